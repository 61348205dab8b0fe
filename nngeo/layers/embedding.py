"""Embeddings: a linear map of one-hot inputs, which are never formed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nngeo.layers.collection import Layer
from nngeo.layers.rule import Factored, LinearMapRule, Names, register_rule
from nngeo.linalg.selected import SelectedProducts


@register_rule(nn.Embedding)
class EmbeddingRule(LinearMapRule):
    """`out[t] = W[index[t]]`; rows of `padding_idx` get no gradient."""

    transposed = True
    parameters = ("weight",)

    def serves(self, module: Any) -> bool:
        # max_norm rewrites the weight in forward; scale_grad_by_freq makes its gradient no derivative.
        return super().serves(module) and module.max_norm is None and not module.scale_grad_by_freq

    def inputs(self, module: Any, x: Tensor) -> Tensor:
        return x.flatten(1)

    def outgrads(self, module: Any, g: Tensor) -> Tensor:
        return g.flatten(2, -2)[None]

    def gradients(self, module: Any, x: Tensor, g: Tensor, layer: Layer, names: Names) -> Factored:
        index, g = self.inputs(module, x), self.outgrads(module, g)
        padding = -1 if module.padding_idx is None else module.padding_idx
        keep = index != padding
        products = SelectedProducts(index, keep, module.num_embeddings, g)
        return Factored(self.view(module, layer), products)

    def nothing(self, module: Any, layer: Layer, k: int, b: int, like: Tensor) -> Factored:
        index = torch.zeros(b, 1, dtype=torch.long, device=like.device)
        g = like.new_zeros(1, k, b, 1, module.embedding_dim)
        products = SelectedProducts(index, index.bool(), module.num_embeddings, g)
        return Factored(self.view(module, layer), products)
