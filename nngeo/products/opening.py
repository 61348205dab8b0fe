"""The differential that a product asks for, at a model that comes back as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nngeo.generators.batches import Function
from nngeo.layers.collection import LayerCollection
from nngeo.layers.models import check_structure
from nngeo.products.contexts import frozen, undisturbed
from nngeo.products.differential import BUDGET, Differential
from nngeo.products.evaluation import Evaluation, Wrt
from nngeo.products.graph import InputGraph, WeightGraph
from nngeo.products.inputs import InputDifferential
from nngeo.products.plainnorms import many_derivatives
from nngeo.products.weights import WeightDifferential


@contextmanager
def differential(
    model: nn.Module,
    x: Any,
    wrt: Wrt,
    *,
    layer_collection: LayerCollection | None = None,
    function: Function | None = None,
    create_graph: bool = False,
    budget: int | None = None,
) -> Iterator[Differential]:
    """The Jacobian of a model at a batch, by its inputs or weights.

    Args:
        layer_collection: which parameters; all trainable ones if None.
        function: called in place of the model, as `function(*x)`, or `function(x)` with a dict.
        create_graph: whether what is computed can be differentiated in x and in the parameters.
        budget: elements that may be held at once; 2**24 if None.

    Raises:
        ValueError: an unknown `wrt`, examples that influence each other, a layer in train mode that mixes or draws, ...
    """
    evaluation = Evaluation.of(model, x, function, detached=not create_graph)
    if budget is not None and not (isinstance(budget, int) and budget > 0):
        raise ValueError(f"`budget` is {budget!r}; it should be a number of elements, 1 or more.")
    held = BUDGET if budget is None else budget
    if of_weights(wrt):
        layers = layers_of(model, layer_collection)
        if create_graph:
            with many_derivatives(model), torch.enable_grad():
                yield WeightGraph(evaluation, layers, held)
        else:
            with undisturbed(next(layers.parameters(model)).device):
                yield WeightDifferential(evaluation, layers, held)
        return
    if layer_collection is not None:
        raise ValueError(
            f'`layer_collection` chooses parameters; it has no meaning with wrt={wrt!r}: use wrt="weight".'
        )
    places = evaluation.inputs(wrt)
    if create_graph:
        with many_derivatives(model), torch.enable_grad():
            yield InputGraph(evaluation, places, held)
    else:
        with frozen(model):
            yield InputDifferential(evaluation, places, held)


def of_weights(wrt: Wrt) -> bool:
    """Whether `wrt` means the weights, not inputs."""
    names = [wrt] if isinstance(wrt, str) else wrt
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f'`wrt` is {wrt!r}; it should be "input", "weight", or the name of an argument, or several.')
    return isinstance(wrt, str) and wrt in ("weight", "weights")


def layers_of(model: nn.Module, layer_collection: LayerCollection | None) -> LayerCollection:
    """The layers asked for, by default all of the model that are trained."""
    check_structure(model)
    layers = LayerCollection.from_model(model) if layer_collection is None else layer_collection
    if not len(layers):
        raise ValueError("`layer_collection` has no layers; make one by LayerCollection.from_model(model).")
    return layers
