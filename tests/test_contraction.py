"""Products along the last axis are those of torch.matmul, whichever kernel makes them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from nngeo import FIM, NTK, PMatDiag, PMatKFAC
from nngeo.layers.collection import LayerCollection
from nngeo.linalg import contraction
from nngeo.linalg.contraction import add_inner, inner, moment, onednn_gains

SHAPES = [(1, 1), (3, 5), (300, 7), (300, 200), (129, 129), (0, 4), (4, 0)]
DTYPES = [torch.float32, torch.float64]


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(autouse=True, params=[2**8, contraction.LARGE], ids=["oneDNN early", "oneDNN late"])
def large(request, monkeypatch):
    """Products by oneDNN, whatever its speed on this machine; small ones, too."""
    monkeypatch.setattr(contraction, "LARGE", request.param)
    monkeypatch.setattr(contraction, "onednn_gains", lambda threads: True)


def close(found: Tensor, x: Tensor, y: Tensor) -> None:
    expected = (x.double() @ y.double().mT).to(found)
    assert_close(found, expected, rtol=1e-4 if found.dtype == torch.float32 else 1e-10, atol=1e-4)


def ids(value: object) -> str:
    return str(value).removeprefix("torch.").replace(", ", "x")


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_inner_is_the_product_with_the_transpose(shape, dtype):
    x, y = randn(*shape, dtype=dtype), randn(250, shape[1], dtype=dtype)
    close(inner(x, y), x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_moment_is_the_product_with_itself_and_symmetric(shape, dtype):
    x = randn(*shape, dtype=dtype)
    close(found := moment(x), x, x)
    assert_close(found, found.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("lead", [(1,), (3,), (2, 3)], ids=ids)
def test_leading_axes_are_products_of_their_own(lead, dtype):
    x, y = randn(*lead, 150, 140, dtype=dtype), randn(*lead, 20, 140, dtype=dtype)
    close(inner(x, y), x, y)
    close(moment(x), x, x)


@pytest.mark.parametrize("step", [1, 2])
def test_strides_do_not_matter(step):
    x, y = randn(400, 300, dtype=torch.float32).mT[::step], randn(400, 600, dtype=torch.float32)[:, ::2].mT
    close(inner(x, y), x, y)
    close(moment(x), x, x)


@pytest.mark.parametrize("contracted", [3, 500])
def test_add_inner_adds_in_place(contracted):
    x, y = randn(140, contracted), randn(20, contracted)
    total = torch.ones(140, 20, dtype=torch.float64)
    assert add_inner(total, x, y) is total
    close(total - 1, x, y)
    close(add_inner(torch.ones(1, 140, 140, dtype=torch.float64), x[None], x[None])[0] - 1, x, x)


@pytest.mark.parametrize("lead", [(), (1,), (2,)], ids=ids)
def test_adding_to_a_symmetric_sum_takes_the_symmetric_product(lead, monkeypatch):
    def unwanted(x: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("both halves are multiplied")

    monkeypatch.setattr(contraction, "inner", unwanted)
    x = randn(*lead, 140, 500)
    close(add_inner(torch.ones(*lead, 140, 140, dtype=torch.float64), x, x) - 1, x, x)


def test_a_gradient_passes_where_it_is_asked_for():
    x = randn(300, 200, dtype=torch.float32).requires_grad_()
    moment(x).sum().backward()
    assert_close(x.grad, 2 * x.detach().sum(0).expand_as(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("matrix", [PMatDiag, PMatKFAC, NTK], ids=lambda m: m.__name__)
def test_float32_statistics_are_those_of_float64(matrix, monkeypatch):
    """Wide enough for every kernel and for several blocks."""
    torch.manual_seed(0)
    sizes = pairwise((150, 140, 5))
    model = torch.nn.Sequential(*[layer for i, o in sizes for layer in (torch.nn.Linear(i, o), torch.nn.Tanh())])
    x = torch.randn(300, 150)

    def found(dtype: torch.dtype) -> Tensor:
        net, batch = model.to(dtype), x.to(dtype)
        layers = LayerCollection.from_model(net)
        made = NTK(net, batch, layer_collection=layers) if matrix is NTK else FIM(net, [(batch,)], matrix)
        return made.trace() if matrix is PMatKFAC else (made.to_torch() if matrix is NTK else made.get_diag())

    single, double = found(torch.float32), found(torch.float64)
    assert_close(single.double(), double, rtol=1e-3, atol=1e-5 * float(double.abs().max()))
    monkeypatch.setattr(contraction, "_onednn", lambda x, y: False)
    assert_close(found(torch.float32), single, rtol=1e-3, atol=1e-5 * float(single.abs().max()))


def test_the_kernel_is_chosen_by_one_measurement_that_the_callers_modes_do_not_see():
    """A mode that counts operations sees the products that were asked for, and nothing of the timing."""

    class Seen(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    onednn_gains.cache_clear()
    with Seen() as seen:
        first = onednn_gains(torch.get_num_threads())
    assert seen.calls == 0
    assert onednn_gains(torch.get_num_threads()) is first
    assert onednn_gains.cache_info().misses == 1
