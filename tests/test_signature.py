"""Functions are known by their code and by what they refer to: what was found out about a model is not asked again."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo
from nngeo import Jacobian, products
from nngeo.generators.signature import Same, code_of
from tests import networks, reference

FLAG = 1.0
MODEL, OTHER = nn.Linear(3, 2), nn.Linear(3, 2)
FROZEN, TRAINED = torch.ones(20), torch.ones(20, requires_grad=True)


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def squared(x: Tensor) -> Tensor:
    return x.square()


def of(value: Any) -> Callable[[Tensor], Any]:
    """A new function with this value in its closure."""
    return lambda x: (x, value)


def by_default(value: Any) -> Callable[..., Any]:
    return lambda x, y=value: (x, y)


def by_global() -> Callable[[Tensor], Any]:
    return lambda x: [FLAG * y for y in x]


def nested(value: Any) -> Callable[[Tensor], Any]:
    return lambda x: (lambda y: (y, value))(x)


class Setting:
    def __init__(self, scale: float):
        self.scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        return self.scale * x


ONE = Setting(1.0)
SAME = {
    "a number": (of(2), of(2)),
    "a module": (of(MODEL), of(MODEL)),
    "a tensor of the same shape": (of(FROZEN), of(2 * FROZEN)),
    "a trained tensor": (of(TRAINED), of(TRAINED)),
    "a small tensor": (of(torch.ones(2)), of(torch.ones(2))),
    "a function": (of(of(doubled)), of(of(doubled))),
    "containers": (of({"a": [1, (MODEL, None)]}), of({"a": [1, (MODEL, None)]})),
    "an object": (of(ONE), of(ONE)),
    "an object that is called": (ONE, ONE),
    "a default": (by_default(3), by_default(3)),
    "a partial": (functools.partial(doubled, x=1), functools.partial(doubled, x=1)),
    "a method": (MODEL.forward, MODEL.forward),
    "a range": (of(range(3)), of(range(3))),
    "a global": (by_global(), by_global()),
}
DIFFERENT = {
    "a number": (of(2), of(3)),
    "a number and a flag": (of(1), of(True)),
    "a module": (of(MODEL), of(OTHER)),
    "a trained tensor": (of(TRAINED), of(torch.ones(20, requires_grad=True))),
    "a tensor of another shape": (of(FROZEN), of(torch.ones(21))),
    "a small tensor": (of(torch.ones(2)), of(torch.zeros(2))),
    "a function": (of(doubled), of(squared)),
    "a function below": (of(of(doubled)), of(of(squared))),
    "containers": (of([1, 2]), of([1, 3])),
    "an object": (of(Setting(1.0)), of(Setting(1.0))),
    "a default": (by_default(3), by_default(4)),
    "a partial": (functools.partial(doubled, x=1), functools.partial(doubled, x=2)),
    "a method": (MODEL.forward, OTHER.forward),
    "a nested function": (nested(1), nested(2)),
    "other code": (of(1), by_default(1)),
}


@pytest.mark.parametrize(("first", "second"), SAME.values(), ids=SAME)
def test_the_same_code_of_the_same_things_is_the_same_function(first, second):
    assert code_of(first) == code_of(second) and hash(code_of(first)) == hash(code_of(second))


@pytest.mark.parametrize(("first", "second"), DIFFERENT.values(), ids=DIFFERENT)
def test_what_a_function_refers_to_tells_it_apart(first, second):
    assert code_of(first) != code_of(second)


def test_a_global_that_changes_makes_another_function(monkeypatch):
    before = code_of(by_global())
    monkeypatch.setitem(globals(), "FLAG", 2.0)
    assert code_of(by_global()) != before


def test_a_setting_that_changes_makes_another_function():
    setting = Setting(1.0)
    before = code_of(of(setting))
    setting.scale = 2.0
    assert code_of(of(setting)) != before


def test_functions_that_refer_to_themselves_are_known():
    def first(x: Tensor, n: int) -> Tensor:
        return first(x, n - 1) if n else x

    assert code_of(first) == code_of(first)


def test_what_is_gone_is_equal_to_nothing():
    module = nn.Linear(1, 1)
    key = Same(module)
    assert key == Same(module)
    del module
    gc.collect()
    assert key != Same(MODEL) and key != key  # noqa: PLR0124


def test_a_key_does_not_keep_what_it_names_alive():
    module = nn.Linear(1, 1)
    key, gone = code_of(of(module)), Same(module)
    del module
    gc.collect()
    assert gone != gone and key is not None  # noqa: PLR0124


class Counted(nn.Sequential):
    """Counts the examples that it is run on."""

    examples = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.examples += len(x)
        return super().forward(x)

    def run_in(self, call: Callable[[], Any]) -> int:
        before = Counted.examples
        call()
        return Counted.examples - before


CALLS: dict[str, Callable[[Any, Tensor, Any], Any]] = {
    "diagonal": lambda model, x, f: nngeo.FIM(model, (x,), nngeo.PMatDiag, "regression", function=f),
    "kernel": lambda model, x, f: nngeo.NTK(model, (x,), function=f),
    "by weights": lambda model, x, f: products.vjp(model, x, torch.ones(2).to(x), "weight", function=f),
    "by inputs": lambda model, x, f: products.vjp(model, x, torch.ones(2).to(x), function=f),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_function_made_anew_is_not_looked_at_again(call):
    model, x = Counted(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    runs = [model.run_in(lambda: call(model, x, lambda x: model(x).sin())) for _ in range(3)]
    assert runs[0] > runs[1] == runs[2] == 5


def test_another_function_of_the_same_code_is_looked_at_again():
    model = networks.hidden_use().double()
    batch = (torch.randn(5, 3, dtype=torch.float64), torch.zeros(5))

    def made(hidden: bool) -> Callable[..., Tensor]:
        return lambda x, y: nn.functional.linear(model(x).tanh(), model.inner.weight) if hidden else model(x)

    Jacobian(model, batch, made(False))
    assert_close(Jacobian(model, batch, made(True)).to_torch(), reference.jacobian(model, batch, made(True)))
