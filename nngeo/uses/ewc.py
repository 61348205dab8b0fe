"""Elastic weight consolidation: learn a task without forgetting those before (Kirkpatrick et al., 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nngeo.layers import LayerCollection
from nngeo.layers.collection import checked_layers, layers_of
from nngeo.linalg.arguments import flag, instance
from nngeo.linalg.precision import FullPrecision
from nngeo.representations import PMat
from nngeo.uses.estimates import check_fisher, fisher
from nngeo.uses.quadratic import Quadratic
from nngeo.vectors import PVector

if TYPE_CHECKING:
    from typing_extensions import Self


class EWC(FullPrecision):
    """A penalty on moving the weights along directions that matter for the tasks learned so far.

    Add `strength / 2 * penalty()` to the loss of the next task; each task's F is the mean over its examples.

    Args:
        model: whose parameters are kept; in eval mode at `consolidate`, where it has BatchNorm or dropout.
        representation: such as PMatKFAC or PMatDiag.
        variant: of the Fisher matrix, as in `FIM`.
        decay: what is left of older tasks at each new one. One matrix and one centre serve all, in constant memory;
            None keeps those of every task. See `Quadratic`.
        layer_collection: the parameters to keep; by default all that require a gradient at `consolidate`.
        trials: draws for each example (`FIM_MonteCarlo`); None for the exact Fisher.
        verbose: show a progress bar.
        options: others of `FIM` or `FIM_MonteCarlo`: `function`, `mask`, `empirical`, `generator`, ...

    >>> from nngeo import PMatDiag
    >>> model, x = nn.Linear(3, 2), torch.randn(8, 3)
    >>> penalty = EWC(model, PMatDiag)
    >>> penalty.consolidate((x,))
    EWC(PMatDiag, 1 task in 1 term)
    >>> loss = model(x).square().mean() + 10 / 2 * penalty()
    """

    def __init__(
        self,
        model: nn.Module,
        representation: type[PMat],
        variant: Any = "classif_logits",
        decay: float | None = 1.0,
        *,
        layer_collection: LayerCollection | None = None,
        trials: int | None = None,
        verbose: bool = False,
        **options: Any,
    ):
        instance("model", model, nn.Module)
        check_fisher(representation, variant, trials)
        flag("verbose", verbose)
        if layer_collection is not None:
            checked_layers(layer_collection)
        self.model, self.representation, self.layer_collection = model, representation, layer_collection
        self.quadratic = Quadratic(decay)
        self._options = {"variant": variant, "trials": trials, "verbose": verbose, **options}

    def consolidate(self, loader: Any) -> Self:
        """Remember the task of these examples at the model's weights, which are copied. Returns itself.

        Costs one estimate of the Fisher matrix.
        """
        layers = layers_of(self.model, self.layer_collection)
        F = fisher(self.model, loader, self.representation, layer_collection=layers, **self._options)
        self.quadratic.add(F, PVector.from_model(self.model, layers))
        return self

    def __call__(self) -> Tensor:
        """The penalty at the model's weights, 0-d and differentiable; zero before the first task."""
        if not self.quadratic.terms:
            return self.quadratic(PVector.from_model(self.model, self.layer_collection))
        # Each over its own layers: a model may have got more of them since.
        terms = [term(PVector.from_model(self.model, term.F.layer_collection)) for term in self.quadratic.terms]
        return torch.stack(terms).sum()

    def state_dict(self) -> dict[str, Tensor]:
        """What was consolidated, as tensors only."""
        return self.quadratic.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what was consolidated, and the decay, from a `state_dict()`."""
        self.quadratic.load_state_dict(state)

    def __repr__(self) -> str:
        t, m = self.quadratic.added, len(self.quadratic.terms)
        return f"EWC({self.representation.__name__}, {t} task{'s' * (t != 1)} in {m} term{'s' * (m != 1)})"
