"""What mini-batches, threads, callers and compilers can do to a sweep."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo import FIM, PMatDense, PMatDiag, PMatImplicit, PVector


def batch(size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 10, generator=generator, dtype=dtype), torch.randint(3, (size,), generator=generator)


def entries(model: nn.Module, batches: Any, representation: Any, **options: Any) -> Tensor:
    matrix = FIM(model, batches, representation, "classif_logits", **options)
    return matrix.to_torch() if representation is not PMatImplicit else matrix.mv(PVector.from_model(model)).to_torch()


@pytest.mark.parametrize("representation", [PMatDense, PMatDiag, PMatImplicit], ids=lambda r: r.__name__)
@pytest.mark.parametrize("sizes", [(16, 10), (16, 10, 10), (7, 10, 10, 10)], ids=str)
@pytest.mark.parametrize("budget", [2**22, 40], ids=["joined", "split"])
def test_a_tensor_as_long_as_a_later_batch_by_chance_is_no_tensor_of_examples(
    representation, sizes, budget, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("nngeo.generators.sizing.LARGEST", budget)
    model, weights = nn.Linear(10, 3).double(), torch.rand(10, dtype=torch.float64)
    plain = [batch(size, seed) for seed, size in enumerate(sizes)]
    shared = [(x, weights, y) for x, y in plain]
    found = entries(model, shared, representation, function=lambda x, w, y: model(x) * w.sum())
    assert_close(found, entries(model, plain, representation, function=lambda x, y: model(x) * weights.sum()))


def test_threads_multiply_by_their_own_models_at_the_same_time():
    models = [nn.Sequential(nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 3)).double() for _ in range(2)]
    batches = [batch(4, seed) for seed in range(3)]

    def products(model: nn.Module) -> list[Tensor]:
        return [entries(model, batches, PMatImplicit) for _ in range(20)]

    alone = [products(model)[0] for model in models]
    with ThreadPoolExecutor(2) as pool:
        for expected, found in zip(alone, pool.map(products, models), strict=True):
            for one in found:
                assert_close(one, expected)


def test_layers_without_batching_rules_leave_no_tensors_behind():
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    model = nn.Bilinear(3, 2, 3).double()
    FIM(model, [(x, y)], PMatDense, "classif_logits", function=model)
    gc.collect()
    tensors = [leaf for leaf in gc.get_objects() if issubclass(type(leaf), Tensor)]
    assert not any(torch._C._functorch.is_batchedtensor(leaf) for leaf in tensors)


@pytest.mark.parametrize("representation", [PMatDense, PMatDiag, PMatImplicit], ids=lambda r: r.__name__)
def test_autocast_of_the_caller_has_no_influence(representation):
    model = nn.Sequential(nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 3))
    data = batch(20, dtype=torch.float32)
    expected = entries(model, [data], representation)
    with torch.autocast("cpu"):
        found = entries(model, [data], representation)
    assert_close(found, expected, rtol=0, atol=0)


class Dropping(nn.Module):
    """A model that leaves examples out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[x[:, 0] > -9])


def test_outputs_of_too_few_examples_are_refused_in_words():
    model, (x, y) = Dropping().double(), batch(20)
    x[15, 0] = -10
    matrix = FIM(model, [(x[:10], y[:10]), (x[10:], y[10:])], PMatImplicit, "classif_logits")
    with pytest.raises(ValueError, match="the first axis should be the batch"):
        matrix.mv(PVector.from_model(model))


class Sine(torch.autograd.Function):
    """By numpy; the graph of its derivative ends there, though it does not say so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.from_numpy(g.detach().numpy() * np.cos(ctx.saved_tensors[0].detach().numpy()))


@pytest.mark.parametrize("m", [1, 3])
def test_functions_with_a_first_derivative_only_are_multiplied_by_layers(m):
    first, last, (x, y) = nn.Linear(10, 4).double(), nn.Linear(4, 3).double(), batch(9)
    model = nn.ModuleList([first, last])
    matrix = FIM(model, [(x, y)], PMatImplicit, "classif_logits", function=lambda x, y: last(Sine.apply(first(x))))
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="second derivative"):
            matrix.linearize()
    v = torch.randn(m, matrix.layer_collection.numel(), dtype=torch.float64)
    found = matrix.generator.mv(v, matrix.examples, matrix.layer_collection)
    assert_close(found, v @ matrix.to_torch())
