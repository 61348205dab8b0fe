"""Gramians of the engine are J J', on every network of cases.py, for losses of any shape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from nngeo.descent.autogram import Engine, products
from nngeo.generators.record import LayerRecord
from tests import networks, reference
from tests.engines import (
    EXACT,
    each_case,
    jacobian,
    losses,
    mlp,
    plan_of,
    scores,
    slow_accepted,
    whole_losses,
)

# Modules without a rule, and what their parents do with parameters of their own.
GENERIC = {"linear_subclass", "position_mlp", "attention_cross", "bilinear", "prelu"}
GENERIC |= {"lstm", "gru_bidirectional", "rnn_two_layers", "weight_norm", "weight_norm_old"}
GENERIC |= {"bare_parameters", "parameter_list", "mapped", "force_field"}


@each_case
def test_gramian_of_one_loss_per_example_is_dense(case):
    model = case.make()
    engine = Engine(model, batch_dim=0)
    found = losses(case, model)
    with slow_accepted():
        gramian = engine.compute_gramian(found)
    rows = jacobian(found, reference.trainable(model))
    assert_close(gramian, rows @ rows.T, **EXACT)


@each_case
def test_gramian_of_several_losses_per_example_is_dense(case):
    model = case.make()
    engine = Engine(model, batch_dim=0)
    found = losses(case, model, k=3)
    with slow_accepted():
        gramian = engine.compute_gramian(found)
    rows = jacobian(found, reference.trainable(model))
    assert_close(gramian, rows @ rows.T, **EXACT)


@each_case
def test_gramian_of_losses_of_the_batch_is_dense(case):
    model = case.make()
    engine = Engine(model, batch_dim=None)
    found = whole_losses(case, model)
    rows = jacobian(found, reference.trainable(model))
    assert_close(engine.compute_gramian(found), rows @ rows.T, **EXACT)


@each_case
def test_gramian_in_blocks_is_the_whole_one(case):
    model = case.make()
    engine = Engine(model, batch_dim=0)
    found = losses(case, model, k=2)
    with slow_accepted():
        whole = engine.compute_gramian(found)
    assert_close(engine.compute_gramian(found, block=4), whole, **EXACT)
    assert_close(engine.compute_gramian(found, block=2 * len(found)), whole, **EXACT)


@each_case
def test_gramian_across_batches_is_dense(case):
    model = case.make()
    engine = Engine(model, batch_dim=0)
    left, right = losses(case, model), losses(case, model, k=2, seed=1)
    with slow_accepted():
        gramian = engine.compute_gramian(left, right)
    parameters = reference.trainable(model)
    assert_close(gramian, jacobian(left, parameters) @ jacobian(right, parameters).T, **EXACT)


@each_case
def test_gramians_of_layers_are_dense(case):
    model = case.make()
    engine = Engine(model, batch_dim=0)
    found = losses(case, model)
    with slow_accepted():
        parts = engine.compute_gramian(found, per_layer=True)
    rows = jacobian(found, reference.trainable(model))
    slices = reference.layer_slices(model)
    for name, part in parts.items():
        assert_close(part, rows[:, slices[name]] @ rows[:, slices[name]].T, **EXACT)
    assert not rows[:, [j for name in slices.keys() - parts for j in range(*slices[name].indices(10**9))]].any()


@each_case
def test_rules_serve_all_but_modules_without_one(case):
    model = case.make()
    engine = Engine(model, batch_dim=0)
    engine.compute_gramian(losses(case, model))
    chosen = plan_of(engine).choices.values()
    assert any(not choice.source.fast for choice in chosen) == (case.id in GENERIC)
    assert not any(choice.by_rows for choice in chosen)


def test_a_tied_head_needs_no_dense_gradient(monkeypatch):
    model = networks.tied_embedding().double()
    engine = Engine(model, batch_dim=0)
    found = scores(model(torch.randint(5, (4, 3))), 2)
    rows = jacobian(found, reference.trainable(model))
    monkeypatch.setattr(LayerRecord, "jacobian", None)
    monkeypatch.setattr(products, "_dense_entries", lambda x, y: 10**9)  # as it is with a vocabulary
    assert_close(engine.compute_gramian(found), rows @ rows.T, **EXACT)
    assert_close(engine.compute_gramian(found, block=3), rows @ rows.T, **EXACT)


# ------------------------------------------------------------------------------------------ shapes of losses


@pytest.mark.parametrize("axis", [0, 1, 2, -1, None])
def test_any_axis_may_count_the_examples(axis):
    model = mlp(3, 4, 4)
    engine = Engine(model, batch_dim=axis)
    found = model(torch.randn(5, 3).double()).square().view(5, 2, 2)
    found = found if axis is None else found.movedim(0, axis)
    rows = jacobian(found, reference.trainable(model))
    assert_close(engine.compute_gramian(found), rows @ rows.T, **EXACT)
    assert_close(engine.compute_gramian(found, block=3), rows @ rows.T, **EXACT)


def test_one_example_is_a_batch():
    model = mlp(3, 4, 1)
    found = Engine(model, batch_dim=0)
    value = model(torch.randn(1, 3).double())[:, 0]
    rows = jacobian(value, reference.trainable(model))
    assert_close(found.compute_gramian(value), rows @ rows.T, **EXACT)


def test_a_scalar_loss_of_the_batch_has_the_squared_norm_of_its_gradient():
    model = mlp(3, 4, 1)
    engine = Engine(model, batch_dim=None)
    loss = model(torch.randn(5, 3).double()).square().mean()
    gradient = reference.gradient(loss, reference.trainable(model))
    assert_close(engine.compute_gramian(loss), (gradient @ gradient).view(1, 1), **EXACT)


def test_the_number_of_examples_may_change():
    model = mlp(3, 4, 2)
    engine = Engine(model, batch_dim=0)
    for b in (4, 1, 7, 2, 4):
        found = scores(model(torch.randn(b, 3).double()))[:, 0]
        rows = jacobian(found, reference.trainable(model))
        assert_close(engine.compute_gramian(found), rows @ rows.T, **EXACT)


# ------------------------------------------------------------------------------------------ which parameters


def test_a_part_of_the_model_gives_its_part_of_the_gramian():
    model = mlp(3, 4, 4, 2)
    engine = Engine(model[2], model[4], batch_dim=0)
    found = scores(model(torch.randn(5, 3).double()))[:, 0]
    rows = jacobian(found, [*model[2].parameters(), *model[4].parameters()])
    assert_close(engine.compute_gramian(found), rows @ rows.T, **EXACT)


def test_a_weight_tied_to_a_module_outside_is_right():
    model = mlp(3, 3, 3, 3)
    model[2].weight = model[0].weight
    engine = Engine(model[0], batch_dim=0)
    found = scores(model(torch.randn(5, 3).double()))[:, 0]
    gramian = engine.compute_gramian(found)
    rows = jacobian(found, list(model[0].parameters()))
    assert_close(gramian, rows @ rows.T, **EXACT)


def test_parameters_frozen_and_thawed_later_are_followed():
    model = mlp(3, 4, 2)
    engine, x = Engine(model, batch_dim=0), torch.randn(5, 3).double()
    for frozen in ([], [model[0].weight], [model[0].weight, model[0].bias], [model[2].bias], []):
        model.requires_grad_(True)
        for p in frozen:
            p.requires_grad_(False)
        found = scores(model(x))[:, 0]
        rows = jacobian(found, reference.trainable(model))
        assert_close(engine.compute_gramian(found), rows @ rows.T, **EXACT)


def test_replaced_parameters_and_modules_are_followed():
    model = mlp(3, 4, 2)
    engine, x = Engine(model, batch_dim=0), torch.randn(5, 3).double()
    engine.compute_gramian(scores(model(x))[:, 0])
    model[0].weight = nn.Parameter(torch.randn(4, 3).double())
    found = scores(model(x))[:, 0]
    rows = jacobian(found, reference.trainable(model))
    assert_close(engine.compute_gramian(found), rows @ rows.T, **EXACT)
    model[2] = nn.Linear(4, 2, dtype=torch.float64)
    for accepted in (slow_accepted(), torch.enable_grad()):  # the second forward needs no indulgence
        found = scores(model(x))[:, 0]
        rows = jacobian(found, reference.trainable(model))
        with accepted:
            assert_close(engine.compute_gramian(found), rows @ rows.T, **EXACT)


def test_a_use_in_the_loss_itself_is_right_and_warned_of():
    model = mlp(3, 4, 2)
    engine = Engine(model, batch_dim=0)
    found = scores(model(torch.randn(5, 3).double()))[:, 0] + 0.1 * model[0].weight.square().sum()
    with pytest.warns(UserWarning, match="by '0' \\(Linear\\) take a backward pass for every one of the 5 losses"):
        gramian = engine.compute_gramian(found)
    rows = jacobian(found, reference.trainable(model))
    assert_close(gramian, rows @ rows.T, **EXACT)


# ------------------------------------------------------------------------------------------ train mode


def test_dropout_of_the_forward_that_was_run_counts():
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 2)).double()
    engine, x = Engine(model, batch_dim=0), torch.randn(5, 3).double()
    for _ in range(2):
        found = scores(model(x))[:, 0]
        rows = jacobian(found, reference.trainable(model))
        assert_close(engine.compute_gramian(found), rows @ rows.T, **EXACT)


def test_batch_norm_in_train_mode_mixes_examples():
    model = networks.batch_norm1d().double()
    engine = Engine(model, batch_dim=0)
    with pytest.raises(ValueError, match="'positions' \\(BatchNorm1d\\) is in train mode, so it mixes"):
        engine.compute_gramian(scores(model(torch.randn(5, 3, 4).double()))[:, 0])


def test_batch_norm_in_train_mode_is_right_for_losses_of_the_batch():
    model = networks.batch_norm2d().double()
    engine = Engine(model, batch_dim=None)
    found = scores(model(torch.randn(5, 1, 4, 4).double()))[:, 0]
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gramian = engine.compute_gramian(found)
    rows = jacobian(found, reference.trainable(model))
    assert_close(gramian, rows @ rows.T, **EXACT)
    assert_close(dict(model.named_buffers()), state, rtol=0, atol=0)


def test_examples_that_influence_each_other_outside_of_the_modules_are_right():
    model = mlp(3, 4, 2)
    engine = Engine(model, batch_dim=0)
    out = model(torch.randn(5, 3).double())
    found = (out @ out.T).logsumexp(1)
    with pytest.warns(UserWarning, match="do the examples influence each other"):
        gramian = engine.compute_gramian(found)
    rows = jacobian(found, reference.trainable(model))
    assert_close(gramian, rows @ rows.T, **EXACT)


# ------------------------------------------------------------------------------------------ routing by data


class Experts(nn.Module):
    """Rows go to the expert that the sign of their first entry says."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 3)
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    def forward(self, x):
        h, out = self.embed(x).tanh(), torch.zeros_like(x)
        for j, expert in enumerate(self.experts):
            rows = (x[:, 0] > 0).long().eq(j).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(h[rows]))
        return out


