"""The commonest layer of all: a Linear that is called once, on vectors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nngeo.descent.autogram.choices import Choice
from nngeo.descent.autogram.graph import Graph
from nngeo.layers.linear import LinearRule
from nngeo.layers.rule import rule_for


@dataclass(frozen=True)
class Vectors:
    """Inputs x (b, i) and output gradients d (k, b, o), with the products that LayerRecord has, in fewer operations."""

    x: Tensor
    d: Tensor
    bias: bool

    def double(self) -> Vectors:
        """The same numbers in float64."""
        return Vectors(self.x.double(), self.d.double(), self.bias)

    def gram(self, other: Vectors) -> Tensor:
        """(k, b, l, c): `(X X' + 1) * (D D')`."""
        (k, b, _), (m, c, _) = self.d.shape, other.d.shape
        inputs = self.x @ other.x.mT
        if self.bias:
            inputs += 1
        outputs = self.d.flatten(0, 1) @ other.d.flatten(0, 1).mT
        return outputs.view(k, b, m, c).mul_(inputs[None, :, None, :])

    def weighted(self, w: Tensor) -> dict[str, Tensor]:
        """{parameter: (*shape)}, gradients summed over k and b with weights w (k, b): `(w * D)' X`."""
        d = self.d[0] * w[0, :, None] if len(w) == 1 else torch.einsum("kbo,kb->bo", self.d, w)
        found = {"weight": d.mT @ self.x}
        return {**found, "bias": d.sum(0)} if self.bias else found


def place_of_vectors(names: Collection[str], choice: Choice, model: nn.Module, graph: Graph, b: int) -> int | None:
    """Which use of a module gives all gradients by the parameters `names` of a layer as `Vectors`, if one does."""
    places = [j for j, use in enumerate(graph.uses) if use.module in choice.source.hosts]
    if not choice.source.fast or choice.reading != "first" or len(places) != 1 or "weight" not in names:
        return None
    use = graph.uses[places[0]]
    shapes = [*use.call.argument_shapes(), *use.call.returned]
    plain = len(shapes) == 2 and all(shape is not None and len(shape) == 2 and shape[0] == b for shape in shapes)
    vectors = plain and type(rule_for(model.get_submodule(use.module))) is LinearRule and len(choice.source.hosts) == 1
    return places[0] if vectors else None
