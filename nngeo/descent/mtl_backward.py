"""Multi-task learning in one call: heads by their own gradients, the trunk by an aggregation of all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from nngeo.descent.autojac import arguments
from nngeo.descent.autojac import mtl_backward as accumulate_jacobians
from nngeo.descent.autojac.arguments import Aggregation
from nngeo.descent.autojac.combine import combine
from nngeo.descent.autojac.fields import accumulate_grads
from nngeo.descent.autojac.multitask import multitask
from nngeo.linalg.arguments import flag
from nngeo.linalg.precision import full_precision


@full_precision
def mtl_backward(
    tensors: Sequence[Tensor] | Tensor,
    features: Sequence[Tensor] | Tensor,
    A: Aggregation | None = None,
    tasks_params: Sequence[Iterable[Tensor]] | None = None,
    shared_params: Iterable[Tensor] | None = None,
    retain_graph: bool = False,
    parallel_chunk_size: int | None = None,
    *,
    aggregator: Aggregation | None = None,
    grad_tensors: Sequence[Tensor] | Tensor | None = None,
) -> Tensor | None:
    """The weights (tasks,) with which the gradients of the shared parameters were combined and added to `.grad`.

    None for an aggregator without weights. Each task's own parameters get its gradient. Without an aggregator this is
    `autojac.mtl_backward`, where the arguments are explained: Jacobians of the shared parameters are added to `.jac`.

    Args:
        A: the aggregator, or any function of a matrix (m, n) that returns a vector (n,). `aggregator` is another name.

    >>> import torch
    >>> from nngeo.descent.aggregation.mean import Mean
    >>> w, a, b = (torch.tensor(x, requires_grad=True) for x in (2.0, 3.0, -1.0))
    >>> feature = 5 * w
    >>> mtl_backward([a * feature, b * feature], [feature], Mean())
    tensor([0.5000, 0.5000])
    >>> a.grad, b.grad, w.grad
    (tensor(10.), tensor(10.), tensor(5.))
    """
    combination = arguments.one_aggregator(A, aggregator)
    if combination is None:
        accumulate_jacobians(
            tensors,
            features,
            grad_tensors=grad_tensors,
            tasks_params=tasks_params,
            shared_params=shared_params,
            retain_graph=retain_graph,
            parallel_chunk_size=parallel_chunk_size,
        )
        return None
    chunk = arguments.chunk_size(parallel_chunk_size)
    flag("retain_graph", retain_graph)
    tasks = multitask(tensors, features, grad_tensors, tasks_params, shared_params)
    if not tasks.shared:
        raise ValueError(
            "shared_params is empty, so that there is nothing to aggregate. Use loss.backward() for every task."
        )
    own, gradients, jacobian = tasks.differentiated(retain_graph, chunk)
    found = combine(jacobian, combination)
    accumulate_grads([*own, *tasks.shared], [*gradients, *found.gradients])
    return found.weights
