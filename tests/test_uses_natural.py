"""Natural gradient steps against their definition, `w - lr (F + damping)^-1 g` with dense matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from nngeo import FIM, LayerCollection, PMatDense, PMatDiag, PMatEKFAC, PMatKFAC, PMatLowRank, PVector
from nngeo.uses import NaturalGradient

DAMPING = 0.1
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def batch(dtype: torch.dtype = torch.float64, n: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, dtype=dtype), torch.randint(3, (n,))


def flat(model: nn.Module) -> Tensor:
    return PVector.from_model(model).to_torch().detach().clone()


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.zero_grad()
    cross_entropy(model(x), y).backward()
    return PVector.from_model_grad(model).to_torch().clone()


def natural(F, g: Tensor, damping: float = DAMPING) -> Tensor:
    M = F.to_torch()
    return torch.linalg.solve(M + damping * torch.eye(len(M)).to(M), g)


# ------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("kind", [PMatDense, PMatDiag, PMatKFAC, PMatEKFAC, PMatLowRank])
@each_dtype
def test_a_step_is_along_the_natural_gradient(kind, dtype):
    model, (x, y) = network(dtype), batch(dtype)
    opt = NaturalGradient(model, 0.5, kind, trials=None, damping=DAMPING)
    before, g = flat(model), gradient(model, x, y)
    opt.update((x, y))
    opt.step()
    assert_close(flat(model), before - 0.5 * natural(opt.F, g), rtol=1e-4, atol=1e-5)


def test_the_matrix_is_the_exact_one_the_drawn_one_or_of_the_targets():
    model, (x, y) = network(), batch()
    opts = [
        NaturalGradient(model, trials=None),
        NaturalGradient(model, trials=3000, generator=torch.Generator().manual_seed(0)),
        NaturalGradient(model, empirical=True),
    ]
    for opt in opts:
        opt.update((x, y))
    exact, drawn, empirical = (opt.F.to_torch() for opt in opts)
    assert_close(exact, FIM(model, (x,), PMatKFAC).to_torch())
    assert_close(drawn, exact, rtol=0, atol=0.1 * exact.max().item())
    assert_close(empirical, FIM(model, (x, y), PMatKFAC, empirical=True).to_torch())


def test_preconditioned_gradients_serve_any_optimizer():
    model, (x, y) = network(), batch()
    opt, sgd = NaturalGradient(model, trials=None, damping=DAMPING), torch.optim.SGD(model.parameters(), lr=0.3)
    before, g = flat(model), gradient(model, x, y)
    opt.update((x, y))
    opt.precondition()
    sgd.step()
    assert_close(flat(model), before - 0.3 * natural(opt.F, g))


def test_momentum_adds_the_steps_before():
    model, (x, y) = network(), batch()
    opt = NaturalGradient(model, 0.1, trials=None, damping=DAMPING, momentum=0.9, decay=0.0)
    expected, last = flat(model), torch.zeros(31).double()
    for _ in range(3):
        g = gradient(model, x, y)
        opt.update((x, y))
        last = 0.9 * last + natural(opt.F, g)
        expected = expected - 0.1 * last
        opt.step()
        assert_close(flat(model), expected)


def test_a_long_step_is_cut_to_the_divergence_allowed():
    model, (x, y) = network(), batch()
    opt = NaturalGradient(model, 1.0, trials=None, damping=DAMPING, kl_clip=1e-4)
    before, g = flat(model), gradient(model, x, y)
    opt.update((x, y))
    opt.step()
    step = flat(model) - before
    assert_close(-(step @ g) * -(step @ g) / (g @ natural(opt.F, g)), torch.tensor(1e-4).double())


def test_weight_decay_is_a_part_of_the_loss():
    model, (x, y) = network(), batch()
    opt = NaturalGradient(model, 1.0, trials=None, damping=DAMPING, weight_decay=0.2)
    before, g = flat(model), gradient(model, x, y)
    opt.update((x, y))
    opt.step()
    assert_close(flat(model), before - natural(opt.F, g + 0.2 * before, DAMPING + 0.2))


def test_for_linear_regression_one_step_is_to_the_least_squares():
    x, y = torch.randn(20, 3).double(), torch.randn(20, 2).double()
    model = nn.Linear(3, 2).double()
    opt = NaturalGradient(model, 1.0, PMatDense, "regression", trials=None, damping=0.0)
    ((model(x) - y).square().sum() / 2 / len(x)).backward()
    opt.update((x, y))
    opt.step()
    phi = nn.functional.pad(x, (0, 1), value=1.0)
    assert_close(torch.cat([model.weight, model.bias[:, None]], 1).T.detach(), torch.linalg.lstsq(phi, y).solution)


# ------------------------------------------------------------------------------------------ averages and schedules


def test_the_moving_average_starts_as_a_mean():
    model, xs = network(), [batch()[0] for _ in range(4)]
    opt = NaturalGradient(model, trials=None, decay=0.6)
    factors = [FIM(model, (x,), PMatKFAC).data["0"].a for x in xs]
    expected = factors[0]
    for i, x in enumerate(xs):
        opt.update((x,))
        weight = min(0.6, 1 - 1 / (i + 1))
        expected = weight * expected + (1 - weight) * factors[i]
        assert_close(opt.F.data["0"].a, expected)


def test_updates_and_solves_are_as_rare_as_asked_for():
    model, (x, y) = network(), batch()
    opt = NaturalGradient(model, 0.1, trials=None, update_every=2, solve_every=3)
    matrices, near = [], []
    for _ in range(6):
        gradient(model, x, y)
        opt.update((x, y))
        opt.step()
        matrices.append(opt.F)
        near.append(opt.near)
    assert [matrices[i] is matrices[i - 1] for i in range(1, 6)] == [True, False, True, False, True]
    assert [near[i] is near[i - 1] for i in range(1, 6)] == [True, True, False, True, True]


def test_schedulers_and_clipping_work_as_with_any_optimizer():
    model, (x, y) = network(), batch()
    opt = NaturalGradient(model, 1.0, trials=None, damping=DAMPING)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.1)
    for lr in (1.0, 0.1):
        before = flat(model)
        gradient(model, x, y)
        opt.update((x, y))
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        g = PVector.from_model_grad(model).to_torch().clone()
        opt.step()
        schedule.step()
        assert_close(flat(model), before - lr * natural(opt.F, g))
        assert_close(g.norm(), torch.tensor(0.01).double(), rtol=1e-3, atol=0)


def test_a_scaler_of_gradients_unscales_them_first():
    plain, scaled, (x, y) = network(torch.float32), network(torch.float32), batch(torch.float32)
    scaled.load_state_dict(plain.state_dict())
    opts = [NaturalGradient(model, 0.1, trials=None, damping=DAMPING) for model in (plain, scaled)]
    gradient(plain, x, y)
    opts[0].update((x, y))
    opts[0].step()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(cross_entropy(scaled(x), y)).backward()
    opts[1].update((x, y))
    scaler.step(opts[1])
    assert_close(flat(scaled), flat(plain))


@pytest.mark.parametrize("others", [True, False])
def test_parameters_that_are_not_served_take_gradient_descent_or_are_left(others):
    model, (x, y) = network(), batch()
    layers = LayerCollection.from_model(model, layers="2")
    opt = NaturalGradient(model, 0.5, trials=None, damping=DAMPING, layer_collection=layers, others=others)
    before, g = flat(model), gradient(model, x, y)
    opt.update((x, y))
    opt.step()
    step = flat(model) - before
    assert_close(step[:16], -0.5 * g[:16] if others else torch.zeros(16).double())
    assert_close(step[16:], -0.5 * natural(opt.F, g[16:]))
    assert len(opt.param_groups) == 1 + others


# ------------------------------------------------------------------------------------------ captured passes


class Twice(nn.Module):
    """One layer that is called two times."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(x).tanh()))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4, 3)
    )


