"""Metrics carried through the Jacobian of any module, example by example."""

from __future__ import annotations

import operator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from nngeo.linalg.arguments import random_source
from nngeo.linalg.precision import full_precision
from nngeo.products.diagbackprop import diag_backprop
from nngeo.products.differential import finished
from nngeo.products.evaluation import Wrt
from nngeo.products.functions import Options, Unpack
from nngeo.products.montecarlo import sampled
from nngeo.products.opening import differential
from nngeo.products.sandwich import Pair, sandwich
from nngeo.products.structured import as_metric


@full_precision
def jTmjp(
    model: nn.Module,
    x: Any,
    metric: Any = None,
    wrt: Wrt = "input",
    *,
    result: str = "dense",
    method: str = "exact",
    reduce: str | None = None,
    x2: Any = None,
    samples: int = 10,
    generator: torch.Generator | None = None,
    **options: Unpack[Options],
) -> Any:
    """J' M J, the metric M of the outputs pulled back: "dense" (b, n, n), with all blocks between layers.

    Args:
        metric: None (the identity), Diagonal, Dense (or a tensor), Factor, LowRankPlusDiagonal, Kronecker, Softmax.
        result: also "diag" (b, n); "trace" (b,); "factor" (b, n, r), J' V for M = V V'; "blocks", the diagonal blocks
            (b, p, p) in a dict by layer, or by argument.
        method: "exact"; "mc", an estimate with a standard error from `samples` random signs of `generator`;
            "diag_backprop" for result="diag", biased (see `diag_backprop`).
        reduce: "sum" or "mean" over the examples, without the axis b; no tensor (b, n) is formed for it. Factors of
            all examples stand side by side, (n, b r).
        x2: other arguments, for J1' M J2 example by example.
        options: see `differential`.

    >>> from nngeo.products import Diagonal
    >>> jTmjp(torch.nn.Tanh(), torch.zeros(1, 2), Diagonal(torch.tensor([1.0, 4.0])))
    tensor([[[1., 0.],
             [0., 4.]]])
    """
    return _product(True, model, x, metric, wrt, result, method, reduce, x2, samples, generator, options)


@full_precision
def jmjTp(
    model: nn.Module,
    x: Any,
    metric: Any = None,
    wrt: Wrt = "input",
    *,
    result: str = "dense",
    method: str = "exact",
    reduce: str | None = None,
    x2: Any = None,
    samples: int = 10,
    generator: torch.Generator | None = None,
    **options: Unpack[Options],
) -> Any:
    """J M J', the metric M of the inputs or weights pushed forward: "dense" (b, o, o).

    The arguments are those of `jTmjp`. Metrics of the weights may also be BlockDiagonal, by layer, or any PMat: with a
    covariance of the weights, J M J' is the covariance of the linearized outputs.

    Args:
        result: also "diag" (b, o); "trace" (b,); "factor" (b, o, r), J V for M = V V'.

    >>> jmjTp(torch.nn.Linear(3, 1), torch.ones(2, 3), wrt="weight")
    tensor([[[4.]],
            [[4.]]])
    """
    return _product(False, model, x, metric, wrt, result, method, reduce, x2, samples, generator, options)


def _product(back, model, x, metric, wrt, result, method, reduce, x2, samples, generator, options):
    _check(back, result, method, reduce, x2, samples)
    random_source(generator)
    m = as_metric(metric)
    # Behind a function, or with several arguments, there are no layers to go through: all is one, which is exact.
    if method == "diag_backprop" and options.get("function") is None and isinstance(x, Tensor):
        return diag_backprop(back, model, x, m, wrt, reduce, **options)
    with ExitStack() as stack:
        at = stack.enter_context(differential(model, x, wrt, **options))
        other = at if x2 is None else stack.enter_context(differential(model, x2, wrt, **options))
        if other.domain.b != at.domain.b:
            raise ValueError(f"`x2` holds {other.domain.b} examples and `x` {at.domain.b}; they are taken in pairs.")
        left = at if back else at.T
        pair: Pair = (left, left if other is at else other if back else other.T)
        _check_pair(pair, result)
        m.check(left.codomain)
        if method == "mc":
            return finished(sampled(pair, m, result, reduce, samples, generator), at)
        return finished(sandwich(pair, m, result, reduce), at)


def _check_pair(pair: Pair, result: str) -> None:
    """Raise where maps of two batches have no product, or none of which there is a diagonal."""
    left, right = pair
    if left.codomain.d != right.codomain.d:
        raise ValueError(
            f"The {left.codomain.what} have {left.codomain.d} entries for `x` and {right.codomain.d} for `x2`; one "
            "metric is between them, so their numbers should be equal."
        )
    if result != "dense" and left.domain.sizes != right.domain.sizes:
        raise ValueError(
            f"The {left.domain.what} have {left.domain.d} entries for `x` and {right.domain.d} for `x2`; "
            f"result={result!r} needs equal numbers. Use result='dense'."
        )


def _check(back: bool, result: str, method: str, reduce: str | None, x2: Any, samples: Any) -> None:
    known = ("dense", "diag", "blocks", "factor", "trace") if back else ("dense", "diag", "factor", "trace")
    if result not in known:
        raise ValueError(f"Unknown result {result!r}; known are {', '.join(known)}.")
    if method not in ("exact", "mc", "diag_backprop"):
        raise ValueError(f"Unknown method {method!r}; known are exact, mc and diag_backprop.")
    if reduce not in (None, "sum", "mean"):
        raise ValueError(f"Unknown reduce {reduce!r}; known are None, 'sum' and 'mean'.")
    if method == "diag_backprop" and (result != "diag" or x2 is not None):
        raise ValueError("method='diag_backprop' has result='diag' only, and no `x2`.")
    if result == "factor" and (method == "mc" or x2 is not None):
        raise ValueError("result='factor' has method='exact' only, and no `x2`: a product of two maps is no V V'.")
    try:
        enough = operator.index(samples) >= 1 and not isinstance(samples, bool)
    except TypeError:
        enough = False
    if not enough:
        raise ValueError(f"`samples` is {samples!r}; it should be a number of samples, 1 or more.")
