"""Variants against their definitions: derivatives of log-probabilities of torch.distributions, by loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, distributions, nn
from torch.nn import functional
from torch.testing import assert_close

import nngeo
from nngeo.variants import (
    VARIANTS,
    Cotangents,
    Empirical,
    Exact,
    MonteCarlo,
    OutputHessian,
    Regression,
    Variant,
    make_variant,
    register_variant,
)

COVARIANCE = [[2.0, 0.5, 0.1], [0.5, 1.0, -0.3], [0.1, -0.3, 0.7]]


@dataclass(frozen=True)
class Case:
    """A variant, the shape of its outputs, and its distribution in torch.distributions."""

    id: str
    variant: str
    shape: tuple[int, ...]
    distribution: Callable[[Tensor], distributions.Distribution]
    options: dict[str, Any] = field(default_factory=dict)
    positions: tuple[int, ...] = ()  # the shape of a full mask; () for that of the outputs

    def build(self) -> Variant:
        return make_variant(self.variant, **self.options)

    def outputs(self, seed: int = 0, scale: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return scale * torch.randn(self.shape, dtype=torch.float64, generator=generator)

    def target(self, seed: int = 1) -> Tensor:
        return self.build().sample(self.outputs(), torch.Generator().manual_seed(seed))

    def mask(self) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        return torch.rand(self.positions or self.shape, generator=generator) < 0.6


def normal(scale: float) -> Callable[[Tensor], distributions.Distribution]:
    return lambda f: distributions.Normal(f, scale)


def normal_with_variances(f: Tensor) -> distributions.Distribution:
    return distributions.Normal(f, torch.tensor([0.5, 1.0, 4.0], dtype=f.dtype).sqrt())


def correlated_normal(f: Tensor) -> distributions.Distribution:
    return distributions.MultivariateNormal(f, torch.tensor(COVARIANCE, dtype=f.dtype))


def categorical_on_axis_one(f: Tensor) -> distributions.Distribution:
    return distributions.Categorical(logits=f.movedim(1, -1))


def categorical(f: Tensor) -> distributions.Distribution:
    return distributions.Categorical(logits=f)


def bernoulli(f: Tensor) -> distributions.Distribution:
    return distributions.Bernoulli(logits=f)


def poisson(f: Tensor) -> distributions.Distribution:
    return distributions.Poisson(f.exp())


CASES = [
    Case("regression", "regression", (4, 3), normal(1.0)),
    Case("regression of one output without axis", "regression", (4,), normal(1.0)),
    Case("regression on images", "regression", (2, 2, 3), normal(2.0), {"covariance": 4.0}),
    Case("regression with variances", "regression", (4, 3), normal_with_variances, {"covariance": [0.5, 1.0, 4.0]}),
    Case("regression with covariance", "regression", (4, 3), correlated_normal, {"covariance": COVARIANCE}, (4,)),
    Case("classif_logits", "classif_logits", (4, 5), categorical, positions=(4,)),
    Case("classif_logits of two classes", "classif_logits", (4, 2), categorical, positions=(4,)),
    Case("segmentation_logits", "segmentation_logits", (2, 3, 2, 2), categorical_on_axis_one, positions=(2, 2, 2)),
    Case("segmentation_logits without positions", "segmentation_logits", (3, 4), categorical, positions=(3,)),
    Case("token_logits", "token_logits", (2, 3, 4), categorical, positions=(2, 3)),
    Case("token_logits on two axes", "token_logits", (2, 2, 2, 3), categorical, positions=(2, 2, 2)),
    Case("classif_binary_logits", "classif_binary_logits", (4, 3), bernoulli),
    Case("classif_binary_logits without axis", "classif_binary_logits", (4,), bernoulli),
    Case("poisson_log_rate", "poisson_log_rate", (4, 2), poisson),
]
WITH_CLASSES = [case for case in CASES if case.positions and "covariance" not in case.options]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
each_seed = pytest.mark.parametrize("seed", [0, 1, 2])


def hessian_by_loops(loss: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    """(b, o, o), of a sum over examples."""
    leaf = outputs.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0].reshape(len(outputs), -1)
    rows = []
    for i in range(gradient.shape[1]):
        if not gradient.requires_grad:
            return outputs.new_zeros(*gradient.shape, gradient.shape[1])
        row = torch.autograd.grad(gradient[:, i].sum(), leaf, retain_graph=True, materialize_grads=True)[0]
        rows.append(row.reshape(len(outputs), -1))
    return torch.stack(rows, 1)


def fisher_by_loops(case: Case, outputs: Tensor) -> Tensor:
    """(b, o, o): in natural parameters the Hessian of -log p is the Fisher matrix, whatever the target."""
    target = case.target()
    return hessian_by_loops(lambda f: -case.distribution(f).log_prob(target).sum(), outputs)


def squared(c: Tensor) -> Tensor:
    """(b, o, o): the sum of c c' over cotangents (k, b, *outputs)."""
    flat = c.reshape(*c.shape[:2], -1)
    return torch.einsum("kbo,kbq->boq", flat, flat)


