"""The differential that a product asks for, at a model that comes back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nngeo.generators.batches import Function
from nngeo.generators.independence import explained
from nngeo.layers import collection
from nngeo.layers.collection import LayerCollection
from nngeo.layers.models import check_structure
from nngeo.linalg.arguments import count, flag
from nngeo.products.contexts import frozen, undisturbed
from nngeo.products.differential import BUDGET, Differential
from nngeo.products.evaluation import Evaluation, Wrt, of_weights
from nngeo.products.graph import InputGraph, WeightGraph
from nngeo.products.inputs import InputDifferential
from nngeo.products.manyderivatives import many_derivatives
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
    flag("create_graph", create_graph)
    evaluation = Evaluation.of(model, x, function, detached=not create_graph)
    held = BUDGET if budget is None else count("budget", budget)
    opened = _opened(evaluation, wrt, layer_collection, create_graph, held)
    with explained(evaluation.run, evaluation.batch), opened as at:
        yield at


@contextmanager
def _opened(
    evaluation: Evaluation, wrt: Wrt, layer_collection: LayerCollection | None, create_graph: bool, held: int
) -> Iterator[Differential]:
    model = evaluation.model
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


def layers_of(model: nn.Module, layer_collection: LayerCollection | None) -> LayerCollection:
    """The layers asked for, by default all of the model that are trained; at least one."""
    check_structure(model)
    layers = collection.layers_of(model, layer_collection)
    if not len(layers):
        raise ValueError("`layer_collection` has no layers; make one by LayerCollection.from_model(model).")
    return layers
