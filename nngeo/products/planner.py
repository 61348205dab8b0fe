"""Which way to a sandwich A' M A is the cheapest, by counted multiplications."""

from __future__ import annotations

from dataclasses import dataclass

from nngeo.products.byblock import through_factors
from nngeo.products.differential import Differential
from nngeo.products.metrics import Metric


@dataclass(frozen=True)
class Plan:
    """A way, what it costs for each example, and how many elements it holds for each at once."""

    way: str
    cost: float
    elements: int


def cheapest(at: Differential, metric: Metric, result: str, two: bool) -> Plan:
    """The cheapest way; `two` says whether the right A is another one.

    "factor": every column c of V, M = V V', is pulled back, and squares or products of these rows are summed.
    "whole": A, by rows or by columns, and M applied to it. Only this one is differentiable, and serves any M.
    "kernel": A' A, or A' M A for M with a block for each layer, by inner products of the layers' inputs and gradients.
    """
    found = [_whole(at, metric, result, two)]
    if at.T.has_kernel and not at.differentiable:
        found.extend(_kernel(at, metric, result, two))
    if metric.symmetric and not at.differentiable:
        found.append(_factor(at, metric, result, two))
    return min(found, key=lambda plan: plan.cost)


def _factor(at: Differential, metric: Metric, result: str, two: bool) -> Plan:
    sides, r = 1 + two, metric.rank(at.codomain)
    squared = result in ("diag", "trace") and not two
    carried = at.squares_cost() if squared else sides * at.pull_cost()
    cost = r * carried + metric.factors_cost(at.codomain) + r * _combined(at, result)
    return Plan("factor", cost, sides * at.held(squared))


def _whole(at: Differential, metric: Metric, result: str, two: bool) -> Plan:
    d, e, sides = at.codomain.d, at.domain.d, 1 + two
    carried = sides * min(d * at.pull_cost(), e * at.push_cost())
    cost = carried + e * metric.cost(at.codomain) + d * _combined(at, result)
    if result in ("diag", "trace") and at.by_columns:  # column after column
        return Plan("whole", cost, (sides + 1) * at.T.held(metric.is_identity and not two))
    return Plan("whole", cost, (sides + 1) * d * e)


def _kernel(at: Differential, metric: Metric, result: str, two: bool) -> list[Plan]:
    """No plan, or one."""
    e, sides, blocks = at.domain.d, 1 + two, metric.by_layer(at.codomain)
    if blocks is None and not (metric.is_identity and result == "dense"):
        return []
    # Blocks of other types are applied to the rows of their layers.
    rows = [at.codomain.sizes[name] for name, block in (blocks or {}).items() if not through_factors(block)]
    cost = sides * e * at.push_cost() + 20.0 * e * sum(rows)
    return [Plan("kernel", cost, sides * e * at.T.held(squared=True) + (1 + sides) * e * max(rows, default=0))]


def _combined(at: Differential, result: str) -> float:
    """Multiplications that form the result from a row (e,)."""
    if result == "dense":
        return float(at.domain.d) ** 2
    return float(sum(size**2 for size in at.domain.sizes.values())) if result == "blocks" else float(at.domain.d)