def applied(cotangents: Cotangents, outputs: Tensor) -> Tensor:
    """(b, o, o): the metric, column by column."""
    o = math.prod(outputs.shape[1:])
    basis = torch.eye(o, dtype=outputs.dtype)
    columns = [cotangents.metric(e.expand(len(outputs), o).reshape(outputs.shape)) for e in basis]
    return torch.stack([column.reshape(len(outputs), o) for column in columns], -1)


def entries_counted(case: Case, mask: Tensor) -> Tensor:
    """(b, *outputs): the mask, repeated over classes."""
    axis = {"segmentation_logits": 1, "classif_logits": 1}.get(case.variant, -1)
    by_class = bool(case.positions) and "covariance" not in case.options
    if by_class:
        return mask.unsqueeze(axis).expand(case.shape)
    return mask.reshape(*mask.shape, *(1,) * (len(case.shape) - mask.ndim)).expand(case.shape)


# ------------------------------------------------------------ exact


@each_case
def test_exact_cotangents_square_to_the_fisher_matrix(case):
    outputs = case.outputs()
    assert_close(squared(Exact(case.build())(outputs).all()), fisher_by_loops(case, outputs))


@each_case
def test_metric_is_the_fisher_matrix(case):
    outputs = case.outputs()
    assert_close(applied(Exact(case.build())(outputs), outputs), fisher_by_loops(case, outputs))


@each_case
@pytest.mark.parametrize("size", [1, 2, 7])
def test_chunks_are_slices_of_all(case, size):
    cotangents = Exact(case.build())(case.outputs())
    chunks = [cotangents.chunk(start, start + size) for start in range(0, cotangents.count, size)]
    assert cotangents.all().shape == (cotangents.count, *case.shape)
    assert_close(torch.cat(chunks), cotangents.all(), rtol=0, atol=0)


@each_case
def test_outputs_with_a_graph_give_cotangents_without_one(case):
    outputs = case.outputs().requires_grad_()
    assert not Exact(case.build())(outputs).all().requires_grad
    assert not Empirical(case.build())(outputs, (case.target(),)).all().requires_grad


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_the_result(case, dtype):
    outputs = case.outputs().to(dtype)
    variant, target = case.build(), case.target()
    assert_close(Exact(variant)(outputs).all(), Exact(variant)(outputs.float()).all().to(dtype))
    assert_close(variant.gradient(outputs, target), variant.gradient(outputs.float(), target).to(dtype))
    assert Exact(variant)(outputs).metric(outputs).dtype == dtype
    assert MonteCarlo(variant)(outputs).all().dtype == dtype


@each_case
def test_no_examples_give_no_cotangents(case):
    outputs = case.outputs()[:0]
    assert Exact(case.build())(outputs).all().shape[1:] == outputs.shape
    assert MonteCarlo(case.build(), 2)(outputs).all().shape == (2, *outputs.shape)


@each_case
def test_n_output_counts_the_class_axis_or_everything(case):
    axis = {"segmentation_logits": 1, "classif_logits": 1, "token_logits": -1}.get(case.variant)
    expected = math.prod(case.shape[1:]) if axis is None else case.shape[axis]
    assert case.build().n_output(case.outputs()) == expected


@each_seed
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_softmax_root_is_exact_in_float32_for_large_logits(classes, scale, seed):
    logits = scale * torch.randn(64, classes, generator=torch.Generator().manual_seed(seed))
    root = Exact(make_variant("classif_logits"))(logits).all()
    p = logits.double().softmax(-1)
    others = p[:, None, :] * (1 - torch.eye(classes, dtype=torch.float64))
    exact = torch.diag_embed(p * others.sum(-1)) - p[:, :, None] * others
    size = exact.diagonal(dim1=1, dim2=2).sqrt()
    found = squared(root.double())
    assert len(root) == classes - 1 and root.isfinite().all()
    assert ((found - exact).abs() <= 1e-4 * size[:, :, None] * size[:, None, :] + 1e-30).all()


@pytest.mark.parametrize("logits", [[0.0, -80, -90], [-80, 0.0, -90], [-90, -80, 0.0]], ids=str)
def test_softmax_of_vanishing_classes_keeps_its_tiny_metric(logits):
    outputs = torch.tensor([logits])
    p = outputs.double().softmax(-1)[0]
    variance = p * torch.stack([p[1] + p[2], p[0] + p[2], p[0] + p[1]])
    cotangents = Exact(make_variant("classif_logits"))(outputs)
    assert_close(squared(cotangents.all().double())[0].diagonal(), variance, rtol=1e-4, atol=0)
    assert_close(applied(cotangents, outputs)[0].diagonal().double(), variance, rtol=1e-4, atol=0)


