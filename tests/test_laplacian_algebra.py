"""forward_laplacian through complex numbers, and through determinants, inverses, solutions and Cholesky factors."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo.products.laplacian import forward_laplacian
from tests.networks import Net
from tests.test_laplacian import W, bent, draw, hessians, model_of, slope

C = torch.complex(draw(6, 6, seed=7), draw(6, 6, seed=8))


def z(x: Tensor) -> Tensor:
    return torch.complex(bent(x), x)


def matrix(x: Tensor) -> Tensor:
    left, right = torch.sin(x @ W)[:, :4, None], torch.cos(x @ W.T)[:, None, :4]
    return left * right + 0.1 * bent(x)[:, None, :4] ** 2 + 2 * torch.eye(4).to(x)


def positive(x: Tensor) -> Tensor:
    return matrix(x) @ matrix(x).mT + torch.eye(4).to(x)


def hermitian(x: Tensor) -> Tensor:
    return turned(x) @ turned(x).mH + torch.eye(4).to(x)


def turned(x: Tensor) -> Tensor:
    return matrix(x) + 1j * bent(x)[:, :4, None]


COMPLEX: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": lambda x: torch.exp(1j * bent(x)).real,
    "abs": lambda x: z(x).abs(),
    "angle": lambda x: (bent(x) * (2 + 1j) + 1j * x * x).angle(),
    "conj": lambda x: (z(x).conj() * (x.sin() + 2j * bent(x))).imag,
    "cubed": lambda x: (z(x) ** 3).abs() ** 2,
    "tanh": lambda x: z(x).tanh().real,
    "log": lambda x: (z(x).log() * torch.complex(x, bent(x))).real,
    "mm": lambda x: (z(x) @ C).abs(),
    "bmm": lambda x: ((z(x) @ C).reshape(-1, 2, 3) @ ((x + 0j) @ C).reshape(-1, 3, 2)).real,
    "fft": lambda x: torch.fft.fft(bent(x)).abs() ** 2,
    "rfft": lambda x: torch.fft.irfft(torch.fft.rfft(bent(x)) * torch.fft.rfft(x)),
    "polar": lambda x: torch.polar(bent(x) ** 2 + 1, x * x).imag,
    "pairs": lambda x: torch.view_as_real(torch.view_as_complex(bent(x).reshape(-1, 3, 2)) ** 2),
    "div": lambda x: ((bent(x) + 1j) / (x * x + 1j * bent(x) + 2)).real,
    "in_place": lambda x: (bent(x) + 1j).mul_(1j * x).add_(x * x).imag,
    "there_and_back": lambda x: (bent(x) + 0j).real + (1j * x).imag * x,
    "where": lambda x: torch.where(x > 0, (1j * bent(x)).exp(), x * x + 0j).real,
    "cat": lambda x: (torch.cat([1j * bent(x), x * x + 0j], 1) ** 2).real,
    "mean": lambda x: (bent(x) * 1j).exp().mean(-1, keepdim=True).abs(),
}

ALGEBRA: dict[str, Callable[[Tensor], Tensor]] = {
    "slogdet": lambda x: torch.linalg.slogdet(matrix(x))[1],
    "sign": lambda x: torch.linalg.slogdet(matrix(x))[0] * bent(x)[:, 0],
    "logdet": lambda x: torch.logdet(positive(x)),
    "det": lambda x: torch.linalg.det(matrix(x)),
    "inv": lambda x: torch.linalg.inv(matrix(x)),
    "solve_vector": lambda x: torch.linalg.solve(matrix(x), x[:, :4]),
    "solve": lambda x: torch.linalg.solve(matrix(x), bent(x)[:, :4, None] * x[:, None, :2]),
    "solve_from_the_right": lambda x: torch.linalg.solve(matrix(x), bent(x)[:, None, :4] * x[:, :2, None], left=False),
    "solve_with_a_constant": lambda x: torch.linalg.solve(W[:4, :4], bent(x)[:, :4, None] * x[:, None, :2]),
    "solve_for_a_constant": lambda x: torch.linalg.solve(matrix(x), W[:4, :3]),
    "cholesky": lambda x: torch.linalg.cholesky(positive(x)),
    "cholesky_upper": lambda x: torch.linalg.cholesky(positive(x), upper=True),
    "lower": lambda x: torch.linalg.solve_triangular(matrix(x), bent(x)[:, :4, None], upper=False),
    "upper_from_the_right": lambda x: torch.linalg.solve_triangular(
        matrix(x), bent(x)[:, None, :4], upper=True, left=False, unitriangular=True
    ),
    "of_one": lambda x: torch.linalg.slogdet(matrix(x)[:, :1, :1])[1],
    "complex_slogdet": lambda x: torch.linalg.slogdet(turned(x))[1],
    "complex_phase": lambda x: torch.linalg.slogdet(turned(x))[0].real,
    "complex_det": lambda x: torch.linalg.det(turned(x)).imag,
    "complex_inv": lambda x: torch.linalg.inv(turned(x)).imag,
    "complex_solve": lambda x: torch.linalg.solve(turned(x), x[:, :4] + 1j).imag,
    "complex_cholesky": lambda x: torch.linalg.cholesky(hermitian(x)).imag,
}
ALL = {**COMPLEX, **ALGEBRA}
each = pytest.mark.parametrize("f", ALL.values(), ids=ALL.keys())


def indefinite() -> Tensor:
    m = draw(6, 6, seed=3)
    return m + m.mT


@each
@pytest.mark.parametrize("metric", [None, indefinite()], ids=["laplacian", "indefinite"])
def test_second_derivatives_are_carried(f, metric):
    x = draw(3, 6)
    y, jacobian, hessian = hessians(f, x)
    found = forward_laplacian(model_of(f), x, metric, method="forward")
    weights = torch.eye(6).to(x) if metric is None else metric
    assert_close(found.value, y.detach())
    assert_close(found.laplacian, torch.einsum("boij,ij->bo", hessian, weights).detach(), rtol=1e-8, atol=1e-8)
    if metric is None:
        assert_close(found.columns, jacobian.detach())


@pytest.mark.parametrize("f", [COMPLEX["exp"], COMPLEX["abs"], ALGEBRA["slogdet"], ALGEBRA["solve"]])
def test_one_example_in_float32(f):
    x = draw(1, 6)
    expected = forward_laplacian(model_of(f), x, method="backward")
    single = model_of(lambda x: f(x.double()).float())
    found = forward_laplacian(single, x.float(), method="forward")
    assert_close(found.laplacian.double(), expected.laplacian, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("f", [COMPLEX["exp"], COMPLEX["conj"], *ALGEBRA.values()], ids=["exp", "conj", *ALGEBRA])
def test_what_is_carried_can_be_differentiated(f):
    model, x = model_of(f), draw(2, 6).requires_grad_()
    found = forward_laplacian(model, x, method="forward", create_graph=True)
    weights, step = draw(*found.laplacian.shape, seed=5), draw(2, 6, seed=6)
    (grad,) = torch.autograd.grad((found.laplacian * weights).sum() + 0 * x.sum(), x)

    def value(t: float) -> Tensor:
        return (forward_laplacian(model, x.detach() + t * step, method="forward").laplacian * weights).sum()

    assert_close((grad * step).sum(), slope(value), rtol=1e-4, atol=1e-4)


def test_complex_parameters_and_a_wave_function():
    w = nn.Parameter(torch.complex(draw(6, 4, seed=1), draw(6, 4, seed=2)))
    net = Net(lambda net, x: ((bent(x) + 0j) @ net.w).exp().abs(), w=w)
    hessian = hessians(net, draw(3, 6))[2].detach()
    found = forward_laplacian(net, draw(3, 6), method="forward")
    assert_close(found.laplacian, hessian.diagonal(dim1=-2, dim2=-1).sum(-1), rtol=1e-8, atol=1e-8)


class Wrong(torch.autograd.Function):
    """The square, whose forward mode says something else than its gradient."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] * grad


def test_what_double_backward_says_otherwise_is_not_carried():
    """The detached part is constant for gradients, and so it is for the columns."""
    f = lambda x: bent(x) * bent(x).detach() + Wrong.apply(bent(x))  # noqa: E731
    with pytest.raises(NotImplementedError, match="autograd.Function|double backward"):
        forward_laplacian(model_of(f), draw(3, 6), method="forward")


def test_a_singular_matrix_is_left_to_double_backward_or_refused():
    f = lambda x: torch.linalg.det(x[:, :4, None] * x[:, None, :4])  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = forward_laplacian(model_of(f), torch.ones(2, 6, dtype=torch.float64))
    assert found.method == "backward" or bool(found.laplacian.isfinite().all())


@pytest.mark.parametrize("what", ["inputs", "outputs"])
def test_complex_inputs_and_outputs_are_named(what):
    x = torch.complex(draw(2, 6), draw(2, 6)) if what == "inputs" else draw(2, 6)
    with pytest.raises(TypeError, match="complex"):
        forward_laplacian(model_of(lambda x: x * (1 + 1j)), x)
