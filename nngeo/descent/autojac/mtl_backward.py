"""The backward pass of multi-task learning: a shared trunk and a head for each task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from nngeo.descent.autojac import arguments
from nngeo.descent.autojac.fields import accumulate_grads, accumulate_jacs
from nngeo.descent.autojac.multitask import multitask
from nngeo.linalg.arguments import flag
from nngeo.linalg.precision import full_precision


@full_precision
def mtl_backward(
    tensors: Sequence[Tensor] | Tensor,
    /,
    features: Sequence[Tensor] | Tensor,
    *,
    grad_tensors: Sequence[Tensor] | Tensor | None = None,
    tasks_params: Sequence[Iterable[Tensor]] | None = None,
    shared_params: Iterable[Tensor] | None = None,
    retain_graph: bool = False,
    parallel_chunk_size: int | None = None,
) -> None:
    """Adds each task's gradient to the `.grad` of its parameters, and the Jacobian (tasks, *shape) to the `.jac` of
    the shared ones.

    Every head is differentiated once, down to the features; only the trunk below is differentiated for every task.
    Where tasks have parameters in common, their gradients are summed. Nothing is written where something is raised.

    Args:
        tensors: the losses, one for each task.
        features: what the heads take from the trunk. None of them is computed from another.
        grad_tensors: gradients of something by the tensors, needed if these are not scalars.
        tasks_params: the parameters of every task; if None, the leaves of its graph that are reached other than
            through the features.
        shared_params: if None, the leaves below the features.
        retain_graph: keeps the graph for another call.
        parallel_chunk_size: how many tasks to differentiate together in the trunk, all if None; 1 is a plain loop
            without vmap.

    >>> import torch
    >>> w, a, b = (torch.tensor(x, requires_grad=True) for x in (2.0, 3.0, -1.0))
    >>> feature = 5 * w
    >>> mtl_backward([a * feature, b * feature], [feature])
    >>> a.grad, b.grad, w.jac
    (tensor(10.), tensor(10.), tensor([15., -5.]))
    """
    chunk = arguments.chunk_size(parallel_chunk_size)
    flag("retain_graph", retain_graph)
    tasks = multitask(tensors, features, grad_tensors, tasks_params, shared_params)
    own, gradients, jacobian = tasks.differentiated(retain_graph, chunk)
    accumulate_jacs("shared_params", tasks.shared, jacobian)
    accumulate_grads(own, gradients)