@pytest.mark.parametrize("build", [network, conv, Twice])
@each_dtype
def test_captured_factors_are_those_of_the_gradients_at_the_targets(build, dtype):
    model, (x, y) = build().to(dtype), batch(dtype)
    opt = NaturalGradient(model)
    with opt.capture():
        cross_entropy(model(x), y).backward()
    assert_close(opt.F.to_torch(), FIM(model, (x, y), PMatKFAC, empirical=True).to_torch())
    assert opt.F.n_examples == 8


@pytest.mark.parametrize("kind", [PMatDiag, PMatDense, PMatEKFAC])
def test_what_is_captured_makes_other_matrices_too(kind):
    model, (x, y) = network(), batch()
    opt = NaturalGradient(model, representation=kind)
    with opt.capture():
        cross_entropy(model(x), y).backward()
    assert_close(opt.F.trace(), FIM(model, (x, y), kind, empirical=True).trace())


def test_a_matrix_without_a_mean_of_two_takes_the_last():
    model, (x, y) = network(), batch()
    opt = NaturalGradient(model, representation=PMatEKFAC)
    opt.update((x, y))
    with pytest.raises(NotImplementedError, match="decay=0"):
        opt.update((x, y))
    last = NaturalGradient(model, representation=PMatEKFAC, trials=None, decay=0.0)
    last.update((2 * x, y))
    last.update((x, y))
    F = FIM(model, (x,), PMatEKFAC)
    F.update_diag((x,))
    assert_close(last.F.to_torch(), F.to_torch())


