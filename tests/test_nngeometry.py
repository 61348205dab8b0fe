"""What NNGeometry (0.4) gets silently wrong is right here, or refused; its names are kept, or have a row."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

import nngeo
from nngeo import (
    FIM,
    FIM_MonteCarlo,
    GramMatrix,
    Jacobian,
    LayerCollection,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatQuasiDiag,
    PVector,
    random_pvector,
)
from tests import reference
from tests.cases import CASES

BY_ID = {case.id: case for case in CASES}
DENSE = [PMatDense, PMatBlockDiag, PMatLowRank, PMatImplicit, PMatKFAC, PMatEKFAC, PMatDiag, PMatQuasiDiag]
EXACT = [PMatDense, PMatLowRank, PMatImplicit]


def each_case(*ids: str) -> Any:
    return pytest.mark.parametrize("case", [BY_ID[id] for id in ids], ids=ids)


def each(*representations: Any) -> Any:
    return pytest.mark.parametrize("representation", representations, ids=lambda kind: kind.__name__)


def fisher(case: Any, representation: Any, **options: Any) -> Any:
    model = case.make()
    return FIM(model, case.batches(), representation, case.variant, function=case.function(model), **options)


def expected(case: Any) -> Tensor:
    model = case.make()
    return reference.fisher(model, case.batch(), case.variant, case.function(model))


def normal(matrix: Any, seed: int = 0) -> PVector:
    generator = torch.Generator().manual_seed(seed)
    return random_pvector(matrix.layer_collection, dtype=torch.float64, generator=generator)


# Layers that do not depend on the first input; tied and re-used weights; (b t, d) before a Linear; groups, circular
# padding and padding_idx; parameters of a model with children; weight_norm.
OVERLOOKED = each_case(
    *("two_inputs", "attention_cross", "tied_linears", "tied_embedding", "called_twice", "registered_twice"),
    *("folded", "folded_first", "folded_conv", "conv1d", "conv1d_circular", "conv2d_circular", "conv2d_groups"),
    *("embedding_padding", "vision_transformer", "parameter_list", "weight_norm", "weight_norm_old", "linear_4d"),
)


@OVERLOOKED
@each(*EXACT)
def test_the_matrix_is_exact(representation, case):
    assert_close(fisher(case, representation).to_torch(), expected(case))


@OVERLOOKED
def test_the_diagonal_is_exact(case):
    assert_close(fisher(case, PMatDiag).get_diag(), expected(case).diagonal())


@OVERLOOKED
def test_the_jacobian_and_the_gram_matrix_are_exact(case):
    model = case.make()
    rows = reference.jacobian(model, case.batch(), case.function(model))
    assert_close(Jacobian(model, case.batches(), case.function(model)).to_torch(), rows)
    kernel = GramMatrix(model, case.batches(), case.function(model)).to_torch()
    assert_close(kernel, torch.einsum("knp,lmp->knlm", rows, rows))


@each_case("tied_linears", "tied_embedding", "registered_twice", "conv2d_groups", "vision_transformer", "weight_norm")
def test_every_parameter_is_counted_once(case):
    model = case.make()
    assert LayerCollection.from_model(model).numel() == sum(p.numel() for p in model.parameters())


def test_the_row_of_padding_has_no_gradient():
    diagonal = fisher(BY_ID["embedding_padding"], PMatDiag).get_diag()
    assert not diagonal[:3].any() and diagonal[3:15].any()


def test_a_linear_on_positions_has_the_factors_of_the_convolution_that_it_is():
    torch.manual_seed(0)
    linear, x = nn.Linear(3, 2).double(), torch.randn(4, 5, 3, dtype=torch.float64)
    conv = nn.Conv1d(3, 2, 1).double()
    conv.load_state_dict({"weight": linear.weight[:, :, None], "bias": linear.bias})
    one = FIM(linear, (x,), PMatKFAC, "regression", function=lambda x: linear(x).sum(1))
    other = FIM(conv, (x,), PMatKFAC, "regression", function=lambda x: conv(x.mT).sum(2))
    assert_close(one.to_torch(), other.to_torch())


def test_g_is_an_average_over_positions():
    case = BY_ID["linear_3d"]
    ((_, g),) = reference.kfac_factors(case.make(), case.batch(), "body.0", case.variant)
    assert_close(fisher(case, PMatKFAC).data["body.0"].g, g[None])


# ------------------------------------------------------------------------------------------ counting examples

MODEL_CASE = BY_ID["linear"]
DATA = TensorDataset(*MODEL_CASE.batch())


class Stream(IterableDataset):
    """Examples without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(DATA)


