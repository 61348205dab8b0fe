"""The calls that users make, as they stand in the README, and the estimates by draws from the model."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import nngeo
from nngeo import (
    FIM,
    GGN,
    NTK,
    FIM_MonteCarlo,
    GramMatrix,
    Hessian,
    Jacobian,
    LayerCollection,
    PFMapImplicit,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatEye,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatMixed,
    PVector,
)
from tests import reference
from tests.contracts import (
    PMATS,
    cases_of,
    converted,
    each_case,
    each_of,
    each_pair,
    each_pmat,
    each_seed,
    loader,
    setting,
    unused_is_known,
)

pytestmark = unused_is_known

EXACT = {"rtol": 1e-8, "atol": 1e-10}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classifier() -> nn.Module:
    """(b, 4) to ten classes."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 10)).double()


def digits(n: int = 9) -> tuple[Tensor, Tensor]:
    return drawn(n, 4), torch.randint(10, (n,), generator=torch.Generator().manual_seed(1))


def digits_loader(**options: Any) -> DataLoader:
    return DataLoader(TensorDataset(*digits()), 4, **options)


# ------------------------------------------------------------------------------------------ calls as they stand


def test_the_regularizer_of_the_diagonal_fisher_is_differentiable_in_w():
    model, loader = classifier(), digits_loader()
    F = FIM(model=model, loader=loader, representation=PMatDiag, n_output=10)
    w = PVector.from_model(model)
    w_a = (w + 1.0).detach()
    regularizer = F.vTMv(w - w_a)
    fisher = reference.fisher(model, digits(), "classif_logits").diagonal()
    assert_close(regularizer.detach(), fisher.sum(), **EXACT)
    regularizer.backward()
    assert_close(PVector.from_model_grad(model).to_torch(), -2 * fisher, **EXACT)


def test_kfac_prints_its_trace_and_multiplies_a_vector():
    model, loader = classifier(), digits_loader()
    F_kfac = FIM(model=model, loader=loader, representation=PMatKFAC, variant="classif_logits", device="cpu")
    v = PVector.from_model(model)
    Fv = F_kfac.mv(v)
    assert float(F_kfac.trace()) > 0 and str(F_kfac.trace()).startswith("tensor(")
    assert isinstance(Fv, PVector)
    assert_close((F_kfac @ v).to_torch(), Fv.to_torch())
    assert_close(Fv.to_torch(), F_kfac.to_torch() @ v.to_torch())


def test_the_kernel_is_called_on_a_loader_on_two_inputs_or_by_its_other_name():
    model, loader = classifier(), digits_loader()
    x1, x2 = drawn(3, 4, seed=2), drawn(5, 4, seed=3)
    assert_close(NTK(model, loader).to_torch(), reference.ntk(model, digits()), **EXACT)
    assert_close(NTK(model, x1, x2).to_torch(), reference.ntk(model, (x1, x1), (x2, x2)), **EXACT)
    assert GramMatrix is NTK


def test_the_gram_matrix_takes_a_function_in_third_place():
    model, loader = classifier(), digits_loader()
    found = GramMatrix(model, loader, lambda x, y: model(x)[:, :2])
    assert_close(found.to_torch(), reference.ntk(model, digits())[:2, :, :2], **EXACT)


def test_a_fisher_takes_its_arguments_in_their_order():
    model = classifier()
    layers = LayerCollection.from_model(model, "2")
    found = FIM(model, digits_loader(), PMatDense, "classif_logits", "cpu", lambda x, y: model(x), layers, False)
    expected = reference.fisher(model, digits(), "classif_logits")[15:, 15:]
    assert_close(found.to_torch(), expected, **EXACT)
    generator = torch.Generator().manual_seed(0)
    args = (model, digits_loader(), PMatDiag, "classif_logits", 3, "cpu", lambda x, y: model(x), layers, False)
    assert FIM_MonteCarlo(*args, generator=generator).get_diag().shape == (40,)


@pytest.mark.parametrize(
    "name", ["FIM", "FIM_MonteCarlo", "GGN", "Hessian", "NTK", "GramMatrix", "Jacobian", "grad", "random_pfmap"]
)
def test_the_names_of_the_factories_are_exported(name):
    assert callable(getattr(nngeo, name)) and name in nngeo.__all__


# ------------------------------------------------------------------------------------------ loaders

