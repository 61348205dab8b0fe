"""What is the same for all examples gets a gradient for each where it is added to something that differs.

So it is with position embeddings, and with tokens and tables that a model owns itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nngeo.descent.autogram.graph import Graph, operation
from nngeo.generators.sources import full_precision
from nngeo.layers.collection import Layer
from nngeo.layers.rule import Computed, assemble

_SUMS = {"Add", "Expand", "Unsqueeze", "Squeeze", "View"}


def sums_above(node: Any, graph: Graph, users: Mapping[Any, list[Any]]) -> list[int]:
    """The places of nodes that do nothing with the output of a node but reshape it, or add it to something."""
    found: list[int] = []
    while True:
        uppers = users.get(node, [])
        if len(uppers) != 1 or operation(node := uppers[0]) not in _SUMS or getattr(node, "_saved_alpha", 1) != 1:
            return found
        found.append(graph.nodes.index(node))


def sums_of(layer: Layer, model: nn.Module, graph: Graph, users: Mapping[Any, list[Any]]) -> dict[str, list[int]]:
    """{parameter: places of the sums above it}, if all parameters of a layer on the graph have some; else none."""
    nodes = {local: graph.node_of(model.get_parameter(layer.full_name(local))) for local in layer.shapes}
    found = {local: sums_above(node, graph, users) for local, node in nodes.items() if node is not None}
    return found if all(found.values()) else {}


def spread(g: Tensor, shape: torch.Size, b: int) -> Tensor | None:
    """(k, b, *shape), from the gradient (k, b, ...) at a sum to which a tensor of this shape was broadcast.

    None where the sum has no axis of examples first, or its terms were not broadcast over it.
    """
    missing = g.ndim - 1 - len(shape)
    wide = (*[1] * missing, *shape)
    if missing < 0 or g.shape[1] != b or wide[0] != 1:
        return None
    summed = [axis + 1 for axis, size in enumerate(wide) if axis and size == 1]
    g = g.sum(summed, keepdim=True) if summed else g
    return g.reshape(*g.shape[:2], *shape) if g.shape[2:] == wide[1:] else None


def sum_gradients(layer: Layer, grads: Mapping[str, list[Tensor | None]], b: int, examples: slice) -> Computed:
    """From the gradients (k, ...) at the sums above each parameter, of which the first with examples is right."""
    parts = {}
    for local, found in grads.items():
        apart = [part for g in found if g is not None and (part := spread(g, layer.shapes[local], b)) is not None]
        if not apart:
            raise ValueError("A sum above a parameter has no axis of examples.")
        parts[local] = full_precision(apart[0][:, examples])
    like = next(iter(parts.values()))
    return Computed(lambda: assemble(layer, parts, like.shape[:2], like))