@pytest.mark.parametrize("excluded", [[0], [3], [1, 2], [2, 3], [0, 3]], ids=str)
def test_classes_at_minus_infinity_do_not_matter(excluded):
    outputs = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    others = [i for i in range(4) if i not in excluded]
    expected = torch.zeros(3, 4, 4, dtype=torch.float64)
    expected[:, torch.tensor(others)[:, None], others] = squared(
        Exact(make_variant("classif_logits"))(outputs[:, others]).all()
    )
    outputs[:, excluded] = -math.inf
    cotangents = Exact(make_variant("classif_logits"))(outputs)
    assert_close(squared(cotangents.all()), expected)
    assert_close(applied(cotangents, outputs), expected)


@pytest.mark.parametrize("logit", [-150.0, -30.0, 30.0, 150.0])
def test_binary_logits_are_stable_in_float32(logit):
    variant, outputs = make_variant("classif_binary_logits"), torch.tensor([[logit]])
    assert_close(Exact(variant)(outputs).all().item(), math.exp(-abs(logit) / 2), rtol=1e-5, atol=0)
    right, wrong = torch.tensor([[float(logit > 0)]]), torch.tensor([[float(logit < 0)]])
    small = 0.0 if abs(logit) > 100 else math.exp(-abs(logit))  # exp(-150) is zero in float32
    assert_close(variant.gradient(outputs, right).abs().item(), small, rtol=1e-5, atol=1e-44)
    assert_close(variant.gradient(outputs, wrong).abs().item(), 1.0)


def test_log_probabilities_have_the_metric_diag_p():
    outputs = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    expected = torch.zeros(4, 3, 3, dtype=torch.float64)
    for b in range(4):
        for y in range(3):
            leaf = outputs[b].clone().requires_grad_()
            score = torch.autograd.grad(-leaf[y], leaf)[0]
            expected[b] += outputs[b, y].exp() * torch.outer(score, score)
    cotangents = Exact(make_variant("classif_logsoftmax"))(outputs)
    assert_close(squared(cotangents.all()), expected)
    assert_close(applied(cotangents, outputs), expected)


def test_log_probabilities_pull_back_to_the_metric_of_the_logits():
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(1)
    jacobian = torch.eye(3, dtype=torch.float64) - p[:, None, :]  # of log_softmax
    inner = squared(Exact(make_variant("classif_logsoftmax"))(logits.log_softmax(1)).all())
    assert_close(jacobian.mT @ inner @ jacobian, squared(Exact(make_variant("classif_logits"))(logits).all()))


def test_identity_has_unit_vectors_for_cotangents():
    outputs = torch.randn(2, 3, 4)
    cotangents = Exact(make_variant("identity"))(outputs)
    assert_close(cotangents.all().reshape(12, 2, 12), torch.eye(12)[:, None].expand(12, 2, 12))
    assert_close(cotangents.metric(outputs), outputs)


# ------------------------------------------------------------ gradients and draws


@each_case
def test_gradient_is_that_of_minus_log_probability(case):
    outputs, target = case.outputs().requires_grad_(), case.target()
    expected = torch.autograd.grad(-case.distribution(outputs).log_prob(target).sum(), outputs)[0]
    assert_close(case.build().gradient(outputs, target), expected)
    empirical = Empirical(case.build())(outputs, (target,))
    assert empirical.count == 1
    assert_close(empirical.all()[0], expected)
    assert_close(applied(empirical, outputs.detach()), squared(expected[None]))


def test_gradient_at_log_probabilities():
    outputs = torch.randn(3, 4, dtype=torch.float64).log_softmax(1).requires_grad_()
    target = torch.tensor([3, 0, 1])
    expected = torch.autograd.grad(functional.nll_loss(outputs, target, reduction="sum"), outputs)[0]
    assert_close(make_variant("classif_logsoftmax").gradient(outputs, target), expected)


def test_gradient_of_a_confident_right_class_does_not_cancel():
    outputs = torch.tensor([[40.0, 0.0, 0.0]])
    gradient = make_variant("classif_logits").gradient(outputs, torch.tensor([0]))
    assert_close(gradient, math.exp(-40.0) * torch.tensor([[-2.0, 1.0, 1.0]]), rtol=1e-4, atol=0)


@each_seed
@each_case
def test_mean_of_draws_is_the_exact_metric(case, seed):
    outputs, trials = case.outputs(scale=0.5), 1500  # no rare classes: their spread would need more draws
    sampled = MonteCarlo(case.build(), trials, torch.Generator().manual_seed(seed))(outputs)
    flat = sampled.all().reshape(trials, len(outputs), -1) * trials**0.5
    squares = torch.einsum("kbo,kbq->kboq", flat, flat)
    error = squares.mean(0) - fisher_by_loops(case, outputs)
    assert (error.abs() <= 4 * squares.std(0) / trials**0.5 + 1e-9).all()


@each_case
def test_metric_of_draws_is_that_of_their_cotangents(case):
    outputs = case.outputs()
    sampled = MonteCarlo(case.build(), 3)(outputs)
    assert sampled.count == 3
    assert_close(applied(sampled, outputs), squared(sampled.all()))
    assert_close(sampled.chunk(1, 3), sampled.all()[1:], rtol=0, atol=0)


