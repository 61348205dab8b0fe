"""How the gradients of each layer are read from the calls of modules, for graphs of one structure."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from torch.autograd.graph import GradientEdge

from nngeo.descent.autogram.choices import Choice
from nngeo.descent.autogram.convolutions import place_of_convolution
from nngeo.descent.autogram.graph import Graph
from nngeo.descent.autogram.linears import Product
from nngeo.descent.autogram.objectives import Objectives
from nngeo.descent.autogram.vectors import place_of_vectors
from nngeo.generators.differentiable import Backward
from nngeo.generators.recording import Plan as SweepPlan
from nngeo.generators.sources import Uses
from nngeo.layers.collection import Layer, LayerCollection


@dataclass
class Plan:
    """A choice for every layer with a parameter on the graph."""

    model: nn.Module
    layers: LayerCollection
    uses: dict[str, Uses]
    choices: dict[str, Choice] = field(default_factory=dict)
    routed: bool = False  # whether data may decide which rows a module sees, so that it is verified every time
    pending: set[str] = field(default_factory=set)  # layers without a gradient so far: still to be verified
    rounding: float = 0.0  # what is as good as zero in an entry of a gradient
    sparse: set[str] = field(default_factory=set)  # layers to which autograd gives sparse gradients
    # Which use of a module is the only one, of layers called once: a Linear on vectors, a convolution.
    vectors: dict[str, int] = field(default_factory=dict)
    convolutions: dict[str, int] = field(default_factory=dict)
    products: dict[str, list[Product]] = field(default_factory=dict)  # of layers whose weights are used by functions
    added: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # layer -> parameter -> sums above it
    above: dict[int, list[int]] = field(default_factory=dict)  # use of a module -> places of the sums above it
    to_modules: Backward = field(default_factory=Backward)
    to_parameters: Backward = field(default_factory=Backward)
    hosts: set[str] = field(default_factory=set)  # the modules at whose outputs gradients are needed
    # Names of layers, those together that share what the generic rule finds.
    groups: list[list[str]] = field(default_factory=list)

    def settle(self, graph: Graph, objectives: Objectives) -> None:
        """Take down what all graphs of this structure have in common, once the choices are made."""
        self.hosts = {host for choice in self.choices.values() for host in choice.source.hosts}
        found: dict[Choice | str, list[str]] = {}
        for name, choice in self.choices.items():
            found.setdefault(name if choice.source.fast else choice, []).append(name)
        self.groups = list(found.values())
        self.products = {name: found for name, found in self.products.items() if self.choices[name].in_graph}
        self.added = {name: found for name, found in self.added.items() if self.choices[name].in_sums}
        highest = {host: choice.above for choice in self.choices.values() for host in choice.source.hosts}
        for j, places in list(self.above.items()):
            self.above[j] = places[: highest.get(graph.uses[j].module, 0)]
        for name, choice in self.choices.items():
            place = place_of_vectors(self.layers[name].shapes, choice, self.model, graph, objectives.b)
            if place is not None:
                self.vectors[name] = place
            b = None if objectives.axis is None else objectives.b
            place = place_of_convolution(choice, self.model, graph, b)
            if place is not None:
                self.convolutions[name] = place

    def look_above(self, graph: Graph) -> None:
        """Give the uses of a graph their edges at sums."""
        for j, places in self.above.items():
            edges = {-n: GradientEdge(graph.nodes[place], 0) for n, place in enumerate(places, start=1)}
            graph.uses[j].edges.update(edges)

    def names(self, layer: Layer, host: str) -> dict[str, str]:
        """{parameter's name in the host: its name in the layer}."""
        return SweepPlan(self.uses, {layer.name: self.choices[layer.name].source}).names(layer, host)

    def sharing(self, choice: Choice) -> list[Layer]:
        """The layers with this choice: what the generic rule finds at a module, it finds for all of them."""
        return [self.layers[name] for name, other in self.choices.items() if other == choice]

    def by_rows(self) -> list[Layer]:
        """The layers whose gradients autograd gives, loss by loss."""
        return [self.layers[name] for name, choice in self.choices.items() if choice.by_rows]

    def without_factors(self) -> list[Layer]:
        """The layers whose weighted gradients come from a backward pass: it costs less than their rules."""
        return [self.layers[name] for name, c in self.choices.items() if not c.source.fast or name in self.sparse]