def test_experts_that_see_rows_chosen_by_data_are_right():
    model = Experts().double()
    engine = Engine(model, batch_dim=0)
    # All rows in order to one expert, then as many to it in another order, then some to each.
    signs = ([1, 1, 1, 1], [-1, 1, -1, 1], [1, -1, 1, -1], [-1, -1, 1, -1])
    for sign in signs:
        x = torch.randn(4, 3).double()
        x[:, 0] = x[:, 0].abs() * torch.tensor(sign)
        found = scores(model(x))[:, 0]
        with slow_accepted():
            gramian = engine.compute_gramian(found)
        rows = jacobian(found, reference.trainable(model))
        assert_close(gramian, rows @ rows.T, **EXACT)


def test_losses_in_an_order_that_depends_on_data_are_right():
    model = mlp(3, 4, 1)
    engine, x = Engine(model, batch_dim=0), torch.randn(2, 3).double()
    for batch in (x, x.flip(0)):  # in order for one of the two
        found = model(batch)[:, 0].sort().values
        rows = jacobian(found, reference.trainable(model))
        with slow_accepted():
            assert_close(engine.compute_gramian(found), rows @ rows.T, **EXACT)


def test_a_dead_layer_that_comes_alive_is_verified_then():
    model = networks.Net(
        lambda net, x: F.linear(F.linear(net.inner(x).tanh(), net.gate), net.inner.weight),
        inner=nn.Linear(3, 3),
        gate=nn.Parameter(torch.zeros(3, 3)),
    ).double()
    engine, x = Engine(model, batch_dim=0), torch.randn(5, 3).double()
    for gate in (0.0, 1.0):
        nn.init.constant_(model.gate, gate)
        found = scores(model(x))[:, 0]
        with slow_accepted():
            gramian = engine.compute_gramian(found)
        rows = jacobian(found, reference.trainable(model))
        assert_close(gramian, rows @ rows.T, **EXACT)


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda x: x.mean(), "without an axis 0 of examples"),
        (lambda x: x.detach(), "have no graph"),
        (lambda x: x[:0], "are empty"),
    ],
    ids=["scalar", "detached", "empty"],
)
def test_losses_that_are_none_are_refused(give, message):
    model = mlp(3, 2)
    with pytest.raises(ValueError, match=message):
        Engine(model, batch_dim=0).compute_gramian(give(model(torch.randn(4, 3).double())[:, 0]))