@each_seed
def test_mean_of_draws_at_log_probabilities_is_the_exact_metric(seed):
    outputs, trials = torch.tensor([[0.2, 0.3, 0.5], [0.9, 0.05, 0.05]]).double().log(), 1500
    variant = make_variant("classif_logsoftmax")
    flat = MonteCarlo(variant, trials, torch.Generator().manual_seed(seed))(outputs).all() * trials**0.5
    squares = torch.einsum("kbo,kbq->kboq", flat, flat)
    error = squares.mean(0) - torch.diag_embed(outputs.exp())
    assert (error.abs() <= 4 * squares.std(0) / trials**0.5 + 1e-9).all()


@each_case
def test_every_sweep_begins_with_the_same_draws(case):
    estimator, outputs = MonteCarlo(case.build(), 20, torch.Generator().manual_seed(0)), case.outputs()
    sweep, other = estimator.begun(), estimator.begun()
    first, second = sweep(outputs).all(), sweep(outputs).all()
    assert_close(other(outputs).all(), first, rtol=0, atol=0)
    assert_close(other(outputs).all(), second, rtol=0, atol=0)
    assert not torch.equal(first, second)


@each_case
def test_draws_leave_the_global_generator_alone(case):
    estimator = MonteCarlo(case.build(), 3, torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    cotangents = estimator(case.outputs())
    cotangents.all()
    cotangents.metric(case.outputs())
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_generators_draw_equal_targets_and_one_generator_draws_anew():
    variant, outputs = make_variant("regression"), torch.zeros(5, 2)
    generator = torch.Generator().manual_seed(7)
    first, second = MonteCarlo(variant, 1, generator), MonteCarlo(variant, 1, generator)
    again = MonteCarlo(variant, 1, torch.Generator().manual_seed(7))
    assert torch.equal(first(outputs).all(), again(outputs).all())
    assert not torch.equal(first(outputs).all(), second(outputs).all())


def test_without_a_generator_the_global_seed_decides():
    variant, outputs = make_variant("classif_logits"), torch.zeros(20, 5)
    torch.manual_seed(3)
    first = MonteCarlo(variant)(outputs).all()
    torch.manual_seed(3)
    estimator = MonteCarlo(variant)
    torch.manual_seed(4)
    assert torch.equal(estimator(outputs).all(), first)


def test_draws_scale_with_the_covariance():
    outputs = torch.zeros(20000, 1)
    draws = make_variant("regression", covariance=4.0).sample(outputs, torch.Generator().manual_seed(0))
    assert 1.95 < draws.std() < 2.05


# ------------------------------------------------------------ masks


@each_case
def test_masked_entries_count_nothing(case):
    outputs, mask, target = case.outputs(), case.mask(), case.target()
    variant, counted = case.build(), entries_counted(case, case.mask())
    flat = counted.reshape(len(outputs), -1).double()
    expected = fisher_by_loops(case, outputs) * flat[:, :, None] * flat[:, None, :]
    exact = Exact(variant)(outputs, (), mask)
    assert_close(squared(exact.all()), expected)
    assert_close(applied(exact, outputs), expected)
    assert_close(Empirical(variant)(outputs, (target,), mask).all()[0], variant.gradient(outputs, target) * counted)
    assert (MonteCarlo(variant, 3)(outputs, (), mask).all()[:, ~counted] == 0).all()


@each_case
def test_a_mask_over_examples_keeps_or_drops_them_whole(case):
    outputs, mask = case.outputs(), torch.arange(case.shape[0]) > 0
    metric = squared(Exact(case.build())(outputs, (), mask).all())
    assert_close(metric[1:], fisher_by_loops(case, outputs)[1:])
    assert (metric[0] == 0).all()


@pytest.mark.parametrize("case", WITH_CLASSES, ids=lambda case: case.id)
def test_nan_outputs_that_do_not_count_are_ignored(case):
    outputs, mask = case.outputs(), case.mask()
    counted = entries_counted(case, mask)
    spoilt = torch.where(counted, outputs, math.nan)
    variant, target = case.build(), case.target()
    assert_close(Exact(variant)(spoilt, (), mask).all(), Exact(variant)(outputs, (), mask).all())
    assert_close(Exact(variant)(spoilt, (), mask).metric(outputs), Exact(variant)(outputs, (), mask).metric(outputs))
    assert_close(variant.gradient(spoilt, target, mask), variant.gradient(outputs, target, mask))


POSITIONS = [case for case in CASES if case.variant in ("segmentation_logits", "token_logits")]


@pytest.mark.parametrize("ignore_index", [-100, 255, 0])
@pytest.mark.parametrize("case", POSITIONS, ids=lambda case: case.id)
def test_ignored_positions_are_masked_positions(case, ignore_index):
    outputs, mask, target = case.outputs(), case.mask(), case.target()
    variant = make_variant(case.variant, ignore_index=ignore_index)
    mask = mask & (target != ignore_index)
    labels = torch.where(mask, target, ignore_index)
    assert_close(Exact(variant)(outputs, (labels,)).all(), Exact(case.build())(outputs, (), mask).all())
    assert_close(Empirical(variant)(outputs, (labels,)).all(), Empirical(case.build())(outputs, (target,), mask).all())
    draws = MonteCarlo(variant, 4, torch.Generator().manual_seed(0))(outputs, (labels,)).all()
    plain = MonteCarlo(case.build(), 4, torch.Generator().manual_seed(0))(outputs, (), mask).all()
    assert_close(draws, plain)


@pytest.mark.parametrize("case", POSITIONS, ids=lambda case: case.id)
def test_ignored_positions_agree_with_cross_entropy(case):
    outputs, target = case.outputs().requires_grad_(), case.target()
    target.view(-1)[::2] = -100
    logits = outputs.movedim(-1, 1) if case.variant == "token_logits" else outputs
    loss = functional.cross_entropy(logits, target, reduction="sum")
    assert_close(case.build().gradient(outputs, target), torch.autograd.grad(loss, outputs)[0])


def test_targets_of_another_kind_ignore_nothing():
    outputs, variant = torch.randn(2, 3, 4), make_variant("token_logits")
    others = [(torch.full((2,), -100),), (torch.full((2, 3), -100.0),), (None,), ("text",), ()]
    counted = [variant.counted(outputs, targets) for targets in others]
    assert counted == [None] * 5


def test_nothing_is_ignored_without_an_ignore_index():
    variant = make_variant("token_logits", ignore_index=None)
    assert variant.counted(torch.randn(2, 3, 4), (torch.full((2, 3), -100),)) is None


# ------------------------------------------------------------ functions and names


def test_a_function_is_a_variant():
    def doubled(outputs, *targets):
        return torch.stack([outputs, targets[0]])

    outputs, target = torch.randn(3, 2), torch.randn(3, 2)
    cotangents = Exact(make_variant(doubled))(outputs, (target,))
    assert_close(cotangents.all(), torch.stack([outputs, target]))
    assert_close(applied(cotangents, outputs), squared(cotangents.all()))
    masked = Exact(make_variant(doubled))(outputs, (target,), torch.tensor([True, False, True]))
    assert_close(masked.all()[:, 1], torch.zeros(2, 2))


@pytest.fixture
def registry():
    known = dict(VARIANTS)
    yield VARIANTS
    VARIANTS.clear()
    VARIANTS.update(known)


def test_functions_and_classes_are_registered_by_name(registry):
    @register_variant("just_outputs")
    def just_outputs(outputs, *targets):
        return outputs[None]

    @register_variant("wide_regression")
    class Wide(Regression):
        def __init__(self):
            super().__init__(covariance=100.0)

    outputs = torch.randn(3, 2)
    assert_close(Exact(make_variant("just_outputs"))(outputs).all()[0], outputs)
    assert_close(Exact(make_variant("wide_regression"))(outputs).metric(outputs), outputs / 100)
    assert make_variant("wide_regression").name == Wide.name == "wide_regression"
    assert repr(make_variant("just_outputs")) == "<Variant 'just_outputs'>"


def test_a_taken_name_is_refused_and_the_same_thing_replaces_itself(registry):
    def define(scale):
        @register_variant("again")
        def again(outputs, *targets):
            return scale * outputs[None]

    define(1.0)
    define(2.0)
    assert_close(Exact(make_variant("again"))(torch.ones(1, 1)).all().item(), 2.0)
    with pytest.raises(ValueError, match="The name 'regression' is taken by nngeo.variants.gaussian.Regression"):
        register_variant("regression")(lambda outputs: outputs[None])


def test_variants_and_their_classes_pass_through_make_variant():
    variant = Regression(covariance=2.0)
    assert make_variant(variant) is variant
    assert_close(make_variant(Regression, covariance=3.0).covariance.item(), 3.0)


# ------------------------------------------------------------ losses


def clipped_by_value(outputs, target):
    """Needs numbers, which vmap cannot give."""
    scale = 2.0 if outputs.max().item() > 0 else 1.0
    return scale * (outputs - target).square().sum()


def with_layer_norm(outputs, target):
    return (functional.layer_norm(outputs, outputs.shape[1:]) - target).square().sum()


def without_targets(outputs):
    return outputs.exp().sum()


WEIGHT = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
REAL, CLASSES = (
    torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)),
    torch.tensor([0, 2, 1, 1]),
)
LOSSES = {
    "mse_sum": (nn.MSELoss(reduction="sum"), (REAL,)),
    "mse_mean": (nn.MSELoss(), (REAL,)),
    "cross_entropy": (nn.CrossEntropyLoss(), (CLASSES,)),
    "cross_entropy_weighted": (nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"), (CLASSES,)),
    "cross_entropy_smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), (CLASSES,)),
    "cross_entropy_soft": (nn.CrossEntropyLoss(), (REAL.softmax(1),)),
    "binary": (nn.BCEWithLogitsLoss(reduction="sum"), (REAL.sigmoid(),)),
    "poisson": (nn.PoissonNLLLoss(), (REAL.exp(),)),
    "huber": (nn.HuberLoss(delta=0.5), (REAL,)),
    "absolute": (nn.L1Loss(), (REAL,)),
    "item": (clipped_by_value, (REAL,)),
    "without_targets": (without_targets, ()),
}
each_loss = pytest.mark.parametrize("loss", LOSSES)


def loss_by_loops(loss_fn: Callable[..., Tensor], targets: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
    """The sum over examples of the loss of each one alone."""
    return lambda f: sum(loss_fn(f[b : b + 1], *(t[b : b + 1] for t in targets)) for b in range(len(f)))


@each_loss
def test_output_hessian_is_that_of_the_loss_of_each_example(loss):
    loss_fn, targets = LOSSES[loss]
    outputs = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = hessian_by_loops(loss_by_loops(loss_fn, targets), outputs)
    cotangents = Exact(OutputHessian(loss_fn))(outputs, targets)
    assert cotangents.count == 3
    assert_close(squared(cotangents.all()), expected)
    assert_close(squared(torch.cat([cotangents.chunk(0, 2), cotangents.chunk(2, 3)])), expected)
    assert_close(applied(cotangents, outputs), expected)


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "without_targets"])
def test_gradient_of_a_loss_is_that_of_each_example(loss):
    loss_fn, targets = LOSSES[loss]
    outputs = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(loss_by_loops(loss_fn, targets)(outputs), outputs)[0]
    assert_close(Empirical(OutputHessian(loss_fn))(outputs, targets).all()[0], expected)


