"""Where the gradients of a layer come from: which modules are watched, and which rule is applied to their calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from nngeo.generators.batches import Batch, Function
from nngeo.generators.outputs import outputs_of
from nngeo.generators.untouched import untouched
from nngeo.generators.watch import Call, Layout, added_layout
from nngeo.layers.collection import Layer, LayerCollection
from nngeo.layers.generic import AnyLayerRule
from nngeo.layers.replace import call_with
from nngeo.layers.rule import Gradients, rule_for

Uses = dict[str, dict[str, str]]  # module name -> {its parameter's name -> the name in the layer}


@dataclass(frozen=True)
class Source:
    """One way to get a layer's gradients.

    `hosts` are the watched modules; none means that the whole function is run again, example by example. With `fast`
    the rules of the hosts' types are used, else the generic rule.
    """

    hosts: tuple[str, ...]
    fast: bool = False
    position_major: bool = False
    added: bool = False
    vectorized: bool = True

    def layout(self, known: Layout) -> Layout:
        """The layout of a tensor, as this source reads it."""
        same = known.position_major == self.position_major
        return known if same else replace(known, position_major=self.position_major)


def uses_of(model: nn.Module, layers: LayerCollection) -> dict[str, Uses]:
    """For every layer the modules that hold its parameters: its own and, for tied parameters, others."""
    owner = {}
    for layer in layers.layers.values():
        for local in layer.shapes:
            owner[id(model.get_parameter(layer.full_name(local)))] = (layer.name, local)
    # A parametrized module is one layer together with the modules that compute its weight.
    whole = {name: any("." in local for local in layers[name].shapes) for name in layers}
    inside = {inner for name in layers if whole[name] for inner in model.get_submodule(name).modules()} - {
        model.get_submodule(name) for name in layers
    }
    found: dict[str, Uses] = {name: {} for name in layers}
    for name, module in model.named_modules():
        for local, p in module.named_parameters(recurse=whole.get(name, False), remove_duplicate=False):
            if id(p) in owner and module not in inside:
                layer_name, in_layer = owner[id(p)]
                found[layer_name].setdefault(name, {})[local] = in_layer
    return found


def candidates(layer: Layer, uses: Uses, model: nn.Module) -> Iterator[Source]:
    """The ways to get a layer's gradients, from the cheapest to the one that always works."""
    hosts = tuple(uses)
    plain = all(local == name for names in uses.values() for local, name in names.items())
    rules = [rule_for(model.get_submodule(host)) for host in hosts]
    ordered = [name for name in ("weight", "bias") if name in layer.shapes] == list(layer.shapes)
    for fast in [True, False] if plain and ordered and all(rules) else [False]:
        yield Source(hosts, fast)
        yield Source(hosts, fast, position_major=True)
        yield Source(hosts, fast, added=True)
    for parent in _ancestors(hosts):
        yield Source((parent,))
        yield Source((parent,), position_major=True)
    yield Source(())


class Chain:
    """The sources of one layer in the order in which they are tried, each of them once.

    A generic one that raises an error is tried again row by row at once; one that differs, after all others.
    """

    def __init__(self, sources: Sequence[Source], first: Source):
        self._sources = list(dict.fromkeys(sources))
        self._begin(first)

    def _begin(self, first: Source) -> None:
        self.source = first
        self._left = self._sources[self._sources.index(replace(first, vectorized=True)) + 1 :]
        self._again: list[Source] = []
        self.was_added = first.added

    def following(self, raised: bool, applies: Callable[[Source], bool]) -> Source | None:
        """The next source, of those that apply; None where all have been tried."""
        if raised and self._by_rows() is not None:
            return self._by_rows()
        again = self._again if raised else [*self._again, *filter(None, [self._by_rows()])]
        return next(filter(applies, self._left), next(iter(again), None))

    def move(self, source: Source, raised: bool) -> Source:
        """Go on to a source that `following` gave."""
        if not raised and (by_rows := self._by_rows()) is not None:
            self._again.append(by_rows)
        if source in self._left:
            self._left = self._left[self._left.index(source) + 1 :]
        self._again = [other for other in self._again if other != source]
        self.source, self.was_added = source, self.was_added or source.added
        return source

    def restart(self) -> Source:
        """Go back to the first source."""
        self._begin(self._sources[0])
        return self.source

    def _by_rows(self) -> Source | None:
        return None if self.source.fast or not self.source.vectorized else replace(self.source, vectorized=False)


