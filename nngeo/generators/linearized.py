"""Jacobian-vector products of the whole model, without layers: forward over a recorded reverse graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from nngeo.generators.batches import Batch, Function
from nngeo.generators.differentiable import (
    BUDGET,
    Backward,
    Footprint,
    Setting,
    differentiable,
    has_own_functions,
    joined,
    quiet,
    split_by_parameter,
)
from nngeo.generators.independence import FirstExamples, check_alone, check_independence
from nngeo.generators.lean import Lean
from nngeo.generators.remembered import Remembered
from nngeo.generators.sources import Replay
from nngeo.generators.truth import has_zeros
from nngeo.layers.collection import LayerCollection

# Elements that one vector leaves in memory from which on many, taken together, are slower than one by one on a CPU.
LARGE = 2**19

# Elements that the graph of mini-batches run at a time may keep: 2**25 are 128 MiB in float32.
KEPT = 2**25


@dataclass(frozen=True)
class Linearized:
    """Outputs (b, ...) of a batch, J v (m, b, ...) for v (m, P), and the pull-back of w (m, b, ...).

    The pull-back is a gradient (m, *shape) by every parameter; None is zero. Where it was made for one vector, `push`
    knows the answer for this one only. `together()` says how many vectors are best taken at a time.
    """

    outputs: Tensor
    push: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor], list[Tensor | None]]
    together: Callable[[], int]


@dataclass
class Facts:
    """What the first mini-batch has shown of a model and a function; remembered for their structure."""

    reads: bool  # whether Python reads values of tensors, so that every mini-batch has to be tested
    forward_mode: bool  # whether forward mode and gradients are of one function
    unused: list[str] = field(default_factory=list)  # parameters that the outputs do not depend on
    push: Backward = field(default_factory=Backward)
    pull: Backward = field(default_factory=Backward)
    footprint: Footprint = field(default_factory=Footprint)


_FACTS: Remembered[Facts] = Remembered()


class Linearizer:
    """Linearizes a model at mini-batches, in the cheapest way in which it can be.

    One vector: by one forward in dual numbers that records the reverse graph, too; `pull` is then one backward. Many
    vectors, or where a kernel of the model has no forward-mode derivative, or another one than its gradient
    (torch.no_grad and `padding_idx` stop gradients, but not tangents: the first mini-batch is tested): by a
    `ReverseGraph`, one forward for all vectors. Without `check` nothing is tested, and it is always that one.
    """

    def __init__(self, model: nn.Module, function: Function | None, layers: LayerCollection, check: bool = True):
        self.model, self.function, self.layers = model, function, layers
        self._replay = Replay(model, function)
        self._apart: dict[tuple, list[bool]] = {}
        # Known when the first mini-batch has been looked at.
        self._facts = None if check else Facts(reads=False, forward_mode=False)

    @property
    def facts(self) -> Facts:
        """What the first mini-batch has shown, which `look_at` has been given."""
        assert self._facts is not None
        return self._facts

    def setting(self) -> Setting:
        """For the mini-batches of one product."""
        return Setting(self.model, self.layers)

    def at(self, batch: Batch, rows: Tensor | None, setting: Setting, pulls: bool = True) -> Linearized:
        """The model at a batch, where J v is going to be asked for the rows v of (m, P), if there are any.

        Without `pulls` nothing is pulled back, so that one vector needs no graph.
        """
        self.look_at(batch)
        if rows is not None and len(rows) == 1 and self.facts.forward_mode:
            found = self._forward(batch, rows, setting, pulls)
            self._check(batch, found.outputs)
            return found
        return self.graph(batch, setting).linearized(setting)

    def graph(self, batch: Batch, setting: Setting) -> ReverseGraph:
        """The graph of a batch, which serves any number of products."""
        self.look_at(batch)
        graph = ReverseGraph(self, batch, setting)
        self._check(batch, graph.outputs)
        return graph

    def _check(self, batch: Batch, outputs: Tensor) -> None:
        if self.facts.reads:
            check_alone(self.model, self.function, batch, outputs, self.apart(batch))

    def look_at(self, batch: Batch) -> None:
        """On the first mini-batch of a structure, test what the model does with a few of its examples.

        Raises:
            ValueError: its examples influence each other, or the outputs are none.
        """
        if self._facts is not None:
            return
        known = _FACTS.of(self.model, self.function, self.layers)
        if (facts := known.get(batch.kind)) is not None:
            self._facts = facts
            return
        with differentiable(self.model, self.layers):
            examples = FirstExamples.of(batch)
            first = check_independence(self.model, self.function, examples)
            own = has_own_functions(first.outputs)
        padded = any(getattr(module, "padding_idx", None) is not None for module in self.model.modules())
        self._facts = Facts(reads=first.reads, forward_mode=False)
        try:
            with quiet():
                self._facts.forward_mode = not padded and self._has_forward_mode(examples.few)
            if own or not self._facts.forward_mode:
                self._check_second_derivatives(examples.few)
        except Exception:
            self._facts = None
            raise
        if not has_zeros(self.model):  # what is behind a parameter that is zero has not been seen
            known[batch.kind] = self._facts

    def load(self, batch: Batch) -> float:
        """What the graph of one example takes of a budget."""
        self.look_at(batch)
        return self.kept(batch) / batch.size / KEPT

    def apart(self, batch: Batch) -> Sequence[bool]:
        """Which leaves of the first batch of this kind had one entry for each example."""
        return self._apart.setdefault(batch.kind, batch.apart())

    def kept(self, batch: Batch) -> int:
        """Elements that the graph of a batch keeps; the first time, it costs a forward of two examples."""
        with nullcontext() if self.facts.footprint.known else differentiable(self.model, self.layers):
            return self.facts.footprint.of(batch, self.model, self.run)

    def run(self, batch: Batch) -> Tensor:
        """The outputs (b, ...), with their graph."""
        return self._replay(batch.content)

    def _has_forward_mode(self, batch: Batch) -> bool:
        """Whether <w, J v> = <J' w, v> for random v and w: forward mode and gradients are of one function."""
        try:
            return self._are_adjoint(batch, lambda v, graph, setting: self._forward(batch, v, setting).push(v))
        except Exception:  # whatever a model raises in a way it was not made for: it has run in the plain one
            return False

    def _check_second_derivatives(self, batch: Batch) -> None:
        """Raise unless the backward passes that the model brings along can be differentiated."""
        try:
            right = self._are_adjoint(batch, lambda v, graph, setting: graph.push(v, setting))
        except (NotImplementedError, RuntimeError):
            return  # those that say so do it again where it matters
        if not right:
            raise NotImplementedError(
                "The model has a backward pass that can't be differentiated (of an autograd.Function?): the second "
                "derivative for it is wrong. Use the matrix without linearize()."
            )

    def _are_adjoint(self, batch: Batch, push: Callable[[Tensor, ReverseGraph, Setting], Tensor]) -> bool:
        generator = torch.Generator("cpu").manual_seed(0)
        like = next(self.layers.parameters(self.model))
        v = torch.randn(1, self.layers.numel(), generator=generator, device="cpu").to(like)
        setting = self.setting()
        graph = ReverseGraph(self, batch, setting)
        w = torch.randn(1, *graph.outputs.shape, generator=generator, device="cpu").to(graph.outputs)
        pushed = push(v, graph, setting)
        # The gradients by the parameters themselves, which the function may hold outside of the model, too.
        grads = graph.pull(w, setting)
        self.facts.unused = [
            name for (name, _), g in zip(self.layers.named_parameters(self.model), grads, strict=True) if g is None
        ]
        pulled = joined(grads, setting.parameters, 1)
        products, others = (w * pushed).double(), (pulled.to(v) * v).double()
        scale = products.norm() + others.norm()
        tolerance = 10 * torch.finfo(graph.outputs.dtype).eps ** 0.5
        return bool((products.sum() - others.sum()).abs() <= tolerance * scale)

    def _forward(self, batch: Batch, rows: Tensor, setting: Setting, pulls: bool = True) -> Linearized:
        tangents = setting.tangents(rows)
        with setting.entered(), forward_ad.dual_level():  # of one level for the process
            with torch._C.DisableTorchFunction():  # whose modes would look at every step
                leaves = [p.detach().requires_grad_(pulls) for p in setting.parameters]
                duals = [forward_ad.make_dual(leaf, tangent) for leaf, tangent in zip(leaves, tangents, strict=True)]
            with Lean(dual=True), setting.replaced(self._replay, duals):
                outputs = self.run(batch)
            outputs, tangent = forward_ad.unpack_dual(outputs)

        def pull(w: Tensor) -> list[Tensor | None]:
            found: list[Tensor | None] = [None] * len(leaves)
            if outputs.requires_grad:
                try:
                    with torch.autocast(outputs.device.type, enabled=False):
                        found = self.facts.pull([outputs], leaves, [w.to(outputs)], 1)
                except CheckpointError:  # activation checkpointing has run the model again, with its own parameters
                    return ReverseGraph(self, batch, setting).pull(w, setting)
            return found

        pushed = (torch.zeros_like(outputs) if tangent is None else tangent).detach()[None]
        return Linearized(outputs.detach(), lambda rows: pushed, pull, lambda: 1)


