"""The definitions agree with each other, with closed forms and with finite differences, on every case."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from tests import reference
from tests.cases import CASES, Case

BY_ID = {case.id: case for case in CASES}
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
each_kronecker_case = pytest.mark.parametrize("case", [c for c in CASES if c.kronecker], ids=lambda case: case.id)
each_seed = pytest.mark.parametrize("seed", [0, 1, 2])


def built(case: Case) -> tuple[nn.Module, Any, Any]:
    model = case.make()
    return model, case.batch(), case.function(model)


@cache
def jacobian(case_id: str) -> Tensor:
    model, batch, function = built(BY_ID[case_id])
    return reference.jacobian(model, batch, function)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs, target, reduction="sum")


# ------------------------------------------------------------------------------------------ cases


def test_there_are_many_cases_with_ids_of_their_own():
    assert len(BY_ID) == len(CASES) >= 32


@each_case
def test_a_case_is_small_in_double_precision_and_in_eval_mode(case):
    model = case.make()
    assert 0 < sum(p.numel() for p in reference.trainable(model)) <= 600
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model.modules())
    assert 4 <= case.n <= 7


@each_case
def test_a_case_is_always_the_same_and_leaves_the_random_state_alone(case):
    state = torch.random.get_rng_state()
    (model, batch, function), (other, again, function_again) = built(case), built(case)
    assert_close(torch.random.get_rng_state(), state, rtol=0, atol=0)
    first = reference.outputs(model, batch, function)
    # Torch 2.6 itself rounds the running mean of a tracked instance norm each time that it reads it.
    last_digit = 1e-15 if case.id == "instance_norm_tracked" else 0
    assert_close(reference.outputs(other, again, function_again), first, rtol=last_digit, atol=last_digit)
    assert_close(reference.outputs(model, batch, function), first, rtol=last_digit, atol=last_digit)
    assert_close(torch.random.get_rng_state(), state, rtol=0, atol=0)


@each_case
def test_outputs_of_batches_are_those_of_one_batch(case):
    model, batch, function = built(case)
    parts = [reference.outputs(model, part, function) for part in case.batches()]
    assert sorted({len(part) for part in parts})[:2] == [1, 2]
    assert_close(torch.cat(parts), reference.outputs(model, batch, function))
    assert_close(torch.cat([reference.target(part) for part in case.batches()]), reference.target(batch))


@each_case
def test_outputs_of_an_example_do_not_depend_on_its_batch(case):
    model, batch, function = built(case)
    alone = [reference.outputs(model, example, function) for example in reference.examples(batch)]
    assert_close(torch.cat(alone), reference.outputs(model, batch, function))


@each_case
def test_targets_suit_the_variant(case):
    model, batch, function = built(case)
    pairs = zip(reference.outputs(model, batch, function), reference.target(batch), strict=True)
    losses = [reference.negative_log_likelihood(case.variant, output, y) for output, y in pairs]
    assert torch.stack(losses).isfinite().all()
    if case.variant in reference.CATEGORICAL:
        assert not reference.target(batch).is_floating_point()
        assert (reference.target(batch).flatten() == -100).any() == ("ignore" in case.tags)


@each_case
def test_no_case_is_trivial(case):
    assert jacobian(case.id).norm() > 0.1
    if not case.tags & {"unused", "dead"}:
        slices = reference.layer_slices(case.make())
        assert all(jacobian(case.id)[..., s].norm() > 1e-3 for s in slices.values())


# ------------------------------------------------------------------------------------------ derivatives


def central_difference(model: nn.Module, batch: Any, function: Any, v: Tensor, step: float = 1e-5) -> Tensor:
    """(k, n), the derivative of the outputs along v."""
    ends = []
    for offset in (step * v, -step * v):
        with torch.no_grad(), reference.moved(reference.trainable(model), offset):
            ends.append(reference.outputs(model, batch, function))
    return ((ends[0] - ends[1]) / (2 * step)).reshape(len(ends[0]), -1).T


@each_case
def test_jacobian_is_the_central_difference_of_outputs(case):
    model, batch, function = built(case)
    rows = jacobian(case.id)
    v = drawn(rows.shape[-1], seed=3)
    if "stopped" in case.tags:
        v = v * (rows.abs().amax((0, 1)) > 0)
    difference = central_difference(model, batch, function, v)
    assert_close(rows @ v, difference, rtol=1e-6, atol=1e-6 * difference.abs().max().item())


@pytest.mark.parametrize("case_id", ["linear", "layer_norm", "weight_norm_old", "tied_embedding"])
def test_each_column_of_the_jacobian_is_a_central_difference(case_id):
    model, batch, function = built(BY_ID[case_id])
    rows = jacobian(case_id)
    columns = [central_difference(model, batch, function, v) for v in torch.eye(rows.shape[-1], dtype=torch.float64)]
    assert_close(rows, torch.stack(columns, -1), rtol=1e-6, atol=1e-7)


def test_the_gradient_of_a_padding_token_is_stopped():
    """Its row is used, but autograd reports zero: the definition follows autograd."""
    case = BY_ID["embedding_padding"]
    assert not jacobian(case.id)[..., :3].any()
    model, batch, function = built(case)
    v = torch.eye(jacobian(case.id).shape[-1], dtype=torch.float64)[0]
    assert central_difference(model, batch, function, v).any()


def test_moved_puts_parameters_back_after_an_exception():
    model = BY_ID["linear"].make()
    parameters = reference.trainable(model)
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(KeyError), reference.moved(parameters, torch.ones(31, dtype=torch.float64)):
        raise KeyError
    assert_close([p.detach() for p in parameters], before, rtol=0, atol=0)


@pytest.mark.parametrize("case_id", ["linear", "layer_norm", "vision_transformer", "checkpointed", "frozen_weights"])
def test_hessian_is_the_central_difference_of_gradients(case_id):
    model, batch, function = built(BY_ID[case_id])
    by_backward = reference.hessian(model, batch, cross_entropy, function)
    by_differences = reference.hessian_by_differences(model, batch, cross_entropy, function)
    assert_close(by_backward, by_differences, rtol=1e-5, atol=1e-6)
    assert_close(by_backward, by_backward.T)


def test_plain_attention_is_undone():
    enabled = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError), reference.plain_attention():
        assert not torch.backends.mha.get_fastpath_enabled()
        raise KeyError
    assert torch.backends.mha.get_fastpath_enabled() == enabled


def test_hessian_of_a_linear_model_is_its_ggn():
    model, batch, _ = built(BY_ID["linear_root"])
    n = len(reference.target(batch))
    assert_close(reference.hessian(model, batch, cross_entropy) / n, reference.ggn(model, batch, cross_entropy))


# ------------------------------------------------------------------------------------------ metrics at the output


@each_seed
def test_metric_of_classif_logits_is_the_covariance_of_the_one_hot_target(seed):
    f = drawn(4, seed=seed)
    p = f.softmax(0)
    metric = reference.output_metric("classif_logits", f, torch.tensor(0))
    assert_close(metric, torch.diag(p) - torch.outer(p, p))


@each_seed
def test_metric_of_classif_logsoftmax_is_diagonal_in_log_probabilities(seed):
    f = drawn(4, seed=seed).log_softmax(0)
    assert_close(reference.output_metric("classif_logsoftmax", f, torch.tensor(0)), torch.diag(f.exp()))


@each_seed
def test_metric_of_binary_logits_is_the_variance_of_each_label(seed):
    f = drawn(2, 3, seed=seed)
    p = torch.sigmoid(f).flatten()
    metric = reference.output_metric("classif_binary_logits", f, torch.zeros(2, 3))
    assert_close(metric, torch.diag(p * (1 - p)))


@each_seed
def test_metric_of_poisson_log_rate_is_the_rate(seed):
    f = drawn(2, 3, seed=seed)
    assert_close(reference.output_metric("poisson_log_rate", f, f), torch.diag(f.exp().flatten()))


def test_metric_of_regression_is_the_inverse_covariance():
    f = drawn(2, 3, seed=0)
    identity = torch.eye(6, dtype=torch.float64)
    assert_close(reference.output_metric("regression", f, f), identity)
    assert_close(reference.output_metric("regression", f, f, covariance=4.0), identity / 4)


@pytest.mark.parametrize(
    ("variant", "shape", "class_axis"), [("segmentation_logits", (4, 2, 3), 0), ("token_logits", (2, 3, 4), -1)]
)
def test_metric_of_positions_is_that_of_each_and_zero_where_ignored(variant, shape, class_axis):
    f, target = drawn(*shape, seed=0), torch.zeros(2, 3, dtype=torch.long)
    target[0, 1] = -100
    p = f.softmax(class_axis).movedim(class_axis, -1)
    expected = torch.zeros(2, 3, 4, 2, 3, 4, dtype=torch.float64)
    for i in range(2):
        for j in range(3):
            kept = float(target[i, j] != -100)
            expected[i, j, :, i, j] = kept * (torch.diag(p[i, j]) - torch.outer(p[i, j], p[i, j]))
    if class_axis == 0:
        expected = expected.movedim((2, 5), (0, 3))
    metric = reference.output_metric(variant, f, target)
    assert_close(metric, expected.reshape(24, 24))


@pytest.mark.parametrize("variant", ["classif_logits", "segmentation_logits", "token_logits", "classif_binary_logits"])
def test_metric_is_the_hessian_of_the_negative_log_likelihood(variant):
    """In logits no target changes the Hessian, so that any target will do."""
    shape = {"classif_logits": (3,), "segmentation_logits": (3, 4), "token_logits": (4, 3)}.get(variant, (4,))
    target = torch.tensor([1.0, 0.0, 1.0, 1.0]) if variant == "classif_binary_logits" else torch.tensor([1, 0, 2, -100])
    target = target[0] if variant == "classif_logits" else target
    f = drawn(*shape, seed=0).requires_grad_()
    value = reference.negative_log_likelihood(variant, f, target)
    first = reference.gradient(value, [f], create_graph=True)
    hessian = torch.stack([reference.gradient(entry, [f]) for entry in first])
    assert_close(reference.output_metric(variant, f, target), hessian)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("variant", ["token_logits", "segmentation_logits"])
def test_negative_log_likelihood_of_positions_is_the_cross_entropy_of_torch(variant, ignored):
    f, target = drawn(4, 5, seed=0), torch.tensor([1, 0, -100 if ignored else 4, 2])
    output = f.T if variant == "segmentation_logits" else f
    assert_close(reference.negative_log_likelihood(variant, output, target), cross_entropy(f, target))


@pytest.mark.parametrize(
    ("variant", "loss"),
    [
        ("classif_binary_logits", F.binary_cross_entropy_with_logits),
        ("poisson_log_rate", F.poisson_nll_loss),
        ("regression", lambda f, y, reduction: F.mse_loss(f, y, reduction=reduction) / 2),
    ],
)
def test_negative_log_likelihood_of_numbers_is_the_loss_of_torch(variant, loss):
    f, target = drawn(4, seed=1), torch.tensor([1.0, 0, 0, 1]).double()
    assert_close(reference.negative_log_likelihood(variant, f, target), loss(f, target, reduction="sum"))


# ------------------------------------------------------------------------------------------ matrices


@pytest.mark.parametrize("case_id", ["linear", "conv2d_circular", "lstm", "two_inputs", "hidden_use", "dict_batch"])
def test_fisher_is_the_expected_outer_product_of_scores(case_id):
    model, batch, function = built(BY_ID[case_id])
    parameters = reference.trainable(model)
    expected = torch.zeros(1)
    for example in reference.examples(batch):
        log_p = reference.outputs(model, example, function)[0].log_softmax(-1)
        for k in range(3):
            score = reference.gradient(log_p[k], parameters)
            expected = expected + log_p[k].exp().detach() * torch.outer(score, score)
    n = len(reference.target(batch))
    assert_close(reference.fisher(model, batch, "classif_logits", function), expected / n)


def test_fisher_does_not_depend_on_the_coordinates_of_the_outputs():
    """`log_softmax` is `linear` with one more layer that has no parameters."""
    plain, log = BY_ID["linear"], BY_ID["log_softmax"]
    logits = nn.Sequential(*list(log.make())[:-1])
    fisher = reference.fisher(log.make(), log.batch(), "classif_logsoftmax")
    assert_close(fisher, reference.fisher(logits, plain.batch(), "classif_logits"))


@pytest.mark.parametrize("case_id", ["linear", "layer_norm", "attention_cross"])
def test_fisher_is_the_ggn_of_the_cross_entropy(case_id):
    model, batch, function = built(BY_ID[case_id])
    fisher = reference.fisher(model, batch, "classif_logits", function)
    assert_close(fisher, reference.ggn(model, batch, cross_entropy, function))


@pytest.mark.parametrize("case_id", ["tokens_ignore", "gpt2"])
def test_fisher_of_tokens_is_the_ggn_of_the_cross_entropy(case_id):
    model, batch, function = built(BY_ID[case_id])

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, -2), target.flatten(), reduction="sum")

    assert_close(reference.fisher(model, batch, "token_logits", function), reference.ggn(model, batch, loss, function))


def test_fisher_is_the_mean_of_empirical_ones_over_targets():
    model, (x, _), _ = built(BY_ID["linear"])
    total = torch.zeros(1)
    for b in range(len(x)):
        p = model(x[b]).softmax(-1).detach()
        for k in range(3):
            total = total + p[k] * reference.empirical_fisher(
                model, (x[b : b + 1], torch.tensor([k])), "classif_logits"
            )
    assert_close(total / len(x), reference.fisher(model, (x, torch.zeros(len(x)).long()), "classif_logits"))


@each_case
def test_fisher_and_empirical_fisher_are_means_over_batches(case):
    model, batch, function = built(case)
    n = len(reference.target(batch))
    for matrix in (reference.fisher, reference.empirical_fisher):
        whole = matrix(model, batch, case.variant, function)
        parts = [
            len(reference.target(part)) * matrix(model, part, case.variant, function) / n for part in case.batches()
        ]
        assert_close(sum(parts), whole)
        assert torch.linalg.eigvalsh(whole)[0] > -1e-10 * whole.trace()


def test_ntk_is_the_gram_matrix_of_the_jacobian():
    case = BY_ID["conv1d"]
    model, batch, _ = built(case)
    rows = jacobian(case.id)
    k, n, size = rows.shape
    kernel = reference.ntk(model, batch)
    assert_close(kernel.reshape(k * n, k * n), rows.reshape(k * n, size) @ rows.reshape(k * n, size).T)
    other = case.batches()[0]
    assert_close(reference.ntk(model, batch, other), kernel[..., : len(other[0])])


# ------------------------------------------------------------------------------------------ layers


@each_case
def test_layers_cover_the_coordinates_in_order(case):
    slices = list(reference.layer_slices(case.make()).values())
    starts, stops = [s.start for s in slices], [s.stop for s in slices]
    assert starts == [0, *stops[:-1]]
    assert stops[-1] == jacobian(case.id).shape[-1]


@pytest.mark.parametrize(
    ("case_id", "names"),
    [
        ("linear_root", [""]),
        ("vision_transformer", ["", "patches", "norm", "attend.attend", "attend.attend.out_proj", "head"]),
        ("weight_norm", ["0", "4"]),
        ("tied_linears", ["0", "2", "4"]),
        ("tied_embedding", ["0", "1"]),
        ("registered_twice", ["0", "4"]),
        ("frozen_layers", ["2", "5"]),
        ("parameter_list", ["weights", "head"]),
    ],
)
def test_a_layer_is_a_module_that_owns_trainable_parameters(case_id, names):
    assert list(reference.layer_slices(BY_ID[case_id].make())) == names


def test_block_diagonal_keeps_layers_and_nothing_between():
    matrix = torch.arange(1.0, 10).view(3, 3)
    blocks = reference.block_diagonal(matrix, {"a": slice(0, 1), "b": slice(1, 3)})
    assert_close(blocks, torch.tensor([[1.0, 0, 0], [0, 5, 6], [0, 8, 9]]))


# ------------------------------------------------------------------------------------------ Kronecker factors


@each_kronecker_case
def test_gradients_are_sums_of_outer_products(case):
    """This holds the inputs and output gradients of every linear map to autograd."""
    model, batch, function = built(case)
    example = reference.examples(batch)[0]

    def identity(output: Tensor) -> Tensor:
        return torch.eye(output.numel(), dtype=output.dtype)

    for name, layer in reference.layer_slices(model).items():
        a, g = reference.kronecker_statistics(model, name, example, identity, function)
        gradients = torch.einsum("knto,nti->knoi", g, a)
        rows = torch.zeros(len(g), layer.stop - layer.start, dtype=torch.float64)
        for group, matrix in enumerate(reference.weight_matrices(model.get_submodule(name))):
            rows[:, matrix.flatten()] = gradients[:, group].flatten(1)
        assert_close(rows, jacobian(case.id)[:, 0, layer])


@each_kronecker_case
def test_positions_are_declared(case):
    model, batch, function = built(case)
    example = reference.examples(batch)[0]
    shared = False
    for name in reference.layer_slices(model):
        _, calls = reference.layer_calls(model, model.get_submodule(name), example, function)
        rows = [reference.feature_rows(model.get_submodule(name), out) for _, out in calls]
        shared |= sum(len(row) for row in rows) > 1
    assert shared == case.positions


@each_kronecker_case
def test_kfac_of_one_example_without_positions_is_the_exact_block(case):
    model, batch, function = built(case)
    example = reference.examples(batch)[0]
    fisher = reference.fisher(model, example, case.variant, function)
    for name, layer in reference.layer_slices(model).items():
        _, calls = reference.layer_calls(model, model.get_submodule(name), example, function)
        module = model.get_submodule(name)
        single = len(calls) == 1 and len(reference.feature_rows(module, calls[0][1])) == 1
        if single and getattr(module, "groups", 1) == 1:
            block = reference.kfac_block(model, example, name, case.variant, function)
            assert_close(block, fisher[layer, layer])


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kfac_of_a_deep_linear_network_is_the_exact_block(sharing):
    case = BY_ID["linear_deep"]
    model, batch, _ = built(case)
    fisher = reference.fisher(model, batch, case.variant)
    for name, layer in reference.layer_slices(model).items():
        block = reference.kfac_block(model, batch, name, case.variant, sharing=sharing)
        assert_close(block, fisher[layer, layer])


def test_kfac_of_one_example_at_its_target_is_the_empirical_block():
    model, batch, _ = built(BY_ID["linear"])
    example = reference.examples(batch)[0]
    block = reference.kfac_block(model, example, "0", "classif_logits", empirical=True)
    assert_close(block, reference.empirical_fisher(model, example, "classif_logits")[:16, :16])


def test_kfac_factors_of_a_linear_layer_are_its_moments():
    """By hand, for the root layer of `linear_root` on (b, i): A of the inputs and ones, G of the metric."""
    case = BY_ID["linear_root"]
    model, batch, _ = built(case)
    x = F.pad(batch[0], (0, 1), value=1.0)
    ((a, g),) = reference.kfac_factors(model, batch, "", case.variant)
    assert_close(a, x.T @ x / len(x))
    assert_close(g, sum(reference.metrics(model, batch, case.variant)) / len(x))


def test_kfac_reduce_is_the_block_of_a_network_that_averages_its_outputs():
    """A linear layer followed by a sum over positions: "reduce" is exact for one example, "expand" is not."""
    layer = nn.Linear(3, 2).double()
    x = drawn(1, 4, 3, seed=0)
    batch = (x, torch.zeros(1, 2))

    def function(x: Tensor, y: Tensor) -> Tensor:
        return layer(x).mean(1)

    exact = reference.fisher(layer, batch, "regression", function)
    assert_close(reference.kfac_block(layer, batch, "", "regression", function, sharing="reduce"), exact)
    expand = reference.kfac_block(layer, batch, "", "regression", function)
    assert (expand - exact).norm() > 0.01 * exact.norm()


def test_kfac_of_a_grouped_convolution_has_a_block_for_each_group():
    case = BY_ID["conv2d_groups"]
    model, batch, _ = built(case)
    factors = reference.kfac_factors(model, batch, "2", case.variant)
    assert [(a.shape, g.shape) for a, g in factors] == [((5, 5), (2, 2))] * 4
    block = reference.kfac_block(model, batch, "2", case.variant)
    of_group = torch.arange(8).repeat_interleave(4) // 2
    between = of_group[:, None] != of_group
    assert not block[:32, :32][between].any()
