"""The order of several losses: which example and which loss of it a row of the Jacobian belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Objectives:
    """m losses as (k, b): k losses of each of b examples; without an axis of examples, m losses of the whole batch."""

    losses: Tensor
    axis: int | None
    k: int
    b: int

    @classmethod
    def of(cls, losses: Tensor, batch_dim: int | None) -> Objectives:
        """With the errors for what can't be losses."""
        if not isinstance(losses, Tensor):
            raise TypeError(f"losses is a {type(losses).__name__}; give a tensor with one entry for each loss.")
        if not losses.requires_grad or not losses.numel():
            found = "have no graph" if losses.numel() else f"are empty, of shape {tuple(losses.shape)}"
            raise ValueError(
                f"The losses {found}: their gradients are not defined. Compute them with gradients enabled."
            )
        if losses.is_complex():
            raise ValueError("The losses are complex, and can't be minimised: give real ones, such as their abs().")
        if batch_dim is None:
            return cls(losses, None, losses.numel(), 1)
        if not -losses.ndim <= batch_dim < losses.ndim:
            raise ValueError(
                f"The losses have shape {tuple(losses.shape)}, without an axis {batch_dim} of examples. Use a loss "
                'with reduction="none" for one loss per example, or Engine(..., batch_dim=None) for losses of the '
                "whole batch."
            )
        b = losses.shape[batch_dim]
        return cls(losses, batch_dim % losses.ndim, losses.numel() // b, b)

    def cotangents(self, some: slice) -> Tensor:
        """(some of k, *losses): each reaches one loss of every example."""
        return self._shaped(self._identity(self.k)[some, :, None].expand(-1, -1, self.b))

    def rows(self, some: slice, examples: slice) -> Tensor:
        """(some of k x some of b, *losses): each reaches one loss."""
        k, b = self._identity(self.k)[some], self._identity(self.b)[examples]
        return self._shaped(torch.einsum("ij,ab->iajb", k, b).flatten(0, 1))

    def split(self, row: Tensor) -> Tensor:
        """Numbers (m,), one for each loss, as (k, b)."""
        if self.axis is None:
            return row.view(self.k, 1)
        return row.view(self.losses.shape).movedim(self.axis, 0).reshape(self.b, self.k).T

    def joined(self, tensor: Tensor) -> Tensor:
        """(k, b, ...) -> (m, ...), in the order of the losses."""
        rest = tensor.shape[2:]
        if self.axis is None:
            return tensor.reshape(self.k, *rest)
        others = (*self.losses.shape[: self.axis], *self.losses.shape[self.axis + 1 :])
        return tensor.transpose(0, 1).reshape(self.b, *others, *rest).movedim(0, self.axis).reshape(-1, *rest)

    def _identity(self, size: int) -> Tensor:
        return torch.eye(size, dtype=self.losses.dtype, device=self.losses.device)

    def _shaped(self, rows: Tensor) -> Tensor:
        """(n, k, b) -> (n, *losses)."""
        return self.joined(rows.permute(1, 2, 0)).movedim(-1, 0).reshape(-1, *self.losses.shape)
