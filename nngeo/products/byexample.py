"""Sums over the gradients of one layer, example by example, from their factors where it has any."""

from __future__ import annotations

from functools import reduce, singledispatch

import torch
from torch import Tensor

from nngeo.generators.record import LayerRecord
from nngeo.linalg.outer import BUDGET, OuterProducts
from nngeo.linalg.selected import SelectedProducts

Products = OuterProducts | SelectedProducts


def write_squares(record: LayerRecord, out: Tensor, add: bool) -> None:
    """Write to out (b, p), or add to it, the gradients squared and summed over k."""
    if record.view is None:
        found = record.jacobian().square_().sum(0)
    else:
        f, view = record.factors(), record.view
        if isinstance(f, OuterProducts) and f.g.shape[3] == 1 and (parts := view.parts(out)):
            _write_single(f, *parts, add)
            return
        found = view.to_flat(_squares(f))
    if add:
        out += found
    else:
        out.copy_(found)


def total(record: LayerRecord) -> Tensor:
    """(p,), the sum of the gradients over k and the examples."""
    if record.view is None:
        return record.jacobian().sum((0, 1))
    f = record.factors()
    return record.view.to_flat(f.combine(f.g.new_ones(f.g.shape[1:3])))


def norms(record: LayerRecord) -> Tensor:
    """(k, b), the squared lengths of the gradients."""
    if record.view is None:
        return record.jacobian().square_().sum(-1)
    return _norms(record.factors())


def kernel(record: LayerRecord, other: LayerRecord) -> Tensor:
    """(b, k, l), inner products of the gradients of each example with those of the same one in another record."""
    if record.view is None or record.view != other.view:
        return torch.einsum("kbp,lbp->bkl", record.jacobian(), other.jacobian())
    return _kernel(record.factors(), other.factors())


def _write_single(f: OuterProducts, weight: Tensor, bias: Tensor | None, add: bool) -> None:
    """At one position: squares of products are products of squares, and the sum over k comes first."""
    g, a = f.g[..., 0, :].square().sum(1).transpose(0, 1), f.a[..., 0, :].square().transpose(0, 1)
    pairs = [(weight, g[..., None], a[..., None, : weight.shape[-1]])]
    pairs += [] if bias is None else [(bias, g, a[..., -1:])]
    for out, x, y in pairs:
        if add:
            out.addcmul_(x, y)
        else:
            torch.mul(x, y, out=out)


@singledispatch
def _squares(f: Products) -> Tensor:
    """(b, n, o, i), summed over k."""
    raise NotImplementedError


@_squares.register
def _(f: OuterProducts) -> Tensor:
    n, k, b, _, o = f.g.shape
    a, step = f.a, max(1, BUDGET // max(1, n * b * o * f.i))
    parts = (OuterProducts(a, f.g[:, start : start + step]).dense() for start in range(0, k, step))
    return reduce(torch.add, (part.square_().sum(0) for part in parts))


@_squares.register
def _(f: SelectedProducts) -> Tensor:
    same = (f.index[:, :, None] == f.index[:, None, :]).to(f.g.dtype)
    first = (same.tril(-1).sum(-1) == 0) & f.keep  # the first position of its example to select this feature
    total = (same @ (f.g[0] * f.keep[..., None])).square_().sum(0) * first[..., None]  # (b, t, o)
    out = total.new_zeros(len(total), f.size, total.shape[-1])
    return out.scatter_add_(1, f.index[..., None].expand_as(total), total).mT[:, None]


@singledispatch
def _norms(f: Products) -> Tensor:
    raise NotImplementedError


@_norms.register
def _(f: OuterProducts) -> Tensor:
    n, k, b, t, o = f.g.shape
    a, i = f.a, f.i
    if t == 1:
        return (f.g[..., 0, :].square().sum(-1) * a[:, None, :, 0].square().sum(-1)).sum(0)
    if t * (i + k * o) < k * o * i and t * t * n * b * k < BUDGET:
        inputs, outputs = a @ a.mT, f.g @ f.g.mT
        return (outputs * inputs[:, None]).sum((0, 3, 4))
    return torch.cat([part.square_().sum((2, 3, 4)) for part in _dense(f)])


@_norms.register
def _(f: SelectedProducts) -> Tensor:
    same = (f.index[:, :, None] == f.index[:, None, :]).to(f.g.dtype)
    g = f.g[0] * f.keep[..., None]
    return ((same @ g) * g).sum((-1, -2))


def _dense(f: OuterProducts) -> list[Tensor]:
    """(k, b, n, o, i), in parts of k."""
    n, k, b, _, o = f.g.shape
    a, step = f.a, max(1, BUDGET // max(1, n * b * o * f.i))
    return [OuterProducts(a, f.g[:, start : start + step]).dense() for start in range(0, k, step)]


@singledispatch
def _kernel(f: Products, other: Products) -> Tensor:
    raise NotImplementedError


@_kernel.register
def _(f: OuterProducts, other: OuterProducts) -> Tensor:
    n, k, b, t, o = f.g.shape
    s, i = other.g.shape[3], f.i
    c = len(other.g[0])
    ghost, dense = t * s * (i + k * c * o), (k * t + c * s) * o * i + k * c * o * i
    if t * s == 1 or (ghost < dense and n * b * k * c * t * s < BUDGET):
        inputs = f.a @ other.a.mT  # (n, b, t, s)
        if t * s == 1:
            outputs = torch.einsum("nkbo,nlbo->nbkl", f.g[..., 0, :], other.g[..., 0, :])
            return (outputs * inputs).sum(0)
        outputs = torch.einsum("nkbto,nlbso->nbtskl", f.g, other.g)
        return torch.einsum("nbts,nbtskl->bkl", inputs, outputs)
    step = max(1, BUDGET // max(1, n * o * i * (k + c)))
    left = OuterProducts(f.a, f.g)
    right = left if other is f else OuterProducts(other.a, other.g)
    return torch.cat([_dense_kernel(left, right, slice(e, e + step)) for e in range(0, b, step)])


def _dense_kernel(f: OuterProducts, other: OuterProducts, rows: slice) -> Tensor:
    """(b, k, l), of some of the examples."""
    left = OuterProducts(f.a[:, rows], f.g[:, :, rows]).dense().flatten(2)
    right = left if other is f else OuterProducts(other.a[:, rows], other.g[:, :, rows]).dense().flatten(2)
    return left.transpose(0, 1) @ right.permute(1, 2, 0)


@_kernel.register
def _(f: SelectedProducts, other: SelectedProducts) -> Tensor:
    same = (f.index[:, :, None] == other.index[:, None, :]).to(f.g.dtype)  # (b, t, s)
    g, h = f.g[0] * f.keep[..., None], other.g[0] * other.keep[..., None]
    return torch.einsum("kbto,lbto->bkl", g, same @ h)
