"""Several tasks on shared features: gradients of every task's own parameters, Jacobians of the shared ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nngeo.descent.autojac import arguments
from nngeo.descent.autojac.graph import below, edge, edges, leaves
from nngeo.descent.autojac.rows import Rows, jacobians, kept_grads


@dataclass(frozen=True)
class Multitask:
    """Losses, the features that they are computed from, and who owns which parameters; checked."""

    losses: list[Tensor]
    features: list[Tensor]
    gradients: list[Tensor]  # of something by every loss
    own: list[list[Tensor]]  # the parameters of every task
    shared: list[Tensor]

    def differentiated(self, retain_graph: bool, chunk: int | None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The tasks' parameters, each once; their gradients; the Jacobians (tasks, *shape) of the shared parameters.

        Gradients of a parameter that several tasks have are summed.
        """
        by_parameter: dict[int, tuple[Tensor, Tensor]] = {}
        by_features: list[Sequence[Tensor]] = []
        with kept_grads([*self.losses, *self.features, *(p for own in self.own for p in own)]):
            for t, retain in enumerate(self._needed_later()):
                found = self._task(t, retain_graph or retain)
                for p, g in zip(self.own[t], found, strict=False):
                    by_parameter[id(p)] = (p, by_parameter[id(p)][1] + g if id(p) in by_parameter else g.clone())
                by_features.append(found[len(self.own[t]) :])
        rows = Rows(self.features, [torch.stack(parts) for parts in zip(*by_features, strict=True)])
        jacobian = jacobians(rows, self.shared, chunk, retain_graph=retain_graph) if self.shared else []
        return [p for p, _ in by_parameter.values()], [g for _, g in by_parameter.values()], jacobian

    def _task(self, t: int, retain_graph: bool) -> list[Tensor]:
        """Gradients of one task by its own parameters and by the features."""
        found = torch.autograd.grad(
            self.losses[t],
            [*self.own[t], *self.features],
            self.gradients[t],
            retain_graph=retain_graph,
            materialize_grads=True,
        )
        return [g.to_dense() for g in found]

    def _needed_later(self) -> list[bool]:
        """For each task, whether its head has nodes in common with a later one, which needs its graph."""
        beyond = {edge(f) for f in self.features}
        heads = [{node for node, _ in edges([edge(loss)], beyond)} for loss in self.losses]
        return [any(head & other for other in heads[t + 1 :]) for t, head in enumerate(heads)]


def multitask(
    tensors: Sequence[Tensor] | Tensor,
    features: Sequence[Tensor] | Tensor,
    grad_tensors: Sequence[Tensor] | Tensor | None,
    tasks_params: Sequence[Iterable[Tensor]] | None,
    shared_params: Iterable[Tensor] | None,
) -> Multitask:
    """The arguments of `mtl_backward`, checked."""
    losses = arguments.differentiated("tensors", tensors)
    reached = arguments.differentiated("features", features)
    _check_features(reached)
    if tasks_params is not None and (isinstance(tasks_params, (Tensor, nn.Module)) or not _is_iterable(tasks_params)):
        found = type(tasks_params).__name__
        raise TypeError(f"tasks_params should be a list with the parameters of every task, found {found}.")
    own = (
        [leaves([loss], reached) for loss in losses]
        if tasks_params is None
        else [_receivers(f"tasks_params[{t}]", params) for t, params in enumerate(tasks_params)]
    )
    if len(own) != len(losses):
        raise ValueError(
            f"tasks_params should have the parameters of each of tensors, found {len(own)} for {len(losses)}; "
            "a task without parameters has an empty list."
        )
    shared = leaves(reached) if shared_params is None else _receivers("shared_params", shared_params)
    for t, params in enumerate(own):
        common = {id(p) for p in params} & {id(p) for p in shared}
        for i, p in enumerate(params):
            if id(p) in common:
                raise ValueError(
                    f"shared_params and tasks_params[{t}] have tensors in common, such as tasks_params[{t}][{i}] of "
                    f"shape {tuple(p.shape)}. A parameter belongs to one of them; if the task uses it beside the "
                    "features, give what it computes there as a feature, too."
                )
    gradients = arguments.gradients_of("grad_tensors", grad_tensors, "tensors", losses)
    return Multitask(losses, reached, gradients, own, shared)


def _receivers(name: str, params: Iterable[Tensor]) -> list[Tensor]:
    given = arguments.tensor_list(name, params)
    return arguments.receivers(name, given) if given else []


def _is_iterable(given: object) -> bool:
    return isinstance(given, Iterable)


def _check_features(features: list[Tensor]) -> None:
    for i, feature in enumerate(features):
        if feature.grad_fn is None:
            raise ValueError(f"features[{i}] is a leaf, so that no shared parameter lies below it. Leave it out.")
    ends = [edge(f) for f in features]
    for i, end in enumerate(ends):
        lower = set(edges(below(end)))
        for j, other in enumerate(ends):
            if other in lower:
                raise ValueError(
                    f"features[{i}] is computed from features[{j}], whose gradient would be counted twice. "
                    "Give only one of them."
                )
