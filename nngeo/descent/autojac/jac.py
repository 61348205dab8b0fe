"""Jacobians, returned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from nngeo.descent.autojac import arguments
from nngeo.descent.autojac.rows import Rows, jacobians
from nngeo.linalg.arguments import flag
from nngeo.linalg.precision import full_precision


@full_precision
def jac(
    outputs: Sequence[Tensor] | Tensor,
    inputs: Iterable[Tensor] | Tensor,
    *,
    jac_outputs: Sequence[Tensor] | Tensor | None = None,
    retain_graph: bool = False,
    create_graph: bool = False,
    parallel_chunk_size: int | None = None,
) -> tuple[Tensor, ...]:
    """The Jacobians (m, *shape) of all elements of the outputs by every input; zero where an input has no influence.

    The rows are output after output, row-major inside each. No field of any tensor is written.

    Args:
        jac_outputs: Jacobians (m, *shape) of something by every output, in place of the identity: the result is the
            Jacobian of that something, by the chain rule.
        retain_graph: keeps the graph for another call; otherwise it is freed by the last chunk.
        create_graph: makes the result differentiable (and keeps the graph). Rows are then differentiated one by one.
        parallel_chunk_size: how many rows to differentiate together by vmap, all if None. 1 is a plain loop, also
            taken for operations that vmap does not know.

    >>> import torch
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> y = x**2
    >>> jac([y.sum(), y.prod()], x)
    (tensor([[2., 4.],
            [8., 4.]]),)
    """
    chunk = arguments.chunk_size(parallel_chunk_size)
    flag("retain_graph", retain_graph)
    flag("create_graph", create_graph)
    tensors = arguments.differentiated("outputs", outputs)
    rows = Rows(tensors, arguments.cotangents("jac_outputs", jac_outputs, "outputs", tensors))
    by = arguments.wanted("inputs", inputs)
    return tuple(jacobians(rows, by, chunk, retain_graph=retain_graph, create_graph=create_graph))
