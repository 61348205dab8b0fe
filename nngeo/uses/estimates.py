"""The Fisher matrix that a use works with: exact or by draws."""

from __future__ import annotations

from typing import Any

from torch import nn

from nngeo.factories import FIM, FIM_MonteCarlo
from nngeo.factories.arguments import checked
from nngeo.generators import Examples
from nngeo.linalg.arguments import count
from nngeo.representations import PMat
from nngeo.variants import make_variant


def check_fisher(representation: type[PMat], variant: Any, trials: int | None) -> None:
    """Raise where `fisher` would: before there are examples."""
    checked(representation, (PMat,))
    make_variant(variant)
    if trials is not None:
        count("trials", trials)


def fisher(
    model: nn.Module, loader: Any, representation: type[PMat], variant: Any, trials: int | None = None, **options: Any
) -> PMat:
    """`FIM`, or `FIM_MonteCarlo` of so many draws; the count of examples is there for matrices never formed, too."""
    examples = Examples.kept(loader)
    if trials is None:
        F = FIM(model, examples, representation, variant, **options)
    else:
        F = FIM_MonteCarlo(model, examples, representation, variant, trials, **options)
    if F.n_examples is None:
        F.n_examples = sum(batch.size for batch in examples)
    return F
