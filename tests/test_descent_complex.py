"""Jacobian descent of complex parameters, which count as pairs of real ones, or are refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo import descent
from nngeo.descent import autojac
from nngeo.descent.aggregation import ConFIG, Mean, PCGrad, TrimmedMean, UPGrad
from nngeo.descent.autojac import combine

D, C = torch.float64, torch.complex128
AGGREGATORS = {"mean": Mean, "upgrad": UPGrad, "config": ConFIG, "trimmed": lambda: TrimmedMean(1)}


class Complex(nn.Module):
    """Real, complex and scalar parameters; one loss for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3, dtype=D)
        self.second = nn.Linear(3, 2, dtype=C)
        self.phase = nn.Parameter(torch.tensor(0.3 + 0.1j, dtype=C))

    def forward(self, x: Tensor) -> Tensor:
        return self.second((self.phase * self.first(x)).exp()).abs().square().sum(1)


def seeded(m: int) -> tuple[Complex, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Complex(), torch.randn(m, 4, dtype=D)


def flat(tensors: list[Tensor]) -> Tensor:
    """Complex numbers as pairs of real ones."""
    return torch.cat([(torch.view_as_real(t) if t.is_complex() else t).flatten() for t in tensors])


def rows(losses: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """(m, n) of real numbers, by a backward pass for each loss."""
    return torch.stack([flat(list(torch.autograd.grad(loss, parameters, retain_graph=True))) for loss in losses])


@pytest.mark.parametrize("small", [2**20, 0], ids=["small", "large"])
@pytest.mark.parametrize("m", [3, 12], ids=["combined", "streamed"])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_complex_parameters_are_pairs_of_real_ones(name, m, small, monkeypatch):
    monkeypatch.setattr(combine, "SMALL", small)
    model, x = seeded(m)
    parameters = list(model.parameters())
    expected = AGGREGATORS[name]()(rows(model(x), parameters))
    descent.backward(model(x), parameters, AGGREGATORS[name]())
    assert_close(flat([p.grad for p in parameters]), expected)


def test_weights_of_complex_rows_are_real():
    model, x = seeded(3)
    weights = descent.backward(model(x), [model.second.weight], UPGrad())
    assert weights.dtype == D


@pytest.mark.parametrize("chunk", [None, 1, 2], ids=str)
def test_jacobians_by_complex_parameters_have_their_form(chunk):
    model, x = seeded(5)
    parameters = list(model.parameters())
    losses = model(x)
    found = autojac.jac(losses, parameters, retain_graph=True, parallel_chunk_size=chunk)
    assert [j.dtype for j in found] == [p.dtype for p in parameters]
    assert_close(torch.stack([flat([j[i] for j in found]) for i in range(5)]), rows(losses, parameters))


def heads(model: Complex, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Two losses of complex features."""
    features = (model.phase * model.first(x)).exp()
    out = model.second(features)
    return [out[:, 0].abs().square().mean(), out[:, 1].abs().mean()], features


@pytest.mark.parametrize("name", ["mean", "upgrad"])
def test_complex_features_are_shared(name):
    model, x = seeded(3)
    shared, own = [*model.first.parameters(), model.phase], list(model.second.parameters())
    losses, features = heads(model, x)
    expected = AGGREGATORS[name]()(rows(torch.stack(losses), shared)), rows(torch.stack(losses).sum()[None], own)[0]
    losses, features = heads(model, x)
    descent.mtl_backward(losses, features, AGGREGATORS[name]())
    assert_close((flat([p.grad for p in shared]), flat([p.grad for p in own])), expected)


def test_jacobians_given_of_complex_tensors_are_combined():
    """The rows are those of the real parts of products with the given ones."""
    model, x = seeded(3)
    given = torch.randn(4, 3, 3, dtype=C, generator=torch.Generator().manual_seed(1))
    parameters = [*model.first.parameters(), model.phase]
    _, features = heads(model, x)
    matrix = rows((given.conj() * features).real.sum((1, 2)), parameters)
    _, features = heads(model, x)
    descent.backward(features, parameters, Mean(), jac_tensors=given)
    assert_close(flat([p.grad for p in parameters]), matrix.mean(0))


@pytest.mark.parametrize("batch_dim", [0, None], ids=str)
def test_an_engine_refuses_complex_parameters_by_name(batch_dim):
    model, x = seeded(3)
    engine = descent.Engine(model, batch_dim=batch_dim)
    with pytest.raises(NotImplementedError, match="has complex parameters.*nngeo.descent.backward"):
        engine.compute_gramian(model(x))


@pytest.mark.parametrize("batch_dim", [0, None], ids=str)
def test_an_engine_of_the_real_modules_passes_through_complex_ones(batch_dim):
    model, x = seeded(3)
    engine = descent.Engine(model.first, batch_dim=batch_dim)
    losses = model(x)
    matrix = rows(losses, list(model.first.parameters()))
    assert_close(engine.compute_gramian(losses), matrix @ matrix.T)


COMPLEX = torch.ones(2, dtype=C, requires_grad=True)
REFUSED = {
    "backward": lambda: descent.backward(COMPLEX * 1, PCGrad()),
    "jac": lambda: autojac.jac(COMPLEX * 1, COMPLEX),
    "mtl_backward": lambda: descent.mtl_backward([(features := COMPLEX * 2).sum()], [features], PCGrad()),
    "engine": lambda: descent.Engine(nn.Linear(1, 1), batch_dim=0).compute_gramian(COMPLEX * 1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_complex_losses_are_refused(name):
    with pytest.raises(ValueError, match="complex"):
        REFUSED[name]()
