"""Several threads may use one model: what they get is right, and the model is as it was."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import nngeo.nn
from nngeo import FIM, FIM_MonteCarlo, LayerCollection, PMatDiag, PMatImplicit, products
from nngeo.descent import backward
from nngeo.descent.autogram import Engine
from nngeo.layers.turn import TURN
from nngeo.uses import influence


class Net(nn.Module):
    """Attention, a norm layer with buffers, a layer of its own, and a part that is run again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.BatchNorm1d(3)
        self.shift, self.inner, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 4), nn.Linear(12, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.norm(self.attend(x, x, x, need_weights=False)[0]) + self.shift
        return self.head(checkpoint(self._hidden, h, use_reentrant=False).flatten(1))

    def _hidden(self, h: Tensor) -> Tensor:
        return self.inner(h).tanh()


X = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DATA = TensorDataset(X, torch.arange(7) % 2)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().double().eval()


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    """Threads are switched often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def vector(model: nn.Module) -> nngeo.PVector:
    return nngeo.random_pvector(LayerCollection.from_model(model), dtype=X.dtype, generator=seeded())


def by_engine(model: nn.Module) -> Tensor:
    with Engine(model, batch_dim=0) as engine:
        return engine.compute_gramian(F.cross_entropy(model(X), DATA.tensors[1], reduction="none"))


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "diagonal": lambda model: FIM(model, (X,), PMatDiag).get_diag(),
    "KFAC": lambda model: FIM(
        model, (X,), nngeo.PMatKFAC, layer_collection=LayerCollection.from_model(model, "head")
    ).to_torch(),
    "kernel": lambda model: nngeo.NTK(model, (X,)).to_torch(),
    "Jacobian": lambda model: nngeo.Jacobian(model, (X,)).to_torch(),
    "Hessian": lambda model: nngeo.Hessian(model, DATA[:], PMatImplicit, F.cross_entropy).mv(vector(model)).to_torch(),
    "by weights": lambda model: products.jTmjp(model, X, wrt="weight", result="diag"),
    "by inputs": lambda model: products.jacobian(model, X),
    "forward": lambda model: products.jvp(model, X, torch.ones_like(X)),
    "with a graph": lambda model: products.jvp(model, X, torch.ones_like(X), create_graph=True).detach(),
    "engine": by_engine,
    "as a layer": lambda model: nngeo.nn.convert_to_nnj(model).jmjTp(X, None, None, wrt="weight"),
    "influence": lambda model: influence(
        model, FIM(model, (X,), PMatDiag) + 1.0, DATA[:], DATA[:3], nn.CrossEntropyLoss(reduction="sum"), refine=0
    ),
}


def together(work: Callable[[], Any], count: int = 2) -> list[Any]:
    """What so many threads find at the same time; raises what one of them raised."""
    found: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    if errors:
        raise errors[0]
    return found


def state(model: nn.Module) -> list[Any]:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    kernels = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    return [[p.requires_grad for p in model.parameters()], hooks, kernels]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_threads_that_use_one_model_find_what_one_finds(call, model):
    expected, before, random = call(model), state(model), torch.get_rng_state()
    found = together(lambda: [call(model) for _ in range(3)])
    assert_close(found, [[expected] * 3] * 2)
    assert_close(state(model), before)
    assert torch.equal(torch.get_rng_state(), random)


MATRICES: dict[str, Callable[[nn.Module], Any]] = {
    "exact": lambda model: FIM(model, (X,), PMatImplicit),
    "of draws": lambda model: FIM_MonteCarlo(model, DataLoader(DATA, 3), PMatImplicit, generator=seeded()),
    "of a shuffling loader": lambda model: FIM(model, DataLoader(DATA, 3, shuffle=True), PMatImplicit, empirical=True),
    "linearized": lambda model: FIM(model, (X,), PMatImplicit).linearize(),
}


@pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES)
def test_threads_share_a_matrix(make, model):
    matrix, v = make(model), vector(model)
    expected = matrix.mv(v).to_torch()
    assert_close(together(lambda: [matrix.mv(v).to_torch() for _ in range(5)]), [[expected] * 5] * 2)


def test_different_calls_may_meet(model):
    """The first look at the model, products and kernels, each in a thread of its own.

    Without the engine, whose forward pass is the user's own, and may meet a model whose flags are changed.
    """
    expected = {name: call(model) for name, call in CALLS.items() if name != "engine"}
    names = iter([*expected] * 2)
    lock = threading.Lock()

    def work() -> tuple[str, Any]:
        with lock:
            name = next(names)
        return name, CALLS[name](model)

    assert_close(dict(together(work, len(expected))), expected)


def test_two_models_may_meet():
    """They share a layer: flags, hooks and parameters of the one are those of the other."""
    torch.manual_seed(0)
    first, second = Net().double().eval(), Net().double().eval()
    second.inner = first.inner
    expected = {id(model): CALLS["diagonal"](model) for model in (first, second)}
    models = iter([first, second])
    found = together(lambda: [(id(model), CALLS["diagonal"](model)) for model in [next(models)] * 4])
    assert_close(dict(sum(found, [])), expected)


class Asking(nn.Module):
    """A model whose forward asks for a Jacobian, of another model or of a part of its own."""

    def __init__(self, own: bool):
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        self.other = [self.body if own else nn.Linear(3, 3).double()]

    def forward(self, x: Tensor) -> Tensor:
        scale = nngeo.Jacobian(self.other[0], (X[:2, 0, :3],)).to_torch().norm()
        return self.head(torch.tanh(self.body(x)) * scale)


@pytest.mark.parametrize("own", [False, True], ids=["of another model", "of a part"])
def test_a_forward_may_ask_for_a_jacobian(own):
    """The Jacobian is a number to it, in every thread, and nobody waits for himself."""
    torch.manual_seed(0)
    model, x = Asking(own).double(), X[:, 0, :3]
    plain = nn.Sequential(model.body, nn.Tanh(), Scaled(nngeo.Jacobian(model.other[0], (X[:2, 0, :3],))), model.head)
    expected = nngeo.Jacobian(plain, (x,)).to_torch()
    assert_close(together(lambda: nngeo.Jacobian(model, (x,)).to_torch()), [expected] * 2)
    assert all(p.requires_grad for p in model.parameters())


class Scaled(nn.Module):
    """Multiplies by a norm."""

    def __init__(self, J: Any):
        super().__init__()
        self.scale = float(J.to_torch().norm())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_forward_passes_of_the_user_in_another_thread_are_not_noted(model):
    """They are no calls of the sweep, whose records would be of other examples."""
    expected, stop = nngeo.Jacobian(model, (X,)).to_torch(), threading.Event()

    def forward() -> None:
        while not stop.is_set():
            model.head(torch.zeros(5, 12, dtype=X.dtype))

    thread = threading.Thread(target=forward)
    thread.start()
    try:
        found = [nngeo.Jacobian(model, (X,)).to_torch() for _ in range(5)]
    finally:
        stop.set()
        thread.join()
    assert_close(found, [expected] * 5)


def test_losses_of_different_threads_go_backward_together(model):
    def work() -> list[Tensor]:
        own = nn.Linear(3, 2).double()
        nn.init.ones_(own.weight), nn.init.zeros_(own.bias)
        backward(own(X[:, :, :3].mean(1)).square().mean(0), own.parameters(), nngeo.descent.aggregation.UPGrad())
        return [p.grad for p in own.parameters()]

    assert_close(together(work, 4), [work()] * 4)


def test_a_thread_may_take_its_turn_again():
    with TURN, TURN:
        assert together(lambda: 1, 1) == [1]


def test_a_turn_ends_with_an_error(model):
    with pytest.raises(ValueError, match="finite"):
        FIM(model, (X * torch.nan,), PMatDiag)
    assert len(together(lambda: FIM(model, (X,), PMatDiag), 1)) == 1
