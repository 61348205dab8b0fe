"""What an engine notes lives and dies with the graph of the losses, and belongs to it alone."""

from __future__ import annotations

import gc
import io
import pickle
import weakref
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.testing import assert_close

from nngeo.descent.autogram import Engine
from tests import networks, reference
from tests.engines import EXACT, each_case, jacobian, losses, mlp, scores, slow_accepted


def batch(b: int = 5) -> torch.Tensor:
    return torch.randn(b, 3, dtype=torch.float64)


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def hold(engine: Engine, model: nn.Module, found: torch.Tensor) -> None:
    """The Gramian is the dense one."""
    rows = jacobian(found, reference.trainable(model))
    assert_close(engine.compute_gramian(found), rows @ rows.T, **EXACT)


# ------------------------------------------------------------------------------------------ whose calls count


def test_only_the_calls_on_the_graph_of_the_losses_count():
    model = mlp(3, 4, 2)
    engine = Engine(model, batch_dim=0)
    first, second = scores(model(batch()))[:, 0], scores(model(batch(7)))[:, 0]
    hold(engine, model, second)
    hold(engine, model, first)


def test_a_loss_of_two_forwards_counts_both():
    model = mlp(3, 4, 2)
    engine = Engine(model, batch_dim=0)
    hold(engine, model, (model(batch()) - model(batch())).square().sum(1))


def test_losses_of_two_forwards_side_by_side_are_right():
    model = mlp(3, 4, 2)
    engine = Engine(model, batch_dim=0)
    found = torch.cat([scores(model(batch()))[:, 0], scores(model(batch(4)))[:, 0]])
    with slow_accepted():
        hold(engine, model, found)


def test_a_gan_has_an_engine_for_each_of_its_parts():
    generator, critic = mlp(3, 4, 3), mlp(3, 4, 1)
    engines = [Engine(generator, batch_dim=0), Engine(critic, batch_dim=0)]
    real, fake = critic(batch())[:, 0], critic(generator(batch()))[:, 0]
    hold(engines[0], generator, fake)
    hold(engines[1], critic, fake - real)


def test_two_engines_on_one_model_do_not_disturb_each_other():
    model = mlp(3, 4, 2)
    engines = [Engine(model, batch_dim=0), Engine(model[2], batch_dim=None)]
    found = scores(model(batch()))[:, 0]
    hold(engines[0], model, found)
    hold(engines[1], model[2], found)
    engines[0].remove()
    hold(engines[1], model[2], scores(model(batch()))[:, 0])


def test_the_same_losses_twice_give_the_same_gramian():
    model = mlp(3, 4, 2)
    engine = Engine(model, batch_dim=0)
    found = scores(model(batch()))[:, 0]
    assert_close(engine.compute_gramian(found), engine.compute_gramian(found), rtol=0, atol=0)
    found.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        engine.compute_gramian(found)


# ------------------------------------------------------------------------------------------ hooks


@each_case
def test_nothing_is_left_of_an_engine_that_is_removed(case):
    model = case.make()
    before = hooks_of(model)
    with Engine(model, batch_dim=0) as engine:
        assert hooks_of(model) > before
    assert hooks_of(model) == before
    engine.remove()  # once more does no harm


def test_an_engine_that_is_dropped_takes_its_hooks_along():
    model = mlp(3, 4, 2)
    engine = Engine(model, batch_dim=0)
    engine.compute_gramian(scores(model(batch()))[:, 0])
    del engine
    gc.collect()
    assert hooks_of(model) == 0


