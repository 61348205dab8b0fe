"""Products leave the model, the data and the random numbers as they were, and hold no more than they must."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nngeo import LayerCollection
from nngeo.products import Softmax, jacobian, jmjTp, jmp, jTmjp, jvp, mjp, vjp
from tests.modules import named
from tests.product_settings import draw, setting
from tests.test_untouched import build, unchanged

each_side = pytest.mark.parametrize("wrt", ["input", "weight"])
X = draw(4, 3)
CALLS: dict[str, Callable[[nn.Module, Tensor, str], Any]] = {
    "jvp": lambda model, x, wrt: jvp(model, x, torch.ones(size(model, x, wrt), dtype=x.dtype), wrt),
    "vjp": lambda model, x, wrt: vjp(model, x, draw(3), wrt),
    "jmp": lambda model, x, wrt: jmp(model, x, None, wrt),
    "mjp": lambda model, x, wrt: mjp(model, x, None, wrt),
    "jacobian": lambda model, x, wrt: jacobian(model, x, wrt),
    "jmjTp": lambda model, x, wrt: jmjTp(model, x, None, wrt),
    "jTmjp": lambda model, x, wrt: jTmjp(model, x, None, wrt),
    "diag": lambda model, x, wrt: jTmjp(model, x, None, wrt, result="diag", reduce="sum"),
    "trace": lambda model, x, wrt: jmjTp(model, x, None, wrt, result="trace"),
    "blocks": lambda model, x, wrt: jTmjp(model, x, None, wrt, result="blocks"),
    "softmax": lambda model, x, wrt: jTmjp(model, x, Softmax(draw(len(x), 3)), wrt, result="diag"),
    "graph": lambda model, x, wrt: jTmjp(model, x, None, wrt, create_graph=True),
    "mc": lambda model, x, wrt: jTmjp(
        model, x, None, wrt, result="diag", method="mc", samples=4, generator=torch.Generator()
    ),
}
each_call = pytest.mark.parametrize("call", CALLS)


def size(model: nn.Module, x: Tensor, wrt: str) -> int:
    return x[0].numel() if wrt == "input" else LayerCollection.from_model(model).numel()


@pytest.fixture
def model() -> nn.Module:
    """Without full backward hooks, in which outputs are views that nothing may change in place."""
    model = build().eval()
    model.head._backward_hooks.clear()
    return model


@contextmanager
def unchanged_data() -> Iterator[None]:
    before = X.clone()
    yield
    assert torch.equal(X, before) and not X.requires_grad and X.grad is None


@each_call
@each_side
def test_the_model_comes_back(model, call, wrt):
    with unchanged_data(), unchanged(model):
        CALLS[call](model, X, wrt)


@each_call
@each_side
def test_the_model_comes_back_after_an_error(model, call, wrt):
    with unchanged_data(), unchanged(model), pytest.raises(RuntimeError, match="too large"):
        CALLS[call](model, X + 1000, wrt)


@each_call
@each_side
@pytest.mark.parametrize("id", ["in_place_first", "in_place_sum"])
def test_modules_that_work_in_place_do_not_change_the_data(call, id, wrt):
    (module,) = named(id)
    model, x = module.build(), module.inputs()
    before = x.clone()
    CALLS[call](model, x, wrt)
    assert_close(x, before, rtol=0, atol=0)


def test_random_numbers_of_torch_are_drawn_only_where_no_generator_is_given():
    at, before = setting("mlp", "weight"), torch.get_rng_state()
    jTmjp(at.model, at.x, None, "weight", result="diag", method="mc", samples=3, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------ memory


class Largest(TorchDispatchMode):
    """The largest number of elements in one tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.numel = max([self.numel, *made])
        return out


WIDE = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 4), nn.Tanh(), nn.Linear(4, 3))
MANY = torch.randn(64, 4)
P = sum(p.numel() for p in WIDE.parameters())
SUMMED: dict[str, Callable[[], Any]] = {
    "diag": partial(jTmjp, WIDE, MANY, None, "weight", result="diag", reduce="sum"),
    "softmax_diag": partial(jTmjp, WIDE, MANY, Softmax(torch.randn(64, 3)), "weight", result="diag", reduce="mean"),
    "trace": partial(jTmjp, WIDE, MANY, None, "weight", result="trace", reduce="sum"),
    "diag_backprop": partial(jTmjp, WIDE, MANY, None, "weight", result="diag", reduce="sum", method="diag_backprop"),
    "outputs": partial(jmjTp, WIDE, MANY, None, "weight", result="dense", reduce="sum"),
}


@pytest.mark.parametrize("what", SUMMED)
def test_a_sum_over_the_batch_holds_nothing_for_every_example_and_parameter(what):
    with Largest() as largest:
        SUMMED[what](budget=len(MANY) * P // 8)
    assert largest.numel < len(MANY) * P / 4


def test_a_budget_bounds_what_is_held_at_once():
    found = []
    for budget in (None, 8 * P):
        with Largest() as largest:
            jTmjp(WIDE, MANY, None, "weight", x2=MANY + 1, result="trace", budget=budget)
        found.append(largest.numel)
    assert found[1] <= 16 * P < found[0]