def test_output_hessian_of_cross_entropy_is_the_fisher_metric_of_tokens():
    outputs = torch.randn(2, 3, 4, dtype=torch.float64)
    labels = torch.tensor([[0, -100, 3], [1, 2, -100]])
    hessian = OutputHessian(lambda f, y: functional.cross_entropy(f.movedim(-1, 1), y, reduction="sum"))
    fisher = Exact(make_variant("token_logits"))(outputs, (labels,))
    assert_close(applied(Exact(hessian)(outputs, (labels,)), outputs), applied(fisher, outputs))
    assert_close(squared(Exact(hessian)(outputs, (labels,)).all()), squared(fisher.all()))


@each_seed
def test_metric_of_a_loss_with_layer_norm_is_a_difference_of_gradients(seed):
    torch.manual_seed(seed)
    outputs, target, v = torch.randn(3, 4, 5, dtype=torch.float64).unbind()
    variant, step = OutputHessian(with_layer_norm), 1e-5
    above, below = variant.gradient(outputs + step * v, target), variant.gradient(outputs - step * v, target)
    assert_close(Exact(variant)(outputs, (target,)).metric(v), (above - below) / (2 * step), rtol=1e-6, atol=1e-7)


def test_a_saturated_softmax_in_float32_has_a_root():
    outputs = torch.tensor([[60.0, 0.0, -3.0]])
    root = Exact(OutputHessian(nn.CrossEntropyLoss()))(outputs, (torch.tensor([0]),)).all()
    assert root.isfinite().all() and root.abs().max() < 1e-3


