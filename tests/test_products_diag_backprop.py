"""Diagonals kept between layers: the recursion, where it is exact, and what serves which module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo.products import Diagonal, DiagRule, jmjTp, jTmjp, register_diag_rule
from nngeo.products.diagrules import Passage


def reals(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def recursion(layers: nn.Sequential, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """(b, n) by the inputs and (b, P) by the weights, from the exact diagonals of every layer alone."""
    inputs, found = [x], []
    for layer in layers:
        inputs.append(layer(inputs[-1].clone()).detach())
    for layer, at in reversed(list(zip(layers, inputs, strict=False))):
        metric = Diagonal(m.flatten(1))
        if list(layer.parameters()):
            found.append(jTmjp(layer, at, metric, "weight", result="diag"))
        m = jTmjp(layer, at, metric, result="diag").reshape(at.shape)
    return m.flatten(1), torch.cat(found[::-1], -1)


def forward_recursion(layers: nn.Sequential, x: Tensor, s: Tensor | None, q: Tensor) -> Tensor:
    """(b, o), of variances s at the inputs and q (b, P) at the weights."""
    total: Tensor | None = s
    for layer in layers:
        y, n = layer(x.clone()).detach(), sum(p.numel() for p in layer.parameters())
        parts = []
        if total is not None:
            parts.append(jmjTp(layer, x, Diagonal(total.flatten(1)), result="diag"))
        if n and s is None:
            parts.append(jmjTp(layer, x, Diagonal(q[:, :n]), "weight", result="diag"))
            q = q[:, n:]
        total, x = (sum(parts).reshape(y.shape) if parts else None), y
    return total.flatten(1)


def convolutional() -> nn.Sequential:
    body = [nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.MaxPool2d(2, 1)]
    body += [nn.ConvTranspose2d(2, 4, 2, groups=2), nn.Softplus(), nn.Conv2d(4, 2, 2, padding="same"), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(18, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 2, bias=False))


def sequential() -> nn.Sequential:
    body = [nn.Linear(3, 4), nn.GELU(), nn.Conv1d(5, 2, 2, padding="same", padding_mode="circular")]
    return nn.Sequential(*body, nn.Upsample(scale_factor=2), nn.AvgPool1d(2))


RECURSIONS = {"convolutional": (convolutional, (1, 6, 6)), "sequential": (sequential, (5, 3))}


@pytest.fixture(params=RECURSIONS)
def layered(request):
    build, shape = RECURSIONS[request.param]
    torch.manual_seed(0)
    return build().double().eval(), reals(3, *shape)


def test_diag_backprop_is_the_recursion_over_layers(layered):
    model, x = layered
    m = torch.rand(3, model(x.clone())[0].numel(), dtype=torch.float64)
    back = recursion(model, x, m.reshape(model(x.clone()).shape))
    for wrt, expected in zip(("input", "weight"), back, strict=True):
        assert_close(jTmjp(model, x, Diagonal(m), wrt, result="diag", method="diag_backprop"), expected)


def test_variances_go_forward_layer_by_layer(layered):
    model, x = layered
    s, q = reals(*x.shape).abs(), reals(3, sum(p.numel() for p in model.parameters())).abs()
    options: dict[str, Any] = {"result": "diag", "method": "diag_backprop"}
    assert_close(jmjTp(model, x, Diagonal(s.flatten(1)), **options), forward_recursion(model, x, s, q))
    assert_close(jmjTp(model, x, Diagonal(q), "weight", **options), forward_recursion(model, x, None, q))
    shared = forward_recursion(model, x, None, q[:1].expand(3, -1))
    assert_close(jmjTp(model, x, Diagonal(q[0]), "weight", **options), shared)


def test_diag_backprop_is_exact_for_the_last_two_linear_layers():
    model, x = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double(),
        reals(3, 3),
    )
    exact = jTmjp(model, x, None, "weight", result="diag")
    found = jTmjp(model, x, None, "weight", result="diag", method="diag_backprop")
    assert_close(found[:, 16:], exact[:, 16:])
    assert (found[:, :16] - exact[:, :16]).norm() > 1e-3 * exact[:, :16].norm()


class Doubled(nn.Module):
    """Twice a layer."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


@register_diag_rule(Doubled)
class DoubledRule(DiagRule):
    def forward(self, module, x, visit):
        inner = visit(module.inner, x)
        return Passage(module, self, x, 2 * inner.y, [inner])

    def pull(self, call, m, found, below):
        return call.children[0].rule.pull(call.children[0], 4 * m, found, below)

    def push(self, call, s, given):
        inner = call.children[0].rule.push(call.children[0], s, given)
        return None if inner is None else 4 * inner


def test_containers_with_a_rule_are_entered():
    inner, x = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double(),
        reals(2, 3),
    )
    options: dict[str, Any] = {"result": "diag", "method": "diag_backprop"}
    for wrt in ("input", "weight"):
        assert_close(jTmjp(Doubled(inner), x, None, wrt, **options), 4 * jTmjp(inner, x, None, wrt, **options))
        assert_close(jmjTp(Doubled(inner), x, None, wrt, **options), 4 * jmjTp(inner, x, None, wrt, **options))


def test_modules_with_hooks_are_one_layer():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), reals(2, 3)
    model.register_forward_hook(lambda module, args, out: 2 * out)
    found = jTmjp(model, x, None, result="diag", method="diag_backprop")
    assert_close(found, jTmjp(model, x, result="diag"))
