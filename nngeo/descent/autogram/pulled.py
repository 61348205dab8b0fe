"""What backward passes from the losses leave at the modules, and the gradients of each loss by the layers from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from nngeo.descent.autogram.choices import Choice
from nngeo.descent.autogram.convolutions import weighted_convolution
from nngeo.descent.autogram.graph import Graph, Use
from nngeo.descent.autogram.hooks import Watcher
from nngeo.descent.autogram.linears import Product, product_gradients, saved_input
from nngeo.descent.autogram.objectives import Objectives
from nngeo.descent.autogram.plan import Plan
from nngeo.descent.autogram.sums import spread, sum_gradients
from nngeo.descent.autogram.vectors import Vectors
from nngeo.descent.autogram.weighted import weighted
from nngeo.generators.differentiable import Backward
from nngeo.generators.record import LayerRecord
from nngeo.generators.sources import fast_gradients, full_precision, generic_gradients
from nngeo.layers.collection import Layer
from nngeo.layers.rule import Computed, Gradients, assemble

ALL = slice(None)


class Pulled:
    """Gradients at the outputs of modules for k cotangents, each of which reaches all examples.

    `record` makes a layer's gradients from them, for the examples asked for. Losses of other examples have no influence
    on what an example leaves at a module, so that one pass serves them all.
    """

    def __init__(self, plan: Plan, graph: Graph, objectives: Objectives, watcher: Watcher, some: slice = ALL):
        self.plan, self.graph, self.objectives, self.watcher, self.some = plan, graph, objectives, watcher, some
        self.like = full_precision(objectives.losses.detach())
        self.shared: dict[Any, Callable[[], dict[str, Tensor]]] = {}

    def pull(self, cotangents: Tensor | None, hosts: Collection[str], retain: bool) -> Pulled:
        """Run the backward passes for cotangents (k, *losses); None: one that is 1 at every loss."""
        uses = [use for use in self.graph.uses if use.module in hosts]
        # A backward pass that frees the graph frees the inputs that it saved.
        products = {product.place: self.graph.nodes[product.place] for product in self._products()}
        self.inputs = {place: saved_input(node) for place, node in products.items()}
        edges = list(dict.fromkeys(edge for use in uses for edge in use.edges.values()))
        places = [*products, *(j for sums in self.plan.added.values() for found in sums.values() for j in found)]
        edges += [edge for j in dict.fromkeys(places) if (edge := GradientEdge(self.graph.nodes[j], 0)) not in edges]
        losses = self.objectives.losses
        self.k = 1 if cotangents is None else len(cotangents)
        if not edges:
            found: list[Tensor | None] = []
        elif cotangents is None:
            ones = torch.ones_like(losses)
            one = torch.autograd.grad(losses, edges, ones, retain_graph=retain, allow_unused=True)
            found = [None if g is None else g[None] for g in one]
        else:
            elements = sum(_numel(use) for use in uses)
            found = _many(self.plan.to_modules, losses, edges, cotangents, elements)
        self.by_edge = by_edge = dict(zip(edges, found, strict=True))
        self.grads: dict[str, list[tuple[Use, list[Tensor | None]]]] = {host: [] for host in hosts}
        for use in uses:
            grads = [_at(leaf, use, by_edge) for leaf in range(len(use.call.returned))]
            if any(g is not None for g in grads):
                self.grads[use.module].append((use, grads))
        return self

    def record(self, name: str, examples: slice = ALL) -> LayerRecord:
        """The gradients of one layer, (k, examples, p)."""
        layer, b = self.plan.layers[name], len(range(self.objectives.b)[examples])
        return LayerRecord(layer, self._parts(layer, examples), b, self.k, True, self.like)

    def vectors(self, name: str, examples: slice = ALL) -> Vectors | None:
        """The same, of a Linear that was called once, on vectors; else None."""
        found = self._only(self.plan.vectors.get(name))
        if found is None:
            return None
        (x, d), bias = found, "bias" in self.plan.layers[name].shapes
        return Vectors(full_precision(x)[examples], full_precision(d)[:, examples], bias)

    def weighted(self, name: str, w: Tensor) -> dict[str, Tensor]:
        """{parameter: (*shape)}, a layer's gradients summed over k and b with weights w (k, b)."""
        vectors, w = self.vectors(name), w.to(self.like)
        if vectors is not None:
            return vectors.weighted(w)
        found = self._only(self.plan.convolutions.get(name))
        if found is not None:
            layer = self.plan.layers[name]
            return weighted_convolution(self.plan.model.get_submodule(name), *found, w, layer.shapes)
        return weighted(self.record(name), w)

    def _only(self, place: int | None) -> tuple[Tensor, Tensor] | None:
        """The input of a use of a module, and the gradients (k, *shape) at its output, if there are any."""
        if place is None:
            return None
        use = self.graph.uses[place]
        for other, (g, *_) in self.grads[use.module]:
            if other is use and g is not None:
                use.call.check_unchanged(use.module)
                return use.call.arguments[0], g
        return None

    def forget(self, examples: slice) -> None:
        """Drop the gradients that several layers share, of these examples."""
        self.shared = {key: found for key, found in self.shared.items() if key[-1] != examples.start}

    def _parts(self, layer: Layer, examples: slice) -> list[Gradients]:
        choice = self.plan.choices[layer.name]
        if choice.by_rows:
            found = self.shared.setdefault(("rows", examples.start), cache(partial(self._rows, examples)))
            return [Computed(lambda: found()[layer.name])]
        if choice.in_sums:
            sums = {local: [self._at(j) for j in places] for local, places in self.plan.added[layer.name].items()}
            return [sum_gradients(layer, sums, self.objectives.b, examples)]
        if choice.in_graph:
            products = self.plan.products[layer.name]
            triples = [(product, self.inputs[product.place], self._at_product(product)) for product in products]
            major = choice.source.position_major
            return [*product_gradients(layer, triples, self.objectives.b, major, examples)]
        parts: list[Gradients] = []
        for host in choice.source.hosts:
            for j, (use, grads) in enumerate(self.grads.get(host, ())):
                view, call = choice.view(use, self.objectives.b, examples), use.call
                call.check_unchanged(host)
                module, names = self.plan.model.get_submodule(host), self.plan.names(layer, host)
                if choice.above:
                    grads = [self._above(use, choice.above)]
                if choice.source.fast:
                    parts.append(fast_gradients(module, call, view, grads, layer, names))
                    continue
                wanted = self._wanted(choice, host)
                compute = partial(self._generic, module, call, view, grads, wanted)
                found = self.shared.setdefault((host, j, choice, *wanted, examples.start), cache(compute))
                parts.append(_picked(layer, names, found))
        return parts

    def _products(self) -> list[Product]:
        return [product for found in self.plan.products.values() for product in found]

    def _at_product(self, product: Product) -> Tensor:
        """The gradients (k, n, o) at a product."""
        g = self._at(product.place)
        return self.like.new_zeros(self.k, len(self.inputs[product.place]), product.rows) if g is None else g

    def _at(self, place: int) -> Tensor | None:
        """The gradient (k, ...) at the output of a node."""
        return self.by_edge[GradientEdge(self.graph.nodes[place], 0)]

    def _above(self, use: Use, n: int) -> Tensor:
        """The gradient at the output of a use, for each example, from the n-th sum above it."""
        g, shape = self.by_edge[use.edges[-n]], use.call.returned[0]
        found = None if g is None or shape is None else spread(g, shape, self.objectives.b)
        if found is None or shape is None:
            raise ValueError("The sum above the output of a call has no axis of examples.")
        return found[:, :, 0] if shape[0] == 1 else found

    def _wanted(self, choice: Choice, host: str) -> list[str]:
        return [name for layer in self.plan.sharing(choice) for name in self.plan.names(layer, host)]

    def _generic(self, *args: Any) -> dict[str, Tensor]:
        with self.watcher.pause(), random_state_kept(), slow_vmap_accepted():
            return generic_gradients(*args)

    def _rows(self, examples: slice) -> dict[str, Tensor]:
        """{layer: (k, b, p)}, by a backward pass for each row."""
        layers = self.plan.by_rows()
        parameters = {
            layer.full_name(local): self.plan.model.get_parameter(layer.full_name(local))
            for layer in layers
            for local in layer.shapes
        }
        there = {name: p for name, p in parameters.items() if id(p) in self.graph.parameters}
        rows, elements = self.objectives.rows(self.some, examples), sum(p.numel() for p in there.values())
        found = _many(self.plan.to_parameters, self.objectives.losses, list(there.values()), rows, elements)
        lead = (self.k, len(rows) // self.k)
        grads = {name: full_precision(g.to_dense()) for name, g in zip(there, found, strict=True) if g is not None}
        return {
            layer.name: assemble(
                layer,
                {local: grads[full] for local in layer.shapes if (full := layer.full_name(local)) in grads},
                lead,
                self.like,
            )
            for layer in layers
        }


def random_state_kept() -> Any:
    """Random numbers drawn inside are not missed outside."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return torch.random.fork_rng(devices)


@contextmanager
def slow_vmap_accepted() -> Iterator[None]:
    """Where torch has no batching rule, a vectorised pass is a loop: as fast as one written here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*performance drop", category=UserWarning)
        yield


def _picked(layer: Layer, names: dict[str, str], compute: Callable[[], dict[str, Tensor]]) -> Gradients:
    """A layer's gradients among those by all parameters wanted from a module."""

    def dense() -> Tensor:
        found = compute()
        like = next(iter(found.values()))
        return assemble(layer, {names[name]: found[name] for name in names}, like.shape[:2], like)

    return Computed(dense)


def _at(leaf: int, use: Use, by_edge: dict[GradientEdge, Tensor | None]) -> Tensor | None:
    g = by_edge[use.edges[leaf]] if leaf in use.edges else None
    shape = use.call.returned[leaf]
    return None if g is None or shape is None else g.reshape(len(g), *shape)


def _numel(use: Use) -> int:
    return sum(shape.numel() for shape in use.call.returned if shape is not None)


def _many(
    backward: Backward, losses: Tensor, inputs: Sequence[Any], cotangents: Tensor, elements: int
) -> list[Tensor | None]:
    if not inputs:
        return []
    with slow_vmap_accepted():
        return backward([losses], inputs, [cotangents], elements)
