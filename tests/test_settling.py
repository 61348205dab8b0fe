"""The accounting comes to an end: with a way to the gradients of each layer, or with a refusal by name."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo
from nngeo import NTK, Jacobian
from nngeo.generators.sources import Chain, Source
from tests import networks, reference

EXACT = {"rtol": 1e-8, "atol": 1e-10}
SECONDS = 30  # a second is what the slowest takes


class Late(BaseException):
    """No end: not to be taken for an error of the model."""


@contextmanager
def within(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Layered(nn.TransformerEncoderLayer):
    """One that can be made anew."""

    def reset_parameters(self) -> None:
        for p in self.parameters():
            nn.init.normal_(p)


def owning(run: Callable[[Any, Tensor], Tensor], shape: tuple[int, ...], **modules: nn.Module) -> nn.Module:
    """A model that owns a parameter itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in modules.values():
            module.reset_parameters()  # type: ignore[operator]
        net = networks.Net(run, **modules)
        net.own = nn.Parameter(torch.randn(shape))
    return net.double().eval()


def distances(net: Any, x: Tensor) -> Tensor:
    return torch.exp(-torch.cdist(x, net.own))


def solved(net: Any, x: Tensor) -> Tensor:
    factors, pivots = torch.linalg.lu_factor(net.own @ net.own.T + torch.eye(3, dtype=x.dtype))
    return torch.linalg.lu_solve(factors, pivots, net.head(x).unsqueeze(-1))[..., 0]


def cached(net: Any, x: Tensor) -> Tensor:
    """Reads what the first call kept."""
    if not hasattr(net, "kept"):
        net.kept = net.own.exp()
    return net.head(x * net.kept)


def read(net: Any, x: Tensor) -> Tensor:
    """A value in the middle, which vmap has none of."""
    return net.head(x * net.own * (1.0 if float(net.own.detach().sum()) > 100 else 2.0))


def with_token(net: Any, x: Tensor) -> Tensor:
    """(b, 3) as three positions behind a class token."""
    positions = torch.cat([net.own.expand(len(x), 1, 1), x[..., None]], 1).expand(-1, -1, 4)
    return net.head(net.body(positions)[:, 0])


def nearest(net: Any, x: Tensor) -> Tensor:
    """Of the rows of a code book."""
    return net.head(net.own[torch.cdist(x, net.own).argmin(-1)] * x)


def interpolated(net: Any, x: Tensor) -> Tensor:
    """By a Gaussian process through points of its own."""
    root = torch.linalg.cholesky(torch.exp(-torch.cdist(net.own, net.own)) + torch.eye(4, dtype=x.dtype))
    return torch.exp(-torch.cdist(x, net.own)) @ torch.cholesky_solve(net.head(net.own), root)


SERVED = {
    "a class token": (
        with_token,
        (1, 1, 1),
        {"body": Layered(4, 2, 5, 0.0, batch_first=True), "head": nn.Linear(4, 2)},
    ),
    "a code book": (nearest, (4, 3), {"head": nn.Linear(3, 2)}),
    "a process": (interpolated, (4, 3), {"head": nn.Linear(3, 2)}),
    "distances": (distances, (5, 3), {}),
    "distances, then a layer": (lambda net, x: net.head(distances(net, x)), (3, 3), {"head": nn.Linear(3, 2)}),
    "a solution": (solved, (3, 3), {"head": nn.Linear(3, 3)}),
    "a value": (read, (3,), {"head": nn.Linear(3, 2)}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("run", "shape", "modules"), SERVED.values(), ids=SERVED)
def test_parameters_of_the_model_itself_are_served(run, shape, modules, dtype):
    model, x = owning(run, shape, **modules), drawn(4, 3)
    expected = reference.ntk(model, (x, torch.zeros(4)))
    with within(SECONDS):
        found = NTK(model.to(dtype), (x.to(dtype),)).to_torch()
    assert_close(found.double(), expected, **(EXACT if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}))


@pytest.mark.filterwarnings("ignore:The outputs do not depend on")
def test_what_the_model_keeps_of_its_parameter_comes_to_an_end():
    """In the first call the outputs depend on the parameter; the cache is not kept, so they do in every call."""
    model, batch = owning(cached, (3,), head=nn.Linear(3, 2)), (drawn(4, 3), torch.zeros(4))
    with within(SECONDS):
        found = Jacobian(model, batch).to_torch()
    assert_close(found, reference.jacobian(model, batch), **EXACT)


