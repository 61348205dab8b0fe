"""Jacobians by parameter and an aggregator, to gradients by parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain

import torch
from torch import Tensor, nn

from nngeo.descent.aggregation.base import GramianWeightedAggregator, WeightedAggregator
from nngeo.descent.autojac.arguments import Aggregation
from nngeo.linalg.gramian import row_gramian

# Numbers of a Jacobian that takes longer to be avoided than to be formed and copied: 4 MiB in float32.
SMALL = 2**20


@dataclass(frozen=True)
class Combination:
    """Gradients (*shape) by parameter, and the weights (m,) of the rows if the aggregator has some."""

    gradients: list[Tensor]
    weights: Tensor | None


@torch.no_grad()
def combine(jacobians: Sequence[Tensor], aggregator: Aggregation) -> Combination:
    """The rows of the Jacobians (m, *shape) combined.

    Jacobians are joined to the matrix (m, n), which copies them, for an aggregator that needs it, and small ones for
    any: that takes fewer calls.
    """
    weigh = weights_from_gramian(aggregator)
    if weigh is not None and sum(x.numel() for x in jacobians) > SMALL:
        weights = weigh(_blank(jacobians[0]) if ignores_values(aggregator) else gramian(jacobians))
        return Combination([torch.tensordot(weights.to(x), x, dims=1) for x in jacobians], as_of(jacobians[0], weights))
    matrices = [as_matrix(x) for x in jacobians]
    joint = torch.cat([x.to(matrices[0].device) for x in matrices], 1)
    if weigh is None:
        vector, found = _called(aggregator, joint)
    else:
        found = as_of(jacobians[0], weigh(joint[:, :0] if ignores_values(aggregator) else row_gramian(joint)))
        vector = found.to(joint) @ joint
    if not isinstance(vector, Tensor):
        raise TypeError(f"The aggregator returned {type(vector).__name__}; it should return a tensor (n,).")
    if vector.shape != joint.shape[1:]:
        raise ValueError(
            f"The aggregator returned the shape {tuple(vector.shape)} for a matrix of shape {tuple(joint.shape)}; "
            f"it should return {tuple(joint.shape[1:])}."
        )
    parts = vector.split([x.shape[1] for x in matrices])
    return Combination([_as_tensor(part, x) for part, x in zip(parts, jacobians, strict=True)], found)


def weights_from_gramian(aggregator: Aggregation) -> Callable[[Tensor], Tensor] | None:
    """What finds the weights (m,) from the Gramian (m, m), or None if the aggregator has to see the Jacobian.

    It has to where it is not known to be `weights(J J') @ J`, and where it has hooks, which may look at the Jacobian.
    """
    if (
        not isinstance(aggregator, WeightedAggregator)
        or type(aggregator).forward is not WeightedAggregator.forward
        or _has_hooks(aggregator)
        or _has_hooks(aggregator.weighting)
    ):
        return None
    if isinstance(aggregator, GramianWeightedAggregator):
        return aggregator.gramian_weighting
    return aggregator.weighting if ignores_values(aggregator) else None


def ignores_values(aggregator: Aggregation) -> bool:
    """Whether the weights are known to depend on the number of rows only."""
    return isinstance(aggregator, WeightedAggregator) and not aggregator.weighting.reads_values


def gramian(jacobians: Sequence[Tensor]) -> Tensor:
    """`J J'` (m, m), summed over the Jacobians (m, *shape) of every parameter; in float64."""
    return reduce(lambda total, x: total + products(x).to(total), jacobians[1:], products(jacobians[0]))


def products(jacobian: Tensor) -> Tensor:
    """Inner products (m, m) of the rows (m, *shape), in float64."""
    return row_gramian(as_matrix(jacobian))


def as_of(tensor: Tensor, weights: Tensor) -> Tensor:
    """Weights in the precision of the rows by a tensor: not less than float32."""
    return weights.to(precision(tensor))


def precision(tensor: Tensor) -> torch.dtype:
    """The dtype of the rows by a tensor: real, not less than float32."""
    return torch.promote_types(tensor.dtype, torch.float32).to_real()


def _blank(jacobian: Tensor) -> Tensor:
    """A matrix (m, 0)."""
    return as_matrix(jacobian[:, None][:, :0])


def as_matrix(jacobian: Tensor) -> Tensor:
    """(m, *shape) -> (m, p): complex numbers as pairs of real ones, half precision as float32."""
    real = torch.view_as_real(jacobian.resolve_conj()) if jacobian.is_complex() else jacobian
    return real.to(torch.promote_types(real.dtype, torch.float32)).reshape(len(jacobian), -1)


def _as_tensor(vector: Tensor, jacobian: Tensor) -> Tensor:
    """(p,) -> (*shape), of what a row is."""
    if jacobian.is_complex():
        # Not view_as_complex: the part of a vector may begin at an odd place.
        vector = torch.complex(*vector.reshape(*jacobian.shape[1:], 2).unbind(-1))
    # A clone: parts of one vector would share memory, and gradients are accumulated in place.
    return vector.reshape(jacobian.shape[1:]).to(jacobian, copy=True)


def _called(aggregator: Aggregation, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """The aggregation, and the weights that it used, as the hooks on it left them."""
    if not isinstance(aggregator, WeightedAggregator):
        return aggregator(matrix), None
    seen: list[Tensor] = []
    handle = aggregator.weighting.register_forward_hook(lambda module, args, weights: seen.append(weights))
    try:
        vector = aggregator(matrix)
    finally:
        handle.remove()
    return vector, seen[-1] if seen else None


def _has_hooks(module: nn.Module) -> bool:
    return any(chain(module._forward_hooks, module._forward_pre_hooks))
