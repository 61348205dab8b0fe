"""Quadratic penalties around weights worth keeping: a Fisher matrix and a centre for each, or for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nngeo.linalg.arguments import instance, number
from nngeo.linalg.precision import FullPrecision
from nngeo.representations import PMat
from nngeo.uses.averages import averaged
from nngeo.uses.state import packed, unpacked
from nngeo.vectors import PVector

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Term:
    """`weight (w - centre)' F (w - centre)`."""

    F: PMat
    centre: PVector
    weight: float = 1.0

    def __call__(self, w: PVector) -> Tensor:
        """0-d, differentiable in w."""
        kept = w.restrict(self.centre.layer_collection).to(device=self.F.device, dtype=self.F.dtype)
        return self.weight * self.F.vTMv(kept - self.centre)

    def followed_by(self, F: PMat, centre: PVector, decay: float) -> Term:
        """One term in place of `decay` times this and a new one, around the new centre.

        The matrix is the weighted mean of both, which for Kronecker factors is that of each factor: as large as one.
        """
        try:
            mean = averaged(self.F, F, decay * self.weight, 1.0)
        except NotImplementedError as error:
            raise NotImplementedError(f"There is no mean of two {type(F).__name__}: use decay=None. {error}") from error
        return Term(mean, centre, decay * self.weight + 1.0)


class Quadratic(FullPrecision):
    """The penalty `sum_t decay^(T - t) (w - w_t)' F_t (w - w_t)` of what was added so far, or one term for all of it.

    With a `decay` there is one matrix and one centre, the last (Schwarz et al., 2018; Huszar, 2018): weights that were
    trained under the penalty are where it and the newest task together are least. The memory is that of one matrix,
    but for PMatLowRank, whose rows add up. With None each term is kept as it is.

    Args:
        decay: from 0 to 1: what is left of the older terms at each addition. 1 forgets nothing.

    >>> from torch import nn
    >>> from nngeo import FIM, PMatKFAC
    >>> model, x = nn.Linear(3, 2), torch.randn(8, 3)
    >>> w = PVector.from_model(model)
    >>> penalty = Quadratic().add(FIM(model, (x,), PMatKFAC), w)
    >>> penalty(w)
    tensor(0., grad_fn=<SumBackward0>)
    """

    def __init__(self, decay: float | None = 1.0):
        self.decay = None if decay is None else number("decay", decay, least=0, most=1)
        self.terms: list[Term] = []
        self.added = 0

    def add(self, F: PMat, w: PVector) -> Self:
        """Let the weights be kept at w (of which a copy is taken) as far as F says. Returns itself.

        Raises:
            ValueError: with a `decay`, a matrix over other layers than the ones before.
            NotImplementedError: with a `decay`, a representation without a mean of two matrices.
        """
        instance("F", F, PMat)
        instance("w", w, PVector)
        centre = w.restrict(F.layer_collection).to(device=F.device, dtype=F.dtype).detach().clone()
        if self.terms and self.decay is not None:
            self.terms = [self.terms[-1].followed_by(F, centre, self.decay)]
        else:
            self.terms.append(Term(F, centre))
        self.added += 1
        return self

    def __call__(self, w: PVector) -> Tensor:
        """The penalty at w, 0-d and differentiable; zero where nothing was added."""
        if not self.terms:
            return torch.zeros((), dtype=w.dtype, device=w.device)
        return torch.stack([term(w) for term in self.terms]).sum()

    def state_dict(self) -> dict[str, Tensor]:
        """All terms, as tensors only."""
        parts: dict[str, Any] = {"terms": len(self.terms), "added": self.added, "decay": self.decay}
        for i, term in enumerate(self.terms):
            parts |= {f"{i}.F": term.F.state_dict(), f"{i}.centre": term.centre.to_torch(), f"{i}.weight": term.weight}
        return packed(**parts)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the terms, on the devices on which they are, and the decay of a `state_dict()`.

        Raises:
            ValueError: it is of something else.
        """
        parts = unpacked(state, "a Quadratic")
        if "terms" not in parts:
            raise ValueError("This is not the state_dict of a Quadratic: it has no 'terms'.")
        self.decay, self.added, self.terms = parts["decay"], parts["added"], []
        for i in range(parts["terms"]):
            F = PMat.from_state_dict(parts[f"{i}.F"])
            centre = PVector(F.layer_collection, parts[f"{i}.centre"].clone())
            self.terms.append(Term(F, centre, parts[f"{i}.weight"]))