def _ancestors(hosts: tuple[str, ...]) -> Iterator[str]:
    """Names of the modules around all hosts, from the smallest to the model."""
    paths = [host.split(".") if host else [] for host in hosts]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    if len(hosts) == 1:
        common = common[:-1]
    for length in range(len(common), -1, -1):
        yield ".".join(common[:length])


class Replay(nn.Module):
    """The user's function as a module, so that the parameters of the model it calls can be replaced."""

    def __init__(self, model: nn.Module, function: Function | None):
        super().__init__()
        self.model, self.function = model, function
        self.training = getattr(model, "training", False)

    def forward(self, content: Any) -> Tensor:
        return outputs_of(Batch(content), self.model, self.function)


@dataclass(frozen=True)
class View:
    """How a source reads the tensors of one call, in a batch of b examples."""

    source: Source
    arguments: list[Layout]
    outputs: list[Layout]
    b: int
    examples: slice = field(default_factory=lambda: slice(None))  # those of the b that are looked at

    def argument(self, call: Call, j: int) -> Tensor:
        """(b, *what one example has)."""
        return self.source.layout(self.arguments[j]).split(call.arguments[j], self.b)[self.examples]

    def gradient(self, call: Call, j: int, g: Tensor) -> Tensor:
        """(k, b, *what one example has)."""
        known, shape = self.outputs[j], call.returned[j]
        added = self.source.added and known.axis is None and shape is not None
        layout = added_layout(shape) if added else self.source.layout(known)  # type: ignore[arg-type]
        if layout.axis is None:
            raise ValueError("The output of a call is the same for all examples, so it has no gradient for each.")
        return layout.split(g, self.b, lead=1)[:, self.examples]


def fast_gradients(
    module: nn.Module, call: Call, view: View, grads: list[Tensor | None], layer: Layer, names: dict[str, str]
) -> Gradients:
    """Gradients from one call by the rule of the module's type."""
    rule, tensors = rule_for(module), call.tensors()
    if rule is None or len(tensors) != 1 or len(grads) != 1 or grads[0] is None:
        raise ValueError("A fast rule serves modules with one tensor as input and one as output.")
    x, g = view.argument(call, tensors[0]), view.gradient(call, 0, grads[0])
    return rule.gradients(module, full_precision(x), full_precision(g), layer, names)


def generic_gradients(
    module: nn.Module, call: Call, view: View, grads: list[Tensor | None], names: list[str]
) -> dict[str, Tensor]:
    """{parameter of the module: (k, b, *shape)} from one call by the generic rule."""
    with_examples = [j for j in call.tensors() if view.arguments[j].axis is not None]

    def forward(parameters: dict[str, Tensor], leaves: list[Tensor]) -> list[Tensor | None]:
        args, kwargs = call.rebuilt(dict(zip(with_examples, leaves, strict=True)))
        return tree_flatten(call_with(module, parameters, args, kwargs))[0]

    xs = [view.argument(call, j) for j in with_examples]
    gs = [None if g is None else view.gradient(call, j, g) for j, g in enumerate(grads)]
    with untouched(module):
        found = AnyLayerRule(module, forward, names, view.source.vectorized).gradients(xs, gs)
    return {name: full_precision(grad) for name, grad in found.items()}


def whole_gradients(replay: Replay, batch: Batch, c: Tensor, source: Source, names: list[str]) -> dict[str, Tensor]:
    """{parameter of the model: (k, b, *shape)} by running the whole function again, for cotangents c (k, b, ...)."""
    b = batch.size
    leaves, structure = tree_flatten(batch.content)
    with_examples = [j for j, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == b]

    def forward(parameters: dict[str, Tensor], parts: list[Tensor]) -> list[Tensor | None]:
        replaced = dict(zip(with_examples, parts, strict=True))
        content = tree_unflatten([replaced.get(j, leaf) for j, leaf in enumerate(leaves)], structure)
        return [call_with(replay, parameters, (content,), {})]

    rule = AnyLayerRule(replay, forward, [f"model.{name}" for name in names], source.vectorized)
    with untouched(replay.model):
        found = rule.gradients([leaves[j].unsqueeze(1) for j in with_examples], [c.unsqueeze(2)])
    return {name.removeprefix("model."): full_precision(grad) for name, grad in found.items()}


def full_precision(tensor: Tensor) -> Tensor:
    """Statistics of half-precision models are accumulated in float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
