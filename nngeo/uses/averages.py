"""Weighted means of two matrices, whatever their representation."""

from __future__ import annotations

import copy

from nngeo.representations import PMat


def averaged(F: PMat, G: PMat, weight: float, other: float) -> PMat:
    """`(weight F + other G) / (weight + other)`; of Kronecker products the mean of each factor. Counts add up.

    Raises:
        NotImplementedError: a representation without a mean of two matrices, as EKFAC's exact scalings.
    """
    first, second = copy.copy(F), copy.copy(G)
    first.n_examples, second.n_examples = weight, other  # type: ignore[assignment]  # weights, not counts
    mean = first.pooled(second)
    counts = F.n_examples, G.n_examples
    mean.n_examples = None if None in counts else sum(counts)  # type: ignore[arg-type]
    return mean
