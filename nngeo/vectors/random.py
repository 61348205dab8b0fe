"""Standard normal vectors. The dtype is torch's default one unless it is given."""

from __future__ import annotations

import torch

from nngeo.layers.collection import LayerCollection
from nngeo.vectors.fvector import FVector
from nngeo.vectors.pvector import PVector


def random_pvector(
    layer_collection: LayerCollection,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> PVector:
    """A flat PVector of standard normal numbers."""
    return PVector(
        layer_collection, torch.randn(layer_collection.numel(), device=device, dtype=dtype, generator=generator)
    )


def random_pvector_dict(
    layer_collection: LayerCollection,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> PVector:
    """A PVector of standard normal numbers, with one tensor for each parameter."""
    tensors = {
        name: tuple(
            torch.randn(shape, device=device, dtype=dtype, generator=generator) for shape in layer.shapes.values()
        )
        for name, layer in layer_collection.layers.items()
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
    return FVector(torch.randn(n_output, n_samples, device=device, dtype=dtype, generator=generator))