def clipped(change: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A model that changes the gradient at its hidden layer."""

    def run(net: Any, x: Tensor) -> Tensor:
        h = net.body(x) + net.own
        if h.requires_grad:
            h.register_hook(change)
        return net.head(h.tanh())

    return run


CLIPPED = {
    "to one length": lambda g: g / g.norm(),
    "entry by entry": lambda g: g.clamp(-0.1, 0.1),
    "by the mean": lambda g: g - g.mean(0),
}


@pytest.mark.parametrize("change", CLIPPED.values(), ids=CLIPPED)
@pytest.mark.parametrize("representation", [nngeo.PMatDiag, nngeo.PMatDense], ids=lambda kind: kind.__name__)
def test_a_gradient_that_is_clipped_in_forward_is_refused(representation, change):
    model = owning(clipped(change), (3,), body=nn.Linear(3, 3), head=nn.Linear(3, 2))
    with within(SECONDS), pytest.raises(NotImplementedError, match="layer '(body)?'"):
        nngeo.FIM(model, (drawn(5, 3),), representation, "regression")


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-0.1, 0.1)


KEPT: dict[int, Tensor] = {}


def kept_elsewhere(net: Any, x: Tensor) -> Tensor:
    """In a dict that is not the model's, with the graph of the first call."""
    if id(net) not in KEPT:
        KEPT[id(net)] = net.own.exp()
    return net.head(x * KEPT[id(net)])


def clipped_at_the_parameter(net: Any, x: Tensor) -> Tensor:
    if not net.own._backward_hooks:
        net.own.register_hook(lambda g: g.clamp(-0.01, 0.01))
    return net.head(x * net.own)


UNEXPLAINED = {
    "clipped by a function": lambda net, x: net.head(Clipped.apply(x * net.own)),
    "clipped at the parameter": clipped_at_the_parameter,
    "kept elsewhere": kept_elsewhere,
}


@pytest.mark.parametrize("run", UNEXPLAINED.values(), ids=UNEXPLAINED)
@pytest.mark.parametrize("call", [Jacobian, NTK], ids=["Jacobian", "NTK"])
def test_what_can_not_be_explained_is_refused(run, call):
    model = owning(run, (3,), head=nn.Linear(3, 2))
    try:
        with within(SECONDS), pytest.raises(NotImplementedError, match="Gradients of single examples .* layer ''"):
            call(model, drawn(5, 3))
    finally:
        KEPT.clear()


def test_a_gradient_that_is_scaled_in_forward_is_served():
    model = owning(clipped(lambda g: 0.1 * g), (3,), body=nn.Linear(3, 3), head=nn.Linear(3, 2))
    batch = (drawn(5, 3), torch.zeros(5))
    assert_close(Jacobian(model, batch).to_torch(), reference.jacobian(model, batch), **EXACT)


# ------------------------------------------------------------------------------------------ chains


A, B, WHOLE = Source(("a",), fast=True), Source(("a",)), Source(())


def walked(chain: Chain, raised: Callable[[Source], bool]) -> list[Source]:
    found = [chain.source]
    while (source := chain.following(raised(chain.source), lambda source: True)) is not None:
        found.append(chain.move(source, raised(chain.source)))
    return found


def by_rows(source: Source) -> Source:
    return Source(source.hosts, vectorized=False)


def test_each_source_is_tried_once_and_row_by_row_at_last():
    assert walked(Chain([A, B, B, WHOLE, B], A), lambda source: False) == [A, B, WHOLE, by_rows(B), by_rows(WHOLE)]


def test_what_raises_an_error_is_tried_row_by_row_at_once():
    found = walked(Chain([A, B, WHOLE], A), lambda source: source == B)
    assert found == [A, B, by_rows(B), WHOLE, by_rows(WHOLE)]


def test_a_chain_goes_on_behind_the_source_that_it_begins_with():
    assert walked(Chain([A, B, WHOLE], B), lambda source: False) == [B, WHOLE, by_rows(B), by_rows(WHOLE)]


# ------------------------------------------------------------------------------------------ cost


class Counted(nn.Module):
    """Blocks with attention, their parameters partly zero, a parameter of the model, and the number of examples run."""

    def __init__(self, depth: int):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.examples = Counter[str]()  # a list or a dict would be put back
        self.places = nn.Parameter(torch.randn(5, 8))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True) for _ in range(depth))

    def forward(self, tokens: Tensor) -> Tensor:
        self.examples["run"] += len(tokens)
        h = self.embed(tokens) + self.places
        for block in self.blocks:
            h = block(h)
        return self.head(h)

    def run_in(self, call: Callable[[], Any]) -> int:
        before = self.examples["run"]
        call()
        return self.examples["run"] - before


