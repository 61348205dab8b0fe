"""Classes: the softmax of logits, one for each example or for each position."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nngeo.variants.base import Cotangents, Variant, keep, working
from nngeo.variants.classes import INTEGERS, check_classes, class_indices, draw, in_range
from nngeo.variants.registry import register_variant


class SoftmaxVariant(Variant):
    """Classes drawn from the softmax of logits, independently at every position; losses add up over positions.

    The metric at a position is diag(p) - p p'. Its root has C - 1 columns (Tanabe & Sagae, 1992); there is one
    cotangent for each position and column, zero at the other positions.
    """

    by_example = True
    reads_targets = False
    class_axis: int
    ignore_index: int | None = None

    @abstractmethod
    def validate(self, outputs: Tensor) -> None: ...

    def exact(self, outputs: Tensor, targets: tuple[Any, ...] = (), mask: Tensor | None = None) -> Cotangents:
        counted = self._rows_counted(outputs, targets, mask)
        rows = self._rows(working(outputs))
        b, t, classes = rows.shape
        count = t * (classes - 1)

        @cache
        def logarithms() -> tuple[Tensor, Tensor]:
            log_p = rows.log_softmax(-1)
            return log_p, log_p.flip(-1).logcumsumexp(-1).flip(-1)

        @cache
        def probabilities() -> tuple[Tensor, Tensor]:
            p = rows.softmax(-1)
            return p, p.argmax(-1, keepdim=True)

        def chunk(start: int, stop: int) -> Tensor:
            log_p, log_tails = logarithms()
            at = torch.arange(start, min(stop, count), device=log_p.device)
            position, column = at // (classes - 1), at % (classes - 1)
            columns = keep(None if counted is None else counted[:, position], _root(log_p, log_tails, position, column))
            if t == 1:
                return self._from_rows(columns.transpose(0, 1).unsqueeze(2).to(outputs.dtype), outputs)
            c = outputs.new_zeros(len(at), b, t, classes)
            c[at - start, :, position] = columns.transpose(0, 1).to(c.dtype)
            return self._from_rows(c, outputs)

        def metric(v: Tensor) -> Tensor:
            p, likeliest = probabilities()
            x = self._rows(v).to(p.dtype)
            # The metric ignores constants. Zero at the likeliest class, nothing cancels when p is almost one there.
            x = x - x.gather(-1, likeliest)
            product = x.sub_(torch.linalg.vecdot(p, x)[..., None]).mul_(p)
            return self._from_rows(keep(counted, product)[None], outputs)[0].to(v.dtype)

        def products(v: Tensor) -> Tensor:
            log_p, log_tails = logarithms()
            return _root_products(log_p, log_tails, keep(counted, self._rows(v).to(log_p.dtype))).to(v.dtype)

        return Cotangents(count, chunk, metric, products)

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        return draw(self._rows(working(outputs)).softmax(-1), generator).reshape(self.positions(outputs))

    def gradient(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        p = self._rows(working(outputs)).softmax(-1)
        counted = self._rows_counted(outputs, (), mask)
        index = class_indices(self, target, outputs).reshape(p.shape[:2])
        if self.ignore_index is not None and not 0 <= self.ignore_index < p.shape[-1]:
            kept = (index != self.ignore_index)[..., None]
            counted = kept if counted is None else counted & kept
        index = in_range(index, counted, p.shape[-1], self.name)
        # p_y - 1 as minus the sum of the others, which does not cancel when p_y is almost one.
        rest = p.scatter(-1, index, 0)
        gradient = keep(counted, rest.scatter_(-1, index, -rest.sum(-1, keepdim=True)))
        return self._from_rows(gradient[None], outputs)[0].to(outputs.dtype)

    def n_output(self, outputs: Tensor) -> int:
        return outputs.shape[self.class_axis]

    def positions(self, outputs: Tensor) -> torch.Size:
        sizes = list(outputs.shape)
        del sizes[self.class_axis]
        return torch.Size(sizes)

    def counted(self, outputs: Tensor, targets: tuple[Any, ...] = (), mask: Tensor | None = None) -> Tensor | None:
        """(b, *positions): neither masked nor, where integer targets of that shape are given, `ignore_index`."""
        counted, target = super().counted(outputs, targets, mask), targets[0] if targets else None
        if self.ignore_index is None or not isinstance(target, Tensor):
            return counted
        if target.dtype not in INTEGERS or target.shape != self.positions(outputs):
            return counted
        kept = target.to(outputs.device) != self.ignore_index
        return kept if counted is None else counted & kept

    def _rows_counted(self, outputs: Tensor, targets: tuple[Any, ...], mask: Tensor | None) -> Tensor | None:
        """(b, t, 1)."""
        counted = self.counted(outputs, targets, mask)
        return None if counted is None else counted.reshape(len(outputs), math.prod(counted.shape[1:]), 1)

    def _rows(self, x: Tensor) -> Tensor:
        """(b, t, C) of (b, *outputs)."""
        x = x.movedim(self.class_axis, -1)
        return x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])

    def _from_rows(self, rows: Tensor, outputs: Tensor) -> Tensor:
        """(m, b, *outputs) of (m, b, t, C)."""
        x = rows.reshape(len(rows), *outputs.movedim(self.class_axis, -1).shape)
        return x.movedim(-1, self.class_axis + 1 if self.class_axis >= 0 else self.class_axis)


@register_variant("classif_logits")
class ClassifLogits(SoftmaxVariant):
    """One class for each example, from logits (b, C)."""

    class_axis = 1

    def validate(self, outputs: Tensor) -> None:
        Variant.validate(self, outputs)
        if outputs.ndim != 2:
            raise ValueError(
                f"Variant 'classif_logits' needs logits (b, class); found outputs of shape {tuple(outputs.shape)}. "
                "Use 'segmentation_logits' for (b, class, *positions) or 'token_logits' for (b, *positions, class)."
            )
        check_classes(self, outputs)


class _PositionsVariant(SoftmaxVariant):
    """A class for each position; those whose target is `ignore_index` do not count (None: all count)."""

    layout: str

    def __init__(self, ignore_index: int | None = -100):
        if not (ignore_index is None or isinstance(ignore_index, int)):
            raise TypeError(f"`ignore_index` must be an integer or None; found {type(ignore_index).__name__}.")
        self.ignore_index = ignore_index
        self.reads_targets = ignore_index is not None

    def validate(self, outputs: Tensor) -> None:
        Variant.validate(self, outputs)
        if outputs.ndim < 2:
            raise ValueError(
                f"Variant {self.name!r} needs logits {self.layout}; found outputs of shape {tuple(outputs.shape)}."
            )
        check_classes(self, outputs)


@register_variant("segmentation_logits")
class SegmentationLogits(_PositionsVariant):
    """A class for each position, from logits (b, C, *positions).

    Positions whose target is `ignore_index` do not count, where integer targets (b, *positions) are given.
    """

    class_axis, layout = 1, "(b, class, *positions)"


@register_variant("token_logits")
class TokenLogits(_PositionsVariant):
    """A class for each position, from logits (b, *positions, C).

    Positions whose target is `ignore_index` do not count, where integer targets (b, *positions) are given. Target and
    logits of one position belong together: for next-token prediction, shift one of them first (in `function`).
    With dict batches, positions whose "attention_mask" is 0 do not count either.
    """

    class_axis, layout, padded = -1, "(b, *positions, class)", True


def _root(log_p: Tensor, log_tails: Tensor, position: Tensor, column: Tensor) -> Tensor:
    """(b, m, C): columns of the Cholesky factors of diag(p) - p p', each of one position of log_p (b, t, C).

    With r_j = p_j + ... + p_C (`log_tails`), entry j of column j is sqrt(p_j r_j+1 / r_j) and entry i > j is
    -p_i sqrt(p_j / (r_j r_j+1)): Tanabe & Sagae (1992). Differences 1 - p_1 - ... - p_j would cancel where a class
    vanishes; the logarithms of the sums do not.
    """
    log_pj, log_r = log_p[:, position, column], log_tails[:, position, column]
    log_next = log_tails[:, position, column + 1]
    log_pi = log_p if log_p.shape[1] == 1 else log_p[:, position]
    below = (log_pi + ((log_pj - log_r - log_next) / 2)[..., None]).exp().neg_()
    classes, at = torch.arange(log_p.shape[-1], device=log_p.device), column[:, None]
    on = ((log_pj + log_next - log_r) / 2).exp()[..., None]
    entries = torch.where(classes > at, below, 0).scatter_(-1, at.expand(len(log_p), -1, -1), on)
    # A class of probability zero has no row; the formula would give inf - inf where all classes after j are such.
    return torch.where(log_pi == -math.inf, 0, entries)


def _root_products(log_p: Tensor, log_tails: Tensor, x: Tensor) -> Tensor:
    """(t (C - 1), b): the products of x (b, t, C) with all columns of `_root`, in O(C) for each position.

    That of column j is sqrt(p_j r_j+1 / r_j) (x_j - the mean of x over the classes after j, weighted by p).
    """
    after = log_tails[..., 1:]
    on = ((log_p[..., :-1] + after - log_tails[..., :-1]) / 2).exp()
    rest, weighted = after.exp(), (log_p.exp() * x).flip(-1).cumsum(-1).flip(-1)[..., 1:]
    # Where the classes after j have no probability that a number holds, the column is zero to half of all digits.
    return torch.where(rest > 0, on * (x[..., :-1] - weighted / rest), 0).flatten(1).mT