def test_captured_passes_train_as_empirical_updates_do():
    captured, updated = network(), network()
    updated.load_state_dict(captured.state_dict())
    opts = [NaturalGradient(model, 0.1, empirical=True) for model in (captured, updated)]
    for _ in range(3):
        x, y = batch()
        opts[0].zero_grad()
        with opts[0].capture():
            cross_entropy(captured(x), y).backward()
        opts[0].step()
        gradient(updated, x, y)
        opts[1].update((x, y))
        opts[1].step()
        assert_close(flat(captured), flat(updated))


def test_tokens_are_captured_with_what_their_loss_is_divided_by():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)).double()
    x, y = torch.randint(5, (6, 7)), torch.randint(3, (6, 7))
    opt = NaturalGradient(model, layer_collection=LayerCollection.from_model(model, layers="1"))
    with opt.capture(scale=42):
        cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    expected = FIM(model, (x, y), PMatKFAC, "token_logits", empirical=True, layer_collection=opt.layers)
    assert_close(opt.F.to_torch(), expected.to_torch())


def test_of_several_captures_only_some_are_taken():
    model, (x, y) = network(), batch()
    opt, matrices = NaturalGradient(model, update_every=2), []
    for _ in range(3):
        with opt.capture():
            cross_entropy(model(x), y).backward()
        matrices.append(opt.F)
    assert matrices[0] is matrices[1]
    assert matrices[2] is not matrices[1]


def test_no_hook_is_left_behind_after_an_exception():
    model, (x, y) = network(), batch()
    opt = NaturalGradient(model)
    with pytest.raises(RuntimeError, match="sudden"), opt.capture():
        cross_entropy(model(x), y)
        raise RuntimeError("sudden")
    assert not any(module._forward_hooks for module in model.modules())


def test_what_can_not_be_captured_is_refused():
    x, y = batch()
    with (
        pytest.raises(NotImplementedError, match="LayerNorm"),
        NaturalGradient(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)).double()).capture(),
    ):
        pass
    with pytest.raises(ValueError, match="Nothing was captured"), NaturalGradient(network()).capture():
        pass
    model = network()
    model.append(nn.Linear(3, 3, bias=False).double())
    model[3].weight = nn.Parameter(model[3].weight.detach())
    loss = lambda: cross_entropy(model(x) + x @ model[3].weight.mT, y)  # noqa: E731
    with pytest.raises(ValueError, match="used elsewhere"), NaturalGradient(model).capture():
        loss().backward()


# ------------------------------------------------------------------------------------------ closures


def test_the_exact_step_is_where_the_quadratic_model_is_least():
    model, (x, y) = network(), batch()
    opt = NaturalGradient(model, trials=None, damping=DAMPING, momentum="exact", decay=0.0)
    last = None
    for _ in range(3):
        before, g = flat(model), gradient(model, x, y)
        M = FIM(model, (x,), PMatDense).to_torch() + DAMPING * torch.eye(31).double()
        opt.update((x, y))
        opt.step(lambda: cross_entropy(model(x), y))
        direction = natural(opt.F, g)
        rows = direction[None] if last is None else torch.stack([direction, last])
        last = rows.T @ torch.linalg.solve(rows @ M @ rows.T, -rows @ g)
        assert_close(flat(model) - before, last)