@each_case
def test_the_forward_pass_is_the_same_with_an_engine(case):
    model = case.make()
    plain = deepcopy(model)  # a forward may change a buffer: torch 2.6 rounds the running mean of instance norm anew
    before = losses(case, plain)
    random = torch.get_rng_state()
    engine = Engine(model, batch_dim=0)
    found = losses(case, model)
    with slow_accepted():
        engine.compute_gramian(found)
    assert_close(found, before, rtol=0, atol=0)
    assert_close(dict(model.named_buffers()), dict(plain.named_buffers()), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_a_copy_of_a_model_is_free_of_the_engine():
    model = mlp(3, 4, 2)
    engine = Engine(model, batch_dim=0)
    for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = scores(copy(batch()))[:, 0]
        with pytest.raises(ValueError, match="do not depend on any parameter"):
            engine.compute_gramian(found)
        fresh = Engine(copy, batch_dim=0)
        hold(fresh, copy, scores(copy(batch()))[:, 0])
    hold(engine, model, scores(model(batch()))[:, 0])
    torch.save(model, io.BytesIO())


def test_a_model_copied_with_its_engine_has_one_of_its_own():
    model = mlp(3, 4, 2)
    engine = Engine(model, batch_dim=0)
    copy, twin = deepcopy((model, engine))
    hold(twin, copy, scores(copy(batch()))[:, 0])
    hold(engine, model, scores(model(batch()))[:, 0])
    assert repr(twin) == "Engine(Sequential, batch_dim=0)"


# ------------------------------------------------------------------------------------------ memory


def storages() -> int:
    """Bytes of all tensors that Python can reach; those that torch.compile keeps of its traces have no memory."""
    gc.collect()
    found = {}
    for x in gc.get_objects():
        if issubclass(type(x), torch.Tensor) and x.layout == torch.strided and not isinstance(x, FakeTensor):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(found.values())


@pytest.mark.parametrize(
    "make", [lambda: mlp(3, 4, 2), networks.layer_norm, networks.called_twice], ids=["mlp", "norm", "twice"]
)
def test_dropped_losses_leave_nothing_behind(make):
    model = make().double()
    engine = Engine(model, batch_dim=0)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    scores(model(x))[:, 0]
    engine.compute_gramian(scores(model(x))[:, 0])
    before = storages()
    for _ in range(3):
        engine.compute_gramian(scores(model(x))[:, 0])
        scores(model(x))[:, 0]
    assert storages() == before


def test_calls_die_without_the_garbage_collector():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    engine = Engine(model, batch_dim=0)
    noted: list[weakref.ref] = []
    model[0].register_forward_hook(
        lambda module, args, out: noted.extend(
            weakref.ref(entry.call) for entries in out.grad_fn.metadata.values() for entry in entries
        )
    )
    gc.disable()
    try:
        found = scores(model(batch()))[:, 0]
        engine.compute_gramian(found)
        assert noted and all(ref() is not None for ref in noted)
        del found
        assert all(ref() is None for ref in noted)
    finally:
        gc.enable()


def test_a_step_drops_the_calls_even_if_the_losses_are_kept():
    model = mlp(3, 4, 2)
    engine = Engine(model, batch_dim=0)
    found = scores(model(batch()))[:, 0]
    engine.step(found, lambda gramian: torch.ones(5, dtype=torch.float64))
    assert not engine._planner.graph(found).uses


def test_nothing_is_noted_without_gradients():
    model = mlp(3, 4, 2)
    engine = Engine(model, batch_dim=0)
    with torch.no_grad():
        model(batch())
    with torch.inference_mode():
        model(batch())
    assert not engine._watcher.kinds
    hold(engine, model, scores(model(batch()))[:, 0])


# ------------------------------------------------------------------------------------------ in place


def test_views_that_are_overwritten_are_followed_to_their_base():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    engine = Engine(model, batch_dim=0)
    found = scores(model(torch.randn(5, 4, 3, dtype=torch.float64)))[:, 0]
    hold(engine, model, found)  # no warning: the rules serve both layers


def test_an_input_that_is_overwritten_is_left_to_autograd():
    def run(net: networks.Net, x: torch.Tensor) -> torch.Tensor:
        h = net.embed(x)
        out = net.head(h)
        h += 1  # autograd does not need the input of a frozen weight
        return out + h.sum(-1, keepdim=True)

    model = networks.Net(run, embed=nn.Linear(3, 4), head=nn.Linear(4, 2)).double()
    model.head.weight.requires_grad_(False)
    engine = Engine(model, batch_dim=0)
    found = scores(model(batch()))[:, 0]
    with slow_accepted():
        hold(engine, model, found)
