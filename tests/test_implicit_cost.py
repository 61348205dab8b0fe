"""What products with an implicit matrix run, and what they don't."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from nngeo import FIM, GGN, Hessian, LayerCollection, PMatDense, PMatImplicit, PVector
from nngeo.products import jmp, vjp


class Operations(TorchDispatchMode):
    """Names of the operations that are run inside."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Gate(nn.Module):
    """Zero at first, so that a tangent passes what a gradient does not, and nobody can tell."""

    def __init__(self):
        super().__init__()
        self.body, self.gate = nn.Linear(4, 3), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            stopped = self.body(x)
        return self.gate * stopped + self.body(x)


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(7, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)


def cubic(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).pow(4).sum()


MATRICES = {
    "fisher": lambda m, x, kind: FIM(m, (x,), kind),
    "ggn": lambda m, x, kind: GGN(m, (x, x[:, :3]), kind, cubic),
    "hessian": lambda m, x, kind: Hessian(m, (x, x[:, :3]), kind, cubic),
    "one_example": lambda m, x, kind: FIM(m, (x[:1],), kind),
    "half_batches": lambda m, x, kind: FIM(m, [(x[:4],), (x[4:],)], kind),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES.keys())
def test_quadratic_forms_are_those_of_the_dense_matrix(make, dtype):
    model, x = net(dtype), data(dtype)
    F, dense = make(model, x, PMatImplicit), make(model, x, PMatDense).to_torch()
    v = torch.randn(2, 3, len(dense), dtype=dtype)
    damped = 3 * F + 0.5
    assert_close(F.vTMv(v), torch.einsum("abp,pq,abq->ab", v, dense, v), rtol=1e-4, atol=1e-4)
    assert_close(damped.vTMv(v[0, 0]), v[0, 0] @ (3 * dense @ v[0, 0]) + 0.5 * v[0, 0] @ v[0, 0], rtol=1e-4, atol=1e-4)


def test_the_gradient_of_a_quadratic_form_is_twice_the_product():
    F = FIM(net(), (data(),), PMatImplicit)
    v = torch.randn(F.size(0), dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(F.vTMv(v), v)
    assert_close(grad, 2 * F.mv(v.detach()))
    with torch.no_grad():
        assert_close(F.vTMv(v), v @ F.mv(v))


def test_a_quadratic_form_has_derivatives_of_any_order():
    F, dense = FIM(net(), (data(),), PMatImplicit), FIM(net(), (data(),), PMatDense).to_torch()
    v = torch.randn(F.size(0), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.vTMv(v), v, create_graph=True)
    (bend,) = torch.autograd.grad(slope @ v.detach(), v)
    assert_close(bend, 2 * dense @ v)


def test_quadratic_forms_record_no_graph():
    model, recorded = net(), []
    F = FIM(model, (data(),), PMatImplicit)
    v = torch.randn(F.size(0), dtype=torch.float64)
    F.vTMv(v)
    model.register_forward_hook(lambda module, args, outputs: recorded.append(outputs.requires_grad))
    FIM(model, (data(),), PMatImplicit).mv(v)  # a hook is another structure
    recorded.clear()
    F.vTMv(v), F.mv(v)
    assert recorded == [False, True]


@pytest.mark.parametrize("product", ["mv", "vTMv"])
def test_products_build_no_root_of_the_softmax(product):
    F = FIM(net(), (data(),), PMatImplicit)
    with Operations() as run:
        getattr(F, product)(torch.randn(F.size(0), dtype=torch.float64))
    assert "logcumsumexp" not in run.names and "_softmax" in run.names


def test_a_new_matrix_of_a_model_that_is_known_runs_it_once_for_a_product():
    model, calls = net(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    FIM(model, (data(),), PMatImplicit).mv(v)
    before = len(calls)
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    FIM(model, (data(),), PMatImplicit).mv(v)
    assert len(calls) - before == 1


def test_a_gate_that_opens_is_looked_at_again():
    torch.manual_seed(0)
    model, x = Gate().double(), data()
    v = PVector.from_model(model).to_torch().detach()
    FIM(model, (x,), PMatImplicit).mv(v)
    with torch.no_grad():
        model.gate.fill_(0.7)
    assert_close(FIM(model, (x,), PMatImplicit).mv(v), FIM(model, (x,), PMatDense).mv(v))


def test_another_structure_is_looked_at_anew():
    model, x = net(), data()
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    FIM(model, (x,), PMatImplicit).mv(v)
    model.insert(2, nn.BatchNorm1d(5, affine=False).double())
    with pytest.raises(ValueError, match="BatchNorm|batch"):
        FIM(model, (x,), PMatImplicit, layer_collection=LayerCollection.from_model(model)).mv(v)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "by_example"])
@pytest.mark.parametrize("count", [0, 1, 200])
def test_projected_gradients_are_gradients_times_columns(count, shared, dtype):
    model, x = nn.Sequential(net(dtype), nn.Linear(3, 1).to(dtype)), data(dtype)
    p = sum(q.numel() for q in model.parameters())
    columns = torch.randn(*([] if shared else [7]), p, count, dtype=dtype)
    gradients = vjp(model, x, torch.ones(7, 1, dtype=dtype), wrt="weight")
    assert_close(jmp(model, x, columns, wrt="weight"), gradients[:, None] @ columns, rtol=1e-4, atol=1e-4)
