"""Targets that are classes: draws of them, and checks of those that are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nngeo.variants.base import Variant, keep

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def draw(p: Tensor, generator: torch.Generator) -> Tensor:
    """(b, t) classes, from probabilities (b, t, C)."""
    return torch.multinomial(p.flatten(0, 1), 1, generator=generator).reshape(p.shape[:2])


def class_indices(variant: Variant, target: Any, outputs: Tensor) -> Tensor:
    """(b, *positions), int64."""
    positions, last = tuple(variant.positions(outputs)), variant.n_output(outputs) - 1
    if not isinstance(target, Tensor) or target.dtype not in INTEGERS:
        found = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"Variant {variant.name!r} needs targets that are integers from 0 to {last}; found {found}.")
    if target.shape != positions:
        raise ValueError(
            f"Variant {variant.name!r} needs targets of shape {positions}, one class for each position; "
            f"found {tuple(target.shape)}."
        )
    return target.to(outputs.device, torch.int64)


def in_range(index: Tensor, counted: Tensor | None, classes: int, name: str) -> Tensor:
    """The indices with a last axis of size one, zero where they do not count; raises if one that counts is no class."""
    index = keep(counted, index[..., None])
    wrong = (index < 0) | (index >= classes)
    if bool(wrong.any()):
        raise ValueError(
            f"Variant {name!r} needs targets from 0 to {classes - 1}; found {index[wrong][0].item()}. "
            "Positions to leave out: `ignore_index` of segmentation_logits and token_logits, or a mask."
        )
    return index


def check_classes(variant: Variant, outputs: Tensor) -> None:
    if variant.n_output(outputs) < 2:
        raise ValueError(
            f"Variant {variant.name!r} needs two classes at least; found outputs of shape {tuple(outputs.shape)}. "
            "Use 'classif_binary_logits' for one logit by decision."
        )
