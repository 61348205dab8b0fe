"""Influence functions: what a query owes to each training example (Koh & Liang, 2017; Grosse et al., 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nngeo.generators import BatchRecord, Examples, JacobianGenerator
from nngeo.generators.batches import Function
from nngeo.linalg.arguments import callback, choice, count, instance, number, shown
from nngeo.linalg.cg import conjugate_gradients
from nngeo.linalg.precision import full_precision
from nngeo.representations import PFMapDense, PMat, PMatImplicit
from nngeo.uses.dots import BUDGET, BY, Dots
from nngeo.uses.lossgradients import Loss, loss_gradients
from nngeo.uses.scorefiles import ScoreFiles
from nngeo.variants import Exact, MonteCarlo


class Top(NamedTuple):
    """The k largest scores of each query (q, k), and which training examples they are of."""

    values: Tensor
    indices: Tensor


@full_precision
def influence(
    model: nn.Module,
    F: PMat,
    queries: Any,
    train: Any,
    loss: Loss,
    damping: float = 1e-3,
    refine: int = 10,
    by: str = "example",
    top: int | None = None,
    *,
    measure: Loss | None = None,
    rank: int | None = None,
    exact: PMat | None = None,
    store: str | Path | None = None,
    function: Function | None = None,
    verbose: bool = False,
) -> Tensor | Top:
    """Scores (q, n), `g_q' (F + damping)^-1 g_n`: without example n, the loss of query q changes by about score / n.

    So a positive score says that removing the example raises the query's loss: it helps. F is the mean over examples.

    The solution for each query is refined by conjugate gradients on the exact matrix, from zero, with F as
    preconditioner: with EKFAC some steps come near to the dense inverse. Then the gradients of the training examples
    are met layer by layer, as factors, in one sweep.

    Args:
        F: in any representation, estimated from the training examples; its layers are those that count.
        queries: a batch or a loader.
        loss: `loss(outputs, *targets)`, summed over examples.
        refine: steps of conjugate gradients, each a product with the exact matrix: a sweep over `train` for all
            queries. 0 trusts F.
        by: "example"; "layer" -> (q, n, layers); "token" -> (q, n, positions), for layers with the same positions.
        top: how many training examples to return for each query: a `Top`, in place of all scores.
        measure: what the queries are asked for, in place of their loss.
        rank: of the queries' solutions at each linear map; None keeps all of it.
        exact: the matrix to refine on; by default F without approximation: a PMatImplicit over `train`.
        store: a directory for the solutions and the scores. A call that was killed goes on from there.
        function: called as `function(*batch)`, or `function(batch)` with a dict; by default that of F.
        verbose: show progress bars.

    Memory: q P, and what the layers' inputs and gradients of a mini-batch take.

    Raises:
        ValueError: a loss that is not a sum over examples; by="token" with other layers; a store of other scores; F
            without a generator (from a file) with `refine`, and no `exact`.

    >>> from nngeo import FIM, PMatKFAC
    >>> model, x, y = nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
    >>> loss = nn.CrossEntropyLoss(reduction="sum")
    >>> influence(model, FIM(model, (x,), PMatKFAC), (x[:2], y[:2]), (x, y), loss).shape
    torch.Size([2, 8])
    """
    _check(model, F, loss, damping, function)
    count("refine", refine, least=0)
    choice("by", by, BY)
    callback("measure", measure, "(outputs, *targets)", optional=True)
    for name, value in (("top", top), ("rank", rank)):
        if value is not None:
            count(name, value)
    if exact is not None:
        instance("exact", exact, PMat, "such as a PMatImplicit")
    if not (store is None or isinstance(store, str | Path)):
        raise TypeError(f"`store` should be a directory (str or pathlib.Path), or None; got {shown(store)}.")
    if by != "example" and top is not None:
        raise ValueError(f"`top` is of scores by example; it has no meaning with by={by!r}.")
    function = function or getattr(F.generator, "function", None)
    train = Examples.kept(train)
    asked = loss_gradients(model, measure or loss, function, verbose)
    g = PFMapDense(F.layer_collection, asked, examples=queries).data[0]
    files = None if store is None else ScoreFiles(Path(store), g, [damping, refine, rank, by])

    def solutions() -> Tensor:
        return _solved(F, g, damping, refine, exact, train, function, verbose)

    dots = Dots(F.layer_collection, solutions() if files is None else files.solutions(solutions), rank, by)
    source = loss_gradients(model, loss, function, verbose)

    def scores(examples: Any) -> Iterator[Tensor]:
        records: Iterator[BatchRecord] = source.records(examples, F.layer_collection)
        return (dots(record) for record in records)

    parts = scores(train) if files is None else files.scores(train, scores)
    return torch.cat(list(parts), 1) if top is None else _top(parts, top)


@full_precision
def self_influence(
    model: nn.Module,
    F: PMat,
    train: Any,
    loss: Loss,
    damping: float = 1e-3,
    *,
    function: Function | None = None,
    verbose: bool = False,
) -> Tensor:
    """(n,), `g_n' (F + damping)^-1 g_n`: about n times by how much the loss of an example rises without it.

    Large for what is rare, or labelled wrongly. Gradients are formed for some examples at a time.
    """
    _check(model, F, loss, damping, function)
    source = loss_gradients(model, loss, function or getattr(F.generator, "function", None), verbose)
    most, found = max(1, BUDGET // F.layer_collection.numel()), []
    for batch in Examples(train):
        for part in batch.parts(most):
            g = PFMapDense(F.layer_collection, source, examples=part.content).data[0]
            found.append((g * F.solve(g, regul=damping)).sum(-1))
    return torch.cat(found)


def _check(model: nn.Module, F: PMat, loss: Loss, damping: float, function: Function | None) -> None:
    instance("model", model, nn.Module)
    instance("F", F, PMat, "as of FIM")
    callback("loss", loss, "(outputs, *targets), summed over examples")
    callback("function", function, "of a batch", optional=True)
    number("damping", damping, least=0)


def _solved(
    F: PMat,
    g: Tensor,
    damping: float,
    refine: int,
    exact: PMat | None,
    train: Examples,
    function: Function | None,
    verbose: bool,
) -> Tensor:
    """(q, P)."""
    if not refine:
        return F.solve(g, regul=damping)
    near = None if isinstance(F, PMatImplicit) else F
    matrix = _exact(F, train, function, verbose) if exact is None else exact
    return conjugate_gradients(
        lambda v: matrix.mv(v) + damping * v,
        g,
        max_iter=refine,
        precondition=None if near is None else lambda r: near.solve(r, regul=damping),
    ).x


def _exact(F: PMat, train: Examples, function: Function | None, verbose: bool) -> PMat:
    """What F approximates, by its products: of the same variant, without draws."""
    if isinstance(F, PMatImplicit):
        return F
    source = F.generator
    if source is None:
        raise ValueError(
            f"This {type(F).__name__} has no generator, so that what it approximates is not known: give "
            "`exact=FIM(model, train, PMatImplicit, ...)`, or refine=0."
        )
    if isinstance(source, JacobianGenerator):
        how = Exact(source.estimator.variant) if isinstance(source.estimator, MonteCarlo) else source.estimator
        source = JacobianGenerator(source.model, how, function, mask=source.mask, verbose=verbose)
    return PMatImplicit(F.layer_collection, source, examples=train)


def _top(parts: Iterator[Tensor], k: int) -> Top:
    values, indices, n = None, None, 0
    for part in parts:
        places = torch.arange(n, n + part.shape[1], device=part.device).expand(part.shape)
        n += part.shape[1]
        if values is not None and indices is not None:
            part, places = torch.cat([values, part], 1), torch.cat([indices, places], 1)
        values, where = part.topk(min(k, part.shape[1]), 1)
        indices = places.gather(1, where)
    assert values is not None and indices is not None
    return Top(values, indices)
