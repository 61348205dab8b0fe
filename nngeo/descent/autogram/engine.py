"""The engine: hooks on modules, Gramians of losses, and steps without a second backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nngeo.descent.aggregation.base import Aggregator, GramianWeightedAggregator, RowWeighting, WeightedAggregator
from nngeo.descent.autogram.gramian import Rows, gramian
from nngeo.descent.autogram.hooks import Watcher
from nngeo.descent.autogram.objectives import Objectives
from nngeo.descent.autogram.planner import Planner
from nngeo.descent.autogram.pulled import Pulled
from nngeo.descent.autojac import arguments
from nngeo.generators.sources import candidates, full_precision, uses_of
from nngeo.layers.collection import LayerCollection
from nngeo.layers.models import check_usable
from nngeo.layers.turn import TURN
from nngeo.linalg import precision
from nngeo.linalg.arguments import count


class Engine:
    """Gramians `J J'` of losses, J their Jacobian by the parameters of some modules, without J.

    The engine notes what its modules see while the user runs her own forward pass. One backward pass to the outputs of
    the modules, which computes no gradient by a parameter, then gives the Gramian layer by layer: `(X X' + 1) * (D D')`
    for a Linear with inputs X and output gradients D. Weights tied between modules, modules called several times, and
    parents that use a child's weight are right: for the first graph of each structure a random combination of rows is
    compared with autograd, and a layer that no rule serves is left to autograd, loss by loss, with a warning.

    Args:
        modules: whose parameters span the rows of J; those that require no gradient are left out.
        batch_dim: the axis of the losses that counts examples, if each loss depends on one example only: then one
            backward pass serves all examples. None for losses of the whole batch, at a backward pass for each loss.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0))
    >>> engine = Engine(model, batch_dim=0)
    >>> losses = model(torch.randn(5, 3)).square()
    >>> gramian = engine.compute_gramian(losses)
    >>> gramian.shape
    torch.Size([5, 5])
    >>> losses.backward(gramian.new_full((5,), 0.2))  # any weights found from the Gramian
    """

    def __init__(self, *modules: nn.Module, batch_dim: int | None):
        if not modules or not all(isinstance(module, nn.Module) for module in modules):
            found = ", ".join(type(module).__name__ for module in modules) or "nothing"
            raise TypeError(f"Engine takes modules and batch_dim=, found {found}.")
        if batch_dim is not None and (isinstance(batch_dim, bool) or not isinstance(batch_dim, int)):
            raise TypeError(f"batch_dim should be an axis of the losses, or None, found {batch_dim!r}.")
        self.modules, self.batch_dim = modules, batch_dim
        for module in modules:
            check_usable(module)
        self._model = modules[0] if len(modules) == 1 else nn.ModuleList(modules)
        self._watcher = Watcher()
        self._handles: list[RemovableHandle] = []
        self._finalizer = weakref.finalize(self, _remove, self._handles)
        self._install()

    @overload
    def compute_gramian(
        self, losses: Tensor, other: Tensor | None = ..., /, *, per_layer: Literal[False] = ..., block: int | None = ...
    ) -> Tensor: ...

    @overload
    def compute_gramian(
        self, losses: Tensor, other: Tensor | None = ..., /, *, per_layer: Literal[True], block: int | None = ...
    ) -> dict[str, Tensor]: ...

    @precision.full_precision
    def compute_gramian(
        self, losses: Tensor, other: Tensor | None = None, /, *, per_layer: bool = False, block: int | None = None
    ) -> Tensor | dict[str, Tensor]:
        """`J J'` (m, m) of m losses of any shape, in row-major order; `J1 J2'` (m, l) with other losses.

        In float64, since a Gramian in float32 has lost what its rows differ by. The graph is kept.

        Args:
            other: losses of another forward pass.
            per_layer: return {name of the layer: its part of the sum}.
            block: at most about so many rows are held at a time. Backward passes are run again for each pair of blocks.

        Raises:
            ValueError: losses without a graph, or without an axis of examples; a layer mixes the examples of a batch.
        """
        with TURN, torch.no_grad():
            left = self._rows(losses, block)
            right = left if other is None or other is losses else self._rows(other, block)
            found = gramian(left, right, per_layer=per_layer)
            both = {name: _matrix(tensor, left, right) for name, tensor in found.items()}
        return both if per_layer else both[""]

    @precision.full_precision
    def step(
        self,
        losses: Tensor,
        weighting: Callable[[Tensor], Tensor],
        *,
        others: Iterable[Tensor] = (),
        block: int | None = None,
        retain_graph: bool = False,
    ) -> Tensor:
        """The weights w (m,) that a weighting finds from the Gramian; `J' w` is added to `.grad` of the parameters.

        The same as `losses.backward(w)` after `compute_gramian`, without that backward pass: the gradient by a Linear
        is `(w * D)' X`. Parameters that only the generic rule or autograd serves get theirs from one pass of their own.

        Args:
            weighting: a function of the Gramian, or an aggregator that has one (`gramian_weighting`).
            others: tensors outside of the modules that shall get the gradient of `sum(w * losses)`, too.
            retain_graph: whether the graph is needed once more.
        """
        with TURN, torch.no_grad():
            rows, rest = self._rows(losses, block), arguments.wanted("others", others)
            single = len(rows.passes()) == 1
            later = rows.plan.without_factors() if single else list(rows.plan.layers.layers.values())
            retain = retain_graph or bool(later or rest) or not single
            pulled = rows.pull(rows.passes()[0], retain) if single else None
            matrix = _matrix(gramian(rows, rows, first=pulled)[""], rows, rows)
            w = _weights(weighting, matrix)
            names = [layer.name for layer in rows.plan.layers.layers.values() if layer not in later]
            if pulled is not None:
                self._add_from_factors(pulled, names, rows.objectives.split(w))
            rest += [self._model.get_parameter(layer.full_name(local)) for layer in later for local in layer.shapes]
            if rest:
                cotangent = w.to(losses).view_as(losses)
                grads = torch.autograd.grad(losses, rest, cotangent, retain_graph=retain_graph, allow_unused=True)
                for p, grad in zip(rest, grads, strict=True):
                    # Autograd may give the same memory to several tensors.
                    _accumulate(p, None if grad is None else grad.clone())
        if not retain_graph:
            self._watcher.forget(rows.graph.nodes)
        return w.to(full_precision(losses).dtype)

    def remove(self) -> None:
        """Take the hooks off the modules."""
        self._finalizer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        return Engine(*deepcopy(self.modules, memo), batch_dim=self.batch_dim)

    def __repr__(self) -> str:
        return f"Engine({', '.join(type(module).__name__ for module in self.modules)}, batch_dim={self.batch_dim})"

    @TURN
    def _install(self) -> None:
        _remove(self._handles)
        self._planner = Planner(self._model, self.batch_dim is None, self._watcher)
        self._handles += self._watcher.install(_hosts(self._model))

    def _rows(self, losses: Tensor, block: int | None) -> Rows:
        if block is not None:
            count("block", block)
        objectives = Objectives.of(losses, self.batch_dim)
        if not self._planner.is_current():
            self._install()  # a module was replaced: its next call will be noted
        graph = self._planner.graph(losses)
        return Rows(self._planner.plan(graph, objectives), graph, objectives, self._watcher, block)

    def _add_from_factors(self, pulled: Pulled, names: list[str], w: Tensor) -> None:
        for name in names:
            layer = pulled.plan.layers[name]
            for local, grad in pulled.weighted(name, w).items():
                p = self._model.get_parameter(layer.full_name(local))
                if id(p) in pulled.graph.parameters:
                    _accumulate(p, grad)


def _hosts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules whose calls may give the gradients of some layer."""
    layers = LayerCollection.from_model(model, frozen=True)
    uses = uses_of(model, layers)
    names = {
        host
        for name, layer in layers.layers.items()
        for source in candidates(layer, uses[name], model)
        for host in source.hosts
    }
    return [(name, module) for name, module in model.named_modules() if name in names]


