"""Products with vectors through the linear maps whose derivatives are written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from nngeo import FIM, PMatImplicit
from nngeo.generators import lean, linearized


class OwnGradient(nn.Module):
    """A network with its own derivative by the inputs, recorded in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = self.net(x)
            (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y + slope[:, :2]


class Squares(nn.Module):
    """Square weights without a bias, run again in the backward pass: what is saved would fit when it is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: self.b(self.a(x)), self.a(x), use_reentrant=False)


def norm(width: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(width).eval()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer


def convolutional(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(2))


MODELS = {
    "strided": (
        lambda: convolutional(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 2)),
        (2, 6, 6),
    ),
    "grouped": (lambda: convolutional(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, dilation=2, groups=2)), (2, 6, 6)),
    "same": (lambda: convolutional(nn.Conv2d(2, 3, 3, padding="same"), nn.ReLU(inplace=True)), (2, 5, 5)),
    "1d": (lambda: convolutional(nn.Conv1d(2, 3, 3, bias=False), nn.ReLU()), (2, 6)),
    "3d": (lambda: convolutional(nn.Conv3d(2, 3, 2), nn.ReLU()), (2, 3, 3, 3)),
    "norm": (lambda: convolutional(nn.Conv2d(2, 3, 3), norm(3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1)), (2, 5, 5)),
    "sequence": (lambda: convolutional(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)), (5, 3)),
    "own gradient": (OwnGradient, (3,)),
    "checkpointed squares": (Squares, (3,)),
}


Batches = list[tuple[Tensor]]


def setting(name: str) -> tuple[nn.Module, Batches, Tensor]:
    """A model, its data and three vectors."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make()
    model(torch.randn(2, *shape))
    model = model.eval().double()
    x = torch.randn(4, *shape, dtype=torch.float64)
    size = sum(p.numel() for p in model.parameters())
    return model, [(x[:3],), (x[3:],)], torch.randn(3, size, dtype=torch.float64)


def definition(model: nn.Module, batches: Batches) -> Tensor:
    """From the outputs' Jacobians by plain gradients, a row at a time, and the softmax's metric."""
    parameters = list(model.parameters())

    def row(y: Tensor) -> Tensor:
        grads = torch.autograd.grad(y, parameters, retain_graph=True, allow_unused=True)
        return torch.cat([(p * 0 if g is None else g).flatten() for g, p in zip(grads, parameters, strict=True)])

    def term(x: Tensor) -> Tensor:
        y = model(x)[0]
        J, p = torch.stack([row(out) for out in y]), y.softmax(0)
        return J.mT @ (p.diag() - p.outer(p)) @ J

    terms = [term(one) for (x,) in batches for one in x.split(1)]
    return (sum(terms) / len(terms)).detach()


def exact(found: Tensor, want: Tensor) -> None:
    assert_close(found, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("small", [0, 2**16], ids=["own rectifier", "torch's rectifier"])
@pytest.mark.parametrize("name", MODELS)
def test_one_vector_is_multiplied_as_by_the_definition(name, small, monkeypatch):
    monkeypatch.setattr(lean, "SMALL", small)
    model, batches, v = setting(name)
    exact(FIM(model, batches, PMatImplicit) @ v[0], definition(model, batches) @ v[0])


@pytest.mark.parametrize("large", [0, 2**19], ids=["one by one", "together"])
@pytest.mark.parametrize("name", MODELS)
def test_kept_graphs_multiply_as_the_definition(name, large, monkeypatch):
    monkeypatch.setattr(linearized, "LARGE", large)
    model, batches, v = setting(name)
    with FIM(model, batches, PMatImplicit).linearize() as kept:
        exact(kept @ v, v @ definition(model, batches))


def test_where_hooks_save_what_graphs_keep_nothing_is_replaced(monkeypatch):
    monkeypatch.setattr(lean, "_AffineFunction", None)
    model, batches, v = setting("strided")
    want = definition(model, batches) @ v[0]
    with torch.autograd.graph.save_on_cpu():
        exact(FIM(model, batches, PMatImplicit) @ v[0], want)


def test_tangents_do_not_outlive_the_layer_that_they_pass():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(9, 9), nn.ReLU()) for _ in range(3)])
    saved: list[Tensor] = []
    found = FIM(model, [(torch.randn(5, 9),)], PMatImplicit)
    v = torch.randn(270)
    found @ v  # looks at the model
    model[1][0].register_forward_hook(lambda module, args, out: saved.extend(out.grad_fn.saved_tensors))
    found @ v
    assert [torch.autograd.forward_ad.unpack_dual(x).tangent for x in saved] == [None, None]
