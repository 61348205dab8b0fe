"""Multiples of the identity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nngeo.layers.collection import LayerCollection
from nngeo.linalg.arguments import device_named, floating, number, tensor
from nngeo.linalg.spectrum import Spectrum
from nngeo.linalg.symmetric import reciprocal
from nngeo.representations.base import PMat, entry
from nngeo.representations.damping import Damping
from nngeo.representations.diag import PMatDiag

if TYPE_CHECKING:
    from typing_extensions import Self


class PMatEye(PMat):
    """`scaling` times the identity. It acts on vectors of any dtype and device.

    Args:
        scaling: a number, or a tensor with one entry.
        device, dtype: those of `to_torch()` and `get_diag()`; torch's defaults if None.

    >>> import torch
    >>> from nngeo.layers.collection import LayerCollection
    >>> layers = LayerCollection.from_model(torch.nn.Linear(1, 1))
    >>> PMatEye(layers, 3.0).mv(torch.ones(2))
    tensor([3., 3.])
    """

    data: Tensor  # 0-d, float64

    def __init__(
        self,
        layer_collection: LayerCollection,
        scaling: float | Tensor = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        examples: Any = None,
    ):
        if examples is not None:
            raise NotImplementedError(
                "The identity is not estimated from examples: make it by PMatEye(layer_collection, `scaling`)."
            )
        number("scaling", scaling)
        super().__init__(layer_collection, data=torch.as_tensor(scaling, device="cpu"))
        self._kind = torch.empty(
            0,
            device=None if device is None else device_named(device),
            dtype=None if dtype is None else floating(dtype),
        )

    def _checked(self, data: Any) -> Tensor:
        if data.numel() != 1 or data.is_complex():
            raise ValueError(f"`scaling` should be one number, is a tensor {tuple(data.shape)}.")
        # 0-d tensors on the CPU multiply those of any dtype and device, and leave both as they are.
        return data.detach().to("cpu", torch.float64).reshape(())

    def _estimate(self, examples: Any) -> tuple[Tensor, int]:
        raise NotImplementedError("The identity is not estimated from examples; give its `scaling`.")

    @property
    def _sample(self) -> Tensor:
        return self._kind

    def _check_kind(self, flat: Tensor) -> None:
        pass

    def _mv(self, v: Tensor) -> Tensor:
        return self.data * v

    def _solve(self, v: Tensor, regul: float) -> Tensor:
        return reciprocal(self.data, regul) * v

    def _diag(self) -> Tensor:
        return self.data.to(self._sample).repeat(self.layer_collection.numel())

    def _shifted(self, damping: Damping) -> PMat:
        """Still a multiple of the identity, or a PMatDiag where the damping is none."""
        if isinstance(damping.value, Tensor) and not damping.value.ndim:
            return self._derived(self.data + damping.value.to("cpu", torch.float64))
        return PMatDiag(self.layer_collection, data=self._diag() + damping.flat())

    def _function(self, f: Callable[[Tensor], Tensor]) -> Self:
        return self._derived(f(self.data))

    def _spectrum(self) -> Spectrum:
        return Spectrum(self._diag(), lambda v: v, lambda c: c)

    def _norm(self, ord: str | int) -> Tensor:
        values = self.data.abs() * (self.layer_collection.numel() ** 0.5 if ord == "fro" else 1.0)
        return values.to(self._sample)

    def _state(self) -> dict[str, Any]:
        return {"data": self.data, "sample": self._sample}

    def _load(self, state: Mapping[str, Any], to: Callable[[Tensor], Tensor]) -> Tensor:
        self._kind = to(tensor("sample", entry(state, "sample"), "(0,)", ndim=1))
        return self._checked(tensor("data", entry(state, "data"), "()"))

    def _scaled(self, factor: float | Tensor) -> Self:
        factor = factor.to("cpu", torch.float64) if isinstance(factor, Tensor) else factor
        return self._like(factor * self.data, None)

    def _added(self, other: Self) -> Self:
        return self._like(self.data + other.data, None)