def test_losses_that_do_not_depend_on_the_modules_are_refused():
    model, other = mlp(3, 2), mlp(3, 2)
    with pytest.raises(ValueError, match="do not depend on any parameter of the engine's modules"):
        Engine(model, batch_dim=0).compute_gramian(other(torch.randn(4, 3).double())[:, 0])


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="found list"):
        Engine([nn.Linear(2, 2)], batch_dim=0)
    model = mlp(3, 2)
    with pytest.raises(TypeError, match="batch_dim should be an axis of the losses, or None, found '0'"):
        Engine(model, batch_dim="0")
    engine, found = Engine(model, batch_dim=0), model(torch.randn(4, 3).double())
    with pytest.raises(TypeError, match="losses is a list"):
        engine.compute_gramian([found])
    with pytest.raises(ValueError, match="`block` should be at least 1; got 0"):
        engine.compute_gramian(found, block=0)


@pytest.mark.parametrize("build", [lambda: mlp(9, 4, 2), lambda: networks.conv2d("zeros")], ids=["linear", "conv"])
def test_a_forward_that_was_run_before_the_engine_was_made_is_right(build):
    model = build().double()
    found = scores(model(torch.randn(5, *((9,) if len(model) == 3 else (1, 4, 4))).double()))[:, 0]
    engine = Engine(model, batch_dim=0)
    with slow_accepted():
        gramian = engine.compute_gramian(found)
    rows = jacobian(found, reference.trainable(model))
    assert_close(gramian, rows @ rows.T, **EXACT)
    # Linear layers are found in the graph; a convolution is not.
    assert bool(plan_of(engine).by_rows()) == (len(model) > 3)


