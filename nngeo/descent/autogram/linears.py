"""Products of a weight with inputs, found in the graph itself: where no Linear is called, but `F.linear` is.

So it is in MultiheadAttention, in a parent that uses a child's weight, in a function around the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nngeo.descent.autogram.graph import Graph, operation
from nngeo.generators.sources import full_precision
from nngeo.generators.watch import Layout
from nngeo.layers.collection import Layer
from nngeo.layers.rule import Factored
from nngeo.linalg.matrixview import MatrixView
from nngeo.linalg.outer import OuterProducts


@dataclass(frozen=True)
class Product:
    """The place of a node that multiplies an input (n, i) by a weight (o, i), and whether the layer's bias is added."""

    place: int
    rows: int  # o
    bias: bool


def products_of(layer: Layer, model: nn.Module, graph: Graph, users: dict[Any, list[Any]]) -> list[Product]:
    """All uses of a layer's weight and bias, if they are such products; else none. `users` are those of each node."""
    shapes = list(layer.shapes.items())
    if not 1 <= len(shapes) <= 2 or len(shapes[0][1]) != 2 or any(shape != shapes[0][1][:1] for _, shape in shapes[1:]):
        return []
    nodes = [graph.node_of(model.get_parameter(layer.full_name(local))) for local, _ in shapes]
    if nodes[0] is None:
        return []
    found = _multiplied(nodes[0], users)
    added = _added(nodes[1], users, found) if found and len(nodes) == 2 and nodes[1] is not None else []
    if found is None or added is None:
        return []
    return [Product(graph.nodes.index(node), shapes[0][1][0], node in added) for node in found]


def saved_input(node: Any) -> Tensor:
    """(n, i), what autograd keeps of a product for the gradient by the weight."""
    return node._saved_self if operation(node) == "Mm" else node._saved_mat1


def product_gradients(
    layer: Layer, products: Sequence[tuple[Product, Tensor, Tensor]], b: int, position_major: bool, examples: slice
) -> list[Factored]:
    """From inputs (b t, i) and gradients (k, b t, o) of products; with `position_major`, (t b, i)."""
    (rows, columns), bias = next(iter(layer.shapes.values())), len(layer.shapes) == 2
    view, parts = MatrixView(1, rows, columns, bias), []
    for product, x, g in products:
        if len(x) % b:
            raise ValueError("The rows of a product can't be divided among the examples.")
        layout = Layout(0, position_major, entries=len(x) // b)
        a = full_precision(layout.split(x, b)[examples])
        a = F.pad(a, (0, 1), value=float(product.bias)) if bias else a
        d = full_precision(layout.split(g, b, lead=1)[:, examples])
        parts.append(Factored(view, OuterProducts(a[None], d[None])))
    return parts


_WEIGHT_AT = {"Mm": 1, "Addmm": 2}  # among the operands of a product


def _multiplied(weight: Any, users: dict[Any, list[Any]]) -> list[Any] | None:
    """The products with the transposed weight; None if it is used in another way."""
    found = []
    for transposed in _cast(weight, users):
        if operation(transposed) not in ("T", "Transpose", "Permute"):
            return None
        for node in users.get(transposed, ()):
            at = _WEIGHT_AT.get(operation(node))
            if at is None or node.next_functions[at][0] is not transposed or not _is_plain(node):
                return None
            found.append(node)
    return found


def _added(bias: Any, users: dict[Any, list[Any]], products: Sequence[Any]) -> list[Any] | None:
    """The products to which the bias is added; None if it is used in another way."""
    found = []
    for node in _cast(bias, users):
        product = node if operation(node) == "Addmm" else _reshaped(node) if operation(node) == "Add" else None
        if product not in products or not _is_plain(node):
            return None
        found.append(product)
    return found


def _cast(node: Any, users: dict[Any, list[Any]]) -> list[Any]:
    """The users of a parameter, and of its copies in other precision."""
    found: list[Any] = []
    for user in users.get(node, ()):
        found += users.get(user, ()) if operation(user) == "ToCopy" else [user]
    return found


def _reshaped(add: Any) -> Any:
    """What a bias is added to, before it was reshaped."""
    node = add.next_functions[0][0]
    while node is not None and operation(node) in ("View", "UnsafeView"):
        node = node.next_functions[0][0]
    return node


def _is_plain(node: Any) -> bool:
    return getattr(node, "_saved_alpha", 1) == 1 and getattr(node, "_saved_beta", 1) == 1
