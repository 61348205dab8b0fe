"""What the functions of autojac are given, checked: each error names the argument."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor, nn

from nngeo.descent.aggregation.base import Weighting
from nngeo.layers.models import check_no_shard
from nngeo.linalg.arguments import count

# What turns a Jacobian (m, n) into a vector (n,): an Aggregator, or any function.
Aggregation = Callable[[Tensor], Tensor]


def tensor_list(name: str, given: Iterable[Tensor] | Tensor, *, empty: str | None = None) -> list[Tensor]:
    """The tensors as a list; raises unless they are some. `empty` says what to do where there are none."""
    if isinstance(given, nn.Module):
        raise TypeError(
            f"{name} should be tensors, found a {type(given).__name__}; give its parameters: model.parameters()."
        )
    if not isinstance(given, Iterable):
        raise TypeError(f"{name} should be a tensor or several, found {type(given).__name__}.")
    tensors = [given] if isinstance(given, Tensor) else list(given)
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{i}] should be a tensor, found {type(tensor).__name__}.")
    if not tensors and empty is not None:
        raise ValueError(f"{name} is empty: {empty}")
    return tensors


def differentiated(name: str, given: Iterable[Tensor] | Tensor) -> list[Tensor]:
    """The tensors whose rows a Jacobian has: at least one, none twice, each in a graph."""
    tensors = tensor_list(name, given, empty="give at least one tensor to differentiate.")
    if len({id(t) for t in tensors}) < len(tensors):
        raise ValueError(
            f"{name} has a tensor more than once; give each once, a repeated row is a choice of jac_tensors."
        )
    for i, tensor in enumerate(tensors):
        if not tensor.requires_grad:
            raise ValueError(
                f"{name}[{i}] does not require grad: it was detached, computed under torch.no_grad, or depends on no "
                "parameter. Leave it out, or compute it with gradients."
            )
    return tensors


def wanted(name: str, given: Iterable[Tensor] | Tensor) -> list[Tensor]:
    """The tensors to differentiate by; none is an answer, but not of a generator that was used up."""
    used_up = "was it a generator, such as model.parameters(), that was used up before?"
    tensors = tensor_list(name, given, empty=used_up if isinstance(given, Iterator) else None)
    for i, tensor in enumerate(tensors):
        check_no_shard(f"{name}[{i}]", tensor)
        if not tensor.requires_grad:
            raise ValueError(
                f"{name}[{i}], of shape {tuple(tensor.shape)}, does not require grad. "
                "Leave frozen parameters out: [p for p in model.parameters() if p.requires_grad]."
            )
    return tensors


def receivers(name: str, given: Iterable[Tensor] | Tensor) -> list[Tensor]:
    """The tensors to differentiate by, whose `.jac` or `.grad` is written to; each once."""
    tensors = list({id(t): t for t in wanted(name, given)}.values())
    for i, tensor in enumerate(tensors):
        if not (tensor.is_leaf or tensor.retains_grad):
            raise ValueError(
                f"{name}[{i}], of shape {tuple(tensor.shape)}, is not a leaf, and has no field to write to. "
                "Call its retain_grad() before, or use autojac.jac."
            )
    return tensors


def cotangents(
    name: str, given: Sequence[Tensor] | Tensor | None, of: str, tensors: Sequence[Tensor]
) -> list[Tensor] | None:
    """Jacobians (m, *shape) of something with respect to the tensors, or None for the identity."""
    if given is None:
        for i, tensor in enumerate(tensors):
            if tensor.is_complex():
                raise ValueError(
                    f"{of}[{i}] is complex and has no rows; give {name}, or torch.view_as_real({of}[{i}])."
                )
        if not any(t.numel() for t in tensors):
            raise ValueError(f"{of} have no elements, so that there is no row to differentiate: was the batch empty?")
        return None
    found = tensor_list(name, given)
    _same_length(name, found, of, tensors)
    for i, (cotangent, tensor) in enumerate(zip(found, tensors, strict=True)):
        if cotangent.dim() == 0 or cotangent.shape[1:] != tensor.shape:
            raise ValueError(
                f"{name}[{i}] has shape {tuple(cotangent.shape)}, and should have (m, *shape) with that of {of}[{i}], "
                f"{tuple(tensor.shape)}."
            )
        if len(cotangent) != len(found[0]) or len(cotangent) == 0:
            raise ValueError(
                f"{name}[{i}] has {len(cotangent)} rows and {name}[0] has {len(found[0])}; "
                "all need the same number, at least one."
            )
    return found


def gradients_of(
    name: str, given: Sequence[Tensor] | Tensor | None, of: str, tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients with the shapes of the tensors; ones where the tensors are scalar and none are given."""
    if given is None:
        for i, tensor in enumerate(tensors):
            if tensor.is_complex():
                raise ValueError(f"{of}[{i}] is complex, and can't be minimised; give a real loss, such as its abs().")
            if tensor.dim() > 0:
                raise ValueError(
                    f"{of}[{i}] has shape {tuple(tensor.shape)}, not (): give {name} with the same shapes, "
                    "or reduce it to a scalar."
                )
        return [t.new_ones(()) for t in tensors]
    found = tensor_list(name, given)
    _same_length(name, found, of, tensors)
    for i, (gradient, tensor) in enumerate(zip(found, tensors, strict=True)):
        if gradient.shape != tensor.shape:
            raise ValueError(
                f"{name}[{i}] has shape {tuple(gradient.shape)}, and should have that of {of}[{i}], "
                f"{tuple(tensor.shape)}."
            )
    return found


def chunk_size(parallel_chunk_size: int | None) -> int | None:
    """The number of rows to differentiate together, None for all."""
    return None if parallel_chunk_size is None else count("parallel_chunk_size", parallel_chunk_size)


def one_aggregator(A: Aggregation | None, aggregator: Aggregation | None) -> Aggregation | None:
    """The aggregator given under one of its two names."""
    if A is not None and aggregator is not None:
        raise TypeError("A and aggregator are the same argument; give one of them.")
    name, found = ("A", A) if aggregator is None else ("aggregator", aggregator)
    return None if found is None else an_aggregator(name, found)


def an_aggregator(name: str, found: Aggregation) -> Aggregation:
    """An aggregator, or any function of a Jacobian."""
    if isinstance(found, type):
        raise TypeError(f"{name} is the class {found.__name__}; give an aggregator: {found.__name__}().")
    if isinstance(found, Weighting):
        kind = type(found).__name__
        raise TypeError(
            f"{name} is the weighting {kind}; give an aggregator: {kind.removesuffix('Weighting')}(), or "
            "GramianWeightedAggregator(weighting)."
        )
    if not callable(found):
        raise TypeError(f"{name} should be an aggregator, such as UPGrad(), found {type(found).__name__}.")
    return found


def warn_of_one_loss(tensors: Sequence[Tensor]) -> None:
    """Say that one loss leaves nothing to aggregate."""
    if len(tensors) == 1 and tensors[0].dim() == 0:
        warnings.warn(
            "There is one loss, so that every aggregator gives its gradient, or a multiple. For the losses of the "
            'examples, compute them with reduction="none"; for several tasks, give a list of losses.',
            stacklevel=3,
        )


def _same_length(name: str, found: Sequence[Tensor], of: str, tensors: Sequence[Tensor]) -> None:
    if len(found) != len(tensors):
        raise ValueError(f"{name} should have one tensor for each of {of}, found {len(found)} for {len(tensors)}.")
