"""The state in which a model is differentiated twice, and many backward passes through one graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nngeo.generators.batches import Batch
from nngeo.generators.untouched import Snapshot
from nngeo.layers.collection import LayerCollection
from nngeo.layers.kernels import plain_kernels
from nngeo.layers.turn import TURN

# Elements of gradients that one vectorised backward pass may hold: 2**24 are 64 MiB in float32.
BUDGET = 2**24


class Setting:
    """The state of a model in which it is differentiated twice, for the mini-batches of one product."""

    def __init__(self, model: nn.Module, layers: LayerCollection):
        self.model, self.layers = model, layers
        self.parameters = list(layers.parameters(model))
        self._before = Snapshot(model)
        wanted = {id(p) for p in self.parameters}
        self._flags = [(p, id(p) in wanted) for p in model.parameters()]
        self._places: list[tuple[dict[str, Any], str, Tensor, int]] | None = None
        self._tangents: tuple[Tensor, list[Tensor]] | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, the parameters of the layers require gradients and no others do; kernels have second derivatives."""
        with (
            self._before.restored(),
            torch.enable_grad(),
            plain_kernels(self.model),
        ):
            for p, flag in self._flags:
                if p.requires_grad != flag:
                    p.requires_grad_(flag)
            yield

    @contextmanager
    def replaced(self, root: nn.Module, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Inside, a module that calls the model finds these tensors in place of the parameters."""
        if self._places is None:
            index = {id(p): j for j, p in enumerate(self.parameters)}
            found = [
                (module._parameters, name, p) for module in root.modules() for name, p in module._parameters.items()
            ]
            self._places = [(own, name, p, index[id(p)]) for own, name, p in found if p is not None and id(p) in index]
        try:
            for own, name, _, j in self._places:
                own[name] = tensors[j]
            yield
        finally:
            for own, name, p, _ in self._places:
                own[name] = p

    def tangents(self, v: Tensor) -> list[Tensor]:
        """(1, P) -> the tangent of every parameter; kept for the next mini-batch."""
        if self._tangents is None or self._tangents[0] is not v:
            # Dual numbers copy a tangent that has not the memory of its own which its parameter has.
            parts = zip(split_by_parameter(self.layers, v), self.parameters, strict=True)
            with torch.inference_mode(False), torch.no_grad():
                self._tangents = v, [torch.empty_like(p, requires_grad=False).copy_(part[0]) for part, p in parts]
        return self._tangents[1]


@contextmanager
def differentiable(model: nn.Module, layers: LayerCollection) -> Iterator[None]:
    """The setting of a single use."""
    with Setting(model, layers).entered(), quiet():
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of torch about itself."""
    with TURN, warnings.catch_warnings():
        # The first forward-mode derivative of a process warns about torch's own use of torch.jit.
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        # Where torch has no batching rule, the vectorised pass is a loop: as fast as one written here.
        warnings.filterwarnings("ignore", message=".*performance drop", category=UserWarning)
        # Counting multiplications takes global hooks, of which torch warns where models are compiled.
        warnings.filterwarnings("ignore", message=".*global hooks on modules", category=UserWarning)
        yield


def split_by_parameter(layers: LayerCollection, v: Tensor) -> list[Tensor]:
    """(..., P) -> (..., *shape) of every parameter, in order."""
    parts = layers.split(v)
    return [part for name in layers for part in layers.split_layer(name, parts[name]).values()]


def joined(grads: Sequence[Tensor | None], parameters: Sequence[Tensor], m: int) -> Tensor:
    """(m, P), from gradients (m, *shape) by every parameter; None is zero."""
    return torch.cat(
        [p.new_zeros(m, p.numel()) if g is None else g.reshape(m, -1) for g, p in zip(grads, parameters, strict=True)],
        -1,
    )


def has_own_functions(outputs: Tensor) -> bool:
    """Whether a graph holds backward passes written in Python, of which only the first derivative may be right."""
    waiting, seen = [outputs.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        seen.add(node)
        waiting.extend(before for before, _ in node.next_functions)
    return False


class Backward:
    """Gradients by `inputs` for many cotangents at one graph: vectorised, in chunks that fit a budget.

    The first vectorised pass is compared with a plain one, along a combination of all rows. Where torch can't vectorise
    it, or gets something else, the rows are differentiated one by one from then on. The graph is kept.
    """

    def __init__(self) -> None:
        self._vectorized: bool | None = None  # None: not tried

    def __call__(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], elements: int
    ) -> list[Tensor | None]:
        """Gradients (m, *shape) for cotangents (m, *shape), None where an input has no influence.

        Args:
            elements: what one row holds at a time, gradients and results.
        """
        m = len(cotangents[0])
        step = max(1, BUDGET // max(1, elements))
        if step == 1:
            return _stacked([_grad(outputs, inputs, [c[j] for c in cotangents]) for j in range(m)])
        chunks = [[c[j : j + step] for c in cotangents] for j in range(0, m, step)]
        found = [self._chunk(outputs, inputs, chunk) for chunk in chunks]
        return (
            found[0] if len(found) == 1 else [None if p[0] is None else torch.cat(p) for p in zip(*found, strict=True)]
        )

    def _chunk(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> list[Tensor | None]:
        m = len(cotangents[0])
        if m > 1 and self._vectorized is not False:
            try:
                found = _grads(outputs, inputs, cotangents)
                self._vectorized = self._vectorized or _combines(found, outputs, inputs, cotangents)
            except (RuntimeError, NotImplementedError):
                self._vectorized = False  # what is wrong in itself is so row by row, too
            if self._vectorized:
                return list(found)
        return _stacked([_grad(outputs, inputs, [c[j] for c in cotangents]) for j in range(m)])


def _grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    with TURN:  # activation checkpointing runs the model again
        return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, allow_unused=True)


def _grads(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor | None]:
    """The same for many cotangents at once. (`is_grads_batched` is a loop in most operations, torch 2.13.)"""
    unused: list[bool] = []

    def used(*cotangents: Tensor) -> list[Tensor]:
        found = _grad(outputs, inputs, cotangents)
        unused[:] = [g is None for g in found]
        return [g for g in found if g is not None]

    with quiet():
        rows = iter(torch.vmap(used)(*cotangents))
    return [None if nothing else next(rows) for nothing in unused]


def _stacked(rows: list[tuple[Tensor | None, ...]]) -> list[Tensor | None]:
    if len(rows) == 1:
        return [None if part is None else part[None] for part in rows[0]]
    return [None if parts[0] is None else torch.stack(parts) for parts in zip(*rows, strict=True)]


def _combines(
    found: Sequence[Tensor | None], outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> bool:
    """Whether a combination of the rows found is the gradient of that combination of the cotangents."""
    weights = torch.linspace(0.5, 1.5, len(cotangents[0]), dtype=torch.float64, device="cpu")

    def combined(rows: Tensor) -> Tensor:
        return torch.tensordot(weights.to(rows), rows, dims=1)

    plain = _grad(outputs, inputs, [combined(c) for c in cotangents])
    if [p is None for p in plain] != [f is None for f in found]:
        return False
    pairs = [(f, p) for f, p in zip(found, plain, strict=True) if f is not None and p is not None]
    return all((combined(f) - p).norm() <= 10 * torch.finfo(p.dtype).eps ** 0.5 * f.norm() for f, p in pairs)


class Footprint:
    """How many elements the graph of a mini-batch keeps, from that of the first two examples; found once."""

    def __init__(self) -> None:
        self._rate: float | None = None  # elements kept for each element of a batch

    @property
    def known(self) -> bool:
        """Whether it has been found."""
        return self._rate is not None

    def of(self, batch: Batch, model: nn.Module, run: Callable[[Batch], Tensor]) -> int:
        """The number for a batch; `run` is a differentiable function of it. Costs a forward of two examples, once."""
        if self._rate is None:
            two = batch.examples(torch.arange(min(2, batch.size), device="cpu"))
            self._rate = _kept_elements(model, lambda: run(two)) / max(1, _numel(two))
        return int(self._rate * _numel(batch)) + 1


def _numel(batch: Batch) -> int:
    return sum(tensor.numel() for tensor in batch.tensors())


def _kept_elements(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Elements of the tensors, other than parameters, that the graph of a result holds."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        place = x.untyped_storage().data_ptr()
        if place not in own:
            sizes[place] = max(sizes.get(place, 0), x.numel())
        return x.detach()  # held, so that no other tensor gets its place; detached, so that there is no cycle

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            result = run()
    except RuntimeError:  # transforms of torch.func inside do not allow it
        with Made() as made:
            run()
        return made.elements
    return sum(sizes.values()) + result.numel()


class Made(TorchDispatchMode):
    """Counts the elements of everything that is computed while it is active, which is no less than what is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.elements += sum(x.numel() for x in tree_leaves(found) if isinstance(x, Tensor))
        return found
