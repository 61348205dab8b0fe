"""Diagonals through layers with weights: by squared weights and squared inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad

from nngeo.layers.collection import Layer
from nngeo.layers.replace import call_with
from nngeo.layers.rule import LinearMapRule, ScaleRule, rule_for
from nngeo.linalg.outer import OuterProducts
from nngeo.products.diagrules import Collected, DiagRule, ElementwiseRule, Passage, add, register_diag_rule

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


class _Convolution(NamedTuple):
    forward: Callable[..., Tensor]
    input_gradient: Callable[..., Tensor]


_CONVOLUTIONS = {  # by the number of axes
    1: _Convolution(F.conv1d, grad.conv1d_input),
    2: _Convolution(F.conv2d, grad.conv2d_input),
    3: _Convolution(F.conv3d, grad.conv3d_input),
}


@register_diag_rule(nn.Linear, nn.Embedding, *CONVOLUTIONS)
class LinearMap(DiagRule):
    """`out = W a + bias` at every position: `(W * W)' m` at the input, sums over positions of `m (a * a)'` at W."""

    def serves(self, module: Any) -> bool:
        # Padding by copies, and rows that get no gradient, are no maps by the squared weight.
        plain = getattr(module, "padding_mode", "zeros") == "zeros" and getattr(module, "padding_idx", None) is None
        return plain and isinstance(rule_for(module), LinearMapRule)

    def pull(self, call: Passage, m: Tensor, found: Collected, below: bool) -> Tensor | None:
        module: Any = call.module
        if found.wants(module.weight):
            found.add(module.weight, _at_weight(module, call.x, m))
        if found.wants(getattr(module, "bias", None)):
            found.add(module.bias, _at_bias(module, m))
        return self._back(call, m) if below else None

    def push(self, call: Passage, s: Tensor | None, given: Collected) -> Tensor | None:
        module: Any = call.module
        total = None if s is None else _on(module, module.weight.detach().square(), None, s)
        q, r = given.of(module.weight), given.of(getattr(module, "bias", None))
        if q is None and r is None:
            return total
        inputs = call.x.square() if call.x.is_floating_point() else call.x
        return add(total, _on_each(module, q, r, inputs))

    def _back(self, call: Passage, m: Tensor) -> Tensor:
        """The transposed map by the squared weight, at m."""
        module: Any = call.module
        squared = module.weight.detach().square()
        if isinstance(module, nn.Linear):
            return m @ squared
        if not isinstance(module.padding, str):
            size = _CONVOLUTIONS[squared.ndim - 2]
            options = (module.stride, module.padding, module.dilation, module.groups)
            if isinstance(module, TRANSPOSED):
                return size.forward(m, squared, None, *options)
            return size.input_gradient(call.x.shape, squared, m, *options)
        with torch.enable_grad():
            x = call.x.detach().requires_grad_()
            return torch.autograd.grad(_on(module, squared, None, x), x, m)[0]


@register_diag_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class BatchNormMap(ElementwiseRule):
    """In eval mode, an affine map of every entry: weight and bias by channel."""

    def serves(self, module: Any) -> bool:
        return module.weight is None or isinstance(rule_for(module), ScaleRule)

    def pull(self, call: Passage, m: Tensor, found: Collected, below: bool) -> Tensor | None:
        module, rule = call.module, rule_for(call.module)
        if isinstance(rule, ScaleRule):
            parts = {"weight": lambda: m * rule.normalized(module, call.x).square(), "bias": lambda: m}
            for name, part in parts.items():
                if found.wants(p := getattr(module, name)):
                    found.add(p, rule.positions(module, part()[None, :, None]).sum(-2)[0])
        return super().pull(call, m, found, below)

    def push(self, call: Passage, s: Tensor | None, given: Collected) -> Tensor | None:
        module, rule = call.module, rule_for(call.module)
        total = super().push(call, s, given)
        if isinstance(rule, ScaleRule):
            channels = (-1, call.x.shape[1], *[1] * (call.x.ndim - 2))
            q, r = given.of(module.weight), given.of(module.bias)
            total = total if q is None else add(total, rule.normalized(module, call.x).square() * q.reshape(channels))
            total = total if r is None else add(total, r.reshape(channels).expand_as(call.x))
        return total


def _on(module: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """The module's output at x with another weight and bias; a bias None is zero."""
    tensors = {"weight": weight}
    if getattr(module, "bias", None) is not None:
        tensors["bias"] = torch.zeros_like(module.bias) if bias is None else bias
    return call_with(module, tensors, (x,), {})


def _on_each(module: Any, q: Tensor | None, r: Tensor | None, x: Tensor) -> Tensor:
    """The same with the weights q (b or 1, ...) and biases r (b or 1, ...) of every example."""
    q = torch.zeros_like(module.weight).flatten()[None] if q is None else q

    def one(q: Tensor, r: Tensor | None, x: Tensor) -> Tensor:
        return _on(module, q.reshape(module.weight.shape), r, x)

    if len(q) == 1 and (r is None or len(r) == 1):
        return one(q[0], None if r is None else r[0], x)
    b = len(x)
    biases = None if r is None else r.expand(b, -1)
    found = torch.func.vmap(one, (0, None if r is None else 0, 0))(q.expand(b, -1), biases, x[:, None])
    return found.squeeze(1)


def _at_weight(module: Any, x: Tensor, m: Tensor) -> Tensor:
    """(b, entries of the weight)."""
    rule: Any = rule_for(module)
    layer = Layer("", type(module).__name__, {"weight": module.weight.shape})
    factored = rule.gradients(module, x[:, None], m[None, :, None], layer, {"weight": "weight"})
    products = factored.products
    if isinstance(products, OuterProducts):
        products = OuterProducts(products.a.square(), products.g)
    return factored.view.to_flat(products.dense())[0]


def _at_bias(module: Any, m: Tensor) -> Tensor:
    """(b, entries of the bias)."""
    rule: Any = rule_for(module)
    return rule.outgrads(module, m[None, :, None])[:, 0].sum(2).transpose(0, 1).flatten(1)
