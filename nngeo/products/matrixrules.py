"""How determinants, inverses, solutions and Cholesky factors carry derivatives: in closed form.

With tangents T of A and X = A^-1, all along a column (the last tangent, the trace, has no second term).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.linalg import solve

from nngeo.products.secondorder import Call, added, aligned


def inverse(call: Call) -> tuple[Any, Any]:
    """`X' = -X T X`, `X'' = 2 X T X T X`."""
    x, info = call.function(*call.values)
    turned = x @ call.tangents[0]
    tangents = -turned @ x
    return (x, info), (added(tangents, -2 * call.over_columns(turned[:-1] @ tangents[:-1])), None)


def slogdet(call: Call) -> tuple[Any, Any]:
    """`log det' = tr X T`, `log det'' = -tr X T X T`; the sign of a complex determinant is its phase."""
    sign, logarithm, *rest = call.function(*call.values)
    first, second = _logarithmic(call)
    logarithms = added(first.real.clone() if first.is_complex() else first.clone(), second.real)
    if not first.is_complex():
        return (sign, logarithm, *rest), (torch.zeros_like(first), logarithms, *[None] * len(rest))
    turns = added(first.imag * 1j, 1j * second.imag - call.over_columns(first[:-1].imag ** 2))
    return (sign, logarithm, *rest), (turns * sign, logarithms, *[None] * len(rest))


def det(call: Call) -> tuple[Any, Any]:
    """`det' = det tr X T`, `det'' = det ((tr X T)^2 - tr X T X T)`."""
    value, *rest = call.function(*call.values)
    first, second = _logarithmic(call)
    tangents = added(first * value, value * (second + call.over_columns(first[:-1] ** 2)))
    return (value, *rest), (tangents, *[None] * len(rest))


def cholesky(call: Call) -> tuple[Any, Any]:
    """`L' = L low(L^-1 T L^-*)` (Murray, 2016), and `L''` so that `(L L*)'' = A''`; low halves the diagonal."""
    factor, info = call.function(*call.values)
    upper = bool(call.kwargs.get("upper", False))
    low = factor.mH if upper else factor
    x = torch.linalg.solve_triangular(low, torch.eye(low.shape[-1]).to(low), upper=False)
    t = (call.tangents[0] + call.tangents[0].mH) / 2  # as gradients are: of a symmetric matrix

    def carried(t: Tensor) -> Tensor:
        inner = (x @ t @ x.mH).tril()
        return low @ (inner - inner.diagonal(dim1=-2, dim2=-1).diag_embed() / 2)

    tangents = carried(t)
    tangents = added(tangents, carried(-2 * call.over_columns(tangents[:-1] @ tangents[:-1].mH)))
    return (factor, info), (tangents.mH if upper else tangents, None)


def solution(call: Call) -> tuple[Any, Any]:
    """`Y' = X (B' - T Y)`, `Y'' = X (B'' - A'' Y - 2 T Y')` for A Y = B, or Y A = B."""
    found = call.function(*call.values)
    y, *rest = [found] if isinstance(found, Tensor) else found
    (a, b), options = call.args[:2], call.kwargs
    vector = len(options) < 3 and (b.ndim == 1 or b.shape == a.shape[:-1])
    y = y[..., None] if vector else y
    tangents = dict(zip(call.arguments, call.tangents, strict=True))
    t, right = tangents.get(0), tangents.get(1)
    if t is not None:
        t = aligned(y)(_triangle(t, options))
    if right is not None:
        right = aligned(y)(right[..., None] if vector else right)
    left = options.get("left", True)

    def solved(rows: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(a, rows, **options) if "upper" in options else solve(a, rows, left=left)

    def times(t: Tensor, y: Tensor) -> Tensor:
        return t @ y if left else y @ t

    if t is None:
        carried = solved(call.tangents[0] if right is None else right)
    else:
        carried = solved(-times(t, y) if right is None else right - times(t, y))
        carried = added(carried, solved(-2 * call.over_columns(times(t[:-1], carried[:-1]))))
    carried = carried[..., 0] if vector else carried
    return found, carried if isinstance(found, Tensor) else (carried, *[None] * len(rest))


def _triangle(t: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The part of a tangent that a triangular solve reads, all of it for others."""
    if "upper" not in options:
        return t
    past = int(options.get("unitriangular", False))
    return t.triu(past) if options["upper"] else t.tril(-past)


def _logarithmic(call: Call) -> tuple[Tensor, Tensor]:
    """The trace of X T (r + 1, ...), and the sum of -tr X T X T over the columns."""
    turned = torch.linalg.inv(call.values[0]) @ call.tangents[0]
    traces = turned.diagonal(dim1=-2, dim2=-1).sum(-1)
    return traces, -call.over_columns((turned[:-1] * turned[:-1].mT).sum((-2, -1)))
