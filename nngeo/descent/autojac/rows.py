"""The rows of a Jacobian, differentiated one by one, many at once, or as a weighted sum."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nngeo.descent.autojac.graph import kinds
from nngeo.layers.turn import TURN


@dataclass(frozen=True)
class Rows:
    """Cotangents (m, *shape) of tensors: those given or the identity, tensor after tensor, row-major inside each."""

    tensors: list[Tensor]
    given: list[Tensor] | None = None

    def __len__(self) -> int:
        return sum(t.numel() for t in self.tensors) if self.given is None else len(self.given[0])

    def part(self, start: int, stop: int) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors that the rows [start, stop) differentiate, and their cotangents (stop - start, *shape)."""
        if self.given is not None:
            return self.tensors, [c[start:stop] for c in self.given]
        tensors, cotangents, first = [], [], 0
        for tensor in self.tensors:
            begin, end = max(start, first), min(stop, first + tensor.numel())
            if begin < end:
                cotangent = tensor.new_zeros(stop - start, tensor.numel())
                cotangent[begin - start : end - start, begin - first : end - first].fill_diagonal_(1)
                tensors.append(tensor)
                cotangents.append(cotangent.view(-1, *tensor.shape))
            first += tensor.numel()
        return tensors, cotangents


def jacobians(
    rows: Rows,
    inputs: Sequence[Tensor],
    chunk: int | None,
    *,
    retain_graph: bool,
    create_graph: bool = False,
) -> list[Tensor]:
    """The Jacobians (m, *shape) of the rows by every input, zero where it has no influence; they share no memory.

    `chunk` rows are differentiated together, all if None. They go one by one, without vmap, if it is 1, where vmap
    does not know an operation, and with `create_graph`: the derivative of a vectorised gradient is wrong for some
    layers of torch. The graph is freed with the last chunk.
    """
    m = len(rows)
    if not inputs:
        return []
    if create_graph:
        found = [_filled(plain_gradients(*_row(rows, i), inputs, create_graph=True), inputs) for i in range(m)]
        return [torch.stack(parts) for parts in zip(*found, strict=True)]
    step = min(chunk or m, m)
    if step == 1 or not vectorizes(rows, inputs):
        return _in_chunks(rows, inputs, 1, retain_graph)
    with vectorized():
        if step < m:
            return _in_chunks(rows, inputs, step, retain_graph)
        return _owned(vectorized_gradients(*rows.part(0, m), inputs, retain_graph), inputs, m, rows.given or [])


def weighted_sum(rows: Rows, inputs: Sequence[Tensor], weights: Tensor, retain_graph: bool) -> list[Tensor]:
    """Gradients (*shape) by every input of the rows' sum with weights (m,), from one backward pass."""
    if rows.given is None:
        parts = weights.split([t.numel() for t in rows.tensors])
        cotangents = [w.to(t).view_as(t) for w, t in zip(parts, rows.tensors, strict=True)]
    else:
        cotangents = [torch.tensordot(weights.to(c), c, dims=1) for c in rows.given]
    found = plain_gradients(rows.tensors, cotangents, inputs, retain_graph=retain_graph)
    stacked = [None if g is None else g[None] for g in found]
    return [x[0] for x in _owned(stacked, inputs, 1, cotangents)]


def plain_gradients(
    tensors: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor], **options: bool
) -> list[Tensor | None]:
    """Gradients (*shape) for cotangents (*shape), None where an input has no influence."""
    with kept_grads([*tensors, *inputs]):
        found = torch.autograd.grad(tensors, inputs, cotangents, allow_unused=True, **options)
    return [None if g is None else g.to_dense() for g in found]