class ReverseGraph:
    """The graph of w -> J' w at a mini-batch, recorded by one forward; its derivative is v -> J v.

    It serves any number of products, and no forward is run for them, unless the model checkpoints activations. It
    holds what a backward needs and, after the first `push`, the graph of one: two to three times the memory of a
    gradient.
    """

    def __init__(self, linearizer: Linearizer, batch: Batch, setting: Setting):
        self._by, self.size = linearizer, batch.size
        self._leaves = setting.parameters
        self._lean = Lean(dual=False)
        with setting.entered(), self._lean:
            self._outputs = linearizer.run(batch)
        self.outputs = self._outputs.detach()
        self._batch = batch
        self._pulled: tuple[Tensor, tuple[Tensor | None, ...]] | None = None

    def linearized(self, setting: Setting) -> Linearized:
        """Its products, in the setting of one."""
        push, pull = partial(self.push, setting=setting), partial(self.pull, setting=setting)
        return Linearized(self.outputs, push, pull, self.together)

    def together(self) -> int:
        """How many vectors are best taken at a time: one where what it leaves in memory is more than a cache holds."""
        elements = self.elements()
        alone = self.outputs.device.type == "cpu" and elements - self._by.layers.numel() >= LARGE
        return 1 if alone else max(1, BUDGET // elements)

    def elements(self) -> int:
        """What one of many vectors may hold at a time; the first time, it costs a forward of two examples."""
        return self._by.layers.numel() + self._by.kept(self._batch)

    def push(self, rows: Tensor, setting: Setting) -> Tensor:
        """J v (m, b, ...) for each row v of (m, P): a backward through the graph of a backward."""
        m, layers = len(rows), self._by.layers
        nothing = self.outputs.new_zeros(m, *self.outputs.shape)
        if not self._outputs.requires_grad:
            return nothing
        with setting.entered():
            if self._pulled is None:
                w = torch.zeros_like(self._outputs, requires_grad=True)
                with self._lean.transposing():
                    grads = torch.autograd.grad(self._outputs, self._leaves, w, create_graph=True, allow_unused=True)
                self._pulled = w, grads
            w, pulled = self._pulled
            tangents = split_by_parameter(layers, rows.to(self.outputs))
            pairs = [(g, t) for g, t in zip(pulled, tangents, strict=True) if g is not None and g.requires_grad]
            if not pairs:
                return nothing
            elements = self.elements() if m > 1 else 1
            (pushed,) = self._by.facts.push([g for g, _ in pairs], [w], [t for _, t in pairs], elements)
        return nothing if pushed is None else pushed.detach()

    def pull(self, w: Tensor, setting: Setting) -> list[Tensor | None]:
        """J' w for w (m, b, ...), a gradient (m, *shape) by every parameter: a backward."""
        found: list[Tensor | None] = [None] * len(self._leaves)
        if self._outputs.requires_grad:
            with setting.entered():
                elements = self.elements() if len(w) > 1 else 1
                found = self._by.facts.pull([self._outputs], self._leaves, [w.to(self._outputs)], elements)
        return [None if g is None else g.detach() for g in found]
