"""Products with implicit matrices do what they need once: no root of the metric, no second look, no way back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from nngeo import FIM, PMatDense, PMatImplicit


class Calls(TorchDispatchMode):
    """The names of all operations that are executed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def classifier() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double(), torch.randn(7, 6).double()


@pytest.mark.parametrize("shape", [(59,), (3, 59), (2, 3, 59), (0, 59)], ids=str)
@pytest.mark.parametrize("variant", ["classif_logits", "regression"])
def test_a_quadratic_form_is_that_of_the_dense_matrix(variant, shape):
    model, x = classifier()
    v = torch.randn(*shape).double()
    implicit = 2 * FIM(model, [(x[:3],), (x[3:],)], PMatImplicit, variant=variant) + 0.5
    dense = 2 * FIM(model, (x,), PMatDense, variant=variant) + 0.5
    assert_close(implicit.vTMv(v), dense.vTMv(v))


def test_a_quadratic_form_has_derivatives_of_any_order():
    model, x = classifier()
    F, dense = FIM(model, (x,), PMatImplicit), FIM(model, (x,), PMatDense).to_torch()
    v = torch.randn(59).double().requires_grad_()
    (slope,) = torch.autograd.grad(F.vTMv(v), v, create_graph=True)
    assert_close(slope, 2 * dense @ v)
    (bend,) = torch.autograd.grad(slope @ v.detach(), v)
    assert_close(bend, 2 * dense @ v)


def test_a_quadratic_form_runs_nothing_backward():
    model, x = classifier()
    F, v = FIM(model, (x,), PMatImplicit), torch.randn(59).double()
    F.vTMv(v)  # looks at the model
    with Calls() as form:
        F.vTMv(v)
    with Calls() as product:
        F.mv(v)
    # The tangent takes one derivative of tanh, and the way back another.
    assert (form.names.count("tanh_backward"), product.names.count("tanh_backward")) == (1, 2)


def test_a_product_with_the_softmax_metric_builds_no_root():
    model, x = classifier()
    with Calls() as seen:
        FIM(model, (x,), PMatImplicit, variant="classif_logits").mv(torch.randn(59).double())
    assert "_softmax" in seen.names
    assert "logcumsumexp" not in seen.names


def test_a_second_matrix_of_a_model_is_made_without_a_second_look():
    model, x = classifier()
    runs: list[int] = []
    model.register_forward_hook(lambda module, args, out: runs.append(len(out)))
    for _ in range(2):
        runs.clear()
        FIM(model, (x,), PMatImplicit).mv(torch.randn(59).double())
    assert runs == [len(x)]


def test_what_a_model_became_is_looked_at():
    """A dropout layer in the place of another is a change of structure."""
    model, x = classifier()
    FIM(model, (x,), PMatImplicit).mv(torch.randn(59).double())
    model[1] = nn.Dropout(0.5)
    with pytest.raises(ValueError, match="eval"):
        FIM(model, (x,), PMatImplicit).mv(torch.randn(59).double())
