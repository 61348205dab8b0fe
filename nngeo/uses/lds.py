"""How well scores predict the losses after training on a part of the examples (Park et al., 2023)."""

from __future__ import annotations

import torch
from scipy.stats import rankdata
from torch import Tensor

from nngeo.linalg.arguments import tensor
from nngeo.linalg.precision import full_precision


@full_precision
def lds(scores: Tensor, masks: Tensor, losses: Tensor) -> Tensor:
    """The linear datamodeling score, 0-d: the rank correlation of predicted and measured losses, the mean over queries.

    The prediction is minus the sum of the scores of the examples trained on: a positive score says that the example
    lowers the query's loss.

    Args:
        scores: (q, n).
        masks: (s, n), True for the examples that subset s was trained on.
        losses: (s, q), of the queries, measured after this training (the mean over several trainings, best).

    Raises:
        ValueError: shapes that do not fit; fewer than two subsets; a query with the same loss, measured or predicted,
            in all subsets.

    >>> scores, masks = torch.tensor([[2.0, 1.0]]), torch.tensor([[True, False], [False, True]])
    >>> print(f"{lds(scores, masks, torch.tensor([[0.1], [0.2]])):.2f}")
    1.00
    """
    q, n = tensor("scores", scores, "(q, n)", ndim=2).shape
    s, m = tensor("masks", masks, "(s, n)", ndim=2, real=False).shape
    tensor("losses", losses, "(s, q)", ndim=2)
    if m != n or losses.shape != (s, q) or s < 2:
        raise ValueError(
            f"`scores` (q, n), `masks` (s, n) and `losses` (s, q), s at least 2, do not fit: found "
            f"{tuple(scores.shape)}, {tuple(masks.shape)} and {tuple(losses.shape)}."
        )
    predicted = -(masks.to(scores) @ scores.mT)
    ranks = [torch.from_numpy(rankdata(x.detach().cpu().numpy(), axis=0)) for x in (predicted, losses)]
    centred = [x - x.mean(0) for x in ranks]
    norms = [x.norm(dim=0) for x in centred]
    if bool((norms[0] == 0).any()) or bool((norms[1] == 0).any()):
        raise ValueError("A query has the same loss in all subsets, measured or predicted: it has no rank correlation.")
    return ((centred[0] * centred[1]).sum(0) / (norms[0] * norms[1])).mean()
