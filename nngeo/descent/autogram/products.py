"""Inner products of the gradients in two records: from factors, also where one weight is used in two ways."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nngeo.generators.record import LayerRecord
from nngeo.layers.rule import Factored, Gradients
from nngeo.linalg.matrixview import MatrixView
from nngeo.linalg.outer import OuterProducts
from nngeo.linalg.selected import SelectedProducts, concatenate

# Of one layer: what selects rows of its weight (an embedding), and what multiplies by it (a head that is tied to it).
Ways = tuple[SelectedProducts, OuterProducts]


def inner_products(x: LayerRecord, y: LayerRecord) -> Tensor:
    """(k, b, l, c), in float64, with nothing computed twice where both are the same."""
    if x.view is not None and x.view == y.view:
        return x.gram(y, torch.float64)
    left = _two_ways(x.parts)
    right = left if y is x else _two_ways(y.parts)
    if left is not None and right is not None and _entries(left, right) <= _dense_entries(x, y):
        (s, o), (other_s, other_o) = left, right
        mixed = _mixed(s, other_o)
        swapped = (mixed if y is x else _mixed(other_s, o)).permute(2, 3, 0, 1)
        return s.gram(other_s, torch.float64) + o.gram(other_o, torch.float64) + mixed + swapped
    rows = x.jacobian().double()
    return torch.einsum("kbp,lcp->kblc", rows, rows if y is x else y.jacobian().double())


def _two_ways(parts: Sequence[Gradients]) -> Ways | None:
    """The parts of a weight (rows, columns) that is tied between an embedding and a Linear."""
    factored = [part for part in parts if isinstance(part, Factored)]
    selecting = [part for part in factored if isinstance(part.products, SelectedProducts)]
    multiplying = [part for part in factored if isinstance(part.products, OuterProducts)]
    if len(factored) != len(parts) or not selecting or not multiplying:
        return None
    (_, o, i), view = multiplying[0].view.shape, multiplying[0].view
    if {part.view for part in selecting} != {MatrixView(1, i, o, False, True)}:
        return None
    if {part.view for part in multiplying} != {view} or view != MatrixView(1, o, i, False):
        return None
    # mypy does not see the types of the products.
    s, m = (concatenate([part.products for part in group]) for group in (selecting, multiplying))  # type: ignore
    return s, m  # type: ignore[return-value]


def _entries(left: Ways, right: Ways) -> int:
    """Of the largest tensors that are formed: pairs of positions."""
    pairs = (
        left[0].index.numel() * right[1].a.shape[1:3].numel() + right[0].index.numel() * left[1].a.shape[1:3].numel()
    )
    return pairs * max(left[0].g.shape[1], right[0].g.shape[1])


def _dense_entries(x: LayerRecord, y: LayerRecord) -> int:
    return sum(record.n_cotangents * record.n_examples for record in (x, y)) * x.layer.numel()


def _mixed(s: SelectedProducts, m: OuterProducts) -> Tensor:
    """(k, b, l, c): `sum_ts d[l, c, s, index[b, t]] <g[k, b, t], x[c, s]>`."""
    b, t = s.index.shape
    selected = m.g[0][..., s.index.flatten()].unflatten(-1, (b, t)) * s.keep
    inputs = torch.einsum("kbto,cso->kbtcs", s.g[0].double(), m.a[0].double())
    return torch.einsum("kbtcs,lcsbt->kblc", inputs, selected.double())
