"""What a matrix asks of the thing that runs the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from nngeo.generators.batches import Function
from nngeo.generators.record import BatchRecord
from nngeo.layers.collection import LayerCollection
from nngeo.layers.models import check_structure, check_usable
from nngeo.linalg.arguments import device_named

if TYPE_CHECKING:
    from nngeo.generators.kept import LinearizedGenerator


class Generator(ABC):
    """Runs the model on examples. Tensors in and out are flat, in the order of the LayerCollection."""

    model: nn.Module
    function: Function | None
    sums_squares: ClassVar[bool] = True  # whether the matrix is a sum of squares of gradients, so that it has `records`

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    @property
    def described(self) -> str:
        """What it estimates, for the headers of files."""
        return type(self).__name__

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of results: the model's, or float32 for half precision."""
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype

    @abstractmethod
    def mv(self, v: Tensor, examples: Any, layer_collection: LayerCollection) -> Tensor:
        """F v, like v (..., P), without F. The forward of a mini-batch is shared by all vectors."""

    def vTMv(self, v: Tensor, examples: Any, layer_collection: LayerCollection) -> Tensor:
        """v' F v (...), for v (..., P)."""
        return (v * self.mv(v, examples, layer_collection)).sum(-1)

    def linearize(self, examples: Any, layer_collection: LayerCollection) -> LinearizedGenerator:
        """A generator whose products are with the graphs of all mini-batches, which are recorded here and kept."""
        raise NotImplementedError(f"{type(self).__name__} keeps no graphs: use the matrix without linearize().")

    @abstractmethod
    def dense(self, examples: Any, layer_collection: LayerCollection) -> tuple[Tensor, int]:
        """F (P, P), and the number of examples."""

    @abstractmethod
    def diagonal_blocks(self, examples: Any, layer_collection: LayerCollection) -> tuple[dict[str, Tensor], int]:
        """The diagonal blocks (p, p) of F by layer, and the number of examples."""

    @abstractmethod
    def records(self, examples: Any, layer_collection: LayerCollection, factors: bool = True) -> Iterator[BatchRecord]:
        """Per-layer gradients of mini-batches; `factors` says whether those of linear maps have to be there.

        Raises:
            NotImplementedError: the matrix is no sum of their squares.
        """


def device_of(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """The device of the model, which is where batches go; raises if `device` is another one, or there are several."""
    check_structure(model)
    check_usable(model)
    devices = {p.device: name for name, p in model.named_parameters()}
    if not devices:
        raise ValueError(f"{type(model).__name__} has no parameters.")
    if len(devices) > 1:
        found = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ValueError(f"The parameters are on several devices ({found}); bring them to one by model.to(device).")
    (own,) = devices
    asked = own if device is None else device_named(device)
    if asked.type != own.type or (asked.index is not None and asked.index != own.index):
        raise ValueError(f"device={str(device)!r}, but the model is on {own}: move it there, or leave `device` out.")
    return own


def dtype_is_one(model: nn.Module, layers: LayerCollection) -> None:
    """Raise unless the layers' parameters are real numbers of one dtype."""
    dtypes = {p.dtype: name for name, p in layers.named_parameters(model)}
    for dtype, name in dtypes.items():
        if dtype.is_complex:
            raise TypeError(
                f"Parameter {name!r} has dtype {dtype}; derivatives are by real numbers. Keep its real and imaginary "
                "part as a parameter (torch.view_as_real), and join them in the forward (torch.view_as_complex); or "
                "leave its layer out of `layer_collection`."
            )
    if len(dtypes) > 1:
        found = ", ".join(f"{name} {dtype}" for dtype, name in dtypes.items())
        raise ValueError(f"The parameters have several dtypes ({found}); bring them to one by model.to(dtype).")
