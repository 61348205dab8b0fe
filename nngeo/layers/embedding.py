"""Embeddings: a linear map of one-hot inputs, which are never formed."""

from __future__ import annotations

import torch
from torch import nn

from nngeo.layers.rule import Gradients, LinearMapRule, register_rule
from nngeo.linalg.outer import SelectedProducts


@register_rule(nn.Embedding)
class EmbeddingRule(LinearMapRule):
    """`out[t] = W[index[t]]`; rows of `padding_idx` get no gradient."""

    transposed = True
    parameters = ("weight",)

    def serves(self, module):
        # max_norm rewrites the weight in forward; scale_grad_by_freq makes its gradient no derivative.
        return super().serves(module) and module.max_norm is None and not module.scale_grad_by_freq

    def inputs(self, module, x):
        return x.flatten(1)

    def outgrads(self, module, g):
        return g.flatten(2, -2)[None]

    def gradients(self, module, x, g, layer, names):
        index, g = self.inputs(module, x), self.outgrads(module, g)
        padding = -1 if module.padding_idx is None else module.padding_idx
        keep = index != padding
        products = SelectedProducts(index, keep, module.num_embeddings, g)
        return Gradients(self.view(module, layer), products)

    def nothing(self, module, layer, k, b, like):
        index = torch.zeros(b, 1, dtype=torch.long, device=like.device)
        g = like.new_zeros(1, k, b, 1, module.embedding_dim)
        products = SelectedProducts(index, index.bool(), module.num_embeddings, g)
        return Gradients(self.view(module, layer), products)