def counted(depth: int) -> tuple[Counted, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    tokens = torch.randint(9, (6, 5))
    return Counted(depth).eval(), (tokens, tokens)


@pytest.mark.parametrize("depth", [1, 4])
def test_the_first_look_runs_few_examples_whatever_the_depth(depth):
    """Six are run at the parameters, two of them alone, three at others nearby, and these by the generic rule."""
    model, batch = counted(depth)
    first = model.run_in(lambda: nngeo.FIM(model, batch, nngeo.PMatDiag, "token_logits"))
    again = model.run_in(lambda: nngeo.FIM(model, batch, nngeo.PMatDiag, "token_logits"))
    assert first - again <= 6 + 2 + 3 + 3


def mixing(net: Any, x: Tensor) -> Tensor:
    """Examples influence each other, and Python reads a value."""
    return net.head(x - x.mean(0) if float(x.detach().sum()) < 1e9 else x)


UNCHECKED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "diagonal": lambda model, x: nngeo.FIM(model, (x,), nngeo.PMatDiag, check=False),
    "kernel": lambda model, x: NTK(model, (x,), check=False),
    "product": lambda model, x: nngeo.FIM(model, (x,), nngeo.PMatImplicit, check=False).mv(
        nngeo.PVector.from_model(model)
    ),
    "linearized": lambda model, x: nngeo.FIM(model, (x,), nngeo.PMatImplicit, check=False).linearize(),
}


@pytest.mark.parametrize("call", UNCHECKED.values(), ids=UNCHECKED)
def test_without_a_check_nothing_is_compared(call):
    """Examples that influence each other would be found by any comparison."""
    model, x = owning(mixing, (1,), head=nn.Linear(3, 2)), drawn(9, 3)
    model.own.requires_grad_(False)
    call(model, x)
    call(model, 2 * x)


@pytest.mark.parametrize("depth", [1, 4])
def test_without_a_check_the_first_call_runs_only_what_it_needs(depth):
    """The layouts, from one example and a few; and how much these take, whose run serves for the sweep, too."""
    model, batch = counted(depth)
    options = {
        "variant": "token_logits",
        "check": False,
        "layer_collection": nngeo.LayerCollection.from_model(model, nn.Linear),
    }
    first = model.run_in(lambda: nngeo.FIM(model, batch, nngeo.PMatDiag, **options))
    assert first == 1 + 6 + 6


@pytest.mark.parametrize("check", [True, False])
def test_a_run_serves_again_for_the_same_examples_only(check):
    """The loader fills the same tensor again while the first mini-batch waits for company."""
    batches, place = drawn(3, 4, 3), drawn(4, 3)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    refilled = nngeo.FIM(model, ((place.copy_(x),) for x in batches), nngeo.PMatDense, check=check)
    assert_close(refilled.to_torch(), nngeo.FIM(model, (batches.flatten(0, 1),), nngeo.PMatDense).to_torch())


class Noting(nn.Module):
    """A layer without a rule that calls a function before it runs."""

    def __init__(self, before: Callable[[], None]):
        super().__init__()
        self.scale, self.before = nn.Parameter(torch.ones(3)), before

    def forward(self, x: Tensor) -> Tensor:
        self.before()
        return x * self.scale.exp()


@pytest.mark.parametrize("at", [1, 2], ids=["in the sweep", "when it is run again for its gradients"])
def test_a_plan_that_failed_is_made_anew(at):
    count, fails_at = 0, -1

    def before() -> None:
        nonlocal count
        count += 1
        if count == fails_at:
            raise RuntimeError("at this call")

    model, batch = nn.Sequential(nn.Linear(3, 3), Noting(before)), (torch.randn(4, 3),)

    def calls() -> int:
        nonlocal count
        count = 0
        nngeo.FIM(model, batch, nngeo.PMatDiag, "regression")
        return count

    first, again = calls(), calls()
    assert first > again == 2
    fails_at = at
    with pytest.raises(RuntimeError, match="at this call"):
        calls()
    fails_at = -1
    assert [calls(), calls()] == [first, again]
