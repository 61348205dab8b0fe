"""Scalarizers: each by the formula of its paper, with its gradient, and beside torchjd where that is installed."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo.descent import Stateful, scalarization

LOSSES = torch.tensor([0.7, 2.5, 0.1, 1.3], dtype=torch.float64)
W = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
Z = torch.tensor([0.05, 0.5, 0.0, 0.2], dtype=torch.float64)

# Constructor, by the names of the library; the formula of the paper, at its start.
Made = Callable[[Any], Any]
SCALARIZERS: dict[str, tuple[Made, Callable[[Tensor], Tensor]]] = {
    "mean": (lambda lib: lib.Mean(), lambda x: x.sum() / 4),
    "sum": (lambda lib: lib.Sum(), lambda x: x.sum()),
    "constant": (lambda lib: lib.Constant(W), lambda x: (W * x).sum()),
    "geometric_mean": (lambda lib: lib.GeometricMean(), lambda x: x.prod() ** 0.25),
    "stch": (lambda lib: lib.STCH(0.3), lambda x: 0.3 * (x / 4 / 0.3).exp().sum().log()),
    "stch_all": (lambda lib: lib.STCH(0.3, W, Z), lambda x: 0.3 * (W * (x - Z) / 0.3).exp().sum().log()),
    "cosmos": (lambda lib: lib.COSMOS(2.0, W), lambda x: W @ x - 2 * (W @ x) / (W.norm() * x.norm())),
    "pbi": (lambda lib: lib.PBI(5.0, W), lambda x: distances(x, 5.0)),
    "pbi_reference": (lambda lib: lib.PBI(0.5, W, Z), lambda x: distances(x - Z, 0.5)),
    "uw": (lambda lib: lib.UW(4), lambda x: (x / 2).sum()),
    "imtll": (lambda lib: lib.IMTLL(4), lambda x: x.sum()),
    "dwa": (lambda lib: lib.DWA(), lambda x: x.sum()),
    "famo": (lambda lib: lib.FAMO(4), lambda x: logarithms(x)),
    "famo_bounds": (lambda lib: lib.FAMO(4, min_losses=Z), lambda x: logarithms(x - Z)),
}
STATEFUL = ["UW", "IMTLL", "DWA", "FAMO"]
needs_torchjd = pytest.mark.skipif(importlib.util.find_spec("torchjd") is None, reason="needs torchjd")


def distances(x: Tensor, theta: float) -> Tensor:
    d = x @ W / W.norm()
    return d + theta * (x - d * W / W.norm()).norm()


def logarithms(x: Tensor) -> Tensor:
    """With z = 1/4 each, and c not differentiated."""
    return (1 / (0.25 / x).sum()).detach() * (0.25 * x.log()).sum()


def with_gradient(f: Callable[[Tensor], Tensor], losses: Tensor) -> tuple[Tensor, Tensor]:
    losses = losses.clone().requires_grad_()
    value = f(losses)
    return value.detach(), torch.autograd.grad(value, losses)[0]


@pytest.mark.parametrize("name", SCALARIZERS)
def test_values_and_gradients_are_those_of_the_paper(name):
    make, formula = SCALARIZERS[name]
    # FAMO adds 1e-8 to losses, PBI 1e-12 to a square.
    tolerance = {"rtol": 1e-6, "atol": 1e-9} if name.startswith(("famo", "pbi")) else {}
    assert_close(with_gradient(make(scalarization), LOSSES), with_gradient(formula, LOSSES), **tolerance)


@needs_torchjd
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SCALARIZERS)
def test_values_and_gradients_are_those_of_torchjd(name, dtype):
    import torchjd.scalarization as theirs

    make, _ = SCALARIZERS[name]
    expected = make(theirs).double() if name in ("uw", "imtll", "famo") else make(theirs)
    found = with_gradient(make(scalarization), LOSSES.to(dtype))
    assert found[0].dtype == found[1].dtype == dtype
    value, gradient = with_gradient(expected, LOSSES)
    assert_close(found, (value.to(dtype), gradient.to(dtype)))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", sorted({*scalarization.__all__} - {"Scalarizer"}))
def test_losses_have_any_shape(name, shape):
    """In a matrix as in its flat form."""
    losses = torch.linspace(0.5, 2.0, torch.Size(shape).numel(), dtype=torch.float64)
    w, found = losses / losses.sum(), []
    for form in (shape, (losses.numel(),)):
        options = {
            "Constant": (w.view(form),),
            "COSMOS": (0.5, w.view(form)),
            "PBI": (0.5, w.view(form)),
            "STCH": (0.5,),
        }
        options |= dict.fromkeys(["UW", "IMTLL", "FAMO"], (form,))
        torch.manual_seed(0)
        found.append(getattr(scalarization, name)(*options.get(name, ()))(losses.view(form)))
    assert found[0].shape == ()
    assert_close(found[0], found[1])


def test_random_weights_are_a_softmax_of_normal_numbers():
    torch.manual_seed(3)
    found = scalarization.Random()(LOSSES)
    torch.manual_seed(3)
    assert_close(found, torch.randn(4, dtype=torch.float64).softmax(0) @ LOSSES)


@pytest.mark.parametrize("mu", [1e-3, 1e-30])
def test_smooth_maxima_of_large_losses_are_finite(mu):
    losses = torch.tensor([1e8, 4e8], requires_grad=True)
    found = scalarization.STCH(mu)(losses)
    found.backward()
    assert_close(found, torch.tensor(2e8))
    assert_close(losses.grad, torch.tensor([0.0, 0.5]))


def test_on_the_direction_of_preferences_the_gradient_is_finite():
    value, gradient = with_gradient(scalarization.PBI(5.0, W), 3 * W)
    assert_close(value, 3 * W.norm(), rtol=0, atol=1e-5)
    assert_close(gradient, W / W.norm())


def test_minima_of_learned_scales_balance_the_losses():
    """`exp(s) L = 1` for IMTL-L, `exp(-s) L = 1` for UW, which differ by the sign of s and a factor of 2."""
    uw, imtl = scalarization.UW(4).double(), scalarization.IMTLL(4).double()
    with torch.no_grad():
        uw.log_var.copy_(LOSSES.log())
        imtl.log_scale.copy_(-LOSSES.log())
    assert_close(imtl(LOSSES), 2 * uw(LOSSES))
    (imtl(LOSSES) + uw(LOSSES)).backward()
    assert_close(imtl.log_scale.grad, torch.zeros_like(LOSSES))
    assert_close(uw.log_var.grad, torch.zeros_like(LOSSES))


def epochs(dwa: Any, n: int) -> list[Tensor]:
    """The scalarized losses of n epochs of two batches."""
    found = []
    for epoch in range(n):
        found += [dwa(LOSSES / (1 + epoch * W * batch)) for batch in (1, 2)]
        dwa.step()
    return found


def test_dynamic_weights_are_the_softmax_of_ratios_of_epoch_means():
    found = epochs(scalarization.DWA(temperature=0.5), 3)
    means = [sum(LOSSES / (1 + epoch * W * batch) for batch in (1, 2)) / 2 for epoch in range(2)]
    weights = 4 * (means[1] / means[0] / 0.5).softmax(0)
    assert_close(found[3], (LOSSES / (1 + 2 * W)).sum())
    assert_close(found[4], weights @ (LOSSES / (1 + 2 * W)))


@needs_torchjd
def test_dynamic_weights_are_those_of_torchjd():
    import torchjd.scalarization as theirs

    assert_close(epochs(scalarization.DWA(), 5), epochs(theirs.DWA(), 5))


def steps(famo: Any, n: int) -> list[Tensor]:
    """Scalarized losses before n steps that halve the first of them, and let the others fall less."""
    found, losses = [], LOSSES
    for _ in range(n):
        found.append(famo(losses))
        losses = losses * torch.tensor([0.5, 0.9, 0.99, 1.0], dtype=torch.float64)
        famo.update(losses)
    return found


@needs_torchjd
@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "weight_decay": 0.01}], ids=["default", "given"])
def test_adaptive_weights_are_those_of_torchjd(options):
    import torchjd.scalarization as theirs

    assert_close(steps(scalarization.FAMO(4, **options), 6), steps(theirs.FAMO(4, **options).double(), 6))


def test_losses_that_fall_less_get_more_weight():
    famo = scalarization.FAMO(4)
    steps(famo, 3)
    _, gradient = with_gradient(famo, torch.ones_like(LOSSES))
    assert (gradient.diff() > 0).all()
    assert_close(gradient.sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize(("name", "run"), [("DWA", epochs), ("FAMO", steps)], ids=["DWA", "FAMO"])
def test_state_is_saved_and_forgotten(name, run):
    make = (lambda: scalarization.FAMO(4)) if name == "FAMO" else scalarization.DWA
    scalarizer, copy = make(), make()
    first = run(scalarizer, 4)
    copy.load_state_dict(scalarizer.state_dict())
    later = run(scalarizer, 4)
    assert not torch.allclose(torch.stack(later), torch.stack(first))
    assert_close(run(copy, 4), later)
    scalarizer.reset()
    assert_close(run(scalarizer, 4), first)


@pytest.mark.parametrize("name", STATEFUL)
def test_scalarizers_with_a_memory_say_so(name):
    assert issubclass(getattr(scalarization, name), Stateful)


@pytest.mark.parametrize("name", ["UW", "IMTLL"])
def test_learned_scales_are_parameters_that_reset_forgets(name):
    scalarizer = getattr(scalarization, name)((2, 2))
    (p,) = scalarizer.parameters()
    torch.nn.init.ones_(p)
    scalarizer.reset()
    assert p.shape == scalarizer.shape == (2, 2) and not p.any()


def test_a_model_is_trained_with_what_falls_less():
    torch.manual_seed(0)
    model, famo, x = nn.Linear(3, 2), scalarization.FAMO(2), torch.randn(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = model(x).square().mean(0).detach()
    for _ in range(50):
        optimizer.zero_grad()
        famo(model(x).square().mean(0)).backward()
        optimizer.step()
        famo.update(model(x).square().mean(0))
    assert (model(x).square().mean(0) < 0.2 * first).all()


STRINGS = {
    "mean": ("Mean()", "Mean"),
    "constant": (f"Constant(weights={W!r})", "Constant([0.1, 0.4, 0.3, 0.2])"),
    "stch": ("STCH(mu=0.3, weights=None, reference=None)", "STCH"),
    "uw": ("UW(shape=(4,))", "UW"),
    "dwa": ("DWA(temperature=2.0)", "DWA"),
    "famo": ("FAMO(shape=(4,), min_losses=None, lr=0.025, weight_decay=0.001)", "FAMO"),
}


@pytest.mark.parametrize("name", STRINGS)
def test_repr_is_long_and_str_is_short(name):
    scalarizer = SCALARIZERS[name][0](scalarization)
    assert (repr(scalarizer), str(scalarizer)) == STRINGS[name]


s = scalarization
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a list": (lambda: s.Mean()([torch.ones(()), torch.ones(())]), TypeError, "torch.stack(losses)"),
    "a number": (lambda: s.Sum()(3.0), TypeError, "values should be a tensor of losses, found float"),
    "no losses": (lambda: s.Mean()(torch.ones(0)), ValueError, "values has no losses"),
    "weights of a list": (
        lambda: s.Constant([1.0]),
        TypeError,
        "weights should be a tensor of the shape of the losses",
    ),
    "weights of another shape": (lambda: s.Constant(W)(LOSSES[:2]), ValueError, "weights has the shape (4,)"),
    "reference of another shape": (lambda: s.STCH(1.0, reference=Z)(LOSSES[:2]), ValueError, "reference has the shape"),
    "scales of another shape": (lambda: s.UW(3)(LOSSES), ValueError, "log_var has the shape (3,)"),
    "a zero direction": (lambda: s.PBI(1.0, 0 * W)(LOSSES), ValueError, "weights is zero"),
    "negative lambda": (lambda: s.COSMOS(-1.0, W), ValueError, "lambda_ should be at least 0"),
    "negative theta": (lambda: s.PBI(-1.0, W), ValueError, "theta should be at least 0"),
    "mu of zero": (lambda: s.STCH(0.0), ValueError, "mu should be greater than 0"),
    "temperature of zero": (lambda: s.DWA(0.0), ValueError, "temperature should be greater than 0"),
    "negative lr": (lambda: s.FAMO(2, lr=-1.0), ValueError, "lr should be at least 0"),
    "negative losses": (lambda: s.GeometricMean()(-LOSSES), ValueError, "not negative, and the least is -2.5"),
    "losses below their bound": (lambda: s.FAMO(4)(-LOSSES), ValueError, "below its bound by 2.5"),
    "losses of another shape": (
        lambda: s.FAMO(3)(LOSSES),
        ValueError,
        "The losses have the shape (4,), and shape is (3,)",
    ),
    "an update before the losses": (lambda: s.FAMO(4).update(LOSSES), ValueError, "call the scalarizer with them"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case):
    call, kind, words = WRONG[case]
    with pytest.raises(kind, match=re.escape(words)):
        call()


def test_losses_of_another_shape_end_an_average():
    dwa = scalarization.DWA()
    dwa(LOSSES)
    with pytest.raises(ValueError, match=r"shape \(2,\), and had \(4,\) before: call reset"):
        dwa(LOSSES[:2])


def test_a_mean_of_zero_has_no_ratio():
    dwa = scalarization.DWA()
    dwa(0 * LOSSES)
    dwa.step()
    dwa(LOSSES)
    dwa.step()
    with pytest.raises(ValueError, match="mean of a loss over an epoch is zero"):
        dwa(LOSSES)
