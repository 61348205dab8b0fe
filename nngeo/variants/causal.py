"""Language models that predict the next token: labels of the position itself, as Hugging Face models take them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nngeo.variants.base import Cotangents, Variant
from nngeo.variants.categorical import TokenLogits
from nngeo.variants.registry import register_variant


@register_variant("causal_lm")
class CausalLM(Variant):
    """The next token, from logits (b, t, C): those of a position belong to the label of the next one.

    Labels (b, t) are those of the positions themselves, as in `labels=input_ids`; the first one, which nothing
    predicts, and the logits of the last position do not count. Labels that are `ignore_index` do not count either, nor
    does a pair of positions of which the "attention_mask" of a dict batch leaves one out. A mask given by `mask=` says,
    at the positions of the labels, which of them count.

    >>> import torch
    >>> logits, labels = torch.zeros(1, 3, 2), torch.tensor([[1, 0, -100]])
    >>> CausalLM().gradient(logits, labels)
    tensor([[[-0.5000,  0.5000],
             [ 0.0000,  0.0000],
             [ 0.0000,  0.0000]]])
    """

    padded = True
    by_example = True

    def __init__(self, ignore_index: int | None = -100):
        self._tokens = TokenLogits(ignore_index)
        self._tokens.name = self.name
        self.reads_targets = self._tokens.reads_targets

    def validate(self, outputs: Tensor) -> None:
        Variant.validate(self, outputs)
        if outputs.ndim != 3:
            raise ValueError(
                f"Variant {self.name!r} needs logits (b, position, class); found outputs of shape "
                f"{tuple(outputs.shape)}."
            )
        self._tokens.validate(outputs)

    def exact(self, outputs: Tensor, targets: tuple[Any, ...] = (), mask: Tensor | None = None) -> Cotangents:
        c = self._tokens.exact(outputs[:, :-1], (), self._next(outputs, targets, mask))
        return Cotangents(
            c.count,
            lambda start, stop: _with_last(c.chunk(start, stop)),
            lambda v: _with_last(c.metric(v[:, :-1])),
        )

    def sample(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """(b, t) labels, the first one zero."""
        return F.pad(self._tokens.sample(outputs[:, :-1], generator), (1, 0))

    def gradient(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        _check_labels(target, outputs)
        counted = self._next(outputs, (), mask)
        return _with_last(self._tokens.gradient(outputs[:, :-1], target[:, 1:], counted))

    def n_output(self, outputs: Tensor) -> int:
        return outputs.shape[-1]

    def positions(self, outputs: Tensor) -> torch.Size:
        return outputs.shape[:-1]

    def counted(self, outputs: Tensor, targets: tuple[Any, ...] = (), mask: Tensor | None = None) -> Tensor | None:
        """(b, t), at the positions of the labels."""
        if targets and isinstance(targets[0], Tensor):
            _check_labels(targets[0], outputs)
        return self._tokens.counted(outputs, targets, mask)

    def attended(self, mask: Tensor) -> Tensor:
        """A label counts where its own position and the one that predicts it are attended to."""
        return mask & F.pad(mask[:, :-1], (1, 0), value=True) if mask.ndim > 1 else mask

    def left_out(self, outputs: Tensor, mask: Tensor) -> Tensor:
        """What holds no label that counts and predicts none."""
        mask = mask.to(outputs.device)
        return ~(mask | F.pad(mask[:, 1:], (0, 1), value=False)) if mask.ndim > 1 else ~mask

    def _next(self, outputs: Tensor, targets: tuple[Any, ...], mask: Tensor | None) -> Tensor | None:
        """(b, t - 1), whether the label of the next position counts."""
        counted = self.counted(outputs, targets, mask)
        return None if counted is None else counted[:, 1:]


def _with_last(x: Tensor) -> Tensor:
    """(..., t, C), zero at the last position, of (..., t - 1, C)."""
    return F.pad(x, (0, 0, 0, 1))


def _check_labels(labels: Any, outputs: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.shape != outputs.shape[:-1]:
        found = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(
            f"Variant 'causal_lm' needs labels of the shape {tuple(outputs.shape[:-1])} of the tokens, each that of "
            f"its own position; found {found}. Labels that are shifted already are those of 'token_logits'."
        )
