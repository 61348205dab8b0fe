"""A' M A for a map A of every example, in the form that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nngeo.linalg.memory import require_memory
from nngeo.products.differential import Differential, unit_vectors
from nngeo.products.metrics import Metric
from nngeo.products.planner import cheapest

Pair = tuple[Differential, Differential]  # of the left A and the right one; the same object where they are one


def sandwich(pair: Pair, metric: Metric, result: str, reduce: str | None) -> Any:
    """A' M B: "dense" (b, e, e), "diag" (b, e), "trace" (b,), "factor" (b, e, r), or "blocks", a dict of (b, p, p).

    M is a metric of the codomain of A, e counts its domain. With `reduce`, the sum or mean over the examples; the
    factors of all examples stand side by side then, (e, b r). Batches that would not fit the budget are divided.
    """
    b = pair[0].domain.b
    if result in ("diag", "trace") and pair[1] is pair[0] and not metric.symmetric:
        metric = metric.symmetric_part()
    if result == "factor":
        f = _factor(pair[0], metric)
        return f if reduce is None else f.transpose(0, 1).flatten(1) / (b**0.5 if reduce == "mean" else 1.0)
    found = _divided(pair, metric, result, reduce is not None)
    return tree_map(lambda x: x / b, found) if reduce == "mean" else found


def _divided(pair: Pair, metric: Metric, result: str, total: bool) -> Any:
    """Of as many examples at a time as the budget allows; with `total`, the sum over them."""
    at, other = pair
    _require_memory(at, result, total)
    plan, b = cheapest(at, metric, result, other is not at), at.domain.b
    form = _FORMS[plan.way]
    step = b if at.differentiable else max(1, at.budget // max(1, plan.elements))
    if step >= b:
        return form(pair, metric, result, total)
    parts = []
    for start in range(0, b, step):
        rows = slice(start, min(b, start + step))
        left = at.examples(rows)
        part: Pair = (left, left if other is at else other.examples(rows))
        parts.append(form(part, metric.examples(rows), result, total))
    return tree_map(lambda *x: sum(x[1:], x[0]) if total else torch.cat(x), *parts)


def _require_memory(at: Differential, result: str, total: bool) -> None:
    """Raise a MemoryError where a result is too large; small ones are not looked at."""
    sizes = at.domain.sizes.values() if result == "blocks" else [at.domain.d] if result == "dense" else []
    numel = sum(size**2 for size in sizes) * (1 if total else at.domain.b)
    if numel > at.budget:
        like = at.domain.like
        instead = "Use result='blocks', 'diag', 'factor' or 'trace', or reduce='sum' for the sum over the examples."
        require_memory(f"The {result} result over the {at.domain.what}", numel, like.dtype, like.device, instead)


def _factor(at: Differential, metric: Metric) -> Tensor:
    """(b, e, r)."""
    if at.differentiable:
        return _pulled(at, metric.columns(at.codomain)).permute(1, 2, 0)
    terms = metric.factors(at.codomain)
    if any(term.sign < 0 for term in terms):
        raise ValueError(
            f"The metric {type(metric).__name__} has negative eigenvalues, so it is no V V': result='factor' needs a "
            "positive semidefinite one."
        )
    return torch.cat([_pulled(at, term.cotangents.all()) for term in terms]).permute(1, 2, 0)


def _pulled(at: Differential, c: Tensor) -> Tensor:
    """(r, b, e), where r may be zero."""
    return at.pull(c) if len(c) else at.domain.like.new_zeros(0, at.domain.b, at.domain.d)


# By the whole map


def _whole(pair: Pair, metric: Metric, result: str, total: bool) -> Any:
    at, other = pair
    if result in ("diag", "trace") and at.by_columns and not at.differentiable:
        diag = torch.cat(list(_diagonal(pair, metric)), 1)
        diag = diag if result == "diag" else diag.sum(1)
        return diag.sum(0) if total else diag
    left = at.jacobian().permute(2, 0, 1)  # (e, b, d)
    right = metric.apply(left if other is at else other.jacobian().permute(2, 0, 1), at.codomain)
    if result == "diag":
        return (left * right).sum((1, 2)) if total else (left * right).sum(2).mT
    if result == "trace":
        return (left * right).sum() if total else (left * right).sum((0, 2))
    if result == "dense":
        return _products(left, right, total)
    return {name: _products(left[place], right[place], total) for name, place in at.domain.slices().items()}


def _diagonal(pair: Pair, metric: Metric) -> Iterator[Tensor]:
    """(b, k), the diagonal from k columns of A after the other."""
    at, other = pair
    squared = metric.is_identity and other is at
    step = max(1, at.budget // (2 * at.domain.b * max(at.domain.d, at.T.held(squared))))
    for start in range(0, at.domain.d, step):
        v = unit_vectors(at.domain, start, start + step, shared=True)
        if squared:
            yield at.T.norms(v.expand(-1, at.domain.b, -1)).mT
            continue
        left = at.push(v)
        yield (left * metric.apply(left if other is at else other.push(v), at.codomain)).sum(-1).mT


def _products(left: Tensor, right: Tensor, total: bool) -> Tensor:
    """(b, e, e), or their sum, of rows (e, b, d)."""
    return left.flatten(1) @ right.flatten(1).mT if total else left.transpose(0, 1) @ right.permute(1, 2, 0)


def _kernel(pair: Pair, metric: Metric, result: str, total: bool) -> Tensor:
    at, other = (each.T for each in pair)
    diag = result != "dense"
    found = at.kernel(at if pair[0] is pair[1] else other, metric.by_layer(pair[0].codomain), diag)
    if result == "trace":
        found = found.sum(1)
    return found.sum(0) if total else found


# By the columns of a factor of the metric


def _summed(pair: Pair, metric: Metric, result: str, total: bool) -> Any:
    found: Any = None
    for sign, c in _chunks(pair, metric, pair[0] is pair[1] and result in ("diag", "trace")):
        term = _term(pair, c, result, total)
        term = term if sign == 1 else tree_map(lambda x: -x, term)
        found = term if found is None else tree_map(torch.add, found, term)
    if found is None:  # of rank zero
        return _term(pair, pair[0].codomain.like.new_zeros(1, pair[0].domain.b, pair[0].codomain.d), result, total)
    return found


def _chunks(pair: Pair, metric: Metric, squared: bool) -> Iterator[tuple[float, Tensor]]:
    """Signs and columns (k, b, d)."""
    at, other = pair
    sides = 1 if other is at else 2
    step = max(1, at.budget // (sides * at.domain.b * max(at.held(squared), at.codomain.d)))
    for sign, c in metric.factors(at.codomain):
        for start in range(0, c.count, step):
            yield sign, c.chunk(start, min(start + step, c.count))


def _term(pair: Pair, c: Tensor, result: str, total: bool) -> Any:
    """The result for the metric that is the sum over k of c c', c (k, b, d)."""
    at, other = pair
    if other is at and result == "diag":
        return at.total_squares(c) if total else at.squares(c)
    if other is at and result == "trace":
        return at.norms(c).sum() if total else at.norms(c).sum(0)
    left = at.pull(c)
    right = left if other is at else other.pull(c)
    if result == "diag":
        return (left * right).sum((0, 1) if total else 0)
    if result == "trace":
        return (left * right).sum() if total else (left * right).sum((0, 2))
    if result == "dense":
        return _outer(left, right, total)
    return {name: _outer(left[..., s], right[..., s], total) for name, s in at.domain.slices().items()}


def _outer(left: Tensor, right: Tensor, total: bool) -> Tensor:
    """(b, e, e), or their sum, of rows (k, b, e)."""
    if total:
        return left.flatten(0, 1).mT @ right.flatten(0, 1)
    return left.permute(1, 2, 0) @ right.transpose(0, 1)


_FORMS: dict[str, Callable[[Pair, Metric, str, bool], Any]] = {"whole": _whole, "kernel": _kernel, "factor": _summed}
