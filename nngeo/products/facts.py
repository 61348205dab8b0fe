"""What was found out about a model when it was first differentiated, remembered for its structure."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.utils._pytree import tree_flatten

from nngeo.generators.batches import Batch
from nngeo.generators.differentiable import Backward, Footprint, differentiable
from nngeo.generators.independence import FirstExamples, check_alone, check_independence, run
from nngeo.generators.outputs import check_mode
from nngeo.generators.remembered import Remembered
from nngeo.generators.signature import plain
from nngeo.layers.collection import LayerCollection
from nngeo.layers.turn import TURN
from nngeo.products.evaluation import Evaluation


@dataclass
class Facts:
    """How a model can be differentiated by some of its arguments, or by its weights."""

    way: str | None = None  # in which tangents are pushed forward
    pull: Backward = field(default_factory=Backward)
    push: Backward = field(default_factory=Backward)
    footprint: Footprint = field(default_factory=Footprint)
    work: float | None = None  # multiplications of a forward, for each example
    laplacian: bool = False  # whether a forward Laplacian has been compared with double backward
    reads: bool = False  # whether Python reads values of tensors, so that every batch has to be tested
    outputs: dict[tuple, Tensor] = field(default_factory=dict)  # of one example, without data, by shapes of the batch


_FACTS: Remembered[Facts] = Remembered()


@TURN
def facts_of(evaluation: Evaluation, layers: LayerCollection, wrt: tuple) -> Facts:
    """The facts of a model and of what it is differentiated by; the first time, its examples are looked at.

    Raises:
        ValueError: the examples of a batch influence each other, or the model draws random numbers.
    """
    model, function, batch = evaluation.model, evaluation.function, evaluation.batch
    known, key = _FACTS.of(model, function, layers), (_kinds(batch), wrt)
    if key not in known:
        check_mode(model)
        with differentiable(model, layers):
            first = check_independence(model, function, FirstExamples.of(batch))
        known[key] = Facts(reads=first.reads)
    if known[key].reads:
        with differentiable(model, layers):
            check_alone(model, function, batch, run(model, function, batch))
    return known[key]


def _kinds(batch: Batch) -> tuple:
    """What there is in a batch: of tensors axes and dtypes; what is no tensor may decide what is computed."""
    leaves, structure = tree_flatten(batch.content)
    kinds = [(leaf.ndim, leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), plain(leaf)) for leaf in leaves]
    return str(structure), *kinds