def test_the_damping_falls_where_the_model_foresees_the_loss():
    x, y = torch.randn(20, 3).double(), torch.randn(20, 2).double()
    model = nn.Linear(3, 2).double()
    opt = NaturalGradient(model, 1.0, PMatKFAC, "regression", trials=None, damping="lm")
    for i in range(3):
        opt.update((x, y))
        opt.step(lambda: (model(x) - y).square().sum() / 2 / len(x))
        assert opt.param_groups[0]["damping"] == 0.5 ** (i + 1)


def test_a_step_uphill_is_taken_back_and_the_damping_rises():
    model, (x, y) = network(), batch()
    opt = NaturalGradient(model, 100.0, trials=None, damping="lm")  # a hundred times too far
    before = flat(model)
    opt.update((x, y))
    opt.step(lambda: cross_entropy(model(x), y))
    assert_close(flat(model), before)
    assert opt.param_groups[0]["damping"] == 2.0


def test_a_closure_may_call_backward_or_leave_it():
    models, (x, y) = [network()], batch()
    models.append(copy.deepcopy(models[0]))
    opts = [NaturalGradient(model, trials=None, damping="lm", momentum="exact") for model in models]

    def with_backward() -> Tensor:
        opts[1].zero_grad()
        loss = cross_entropy(models[1](x), y)
        loss.backward()
        return loss

    for _ in range(3):
        losses = []
        for opt, closure in zip(opts, [lambda: cross_entropy(models[0](x), y), with_backward], strict=True):
            opt.update((x, y))
            losses.append(opt.step(closure))
        assert losses[0] == losses[1]
        assert_close(flat(models[0]), flat(models[1]))


# ------------------------------------------------------------------------------------------ state


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "solve_every": 2, "update_every": 2},
        {"momentum": "exact", "damping": "lm"},
        {"representation": PMatDiag, "kl_clip": 1e-3},
    ],
    ids=["plain", "momentum", "exact", "diagonal"],
)
def test_a_state_goes_through_a_file_and_steps_go_on_exactly(options, tmp_path):
    model, (x, y) = network(), batch()
    layers = LayerCollection.from_model(model, layers="2")

    def optimizer(model: nn.Module) -> NaturalGradient:
        return NaturalGradient(model, 0.1, trials=None, layer_collection=layers, **options)

    def steps(opt: NaturalGradient, count: int) -> Tensor:
        for _ in range(count):
            opt.zero_grad()
            cross_entropy(opt.model(x), y).backward()
            opt.update((x, y))
            opt.step(lambda: cross_entropy(opt.model(x), y))
        return flat(opt.model)

    first = optimizer(model)
    steps(first, 3)
    torch.save({"model": model.state_dict(), "opt": first.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = network()
    other.load_state_dict(state["model"])
    second = optimizer(other)
    second.load_state_dict(state["opt"])
    assert torch.equal(steps(first, 3), steps(second, 3))


# ------------------------------------------------------------------------------------------ what can go wrong


@each_dtype
def test_one_example_with_dead_units_and_a_zero_column_is_finite(dtype):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).to(dtype)
    with torch.no_grad():
        model[0].bias[:2] = -100.0
    x, y = torch.tensor([[1.0, 0.0, 2.0]], dtype=dtype), torch.tensor([1])
    opt = NaturalGradient(model, damping="lm", momentum="exact")
    for _ in range(5):
        opt.update((x, y))
        opt.step(lambda: cross_entropy(model(x), y))
    assert flat(model).isfinite().all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"damping": "auto"}, "damping"),
        ({"damping": -1.0}, "damping"),
        ({"momentum": 1.0}, "momentum"),
        ({"decay": 1.0}, "decay"),
        ({"lr": -1.0}, "lr"),
        ({"update_every": 0}, "update_every"),
        ({"kl_clip": 0.0}, "kl_clip"),
    ],
)
def test_settings_that_can_not_be_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        NaturalGradient(network(), **options)


def test_calls_in_another_order_are_refused():
    model, (x, y) = network(), batch()
    gradient(model, x, y)
    with pytest.raises(ValueError, match=r"update\(batch\)"):
        NaturalGradient(model).step()
    with pytest.raises(ValueError, match="closure"):
        NaturalGradient(model, damping="lm").step()
    with pytest.raises(ValueError, match="NaturalGradient"):
        NaturalGradient(model).load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
