"""Gradients of examples column by column, where the layers have fewer parameters than a mini-batch has cotangents."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from nngeo.generators.batches import Batch
from nngeo.generators.linearized import Linearizer
from nngeo.generators.products import Point
from nngeo.generators.record import BatchRecord, LayerRecord
from nngeo.layers.collection import LayerCollection
from nngeo.layers.rule import Computed
from nngeo.variants import Cotangents

# Cotangents for each parameter from which on columns are taken: a column is a backward through a backward.
FEWER = 4


def columns_pay(layers: LayerCollection, cotangents: Cotangents) -> bool:
    """Whether J e for each parameter costs less than a backward for each cotangent.

    Only where products with all cotangents have a closed form: otherwise these would be made anew for each parameter.
    """
    return cotangents.products is not None and FEWER * layers.numel() <= cotangents.count


def record_by_columns(whole: Linearizer, batch: Batch, c: Cotangents, like: Tensor) -> BatchRecord:
    """The gradients of a mini-batch, layer by layer when they are asked for, of all cotangents at once.

    Costs a column of the Jacobian for each parameter; a layer's rows (k, b, p) are there while they are used.

    Raises:
        NotImplementedError, RuntimeError: an operation of the model has no second derivative.
    """
    setting = whole.setting()
    point = Point(whole.at(batch, None, setting), c, batch.size)
    point.contracted(like.new_zeros(1, whole.layers.numel()))  # raises here, where there is another way
    layers, start = {}, 0
    for name, layer in whole.layers.layers.items():
        compute = partial(_rows, point, start, layer.numel(), whole.layers.numel(), like)
        layers[name] = LayerRecord(layer, [Computed(compute)], batch.size, c.count, True, like)
        start += layer.numel()
    return BatchRecord(layers, batch.size, True, c.count)


def _rows(point: Point, start: int, p: int, size: int, like: Tensor) -> Tensor:
    """(k, b, p), the gradients by p of all parameters."""
    found = like.new_empty(point.cotangents.count, point.size, p)
    done = 0
    for units in _units(start, p, size, like, len(point.chunks(like.new_empty(p, 0))[0])):
        found[..., done : done + len(units)] = point.contracted(units).permute(1, 2, 0)
        done += len(units)
    return found


def _units(start: int, p: int, size: int, like: Tensor, step: int) -> Iterator[Tensor]:
    """The rows start ... start + p of the identity, some (m, size) at a time."""
    for first in range(0, p, step):
        at = torch.arange(first, min(first + step, p), device=like.device)
        units = like.new_zeros(len(at), size)
        units[at - first, start + at] = 1
        yield units
