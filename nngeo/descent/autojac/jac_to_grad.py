"""From `.jac` to `.grad`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from nngeo.descent.autojac import arguments
from nngeo.descent.autojac.arguments import Aggregation
from nngeo.descent.autojac.combine import combine, weights_from_gramian
from nngeo.descent.autojac.fields import accumulate_grads, clear_jacs, jac_of
from nngeo.linalg.arguments import flag
from nngeo.linalg.precision import full_precision


@full_precision
def jac_to_grad(
    tensors: Iterable[Tensor] | Tensor,
    /,
    aggregator: Aggregation,
    *,
    retain_jac: bool = False,
    optimize_gramian_computation: bool = False,
) -> Tensor | None:
    """The weights (m,) that combined the rows of `.jac` into what was added to `.grad`; None for an aggregator without
    weights.

    An aggregator that is `weights(J J') @ J` gets the Gramian, summed over the tensors; their Jacobians are joined to
    one matrix only for others, which costs a copy. Call it once for each group of parameters that should have weights
    of its own, with an aggregator each where that one is stateful. Nothing is written where something is raised.

    Args:
        retain_jac: keeps `.jac`, which is removed otherwise.
        optimize_gramian_computation: raises where the aggregator has to see the joint matrix.

    >>> import torch
    >>> from nngeo.descent.aggregation.mean import Mean
    >>> from nngeo.descent.autojac import backward
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> backward([w.sum(), w.prod()])
    >>> jac_to_grad([w], Mean())
    tensor([0.5000, 0.5000])
    >>> w.grad
    tensor([1.5000, 1.0000])
    """
    arguments.an_aggregator("aggregator", aggregator)
    flag("retain_jac", retain_jac)
    flag("optimize_gramian_computation", optimize_gramian_computation)
    receivers = arguments.receivers("tensors", tensors)
    if not receivers:
        raise ValueError("tensors is empty, so that there is nothing to aggregate.")
    jacobians: list[Tensor] = []
    for i, tensor in enumerate(receivers):
        jacobian = jac_of(tensor)
        if jacobian is None:
            raise ValueError(
                f"tensors[{i}], of shape {tuple(tensor.shape)}, has no .jac: call autojac.backward or "
                "autojac.mtl_backward before, with it among the inputs."
            )
        if jacobians and len(jacobian) != len(jacobians[0]):
            raise ValueError(
                f"tensors[{i}].jac has {len(jacobian)} rows and tensors[0].jac has {len(jacobians[0])}: they are of "
                "different losses. Call jac_to_grad for each group, or before the next backward."
            )
        jacobians.append(jacobian)
    if optimize_gramian_computation and weights_from_gramian(aggregator) is None:
        raise ValueError(
            "optimize_gramian_computation=True needs an aggregator whose weights come from the Gramian, and no forward "
            f"hooks on it; found {aggregator!r}. Leave the option out."
        )
    found = combine(jacobians, aggregator)
    if not retain_jac:
        clear_jacs(receivers)
    accumulate_grads(receivers, found.gradients)
    return found.weights
