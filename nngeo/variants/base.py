"""Variants: what a likelihood of targets says at the outputs of a network."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nngeo.linalg.outer import BUDGET


@dataclass(frozen=True)
class Cotangents:
    """Vectors c_k at the outputs of every example; the sum of c_k c_k' over k is the metric there.

    `chunk(start, stop)` builds (stop - start, b, *outputs) when it is asked: (k, b, *outputs) need never be held whole.
    `metric(v)` is the metric times v (b, *outputs), and `products(v)` are the products (k, b) of all cotangents with
    it; in closed form where there is one.

    >>> c = Cotangents.from_tensor(torch.tensor([[[1.0, 2.0]], [[0.0, 3.0]]]))  # k = 2, b = 1, two outputs
    >>> c.count, c.chunk(1, 2)
    (2, tensor([[[0., 3.]]]))
    >>> c.metric(torch.tensor([[1.0, 0.0]]))
    tensor([[1., 2.]])
    """

    count: int
    chunk: Callable[[int, int], Tensor]
    metric: Callable[[Tensor], Tensor]
    products: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def from_tensor(cls, c: Tensor) -> Cotangents:
        """Those of c (k, b, *outputs)."""
        flat = c.reshape(*c.shape[:2], math.prod(c.shape[2:]))

        def metric(v: Tensor) -> Tensor:
            weights = torch.einsum("kbo,bo->kb", flat, v.reshape(flat.shape[1:]).to(flat.dtype))
            return torch.einsum("kb,kbo->bo", weights, flat).reshape(v.shape).to(v.dtype)

        return cls(len(c), lambda start, stop: c[start:stop], metric)

    @classmethod
    def diagonal(cls, root: Tensor, dtype: torch.dtype | None = None) -> Cotangents:
        """Those of the diagonal metric root^2, for root (b, *outputs): one unit vector, scaled, for each output."""
        b, o = len(root), math.prod(root.shape[1:])
        flat, dtype = root.reshape(b, o), dtype or root.dtype

        def chunk(start: int, stop: int) -> Tensor:
            at = torch.arange(start, min(stop, o), device=root.device)
            c = root.new_zeros(len(at), b, o, dtype=dtype)
            c[at - start, :, at] = flat[:, at].mT.to(dtype)
            return c.reshape(len(c), *root.shape)

        def products(v: Tensor) -> Tensor:
            return (flat * v.reshape(b, o)).mT.to(v.dtype)

        return cls(o, chunk, lambda v: (root.square() * v).to(v.dtype), products)

    def contracted(self, rows: Tensor) -> Tensor:
        """(m, k, b), the products of all cotangents with each of rows (m, b, *outputs)."""
        if self.products is not None:
            return torch.stack([self.products(row) for row in rows])
        flat = rows.flatten(2) if rows.ndim > 2 else rows[..., None]
        step = max(1, BUDGET // max(1, flat[0].numel()))
        found = []
        for start in range(0, self.count, step):
            c = self.chunk(start, min(start + step, self.count)).to(flat.dtype)
            found.append(torch.einsum("kbo,mbo->mkb", c.reshape(len(c), *flat.shape[1:]), flat))
        return torch.cat(found, 1)

    def all(self) -> Tensor:
        """(k, b, *outputs), all at once."""
        return self.chunk(0, self.count)


class Variant(ABC):
    """A likelihood of targets given outputs (b, ...), seen from the outputs: metric, draws and gradients.

    A subclass needs `exact`; with `sample` and `gradient` it has Monte-Carlo and empirical estimates, too. A metric
    sums over the outputs and positions of an example, and is averaged over examples later. In masks, True counts.

    Mini-batches are joined and split where `by_example` says that this changes nothing. A subclass of a variant that
    says so, and whose `exact` looks at the whole batch, has to take it back.
    """

    name: str = ""
    padded = False  # whether the "attention_mask" of a dict batch says which positions count
    reads_targets = True  # whether the exact metric depends on the targets, if only on which of them count
    by_example = False  # whether what it says of an example is the same in any batch, so that batches may be split

    @abstractmethod
    def exact(self, outputs: Tensor, targets: tuple[Any, ...] = (), mask: Tensor | None = None) -> Cotangents:
        """Cotangents of the expected metric, zero where `counted` is False."""

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """One draw of the targets of all examples; no randomness but the generator's is used."""
        raise NotImplementedError(
            f"Variant {self.name!r} has no Monte-Carlo estimate: it gives a metric, but no distribution to draw from. "
            "Use its exact metric, or another variant."
        )

    def gradient(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """(b, *outputs), of -log p(target | outputs) in the outputs; zero where the mask is False."""
        raise NotImplementedError(
            f"Variant {self.name!r} has no gradient at given targets: it gives a metric but no likelihood. "
            "Use its exact metric, or another variant."
        )

    def n_output(self, outputs: Tensor) -> int:
        """All outputs of one example; along the class axis only where there is one."""
        return math.prod(outputs.shape[1:])

    def positions(self, outputs: Tensor) -> torch.Size:
        """The shape (b, ...) that a mask over everything has."""
        return outputs.shape

    def counted(self, outputs: Tensor, targets: tuple[Any, ...] = (), mask: Tensor | None = None) -> Tensor | None:
        """(b, *positions), True for what counts, or None if all does.

        A mask may leave out trailing axes: (b,) keeps or drops whole examples (which are still counted in the mean).
        """
        if mask is None:
            return None
        shape = self.positions(outputs)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"`mask` must be a boolean tensor, True for what counts; found {found}: use mask.bool().")
        if mask.ndim == 0 or mask.shape != shape[: mask.ndim]:
            raise ValueError(
                f"`mask` of shape {tuple(mask.shape)} does not fit variant {self.name!r} on outputs of shape "
                f"{tuple(outputs.shape)}: it must have the shape {tuple(shape)}, or its leading axes."
            )
        trailing = (1,) * (len(shape) - mask.ndim)
        return mask.to(outputs.device).reshape(*mask.shape, *trailing).expand(shape)

    def attended(self, mask: Tensor) -> Tensor:
        """The mask that an attention mask (b, *positions) is, where no other is given."""
        return mask

    def left_out(self, outputs: Tensor, mask: Tensor) -> Tensor:
        """(b, *positions), True for the positions of the outputs that the mask takes out of what is averaged."""
        return ~mask.to(outputs.device)

    def validate(self, outputs: Tensor) -> None:
        """Raises if the outputs cannot be those of this variant."""
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
            found = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
            raise TypeError(
                f"Variant {self.name!r} needs outputs that are a real floating-point tensor; found {found}."
            )
        if outputs.ndim == 0:
            raise ValueError(
                f"Variant {self.name!r} needs outputs (b, ...), one row for each example; found a single number."
            )

    def __repr__(self) -> str:
        return f"<Variant {self.name!r}>"


def working(outputs: Tensor) -> Tensor:
    """The outputs without their graph, in float32 at least."""
    return outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))


def keep(counted: Tensor | None, x: Tensor) -> Tensor:
    """x, zero where `counted` is False; a NaN that does not count is zero too."""
    return x if counted is None else torch.where(counted, x, 0)


def aligned(target: Any, outputs: Tensor, name: str) -> Tensor:
    """The target in the shape, dtype and on the device of the outputs; only axes of size one may differ."""
    if not isinstance(target, Tensor):
        raise TypeError(f"Variant {name!r} needs a tensor of targets; found {type(target).__name__}.")

    def essential(shape: torch.Size) -> list[int]:
        return [*shape[:1], *(size for size in shape[1:] if size != 1)]

    if essential(target.shape) != essential(outputs.shape):
        raise ValueError(
            f"Variant {name!r} needs targets of the shape of the outputs, {tuple(outputs.shape)}; "
            f"found {tuple(target.shape)}."
        )
    return target.detach().to(outputs).reshape(outputs.shape)