def vectorized_gradients(
    tensors: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor], retain_graph: bool
) -> list[Tensor | None]:
    """Gradients (k, *shape) for cotangents (k, *shape) in one pass, None where an input has no influence."""
    used: list[bool] = []

    def pull_back(*row: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(tensors, inputs, row, retain_graph=retain_graph, allow_unused=True)
        used.extend(g is not None for g in found)
        return tuple(g for g in found if g is not None)

    with TURN, kept_grads([*tensors, *inputs]), warnings.catch_warnings():
        # Where torch has no batching rule, the vectorised pass is a loop: as fast as one written here.
        warnings.filterwarnings("ignore", message=".*performance drop", category=UserWarning)
        found = iter(torch.func.vmap(pull_back)(*cotangents))
    return [next(found) if there else None for there in used]


def vectorizes(rows: Rows, inputs: Sequence[Tensor]) -> bool:
    """Whether vmap differentiates the graph, and rightly: tried on two cotangents when its operations are first met.

    Doing it would not tell: a pass that fails has freed half of the graph.
    """
    met = kinds(rows.tensors)
    if met not in _VECTORIZES:
        _VECTORIZES[met] = _two_rows_agree(rows.tensors, inputs)
    return _VECTORIZES[met]


_VECTORIZES: dict[frozenset[str], bool] = {}


@contextmanager
def vectorized() -> Iterator[None]:
    """Adds to what torch raises inside that there is a way without vmap."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"{error}\nThe rows were differentiated together by vmap. parallel_chunk_size=1 does without: "
            "it is needed where a tensor on the way was told to retain_grad(), for instance."
        ) from error


@contextmanager
def kept_grads(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Restores the `.grad` of intermediate tensors on leaving: a backward pass writes to those that retain it."""
    kept = [(t, t.grad) for t in tensors if t.retains_grad]
    try:
        yield
    finally:
        for tensor, grad in kept:
            tensor.grad = grad


def _two_rows_agree(tensors: list[Tensor], inputs: Sequence[Tensor]) -> bool:
    rows = Rows(tensors, [torch.arange(1, 2 * t.numel() + 1).cos().to(t).view(2, *t.shape) for t in tensors])
    plain = [_chunk(rows, i, i + 1, inputs, retain_graph=True) for i in range(2)]
    try:
        both = vectorized_gradients(*rows.part(0, 2), inputs, retain_graph=True)
    except (RuntimeError, NotImplementedError):
        return False  # what is wrong in itself has raised before, row by row

    return all(
        one is None or (many is not None and _close(many[i], one[0]))
        for i in range(2)
        for many, one in zip(both, plain[i], strict=True)
    )


def _close(x: Tensor, y: Tensor) -> bool:
    scale = float(torch.linalg.vector_norm(y.nan_to_num()))
    return torch.allclose(x, y, rtol=0, atol=10 * torch.finfo(y.dtype).eps ** 0.5 * scale, equal_nan=True)


def _in_chunks(rows: Rows, inputs: Sequence[Tensor], step: int, retain_graph: bool) -> list[Tensor]:
    m = len(rows)
    found = [x.new_zeros(m, *x.shape) for x in inputs]
    for start in range(0, m, step):
        stop = min(start + step, m)
        parts = _chunk(rows, start, stop, inputs, retain_graph or stop < m)
        for whole, part in zip(found, parts, strict=True):
            if part is not None:
                whole[start:stop] = part
    return found


def _row(rows: Rows, i: int) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that a row differentiates, and their cotangents (*shape)."""
    tensors, cotangents = rows.part(i, i + 1)
    return tensors, [c[0] for c in cotangents]


def _chunk(rows: Rows, start: int, stop: int, inputs: Sequence[Tensor], retain_graph: bool) -> list[Tensor | None]:
    """Gradients (stop - start, *shape), None where an input has no influence."""
    if stop - start > 1:
        return vectorized_gradients(*rows.part(start, stop), inputs, retain_graph)
    found = plain_gradients(*_row(rows, start), inputs, retain_graph=retain_graph)
    return [None if g is None else g[None] for g in found]


def _filled(found: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def _owned(found: Sequence[Tensor | None], inputs: Sequence[Tensor], m: int, others: Sequence[Tensor]) -> list[Tensor]:
    """Zeros for None; clones of what overlaps itself, another one or `others`: users accumulate into these in place."""
    seen = {x.untyped_storage().data_ptr() for x in others}
    owned = []
    for x, tensor in zip(found, inputs, strict=True):
        if x is None:
            x = tensor.new_zeros(m, *tensor.shape)
        place = x.untyped_storage()
        if place.data_ptr() in seen or place.nbytes() < x.numel() * x.element_size():
            x = x.clone(memory_format=torch.contiguous_format)
        seen.add(x.untyped_storage().data_ptr())
        owned.append(x)
    return owned