LOADERS = {
    "loader": lambda x, y: DataLoader(TensorDataset(x, y), 4),
    "shuffling": lambda x, y: DataLoader(TensorDataset(x, y), 4, shuffle=True),
    "list_of_tuples": lambda x, y: [(x[:4], y[:4]), (x[4:], y[4:])],
    "list_of_lists": lambda x, y: [[x[:4], y[:4]], [x[4:], y[4:]]],
    "generator": lambda x, y: ((x[b : b + 1], y[b : b + 1]) for b in range(len(x))),
    "zip": lambda x, y: zip(x.split(5), y.split(5), strict=True),
    "tuple": lambda x, y: (x, y),
    "input_alone": lambda x, y: x,
    "inputs_alone": lambda x, y: (x,),
    "dict": lambda x, y: {"input": x, "labels": y},
    "user_dict": lambda x, y: UserDict(input=x, labels=y),
    "dicts": lambda x, y: [{"input": x[:4], "labels": y[:4]}, {"input": x[4:], "labels": y[4:]}],
}


class Keyword(nn.Module):
    """forward(input=), as a dict batch has it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = classifier()

    def forward(self, input: Tensor) -> Tensor:
        return self.body(input)


@pytest.mark.parametrize("source", LOADERS)
@pytest.mark.parametrize("kind", [PMatDense, PMatImplicit], ids=lambda kind: kind.__name__)
def test_examples_come_in_many_forms(kind, source):
    model = Keyword()
    found = FIM(model, LOADERS[source](*digits()), kind)
    assert_close(found.to_torch(), reference.fisher(model, digits(), "classif_logits"), **EXACT)


@pytest.mark.parametrize("source", LOADERS)
def test_kernels_and_jacobians_take_the_same_forms(source):
    model = Keyword()
    kernel = NTK(model, LOADERS[source](*digits())).to_matrix()
    expected = reference.jacobian(model, digits()).flatten(0, 1)
    assert_close(torch.linalg.eigvalsh(kernel), torch.linalg.eigvalsh(expected @ expected.T), rtol=1e-8, atol=1e-8)
    found = Jacobian(model, LOADERS[source](*digits()))
    assert_close(found.to_torch().square().sum(), expected.square().sum(), **EXACT)


def test_a_function_replaces_the_call_of_the_model():
    model = classifier()

    def function(x: Tensor, y: Tensor) -> Tensor:
        return 2.0 * model(x.flip(0).flip(0))

    found = FIM(model, digits_loader(), PMatDense, function=function)
    assert_close(found.to_torch(), reference.fisher(model, digits(), "classif_logits", function), **EXACT)


def test_a_function_is_given_the_whole_dict():
    model = classifier()
    x, y = digits()
    batch = {"anything": x, "labels": y}
    found = FIM(model, batch, PMatDense, function=lambda batch: model(batch["anything"]))
    assert_close(found.to_torch(), reference.fisher(model, digits(), "classif_logits"), **EXACT)


def test_a_bound_method_is_a_function():
    model = Keyword()
    found = [FIM(model, digits(), PMatDense, function=model.run).to_torch() for model.run in [_run(model)] * 2]
    assert_close(found[0], found[1])


def _run(model: nn.Module) -> Any:
    class Runner:
        def run(self, x: Tensor, y: Tensor) -> Tensor:
            return model(x)

    return Runner().run


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad], ids=["no_grad", "enable_grad"])
@each_pmat(PMATS)
def test_factories_work_whatever_the_grad_mode(pmat, grad_mode):
    at = setting(*cases_of("linear"))
    with grad_mode():
        found = pmat.build(at)
        product = found.mv(at.vector())
    assert_close(product, pmat.expected(at) @ at.vector(), **EXACT)
    assert not product.requires_grad


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad], ids=["no_grad", "enable_grad"])
def test_hessians_kernels_and_maps_work_whatever_the_grad_mode(grad_mode):
    model, loss = classifier(), nn.CrossEntropyLoss(reduction="sum")
    with grad_mode():
        hessian = Hessian(model, digits(), PMatDense, loss).to_torch()
        ggn = GGN(model, digits(), PMatDense, loss).to_torch()
        kernel = NTK(model, digits()).to_torch()
        implicit = Jacobian(model, digits(), representation=PFMapImplicit)
        layers = LayerCollection.from_model(model)
        pushed = implicit.jvp(PVector(layers, vector_repr=drawn(55))).to_torch()
    assert_close(hessian, reference.hessian(model, digits(), loss), **EXACT)
    assert_close(ggn, reference.ggn(model, digits(), loss), **EXACT)
    assert_close(kernel, reference.ntk(model, digits()), **EXACT)
    assert_close(pushed, reference.jacobian(model, digits()) @ drawn(55), **EXACT)


@each_pair(cases_of("linear", "tokens_ignore", "layer_norm"))
def test_nothing_is_made_on_the_default_device(pmat, case):
    at, model = setting(case), case.make()
    layers = LayerCollection.from_model(model)
    v, expected = PVector(layers, vector_repr=at.vector()), pmat.expected(at) @ at.vector()
    with torch.device("meta"):
        found = FIM(model, at.batches, pmat.kind, case.variant, **pmat.options(at))
        product = found.mv(v).to_torch()
        assert found.trace().device.type == found.get_diag().device.type == "cpu"
        assert found.solve(v, regul=0.5).device.type == "cpu"
    assert_close(product, expected, **EXACT)


@each_pmat(PMATS)
def test_nothing_is_made_in_the_default_dtype(pmat):
    (case,) = cases_of("layer_norm") if pmat.serves(cases_of("layer_norm")[0]) else cases_of("linear")
    at, model, batch = setting(case), case.make().float(), converted(case.batch(), torch.float32)
    torch.set_default_dtype(torch.float64)
    try:
        found = FIM(model, batch, pmat.kind, case.variant, **pmat.options(at))
        dtypes = {found.dtype, found.get_diag().dtype, found.trace().dtype, found.norm().dtype, found.to_torch().dtype}
    finally:
        torch.set_default_dtype(torch.float32)
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("kind", [PMatDense, PMatKFAC, PMatImplicit], ids=lambda kind: kind.__name__)
def test_factories_work_in_inference_mode(kind):
    model, expected = classifier(), reference.fisher(classifier(), digits(), "classif_logits")
    with torch.inference_mode():
        found = FIM(model, digits(), kind).trace().clone()
    expected = FIM(model, digits(), kind).trace() if kind is PMatKFAC else expected.trace()
    assert_close(found, expected, **EXACT)


# ------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("factory", [FIM, FIM_MonteCarlo], ids=lambda factory: factory.__name__)
def test_the_number_of_outputs_is_checked(factory):
    with pytest.raises(ValueError, match="n_output=7, but the model has 10"):
        factory(classifier(), digits_loader(), PMatDiag, n_output=7)
    assert factory(classifier(), digits_loader(), PMatDiag, n_output=10).n_examples == 9


def test_the_number_of_outputs_is_that_along_the_class_axis():
    case = cases_of("segmentation")[0]
    assert setting(case).fim(PMatDiag, n_output=3).n_examples == case.n
    case = cases_of("tokens")[0]
    assert setting(case).fim(PMatDiag, n_output=5).n_examples == case.n


def test_another_device_is_refused():
    with pytest.raises(ValueError, match="device='meta', but the model is on cpu"):
        FIM(classifier(), digits_loader(), PMatDiag, device="meta")


def test_softmax_over_the_wrong_axis_is_refused_by_an_error_that_names_both_variants():
    at = setting(*cases_of("tokens"))
    with pytest.raises(ValueError, match=r"\(6, 4, 5\).*'segmentation_logits'.*'token_logits'"):
        FIM(at.model, at.batch, PMatDiag, variant="classif_logits")


def test_unknown_variants_are_answered_by_the_known_ones():
    with pytest.raises(ValueError, match="Unknown variant 'softmax'; known are classif_binary_logits, classif_logits"):
        FIM(classifier(), digits(), PMatDiag, variant="softmax")


NO_CLASSES = {
    "matrix": PMatEye(LayerCollection.from_model(nn.Linear(1, 1))),
    "name": "PMatDiag",
    "module": nn.Linear,
    "map": PFMapImplicit,
}


@pytest.mark.parametrize("wrong", NO_CLASSES.values(), ids=NO_CLASSES)
def test_a_representation_is_a_class_of_matrices(wrong):
    with pytest.raises(TypeError, match="`representation` is .*; it should be a class: PMat"):
        FIM(classifier(), digits(), wrong)


def test_an_option_that_the_representation_does_not_take_is_refused():
    with pytest.raises(TypeError, match="weight_sharing"):
        FIM(classifier(), digits(), PMatDiag, weight_sharing="reduce")


def test_the_identity_is_not_estimated():
    with pytest.raises((TypeError, NotImplementedError)):
        FIM(classifier(), digits(), PMatEye)


def test_a_function_is_a_variant():
    model = classifier()

    def variant(outputs: Tensor, *targets: Tensor) -> Tensor:
        """The metric of the first two outputs, weighted by the target."""
        c = torch.zeros(2, *outputs.shape, dtype=outputs.dtype)
        c[0, :, 0], c[1, :, 1] = 1.0, targets[0].to(outputs).sqrt()
        return c

    j = reference.jacobian(model, digits())
    weights = torch.stack([torch.ones(9).double(), digits()[1].double()])
    expected = torch.einsum("kbp,kb,kbq->pq", j[:2], weights, j[:2]) / 9
    assert_close(FIM(model, digits_loader(), PMatDense, variant=variant).to_torch(), expected, **EXACT)


@pytest.mark.parametrize("covariance", [4.0, [0.5, 2.0], [[2.0, 0.5], [0.5, 1.0]]], ids=["number", "variances", "full"])
@pytest.mark.parametrize("kind", [PMatDense, PMatImplicit], ids=lambda kind: kind.__name__)
def test_the_noise_of_a_regression_divides(kind, covariance):
    at = setting(*cases_of("linear_deep"))
    noise = torch.tensor(covariance, dtype=torch.float64)
    noise = noise * torch.eye(2).double() if noise.ndim < 2 else noise
    expected = reference.pulled_back(at.jacobian, [noise.inverse()] * at.case.n)
    assert_close(at.fim(kind, covariance=covariance).to_torch(), expected, **EXACT)


@pytest.mark.parametrize("kind", [PMatDense, PMatImplicit, PMatDiag], ids=lambda kind: kind.__name__)
def test_a_mask_says_which_positions_count(kind):
    at = setting(*cases_of("tokens"))
    x, y = at.batch
    mask = drawn(*y.shape) > 0
    ignored = reference.fisher(at.model, (x, y.masked_fill(~mask, -100)), "token_logits")
    batches = [(x[:2], y[:2], mask[:2]), (x[2:], y[2:], mask[2:])]
    found = FIM(at.model, batches, kind, "token_logits", mask=lambda batch: batch[2])
    assert_close(found.get_diag(), ignored.diagonal(), **EXACT)
    assert_close(
        found.mv(at.vector()), (ignored if kind is not PMatDiag else ignored.diagonal().diag()) @ at.vector(), **EXACT
    )


def test_a_mask_is_a_key_of_dict_batches():
    at = setting(*cases_of("tokens"))
    ids, y = at.batch
    mask = (drawn(*y.shape) > 0).long()
    expected = reference.fisher(at.model, (ids, y.masked_fill(mask == 0, -100)), "token_logits")
    batch = {"ids": ids, "real": mask, "labels": y}
    options = {"function": lambda batch: at.model(batch["ids"]), "variant": "token_logits"}
    assert_close(FIM(at.model, batch, PMatDense, mask="real", **options).to_torch(), expected, **EXACT)
    with pytest.raises(ValueError, match="mask='attention_mask' is no key of the batch; it has 'ids', 'real'"):
        FIM(at.model, batch, PMatDense, mask="attention_mask", **options)


def test_ignored_targets_are_chosen():
    at = setting(*cases_of("tokens"))
    x, y = at.batch
    expected = reference.fisher(at.model, at.batch, "token_logits", ignore_index=2)
    assert_close(FIM(at.model, (x, y), PMatDense, "token_logits", ignore_index=2).to_torch(), expected, **EXACT)
    everything = FIM(at.model, (x, y), PMatDense, "token_logits", ignore_index=None)
    assert_close(everything.to_torch(), at.fisher, **EXACT)
    with pytest.raises(TypeError, match="classif_logits.*ignore_index"):
        FIM(classifier(), digits(), PMatDiag, ignore_index=3)


# ------------------------------------------------------------------------------------------ empirical


@each_case
def test_the_empirical_fisher_is_that_of_gradients_at_the_targets(case):
    at = setting(case)
    expected = reference.empirical_fisher(at.model, at.batch, case.variant, at.function)
    assert_close(at.fim(PMatDense, empirical=True).to_torch(), expected, **EXACT)
    assert_close(at.fim(PMatDiag, empirical=True).get_diag(), expected.diagonal(), **EXACT)
    assert_close(at.fim(PMatImplicit, empirical=True).mv(at.vector()), expected @ at.vector(), **EXACT)


@each_pair(cases_of("linear", "conv2d_groups", "tokens_ignore", "attention_tokens"), [PMATS[6], PMATS[7]])
def test_kfac_of_the_empirical_fisher_is_made_of_gradients_at_the_targets(pmat, case):
    at = setting(case)
    found = pmat.build(at, empirical=True).to_torch()
    sharing = pmat.options(at).get("weight_sharing", "expand")
    name, s = next(iter(at.slices.items()))
    block = reference.kfac_block(at.model, at.batch, name, case.variant, at.function, sharing=sharing, empirical=True)
    assert_close(found[s, s], block, **EXACT)


def test_an_empirical_fisher_needs_targets():
    with pytest.raises(ValueError, match="'classif_logits' found no targets"):
        FIM(classifier(), drawn(3, 4), PMatDiag, empirical=True)


# ------------------------------------------------------------------------------------------ Monte-Carlo

# Variants with draws: small classifiers, attention before a loss of tokens (some ignored), and the others.
DRAWN = cases_of("linear", "attention_tokens", "attention_first", "segmentation", "binary_labels", "counts", "gpt2")
TRIALS = 400


@each_seed
@each_of(DRAWN)
def test_the_exact_fisher_is_the_mean_of_draws(case, seed):
    """Within four standard errors, which are computed from the draws, for the diagonal and 20 quadratic forms."""
    at, generator = setting(case), torch.Generator().manual_seed(seed)
    found = FIM_MonteCarlo(
        at.model, at.batches, PMatLowRank, case.variant, TRIALS, function=at.function, generator=generator
    )
    rows = found.data * TRIALS**0.5  # (trials, n, P): each trial is an estimate of its own
    directions = torch.stack([at.vector(j) for j in range(20)])
    for_forms = (rows @ directions.T).square().sum(1)
    estimates = torch.cat([rows.square().sum(1), for_forms], 1)  # (trials, P + 20)
    forms = torch.einsum("jp,pq,jq->j", directions, at.fisher, directions)
    expected = torch.cat([at.fisher.diagonal(), forms])
    error = estimates.std(0) / TRIALS**0.5
    assert bool(((estimates.mean(0) - expected).abs() <= 4 * error + 1e-12).all())
    assert float(estimates.std(0).max()) > 0
    assert_close(estimates.mean(0)[: at.size], found.get_diag(), **EXACT)


@each_of(DRAWN)
def test_draws_come_from_the_generator_alone(case):
    at = setting(case)
    before = torch.get_rng_state()
    first, second, third = (monte_carlo(at, PMatDiag, seed).get_diag() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(first, second, rtol=0.0, atol=0.0)
    assert not torch.allclose(first, third)


def monte_carlo(at: Any, kind: type, seed: int = 0, trials: int = 1, examples: Any = None, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    examples = at.batches if examples is None else examples
    settings = {"function": at.function, "generator": generator} | options
    return FIM_MonteCarlo(at.model, examples, kind, at.case.variant, trials, **settings)


def test_without_a_generator_the_global_seed_decides():
    at = setting(*cases_of("linear"))

    def estimate() -> Tensor:
        return FIM_MonteCarlo(at.model, at.batches, PMatDiag).get_diag()

    torch.manual_seed(0)
    first, second = estimate(), estimate()
    torch.manual_seed(0)
    assert_close(estimate(), first, rtol=0.0, atol=0.0)
    assert not torch.allclose(first, second)


@each_pmat(PMATS)
def test_every_representation_of_one_seed_is_of_the_same_draws(pmat):
    at = setting(*cases_of("linear"))
    fisher = monte_carlo(at, PMatDense, seed=5, trials=2).to_torch()
    found = monte_carlo(at, pmat.kind, seed=5, trials=2, **pmat.options(at))
    if hasattr(found, "update_diag"):
        found.update_diag(at.batches)
    if pmat.kind is PMatImplicit:
        assert_close(found.to_torch(), fisher, **EXACT)
    if pmat.kind not in (PMatKFAC,):
        assert_close(found.trace(), fisher.trace(), **EXACT)
    if pmat.kind is PMatMixed:
        first = next(iter(at.slices.values()))
        assert_close(found.to_torch()[first, first], fisher[first, first], **EXACT)


@each_seed
def test_the_basis_of_ekfac_and_its_scalings_are_of_the_same_draws(seed):
    """For one example and one draw KFAC is exact, so scalings of the same draw change nothing."""
    at = setting(*cases_of("linear_deep"))
    one = tuple(t[:1] for t in at.batch)
    found = monte_carlo(at, PMatEKFAC, seed, examples=one)
    before = found.to_torch()
    found.update_diag(one)
    assert_close(found.to_torch(), before, **EXACT)


def test_the_scalings_of_ekfac_see_the_draws_of_a_shuffling_loader_again():
    (case,) = cases_of("linear")
    at, shuffling = setting(case), loader(case, shuffle=True)
    fisher = monte_carlo(at, PMatDense, seed=2, examples=shuffling).to_torch()
    found = monte_carlo(at, PMatEKFAC, seed=2, examples=shuffling)
    found.update_diag(shuffling)
    assert_close(found.trace(), fisher.trace(), **EXACT)


@pytest.mark.parametrize("case_id", ["linear", "conv1d", "attention_tokens"])
@pytest.mark.parametrize("own_generator", [True, False], ids=["own generator", "global generator"])
def test_an_implicit_matrix_of_draws_and_a_shuffling_loader_is_one_matrix(case_id, own_generator):
    (case,) = cases_of(case_id)
    at = setting(case)
    data = TensorDataset(*case.batch())
    own = {"generator": torch.Generator().manual_seed(3)} if own_generator else {}
    found = monte_carlo(at, PMatImplicit, examples=DataLoader(data, 4, shuffle=True, **own))
    v, w = at.vector(), at.vector(1)
    first = found.mv(v)
    torch.rand(7)
    assert_close(found.mv(v), first, rtol=0.0, atol=0.0)
    assert_close(w @ found.mv(v), v @ found.mv(w), **EXACT)
    assert_close(found.mv(2 * v - w), 2 * found.mv(v) - found.mv(w), **EXACT)
    assert_close(found.vTMv(w), w @ found.mv(w), **EXACT)
    assert_close(found.get_diag(), found.to_torch().diagonal(), **EXACT)
    assert float(torch.linalg.eigvalsh(found.to_torch())[0]) > -1e-10


def test_an_implicit_matrix_of_a_one_shot_iterator_can_be_used_again():
    at = setting(*cases_of("linear"))
    found = at.fim(PMatImplicit, iter(at.batches))
    assert_close(found.mv(at.vector()), found.mv(at.vector()))
    assert_close(found.to_torch(), at.fisher, **EXACT)


def test_a_shuffling_loader_leaves_the_users_random_numbers_alone():
    at = setting(*cases_of("linear"))
    shuffling = DataLoader(TensorDataset(*at.batch), 4, shuffle=True)
    before = torch.get_rng_state()
    at.fim(PMatDiag, shuffling)
    NTK(at.model, shuffling)
    at.fim(PMatImplicit, shuffling).mv(at.vector())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("trials", [0, -1])
def test_the_number_of_draws_is_positive(trials):
    with pytest.raises(ValueError, match="`trials` must be 1 or more"):
        FIM_MonteCarlo(classifier(), digits(), PMatDiag, trials=trials)


def test_a_variant_without_draws_says_so():
    with pytest.raises(NotImplementedError, match="no Monte-Carlo estimate"):
        FIM_MonteCarlo(classifier(), digits(), PMatDiag, variant=lambda outputs, *targets: outputs[None])


# ------------------------------------------------------------------------------------------ progress


def test_a_progress_bar_counts_examples(capfd):
    FIM(classifier(), digits_loader(), PMatDiag, verbose=True)
    shown = capfd.readouterr().err
    assert "9/9" in shown and "examples/s" in shown and "100%" in shown


VERBOSE = {
    "FIM_MonteCarlo": lambda model: FIM_MonteCarlo(model, digits_loader(), PMatBlockDiag, verbose=True),
    "GGN": lambda model: GGN(model, digits_loader(), PMatDense, nn.CrossEntropyLoss(), verbose=True),
    "Hessian": lambda model: Hessian(model, digits_loader(), PMatDense, nn.CrossEntropyLoss(), verbose=True),
    "NTK": lambda model: NTK(model, digits_loader(), verbose=True),
    "Jacobian": lambda model: Jacobian(model, digits_loader(), verbose=True),
}


@pytest.mark.parametrize("factory", VERBOSE)
def test_every_factory_has_a_progress_bar(factory, capfd):
    VERBOSE[factory](classifier())
    assert "9/9" in capfd.readouterr().err


def test_nothing_is_shown_unless_asked_for(capfd):
    FIM(classifier(), digits_loader(), PMatDiag)
    assert capfd.readouterr() == ("", "")