LOADERS = {
    "drop_last": (DataLoader(DATA, 4, drop_last=True), 4),
    "a batch sampler": (DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(range(5)), 2, False)), 5),
    "batches of any size": (DataLoader(DATA, batch_sampler=[[0, 1, 2], [3]]), 4),
    "an iterable data set": (DataLoader(Stream(), 4), 6),
    "a generator": (None, 6),
}


@pytest.mark.parametrize(("loader", "n"), LOADERS.values(), ids=LOADERS)
@each(PMatDense, PMatLowRank, PMatDiag, PMatImplicit)
def test_the_mean_is_over_the_examples_that_were_seen(representation, loader, n):
    loader = (DATA[start : start + 2] for start in range(0, 6, 2)) if loader is None else loader
    matrix = FIM(MODEL_CASE.make(), loader, representation)
    mean = reference.fisher(MODEL_CASE.make(), DATA[:n], "classif_logits")
    assert_close(matrix.get_diag(), mean.diagonal())
    assert matrix.n_examples in (n, None)


def test_a_jacobian_has_no_rows_of_examples_that_were_dropped():
    assert Jacobian(MODEL_CASE.make(), DataLoader(DATA, 4, drop_last=True)).size(1) == 4


@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["global", "own"])
def test_a_gram_matrix_from_a_shuffling_loader_is_one_of_some_order(generator):
    model = MODEL_CASE.make()
    kernel = GramMatrix(model, DataLoader(DATA, 2, shuffle=True, generator=generator)).to_matrix()
    ordered = reference.ntk(model, DATA[:]).flatten(2).flatten(0, 1)
    assert_close(kernel, kernel.mT)
    assert_close(torch.linalg.eigvalsh(kernel), torch.linalg.eigvalsh(ordered))


# ------------------------------------------------------------------------------------------ algebra


def test_low_rank_solves_outside_of_its_span():
    matrix = FIM(MODEL_CASE.make(), DATA[:2], PMatLowRank)
    v = normal(matrix).to_torch()
    damped = matrix.to_torch() + 0.1 * torch.eye(len(v), dtype=v.dtype)
    assert_close(matrix.solve(v, regul=0.1), torch.linalg.solve(damped, v))


def test_an_implicit_monte_carlo_matrix_is_one_matrix():
    matrix = FIM_MonteCarlo(MODEL_CASE.make(), DATA[:], PMatImplicit, trials=1)
    v, w = normal(matrix), normal(matrix, seed=1)
    assert_close(matrix.mv(v).to_torch(), matrix.mv(v).to_torch())
    assert_close(w.dot(matrix.mv(v)), v.dot(matrix.mv(w)))
    x = matrix.solve(v, regul=0.1)
    assert_close((matrix.mv(x) + 0.1 * x).to_torch(), v.to_torch(), rtol=1e-4, atol=1e-4)


def test_more_noise_is_less_information():
    model, batch = nn.Linear(3, 2).double(), (torch.randn(5, 3).double(),)
    one = FIM(model, batch, PMatDense, "regression").to_torch()
    assert_close(FIM(model, batch, PMatDense, "regression", covariance=4.0).to_torch(), one / 4)


@pytest.mark.parametrize("seed", range(3))
def test_trials_of_regression_are_draws_of_their_own(seed):
    """Their mean converges as 1 / sqrt(trials), also where the trials are a multiple of the examples."""
    model = nn.Linear(1, 1, bias=False).double()
    batch, generator = (torch.ones(2, 1).double(),), torch.Generator().manual_seed(seed)
    matrix = FIM_MonteCarlo(model, batch, PMatDense, "regression", trials=2000, covariance=4.0, generator=generator)
    assert_close(matrix.to_torch().item(), 0.25, rtol=0.1, atol=0)  # four standard deviations


