"""The backward pass of an iteration of Jacobian descent, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nngeo.descent.aggregation.base import Aggregator
from nngeo.descent.autojac import arguments, onepass
from nngeo.descent.autojac import backward as accumulate_jacobians
from nngeo.descent.autojac import combine as combining
from nngeo.descent.autojac.arguments import Aggregation
from nngeo.descent.autojac.combine import (
    Combination,
    as_of,
    combine,
    ignores_values,
    precision,
    weights_from_gramian,
)
from nngeo.descent.autojac.fields import accumulate_grads
from nngeo.descent.autojac.graph import leaves
from nngeo.descent.autojac.rows import Rows, jacobians, vectorized, vectorizes, weighted_sum
from nngeo.linalg.arguments import flag
from nngeo.linalg.precision import full_precision

# Up to this many rows their Jacobian is kept, to be combined; above, another backward pass takes less memory, if it is
# not small.
KEPT_ROWS = 8


@full_precision
def backward(
    tensors: Sequence[Tensor] | Tensor,
    inputs: Iterable[Tensor] | Tensor | None = None,
    A: Aggregation | None = None,
    retain_graph: bool = False,
    parallel_chunk_size: int | None = None,
    *,
    aggregator: Aggregation | None = None,
    jac_tensors: Sequence[Tensor] | Tensor | None = None,
) -> Tensor | None:
    """The weights (m,) with which the gradients of all elements of the tensors were combined and added to `.grad`.

    None for an aggregator without weights. `backward(losses, A)` and `backward(losses, A, parameters)` are understood,
    too. Without an aggregator this is `autojac.backward`: Jacobians are added to `.jac`. Nothing is written where
    something is raised.

    What the aggregator needs decides the cost. With P parameters, the largest of p elements:

    - the number of rows only (Mean, Sum, Constant, Random): one backward pass of the weighted sum;
    - the Gramian, m > 8 rows and m P > 2^20: one vectorised pass that adds up inner products and holds m p numbers,
      then one backward pass of the weighted sum;
    - the Gramian, fewer, with a chunk size, or where vmap does not know an operation: the Jacobians by parameter, m P
      numbers, which are then combined;
    - the Jacobian: those, joined to one matrix: 2 m P numbers.

    For one loss per example `autogram.Engine` needs none of these.

    Args:
        inputs: leaves, or tensors that retain their gradient; all leaves of the graph if None.
        A: the aggregator, or any function of a matrix (m, n) that returns a vector (n,). `aggregator` is another name.
        retain_graph: keeps the graph for another call; otherwise it is freed.
        parallel_chunk_size: how many rows to differentiate together by vmap, all if None; 1 is a plain loop.
        jac_tensors: Jacobians (m, *shape) of something by every tensor, in place of the identity (see `autojac.jac`).

    >>> from nngeo.descent.aggregation.mean import Mean
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> backward([w.sum(), w.prod()], [w], Mean())
    tensor([0.5000, 0.5000])
    >>> w.grad
    tensor([1.5000, 1.0000])
    """
    if isinstance(inputs, Aggregator) or (isinstance(inputs, type) and issubclass(inputs, Aggregator)):
        inputs, A = A, inputs  # type: ignore[assignment]
    combination = arguments.one_aggregator(A, aggregator)
    if combination is None:
        accumulate_jacobians(
            tensors,
            jac_tensors=jac_tensors,
            inputs=inputs,
            retain_graph=retain_graph,
            parallel_chunk_size=parallel_chunk_size,
        )
        return None
    chunk = arguments.chunk_size(parallel_chunk_size)
    flag("retain_graph", retain_graph)
    of = arguments.differentiated("tensors", tensors)
    rows = Rows(of, arguments.cotangents("jac_tensors", jac_tensors, "tensors", of))
    by = leaves(of) if inputs is None else arguments.receivers("inputs", inputs)
    if not by:
        raise ValueError("inputs is empty, so that there is nothing to aggregate.")
    if jac_tensors is None:
        arguments.warn_of_one_loss(of)
    found = _combined(rows, by, combination, chunk, retain_graph)
    accumulate_grads(by, found.gradients)
    return found.weights


@torch.no_grad()
def _combined(
    rows: Rows, inputs: list[Tensor], aggregator: Aggregation, chunk: int | None, retain_graph: bool
) -> Combination:
    weigh = weights_from_gramian(aggregator)
    m = len(rows)
    if weigh is not None and ignores_values(aggregator):
        weights = weigh(torch.empty(m, 0, dtype=precision(inputs[0]), device=rows.tensors[0].device))
        return Combination(weighted_sum(rows, inputs, weights, retain_graph), as_of(inputs[0], weights))
    streams = (chunk or m) >= m > KEPT_ROWS and m * sum(x.numel() for x in inputs) > combining.SMALL
    if weigh is not None and streams and vectorizes(rows, inputs):
        with vectorized():
            weights = weigh(onepass.streamed_gramian(rows, inputs))
            return Combination(weighted_sum(rows, inputs, weights, retain_graph), as_of(inputs[0], weights))
    return combine(jacobians(rows, inputs, chunk, retain_graph=retain_graph), aggregator)
