"""Standard normal vectors. The dtype is torch's default one unless it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nngeo.layers.collection import LayerCollection, checked_layers
from nngeo.linalg.arguments import count, device_named, floating, random_source
from nngeo.vectors.fvector import FVector
from nngeo.vectors.pvector import PVector


def standard_normal(shape: Sequence[int], device: Any = None, dtype: Any = None, generator: Any = None) -> Tensor:
    """Standard normal numbers in a shape; the arguments are checked."""
    device = None if device is None else device_named(device)
    dtype = None if dtype is None else floating(dtype)
    source = random_source(generator)
    if source is not None and source.device.type != (device or torch.empty(0).device).type:
        raise ValueError(f"`generator` is on {source.device}, and the numbers are to be on {device or 'cpu'}.")
    return torch.randn(shape, device=device, dtype=dtype, generator=source)


def random_pvector(
    layer_collection: LayerCollection,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> PVector:
    """A flat PVector of standard normal numbers."""
    size = checked_layers(layer_collection).numel()
    return PVector(layer_collection, standard_normal((size,), device, dtype, generator))


def random_pvector_dict(
    layer_collection: LayerCollection,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> PVector:
    """A PVector of standard normal numbers, with one tensor for each parameter."""
    tensors = {
        name: tuple(standard_normal(shape, device, dtype, generator) for shape in layer.shapes.values())
        for name, layer in checked_layers(layer_collection).layers.items()
    }
    return PVector(layer_collection, dict_repr=tensors)


def random_fvector(
    n_samples: int,
    n_output: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> FVector:
    """An FVector of standard normal numbers, (n_output, n_samples)."""
    shape = count("n_output", n_output, least=0), count("n_samples", n_samples, least=0)
    return FVector(standard_normal(shape, device, dtype, generator))
