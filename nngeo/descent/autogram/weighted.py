"""Sums of a layer's gradients with weights, from its record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nngeo.generators.record import LayerRecord
from nngeo.layers.rule import Factored
from nngeo.linalg.matrixview import MatrixView
from nngeo.linalg.outer import OuterProducts


def weighted(record: LayerRecord, w: Tensor) -> dict[str, Tensor]:
    """{parameter: (*shape)}, a layer's gradients summed over k and b with weights w (k, b)."""
    layer, w = record.layer, w.to(record.like)
    flat = _flat(record, w)
    return {local: part.view(shape) for part, (local, shape) in zip(flat, layer.shapes.items(), strict=True)}


def _flat(record: LayerRecord, w: Tensor) -> Sequence[Tensor]:
    layer, view = record.layer, record.view
    if view is not None:
        factors: Any = record.factors()
        return _apart(view, factors, w) if view.bias else [view.to_flat(factors.combine(w))]
    factored = [part for part in record.parts if isinstance(part, Factored)]
    if len(factored) == len(record.parts):
        total = w.new_zeros(layer.numel())
        for part in factored:
            total += part.view.to_flat(part.products.combine(w))
        return total.split(layer.sizes())
    return torch.einsum("kbp,kb->p", record.jacobian(), w).split(layer.sizes())


def _apart(view: MatrixView, factors: OuterProducts, w: Tensor) -> list[Tensor]:
    """Weight and bias, flat: the column of the bias is computed by itself, so that no part has to be copied."""
    bias = OuterProducts(factors.a[..., view.columns :], factors.g).combine(w).flatten()
    if not view.columns:
        return [bias]
    weight = OuterProducts(factors.a[..., : view.columns], factors.g).combine(w)
    return [replace(view, bias=False).to_flat(weight), bias]