def _matrix(tensor: Tensor, left: Rows, right: Rows) -> Tensor:
    """(k, b, l, c) -> (m, m), in the order of the losses."""
    rows = left.objectives.joined(tensor)
    return right.objectives.joined(rows.permute(1, 2, 0)).mT


def _weights(weighting: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    if isinstance(weighting, type):
        raise TypeError(f"`weighting` is the class {weighting.__name__}; make one of it, {weighting.__name__}().")
    if not callable(weighting):
        found = type(weighting).__name__
        raise TypeError(f"`weighting` should be a weighting, such as UPGradWeighting(), found {found}.")
    w = _of_gramians(weighting)(matrix)
    if not isinstance(w, Tensor) or w.shape != matrix.shape[:1]:
        found = tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__
        raise ValueError(f"`weighting` should give {len(matrix)} weights for a Gramian of that size, found {found}.")
    return w.detach()


def _of_gramians(weighting: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The weighting of an aggregator, which would take a Gramian for a Jacobian."""
    if isinstance(weighting, GramianWeightedAggregator):
        return weighting.gramian_weighting
    inner = weighting.weighting if isinstance(weighting, WeightedAggregator) else weighting
    of_rows = isinstance(inner, RowWeighting) or inner is not weighting
    if isinstance(inner, Aggregator) or (of_rows and getattr(inner, "reads_values", True)):
        raise TypeError(
            f"`weighting` is {type(weighting).__name__}, whose result is not a sum of gradients with weights from "
            "their Gramian. Use nngeo.descent.backward, which forms the Jacobian."
        )
    return inner


def _accumulate(p: Tensor, grad: Tensor | None) -> None:
    if grad is None:
        return
    if p.grad is None:
        p.grad = grad.to(p) if grad.is_sparse else grad.to(p).contiguous()
    else:
        p.grad += grad


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