def test_an_indefinite_loss_has_a_metric_but_no_root():
    def saddle(outputs, target):
        return outputs[:, 0].square().sum() - outputs[:, 1].square().sum()

    outputs = torch.randn(2, 2)
    cotangents = Exact(OutputHessian(saddle))(outputs, (outputs,))
    assert_close(cotangents.metric(outputs), outputs * torch.tensor([2.0, -2.0]))
    with pytest.raises(ValueError, match=r"not convex in the outputs.*eigenvalue -2.*nngeo\.Hessian, or PMatImplicit"):
        cotangents.all()


def test_a_mask_removes_rows_and_columns_of_the_hessian():
    outputs, target, mask = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0, 1]), torch.rand(2, 3) < 0.5
    variant = OutputHessian(nn.CrossEntropyLoss())
    full = squared(Exact(variant)(outputs, (target,)).all())
    masked = Exact(variant)(outputs, (target,), mask)
    expected = full * mask[:, :, None] * mask[:, None, :]
    assert_close(squared(masked.all()), expected)
    assert_close(applied(masked, outputs), expected)


def test_masked_positions_with_nan_outputs_do_not_spoil_the_hessian_of_the_others():
    outputs, labels, mask = torch.randn(2, 3, 4), torch.randint(4, (2, 3)), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    spoilt = torch.where(mask[..., None], outputs, math.nan)
    variant = OutputHessian(lambda f, y: functional.cross_entropy(f.movedim(-1, 1), y, reduction="sum"))
    fisher = Exact(make_variant("token_logits"))(outputs, (), mask)
    cotangents = Exact(variant)(spoilt, (labels,), mask[..., None].expand(2, 3, 4))
    assert_close(squared(cotangents.all()), squared(fisher.all()))
    assert_close(cotangents.metric(outputs), fisher.metric(outputs))


