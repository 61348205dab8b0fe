"""Set weights to zero, and let the others make up for them (LeCun et al., 1990; Hassibi & Stork, 1993)."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.linalg.arguments import count, flag, instance, number
from nngeo.linalg.cg import conjugate_gradients
from nngeo.linalg.precision import full_precision
from nngeo.representations import PMat
from nngeo.vectors import PVector


@full_precision
def prune(
    F: PMat,
    w: PVector,
    fraction: float,
    update: bool = True,
    *,
    damping: float = 1e-5,
    rounds: int = 10,
    steps: int = 100,
) -> PVector:
    """The weights w with a fraction of them at exactly zero, chosen so that `(v - w)' F (v - w)` rises least.

    Each weight is worth `w_i^2 / [(F + damping)^-1]_ii`, what the form rises if it is removed and all others make up
    for it; for a diagonal F that is w_i^2 F_ii, without anything to make up. They go in rounds, equally many left by
    each in proportion, and the rest are set to where the form is least.

    Args:
        F: at w, in any representation with a diagonal of its inverse; over the layers that are pruned, biases too.
        fraction: from 0 to 1, of the coordinates of F.
        update: whether the others make up for what is removed (OBS). False leaves them as they are (OBD).
        damping: added to F, in both.
        rounds: after each of which the worth is found anew.
        steps: of conjugate gradients in a round.

    Returns a vector over the layers of F: `prune(...).to_model(model)`.

    Raises:
        ValueError: a fraction that is none.

    >>> from torch import nn
    >>> from nngeo import FIM, PMatKFAC
    >>> model = nn.Linear(3, 2)
    >>> pruned = prune(FIM(model, (torch.randn(8, 3),), PMatKFAC), PVector.from_model(model), 0.5)
    >>> (pruned.to_torch() == 0).sum()
    tensor(4)
    """
    instance("F", F, PMat)
    instance("w", w, PVector)
    fraction, damping = number("fraction", fraction, least=0, most=1), number("damping", damping, least=0)
    count("rounds", rounds)
    count("steps", steps, least=0)
    start = w.restrict(F.layer_collection).to_torch().detach().to(dtype=F.dtype, device=F.device)
    inverse_diagonal = (F + damping).get_diag(inverse=True)
    pruned, kept = start.clone(), torch.ones_like(start, dtype=torch.bool)
    rounds = rounds if flag("update", update) else 1
    for i in range(1, rounds + 1):
        gone = round((1 - (1 - fraction) ** (i / rounds)) * len(start))
        worth = (pruned.square() / inverse_diagonal).masked_fill(~kept, -1.0)
        kept[worth.argsort(stable=True)[:gone]] = False
        pruned = _made_up(F, start, kept, pruned, damping, steps) if update else start.where(kept, 0.0)
    return PVector(F.layer_collection, pruned)


def _made_up(F: PMat, w: Tensor, kept: Tensor, start: Tensor, damping: float, steps: int) -> Tensor:
    """The v that is zero where it is not kept, and else where `(v - w)' (F + damping) (v - w)` is least."""

    def product(v: Tensor) -> Tensor:
        return (F.mv(v) + damping * v).where(kept, 0.0)

    right = (F.mv(w) + damping * w).where(kept, 0.0)
    found = conjugate_gradients(
        product,
        right[None],
        x0=start.where(kept, 0.0)[None],
        rtol=1e-6,
        max_iter=steps,
        precondition=lambda r: F.solve(r, regul=damping).where(kept, 0.0),
    )
    return found.x[0].where(kept, 0.0)
