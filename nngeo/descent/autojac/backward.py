"""Jacobians, accumulated in the field `.jac`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from nngeo.descent.autojac import arguments
from nngeo.descent.autojac.fields import accumulate_jacs
from nngeo.descent.autojac.graph import leaves
from nngeo.descent.autojac.rows import Rows, jacobians
from nngeo.linalg.arguments import flag
from nngeo.linalg.precision import full_precision


@full_precision
def backward(
    tensors: Sequence[Tensor] | Tensor,
    /,
    *,
    jac_tensors: Sequence[Tensor] | Tensor | None = None,
    inputs: Iterable[Tensor] | Tensor | None = None,
    retain_graph: bool = False,
    parallel_chunk_size: int | None = None,
) -> None:
    """Adds the Jacobian (m, *shape) of all elements of the tensors to the `.jac` of every input.

    The rows are tensor after tensor, row-major inside each. `.jac` is an attribute like any other:
    `optimizer.zero_grad()` leaves it, `jac_to_grad` removes it. Nothing is written where something is raised.

    Args:
        jac_tensors: Jacobians (m, *shape) of something by every tensor, in place of the identity (see `jac`).
        inputs: leaves, or tensors that retain their gradient; all leaves of the graph if None.
        retain_graph: keeps the graph for another call; otherwise it is freed by the last chunk.
        parallel_chunk_size: how many rows to differentiate together by vmap, all if None. 1 is a plain loop, also
            taken for operations that vmap does not know.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> backward([w.sum(), w.prod()])
    >>> w.jac
    tensor([[1., 1.],
            [2., 1.]])
    """
    chunk = arguments.chunk_size(parallel_chunk_size)
    flag("retain_graph", retain_graph)
    of = arguments.differentiated("tensors", tensors)
    rows = Rows(of, arguments.cotangents("jac_tensors", jac_tensors, "tensors", of))
    by = leaves(of) if inputs is None else arguments.receivers("inputs", inputs)
    accumulate_jacs("inputs", by, jacobians(rows, by, chunk, retain_graph=retain_graph))