# ------------------------------------------------------------ errors

LOGITS = torch.zeros(2, 3)


def exact(variant: Any, outputs: Any, targets: tuple[Any, ...] = (), mask: Any = None, **options: Any) -> None:
    Exact(make_variant(variant, **options))(outputs, targets, mask)


def empirical(variant: Any, outputs: Any, targets: tuple[Any, ...] = (), mask: Any = None) -> None:
    Empirical(make_variant(variant))(outputs, targets, mask)


ERRORS = {
    "unknown name": (
        lambda: make_variant("logits"),
        ValueError,
        "Unknown variant 'logits'; known are classif_binary_logits, classif_logits",
    ),
    "no variant": (lambda: make_variant(3), TypeError, "`variant` must be a name, a Variant or a function; found int"),
    "unusable option": (
        lambda: make_variant("classif_logits", covariance=1.0),
        TypeError,
        "Variant 'classif_logits' cannot use the option covariance; it takes none",
    ),
    "another option": (
        lambda: make_variant("token_logits", covariance=1.0),
        TypeError,
        "cannot use the option covariance; it takes ignore_index",
    ),
    "option of a function": (
        lambda: make_variant(len, covariance=1.0),
        TypeError,
        "Variant 'len' cannot use the option",
    ),
    "option of a variant": (lambda: make_variant(Regression(), covariance=1.0), TypeError, "cannot use the option"),
    "ignore_index": (
        lambda: make_variant("token_logits", ignore_index="pad"),
        TypeError,
        "`ignore_index` must be an int",
    ),
    "tokens as classes": (
        lambda: exact("classif_logits", torch.zeros(2, 5, 3)),
        ValueError,
        r"found outputs of shape \(2, 5, 3\).*'segmentation_logits'.*'token_logits'",
    ),
    "no class axis": (
        lambda: exact("token_logits", torch.zeros(2)),
        ValueError,
        r"needs logits \(b, \*positions, class\)",
    ),
    "no class axis in images": (lambda: exact("segmentation_logits", torch.zeros(2)), ValueError, r"\(b, class, \*pos"),
    "one class": (
        lambda: exact("classif_logits", torch.zeros(2, 1)),
        ValueError,
        "two classes.*'classif_binary_logits'",
    ),
    "integer outputs": (
        lambda: exact("regression", torch.zeros(2, dtype=int)),
        TypeError,
        "floating-point.*torch.int64",
    ),
    "complex outputs": (lambda: exact("regression", torch.zeros(2) + 0j), TypeError, "real floating-point.*complex64"),
    "tuple of outputs": (lambda: exact("regression", (LOGITS,)), TypeError, "found tuple"),
    "no batch axis": (
        lambda: exact("regression", torch.tensor(1.0)),
        ValueError,
        r"outputs \(b, \.\.\.\).*single number",
    ),
    "logits as log-probabilities": (
        lambda: exact("classif_logsoftmax", LOGITS),
        ValueError,
        "sum to one; found a sum of 3.*'classif_logits'",
    ),
    "log-probabilities of positions": (
        lambda: exact("classif_logsoftmax", torch.zeros(2, 3, 4)),
        ValueError,
        r"\(b, class\); found outputs of shape \(2, 3, 4\)",
    ),
    "covariance of another size": (
        lambda: exact("regression", LOGITS, covariance=[1.0, 2.0]),
        ValueError,
        r"`covariance` of shape \(2,\).*\(2, 3\): give a number, \(3,\) variances or a \(3, 3\) matrix",
    ),
    "negative covariance": (lambda: Regression(-1.0), ValueError, "must be positive and finite; found -1.0"),
    "asymmetric covariance": (lambda: Regression([[1.0, 0.5], [0.0, 1.0]]), ValueError, "must be symmetric"),
    "indefinite covariance": (lambda: Regression([[1.0, 2.0], [2.0, 1.0]]), ValueError, "must be positive definite"),
    "covariance with three axes": (lambda: Regression(torch.ones(1, 1, 1)), ValueError, r"found shape \(1, 1, 1\)"),
    "mask inside an example": (
        lambda: exact("regression", torch.zeros(2, 3), (), torch.eye(3)[:2].bool(), covariance=COVARIANCE),
        NotImplementedError,
        r"variances \(o,\), or a mask \(b,\)",
    ),
    "mask of integers": (lambda: exact("token_logits", LOGITS, (), torch.ones(2)), TypeError, r"mask\.bool\(\)"),
    "mask as a list": (
        lambda: exact("token_logits", LOGITS, (), [True, False]),
        TypeError,
        "boolean tensor.*found list",
    ),
    "mask of another shape": (
        lambda: exact("token_logits", torch.zeros(2, 3, 4), (), torch.ones(3, 2).bool()),
        ValueError,
        r"`mask` of shape \(3, 2\).*\(2, 3, 4\): it must have the shape \(2, 3\)",
    ),
    "no targets": (
        lambda: empirical("classif_logits", LOGITS),
        ValueError,
        r"the batch should hold \(inputs, targets\)",
    ),
    "targets None": (lambda: empirical("regression", LOGITS, (None,)), ValueError, "found no targets"),
    "float classes": (lambda: empirical("classif_logits", LOGITS, (torch.ones(2),)), TypeError, "integers from 0 to 2"),
    "class targets of another shape": (
        lambda: empirical("classif_logits", LOGITS, (torch.tensor([[1], [1]]),)),
        ValueError,
        r"targets of shape \(2,\), one class for each position; found \(2, 1\)",
    ),
    "no such class": (
        lambda: empirical("classif_logits", LOGITS, (torch.tensor([0, 3]),)),
        ValueError,
        "0 to 2; found 3",
    ),
    "ignored class": (
        lambda: empirical("classif_logits", LOGITS, (torch.tensor([0, -100]),)),
        ValueError,
        "`ignore_index`",
    ),
    "real targets of another shape": (
        lambda: empirical("regression", LOGITS, (torch.ones(2),)),
        ValueError,
        r"the shape of the outputs, \(2, 3\); found \(2,\)",
    ),
    "list of targets": (lambda: empirical("regression", LOGITS, ([1.0],)), TypeError, "tensor of targets; found list"),
    "binary targets beyond one": (
        lambda: empirical("classif_binary_logits", LOGITS, (LOGITS + 2,)),
        ValueError,
        "targets from 0 to 1; found 2.0",
    ),
    "negative counts": (lambda: empirical("poisson_log_rate", LOGITS, (LOGITS - 1,)), ValueError, "counts; found -1.0"),
    "draws of a function": (
        lambda: MonteCarlo(make_variant(lambda f: f[None]))(LOGITS),
        NotImplementedError,
        "no Monte-Carlo estimate",
    ),
    "gradients of a function": (
        lambda: empirical(lambda f: f[None], LOGITS, (LOGITS,)),
        NotImplementedError,
        "no gradient at given targets",
    ),
    "draws of the identity": (lambda: MonteCarlo(make_variant("identity"))(LOGITS), NotImplementedError, "'identity'"),
    "draws of a loss": (
        lambda: MonteCarlo(OutputHessian(nn.MSELoss()))(LOGITS),
        NotImplementedError,
        "'output_hessian' has no Monte-Carlo",
    ),
    "shape of a function": (
        lambda: exact(lambda f: f, LOGITS),
        ValueError,
        r"returned shape \(2, 3\).*\(k, b, \*outputs\), here \(k, 2, 3\)",
    ),
    "type of a function": (lambda: exact(lambda f: None, LOGITS), TypeError, "must return a tensor.*found NoneType"),
    "no trials": (lambda: MonteCarlo(make_variant("regression"), 0), ValueError, "`trials` must be 1 or more; found 0"),
    "half a trial": (lambda: MonteCarlo(make_variant("regression"), 0.5), TypeError, "must be an integer; found float"),
    "a seed": (lambda: MonteCarlo(make_variant("regression"), 1, 42), TypeError, "must be a torch.Generator or None"),
    "a loss by name": (lambda: OutputHessian("mse"), TypeError, "`loss_fn` should be a function.*got 'mse'"),
    "a loss by entry": (
        lambda: Exact(OutputHessian(nn.MSELoss(reduction="none")))(LOGITS, (LOGITS,)).all(),
        ValueError,
        r"one number for one example; found shape \(1, 3\): use reduction='sum' or 'mean'",
    ),
    "targets of other examples": (
        lambda: Exact(OutputHessian(nn.MSELoss()))(LOGITS, (torch.zeros(3, 3),)).all(),
        ValueError,
        r"shape \(2, 3\) and targets of shape \(3, 3\) are not of the same examples",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_bad_input_gets_an_error_that_says_what_would_work(error):
    call, kind, message = ERRORS[error]
    with pytest.raises(kind, match=message):
        call()


def test_targets_and_outputs_may_differ_by_axes_of_size_one():
    outputs, target = torch.randn(4, 1), torch.randn(4)
    assert_close(make_variant("regression").gradient(outputs, target), outputs - target[:, None])


@pytest.mark.parametrize("representation", [nngeo.PMatDense, nngeo.PMatDiag, nngeo.PMatKFAC, nngeo.PMatEKFAC])
def test_a_metric_without_cotangents_has_a_zero_matrix(representation):
    model, batches = torch.nn.Linear(3, 2).double(), [(torch.randn(n, 3).double(),) for n in (2, 1)]
    found = nngeo.FIM(model, batches, representation, lambda outputs, *targets: outputs.new_zeros(0, *outputs.shape))
    assert found.n_examples == 3 and torch.equal(found.to_torch(), torch.zeros(8, 8).double())