class Writing(nn.Module):
    """A layer without a rule, which adds to its own gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            (self.scale * x.detach()).sum().backward()
        return self.scale.square() * x


@pytest.mark.parametrize("there", [True, False], ids=["there", "none"])
def test_a_module_that_runs_again_writes_no_gradients(there):
    model = nn.Sequential(nn.Linear(3, 3), Writing(), nn.Linear(3, 1), nn.Flatten(0)).double()
    engine = Engine(model, batch_dim=0)
    found = model(torch.randn(5, 3, dtype=torch.float64)).square()
    written = model[1].scale.grad.clone()
    model[1].scale.grad = written.clone() if there else None
    gramian = engine.compute_gramian(found)
    grads = [p.grad for p in model.parameters()]
    rows = jacobian(found, list(model.parameters()))
    assert_close(gramian, rows @ rows.T, **EXACT)
    assert_close(grads, [None, None, written if there else None, None, None])


def test_checkpointing_that_hides_the_graph_is_named():
    body = nn.Linear(3, 3).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(3, 1).double()
    engine = Engine(body, head, batch_dim=0)
    out = head(torch.utils.checkpoint.checkpoint(body, x, use_reentrant=True))[:, 0]
    with pytest.raises(NotImplementedError, match="use_reentrant=False"):
        engine.compute_gramian(out)


# ------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_right_up_to_rounding_and_needs_no_rows_of_autograd(dtype):
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
    engine, x = Engine(model, batch_dim=0), torch.randn(6, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = model(x).float().square().sum(1)
    gramian = engine.compute_gramian(found)
    rows = jacobian(found, reference.trainable(model))
    assert gramian.dtype == torch.float64
    assert_close(gramian.float(), rows @ rows.T, rtol=10 * torch.finfo(dtype).eps, atol=10 * torch.finfo(dtype).eps)
    assert not plan_of(engine).by_rows()
