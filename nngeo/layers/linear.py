"""Linear layers, on any number of axes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nngeo.layers.rule import LinearMapRule, register_rule


@register_rule(nn.Linear)
class LinearRule(LinearMapRule):
    """`out[..., :] = W in[..., :] + bias`; all axes between the example and the features are positions."""

    def inputs(self, module: Any, x: Tensor) -> Tensor:
        return x.flatten(1, -2)[None]

    def outgrads(self, module: Any, g: Tensor) -> Tensor:
        return g.flatten(2, -2)[None]


@register_rule("transformers.pytorch_utils.Conv1D")
class TransposedLinearRule(LinearRule):
    """The layer of GPT-2: a Linear whose weight is stored (i, o)."""

    transposed = True