def test_tokens_are_not_mistaken_for_classes():
    model, batch = nn.Linear(3, 4).double(), (torch.randn(5, 2, 3).double(), torch.zeros(5, 2).long())
    with pytest.raises(ValueError, match=r"\(5, 2, 4\).*'segmentation_logits'.*'token_logits'"):
        FIM(model, batch, PMatDiag, "classif_logits")
    assert_close(
        FIM(model, batch, PMatDense, "token_logits").to_torch(), reference.fisher(model, batch, "token_logits")
    )


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each(*DENSE)
def test_results_have_the_dtype_of_the_model(representation, dtype, default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        matrix = FIM(MODEL_CASE.make().to(dtype), (DATA[:][0].to(dtype),), representation)
        v = torch.ones(matrix.size(0), dtype=dtype)
        results = [matrix.to_torch(), matrix.trace(), matrix.get_diag(), matrix.mv(v), matrix.solve(v, 0.1)]
    finally:
        torch.set_default_dtype(before)
    assert {result.dtype for result in results} == {dtype}


def test_a_dead_layer_is_damped():
    matrix = fisher(BY_ID["dead_layer"], PMatKFAC)
    v = normal(matrix)
    assert not matrix.mv(v).to_torch_layer("0").any()
    assert_close(matrix.solve(v, regul=0.1).to_torch_layer("0"), v.to_torch_layer("0") / 0.1)
    assert matrix.solve(v, regul=0.1, solve="factored").to_torch().isfinite().all()


@pytest.mark.parametrize("p", [1, 3])
def test_odd_norms_take_absolute_values(p):
    v = normal(fisher(MODEL_CASE, PMatDiag))
    by_parameter = PVector(v.layer_collection, dict_repr=v.to_dict())
    assert_close(by_parameter.norm(p), v.to_torch().abs().pow(p).sum().pow(1 / p))


def test_layers_with_and_without_bias_differ():
    assert LayerCollection.from_model(nn.Linear(3, 4)) != LayerCollection.from_model(nn.Linear(3, 4, bias=False))


# ------------------------------------------------------------------------------------------ names and places

PAGE = (Path(__file__).parent.parent / "docs" / "migration.rst").read_text()
SAME_PLACES = {
    "FIM": "model loader representation variant device function layer_collection",
    "FIM_MonteCarlo": "model loader representation variant trials device function layer_collection",
    "Hessian": "model loader representation function layer_collection",
    "Jacobian": "model loader function representation layer_collection",
    "random_pvector": "layer_collection device dtype",
    "random_pvector_dict": "layer_collection device",
    "random_fvector": "n_samples n_output device",
}


@pytest.mark.parametrize("name", SAME_PLACES)
def test_arguments_have_the_places_that_they_had(name):
    places = SAME_PLACES[name].split()
    assert list(inspect.signature(getattr(nngeo, name)).parameters)[: len(places)] == places


# Public names of NNGeometry 0.4 that nngeo has not, or with other arguments: each has a row.
OTHERS = """
inverse frobenius_norm compute_eigendecomposition get_KFE project_to_diag project_from_diag mm( iter_by_module solvePVec
solvePFMap get_layerid_module_maps centering= use_pi= split_weight_bias= ignore_unsupported_layers add_layer(name
has_bias() pinv(atol pow(p inv(regul) layer.weight layer.bias layerid_to_module impl= mv(vs) vTMv(vector) vjp(v)
"""


@pytest.mark.parametrize("name", OTHERS.split())
def test_what_differs_has_a_row(name):
    assert name in PAGE


@each(PMatDense, PMatDiag, PMatLowRank)
def test_damped_functions_take_the_arguments_that_they_took(representation):
    matrix = fisher(MODEL_CASE, representation)
    damped = matrix.to_torch() + 0.1 * torch.eye(matrix.size(0), dtype=matrix.dtype)
    assert_close(matrix.inv(regul=0.1).to_torch(), damped.inverse())
    assert_close(matrix.pow(2, regul=0.1).to_torch(), damped @ damped)
    assert_close((matrix + 0.1).pinv(atol=1e-9).to_torch(), damped.inverse())
