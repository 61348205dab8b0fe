"""J M J' over the parameters of one layer, for one Block of a matrix M, from the factors of the gradients."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from nngeo.generators.record import LayerRecord
from nngeo.linalg.matrixview import MatrixView
from nngeo.linalg.outer import BUDGET, OuterProducts
from nngeo.representations import Block, DiagBlock, KroneckerBlock, KroneckerEigenBlock


def sandwiched(block: Block, record: LayerRecord, other: LayerRecord, diag: bool) -> Tensor:
    """(b, k, l), `x' M y` for the gradients x of a record and y of another; with `diag`, (b, k), those with k = l.

    A DiagBlock may have entries (b, p), for each example its own. Where no gradient needs to be formed, none is; for a
    linear map at one position that takes k (i^2 + o^2) multiplications at most, k o i (i + o) for products with rows.
    """
    if (
        through_factors(block)
        and record.view is not None
        and record.view == other.view == getattr(block, "view", record.view)
    ):
        f, h = record.factors(), other.factors()
        if isinstance(f, OuterProducts) and isinstance(h, OuterProducts):
            return _by_factors(block, record.view, f, h, diag)
    left = record.jacobian()
    right = block.mv(left if other is record else other.jacobian())
    return (left * right).sum(-1).mT if diag else torch.einsum("kbp,lbp->bkl", left, right)


def through_factors(block: Block) -> bool:
    """Whether a type of block is known here; others are applied to whole gradients."""
    return _by_factors.dispatch(type(block)) is not _by_factors.dispatch(object)


@singledispatch
def _by_factors(block: Block, view: MatrixView, f: OuterProducts, h: OuterProducts, diag: bool) -> Tensor:
    raise NotImplementedError


@_by_factors.register
def _(block: DiagBlock, view: MatrixView, f: OuterProducts, h: OuterProducts, diag: bool) -> Tensor:
    return _weighted(f, h, view.to_matrix(block.entries), diag)


@_by_factors.register
def _(block: KroneckerBlock, view: MatrixView, f: OuterProducts, h: OuterProducts, diag: bool) -> Tensor:
    """`G V A` of an outer product V is one."""
    a = h.a * block.a[:, None, None] if block.a.ndim == 2 else h.a @ block.a[:, None]
    moved = OuterProducts(a, h.g @ block.g.mT[:, None, None])
    return _weighted(f, moved, None, diag)


@_by_factors.register
def _(block: KroneckerEigenBlock, view: MatrixView, f: OuterProducts, h: OuterProducts, diag: bool) -> Tensor:
    """In the eigenbasis, M is diagonal."""
    rotated = f.rotate(block.ua, block.ug)
    return _weighted(rotated, rotated if h is f else h.rotate(block.ua, block.ug), block.scalings, diag)


def _weighted(f: OuterProducts, h: OuterProducts, s: Tensor | None, diag: bool) -> Tensor:
    """Inner products, the entries weighted by s (n, o, i), or (b, n, o, i); equal weights for None."""
    a, z = f.a, h.a
    if a.shape[2] * z.shape[2] == 1:
        # At one position the squares of the inputs meet the weights first.
        squares = (a * z)[:, :, 0]  # (n, b, i)
        if s is None:
            w = squares.sum(-1, keepdim=True)
        else:
            w = squares @ s.mT if s.ndim == 3 else torch.einsum("nbi,bnoi->nbo", squares, s)
        left, right = f.g[..., 0, :] * w[:, None], h.g[..., 0, :]
        if diag:
            return (left * right).sum((0, 3)).mT
        return torch.einsum("nkbo,nlbo->bkl", left, right)
    b, step = a.shape[1], max(1, BUDGET // max(1, len(a) * f.g.shape[1] * f.g.shape[4] * a.shape[3]))
    parts = []
    for rows in (slice(e, e + step) for e in range(0, b, step)):
        left = OuterProducts(a[:, rows], f.g[:, :, rows]).dense()
        right = left if h is f else OuterProducts(z[:, rows], h.g[:, :, rows]).dense()
        if s is not None:
            right = right * (s[rows] if s.ndim == 4 else s)
        if diag:
            parts.append((left * right).sum((2, 3, 4)).mT)
        else:
            parts.append(left.flatten(2).transpose(0, 1) @ right.flatten(2).permute(1, 2, 0))
    return torch.cat(parts)
