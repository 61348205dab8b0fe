"""Complex parameters are refused in one sentence, wherever derivatives by them are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo
from nngeo import products


class Waves(nn.Module):
    """Absolute values of complex combinations, of which the weights are complex, or pairs of real numbers."""

    def __init__(self, complex: bool):
        super().__init__()
        w = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.w = nn.Parameter(torch.view_as_complex(w) if complex else w)

    def forward(self, x: Tensor) -> Tensor:
        w = self.w if self.w.is_complex() else torch.view_as_complex(self.w)
        return (x.to(w.dtype) @ w).abs()


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "FIM": lambda m: nngeo.FIM(m, (X,), nngeo.PMatDiag, variant="regression").get_diag(),
    "implicit": lambda m: nngeo.FIM(m, (X,), nngeo.PMatImplicit, variant="regression").get_diag(),
    "Hessian": lambda m: nngeo.Hessian(m, (X, X[:, :2]), nngeo.PMatDense, nn.functional.mse_loss).get_diag(),
    "NTK": lambda m: nngeo.NTK(m, X).to_torch(),
    "Jacobian": lambda m: nngeo.Jacobian(m, X).to_torch(),
    "product": lambda m: products.jTmjp(m, X, wrt="weight"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_complex_parameters_are_refused_and_pairs_of_real_ones_are_served(call):
    with pytest.raises(TypeError, match=r"'w' has dtype torch.complex128.*view_as_real"):
        call(Waves(complex=True))
    assert call(Waves(complex=False)).isfinite().all()


def test_derivatives_by_the_inputs_pass_complex_parameters():
    found = products.jacobian(Waves(complex=True), X)
    assert_close(found, products.jacobian(Waves(complex=False), X))
