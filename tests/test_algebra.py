"""Every operation of every representation against dense linear algebra: damping, functions, samples, sums."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nngeo
from nngeo import FIM, LayerCollection, PFMapDense, PMat, PMatEye, PVector, random_pfmap
from nngeo.generators import HessianGenerator
from nngeo.representations import KroneckerBlock, KroneckerEigenBlock, PMatLowRankPlusDiag
from tests.cases import Case
from tests.contracts import PMATS, WITH_EIGENBASIS, Representation, cases_of, each_of, each_pmat, setting

pytestmark = pytest.mark.filterwarnings("ignore:The outputs do not depend on")

NETWORKS = cases_of(
    *("linear", "conv2d_groups", "embedding_padding", "layer_norm", "tokens", "called_twice", "unused_layer", "scalar")
)
STORED = [pmat for pmat in PMATS if pmat.stores]
NAMES = [*(pmat.id for pmat in STORED), "ekfac_updated", "ekfac_block_diag_updated", "eye"]
BY_ID = {pmat.id: pmat for pmat in STORED}


def serves(name: str, case: Case) -> bool:
    if name == "eye":
        return True
    return BY_ID[name.removesuffix("_updated")].serves(case)


PAIRS = [pytest.param(name, case, id=f"{name}-{case.id}") for case in NETWORKS for name in NAMES if serves(name, case)]
every = pytest.mark.parametrize("name, case", PAIRS)
(LINEAR,) = cases_of("linear")
on_linear = pytest.mark.parametrize("name, case", [pytest.param(n, LINEAR, id=n) for n in NAMES if serves(n, LINEAR)])


def build(name: str, case: Case, examples: Any = None) -> Any:
    at = setting(case)
    if name == "eye":
        return PMatEye(at.layers, 0.7, dtype=torch.float64)
    pmat = BY_ID[name.removesuffix("_updated")]
    exact = {"update_diag": True} if name.endswith("_updated") else {}
    return pmat.build(at, examples, **exact)


@cache
def _matrix(name: str, case_id: str) -> Any:
    return build(name, *cases_of(case_id))


def matrix_of(name: str, case: Case) -> Any:
    """The same for all tests that leave it as it is."""
    return _matrix(name, case.id)


@cache
def _dense(name: str, case_id: str) -> Tensor:
    return _matrix(name, case_id).to_torch()


def dense_of(name: str, case: Case) -> Tensor:
    return _dense(name, case.id)


def close(found: Tensor, want: Tensor) -> None:
    """To 1e-8 of the largest entry."""
    scale = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-8 * scale)


def enough(name: str, case: Case) -> float:
    """Damping that makes the matrix positive: a quasi-diagonal one need not be."""
    return 0.5 + 2 * max(0.0, -float(torch.linalg.eigvalsh(dense_of(name, case))[0]))


# The forms of damping: what is added, and the diagonal (P,) that it means.

FORMS = ["number", "tensor", "by layer", "sequence", "PVector"]


def damping(form: str, layers: LayerCollection, least: float) -> tuple[Any, Tensor]:
    rising = least + 0.1 * torch.arange(len(layers), dtype=torch.float64)
    sizes = torch.tensor([layer.numel() for layer in layers.layers.values()])
    vector = least + torch.rand(layers.numel(), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return {
        "number": (least, torch.full_like(vector, least)),
        "tensor": (torch.tensor(least), torch.full_like(vector, float(torch.tensor(least)))),
        "by layer": (dict(zip(layers, rising, strict=True)), rising.repeat_interleave(sizes)),
        "sequence": (rising.tolist(), rising.repeat_interleave(sizes)),
        "PVector": (PVector(layers, vector), vector),
    }[form]


def damped(form: str, name: str, case: Case) -> tuple[Any, Tensor]:
    """A damped matrix, and its dense form."""
    added, diagonal = damping(form, setting(case).layers, enough(name, case))
    return matrix_of(name, case) + added, dense_of(name, case) + diagonal.diag()


def function(dense: Tensor, f: Any) -> Tensor:
    values, vectors = torch.linalg.eigh(dense)
    return (vectors * f(values)) @ vectors.mT


def rows(case: Case, *lead: int) -> Tensor:
    shape = (*lead, setting(case).size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# ------------------------------------------------------------------------------------------ damping

each_form = pytest.mark.parametrize("form", FORMS)


@each_form
@every
def test_damping_is_added_to_the_diagonal(name, case, form):
    added, diagonal = damping(form, setting(case).layers, 0.5)
    want = dense_of(name, case) + diagonal.diag()
    close((matrix_of(name, case) + added).to_torch(), want)
    if form in ("number", "tensor", "PVector"):
        close((added + matrix_of(name, case)).to_torch(), want)


@each_form
@every
def test_a_damped_matrix_has_products_diagonal_trace_and_norms(name, case, form):
    matrix, dense = damped(form, name, case)
    close(matrix.mv(rows(case, 2, 3)), rows(case, 2, 3) @ dense)
    close(matrix.vTMv(rows(case)), rows(case) @ dense @ rows(case))
    close(matrix.get_diag(), dense.diagonal())
    close(matrix.trace(), dense.trace())
    close(torch.stack([matrix.norm(), matrix.norm(2), matrix.norm(-2)]), _norms(dense))
    close(matrix.cond(), torch.linalg.cond(dense))


def _norms(dense: Tensor) -> Tensor:
    return torch.stack([torch.linalg.matrix_norm(dense, ord) for ord in ("fro", 2, -2)])


@each_form
@every
def test_a_damped_matrix_solves(name, case, form):
    matrix, dense = damped(form, name, case)
    eye = torch.eye(len(dense), dtype=torch.float64)
    close(matrix.solve(rows(case, 3), regul=0.2), torch.linalg.solve(dense + 0.2 * eye, rows(case, 3).mT).mT)
    close(matrix.solve(rows(case, 3), regul=0.0), torch.linalg.solve(dense, rows(case, 3).mT).mT)


@each_form
@every
def test_the_inverse_is_the_dense_one(name, case, form):
    matrix, dense = damped(form, name, case)
    inverse, want = matrix.inv(), torch.linalg.inv(dense)
    close(inverse.to_torch(), want)
    close(inverse.mv(rows(case, 3)), rows(case, 3) @ want)
    close(matrix.get_diag(inverse=True), want.diagonal())
    close(inverse.trace(), want.trace())
    close(inverse.inv().to_torch(), dense)


@each_form
@every
def test_the_log_determinant_is_the_dense_one(name, case, form):
    matrix, dense = damped(form, name, case)
    close(matrix.logdet(), torch.linalg.slogdet(dense).logabsdet)


@pytest.mark.parametrize("exponent", [-1.5, -1, -0.5, 0, 0.5, 1 / 3, 2])
@pytest.mark.parametrize("form", ["number", "by layer", "PVector"])
@every
def test_powers_are_the_dense_ones(name, case, form, exponent):
    matrix, dense = damped(form, name, case)
    close((matrix**exponent).to_torch(), function(dense, lambda values: values**exponent))


@every
def test_powers_of_powers_multiply(name, case):
    matrix, dense = damped("number", name, case)
    close((matrix**0.5).pow(-2).mv(rows(case)), torch.linalg.solve(dense, rows(case)))


@every
def test_the_pseudo_inverse_inverts_what_is_not_zero(name, case):
    close(
        matrix_of(name, case).pinv(rtol=1e-5).to_torch(),
        torch.linalg.pinv(dense_of(name, case), rtol=1e-5, hermitian=True),
    )


@pytest.mark.parametrize("regul", [0.3, torch.tensor(0.3, dtype=torch.float64)], ids=["number", "tensor"])
@every
def test_inverse_and_powers_with_damping_in_one_call(name, case, regul):
    matrix, dense = matrix_of(name, case), dense_of(name, case)
    shifted = dense + 0.3 * torch.eye(len(dense), dtype=torch.float64)
    close(matrix.inv(regul).to_torch(), torch.linalg.inv(shifted))
    close(matrix.inv(regul=regul).mv(rows(case)), torch.linalg.solve(shifted, rows(case)))
    close(matrix.pow(-0.5, regul).to_torch(), function(shifted, lambda values: values**-0.5))
    close(matrix.pow(2, regul=regul).to_torch(), shifted @ shifted)


@on_linear
def test_the_damped_inverse_is_differentiable_in_the_damping(name, case):
    regul = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(matrix_of(name, case).inv(regul).trace(), regul)
    values = torch.linalg.eigvalsh(dense_of(name, case))
    close(found, -(values + 0.3).pow(-2).sum())


@every
def test_the_pseudo_inverse_may_cut_at_a_size(name, case):
    close(
        matrix_of(name, case).pinv(atol=1e-5).to_torch(),
        torch.linalg.pinv(dense_of(name, case), atol=1e-5, rtol=0.0, hermitian=True),
    )


@every
def test_positive_powers_do_not_need_damping(name, case):
    close(matrix_of(name, case).pow(2).to_torch(), dense_of(name, case) @ dense_of(name, case))


@pytest.mark.parametrize("form", ["number", "by layer", "PVector"])
@every
def test_eigenvectors_diagonalise(name, case, form):
    matrix, dense = damped(form, name, case)
    values, basis = matrix.eigh()
    close(values, torch.linalg.eigvalsh(dense))
    vectors = basis.to_torch()
    close(vectors.mT @ vectors, torch.eye(len(dense), dtype=torch.float64))
    close((vectors * values) @ vectors.mT, dense)
    close(basis.into(rows(case, 2)), rows(case, 2) @ vectors)
    close(basis.back(basis.into(rows(case, 2))), rows(case, 2))
    close(basis.vectors(torch.tensor([1, 0])), vectors.mT[[1, 0]])


@pytest.mark.parametrize("k", [1, 5, 8])
@every
def test_the_largest_eigenpairs_are_those_of_the_dense_matrix(name, case, k):
    matrix, dense = damped("number", name, case)
    values, vectors = matrix.top_eigenpairs(k)
    close(values, torch.linalg.eigvalsh(dense).flip(0)[:k])
    close(vectors @ dense, values[:, None] * vectors)
    close(vectors @ vectors.mT, torch.eye(k, dtype=torch.float64))
    inverse = matrix.inv()
    values, vectors = inverse.top_eigenpairs(k)
    close(values, 1 / torch.linalg.eigvalsh(dense)[:k])
    close(inverse.mv(vectors), values[:, None] * vectors)


def test_a_singular_matrix_has_an_infinite_condition_number():
    assert matrix_of("block_diag", LINEAR).cond() == float("inf")


# ------------------------------------------------------------------------------------------ draws


@pytest.mark.parametrize("form", ["number", "by layer", "PVector"])
@pytest.mark.parametrize("inverse", [True, False], ids=["inverse", "direct"])
@every
def test_draws_have_the_covariance(name, case, form, inverse, monkeypatch):
    matrix, dense = damped(form, name, case)
    # Unit vectors in place of normal ones: a linear map of them shows its covariance exactly.
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: torch.eye(*_shape(shape), dtype=torch.float64))
    draws = matrix.sample(2 * len(dense) + 200, inverse=inverse)
    close(draws.mT @ draws, torch.linalg.inv(dense) if inverse else dense)


def _shape(shape: tuple[Any, ...]) -> Any:
    return shape[0] if len(shape) == 1 else shape


@every
def test_draws_of_a_singular_matrix_lie_in_its_range(name, case):
    if name == "quasi_diag":
        pytest.skip("it may be indefinite")
    draws = matrix_of(name, case).sample(3, torch.Generator().manual_seed(0), inverse=False)
    root = function(dense_of(name, case), lambda values: values.clamp(min=0).sqrt())
    want = torch.randn(3, len(root), dtype=torch.float64, generator=torch.Generator().manual_seed(0)) @ root
    torch.testing.assert_close(draws, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


@on_linear
def test_draws_follow_their_generator_and_their_representation(name, case):
    matrix, dense = damped("number", name, case)
    first, again = (matrix.sample(4, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.shape == (4, len(dense)) and torch.equal(first, again)
    z = torch.randn(4, len(dense), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    close(first, z @ function(dense, lambda values: values**-0.5))


# ------------------------------------------------------------------------------------------ maps


@every
def test_a_map_through_the_inverse_is_a_matrix_over_outputs(name, case):
    matrix, dense = damped("number", name, case)
    j = random_pfmap(setting(case).layers, (2, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    want = torch.einsum("knp,pq,lmq->knlm", j.to_torch(), torch.linalg.inv(dense), j.to_torch())
    inverse = matrix.inv()
    close((j @ inverse @ j.T).to_torch(), want)
    close((j @ (inverse @ j.T)).to_torch(), want)
    close(inverse.mapTMmap(j, reduction="full").to_torch(), want)
    close(inverse.mapTMmap(j, reduction="blocks"), torch.einsum("knln->nkl", want))
    close(inverse.mapTMmap(j, reduction="diag"), torch.einsum("knkn->kn", want))
    close(inverse.mapTMmap(j), torch.einsum("knkn->n", want))
    close(inverse.mapTMmap(j, reduction="trace"), torch.einsum("knkn->", want))


@on_linear
def test_every_operation_takes_vectors_maps_and_tensors(name, case):
    matrix, dense = damped("number", name, case)
    layers, inverse = setting(case).layers, torch.linalg.inv(dense)
    v = rows(case)
    close((matrix.inv() @ PVector(layers, v)).to_torch(), inverse @ v)
    close((PVector(layers, v) @ matrix.inv()).to_torch(), inverse @ v)
    close(rows(case, 2) @ matrix.inv(), rows(case, 2) @ inverse)
    close((matrix.inv() @ PFMapDense(layers, data=rows(case, 2, 2))).to_torch(), rows(case, 2, 2) @ inverse)


@pytest.mark.parametrize("name", NAMES)
def test_a_map_over_more_layers_is_seen_in_those_of_the_matrix(name):
    at = setting(LINEAR)
    first = LayerCollection([next(iter(at.layers.layers.values()))])
    p = first.numel()
    if name == "eye":
        matrix = PMatEye(first, 0.7, dtype=torch.float64)
    else:
        pmat = BY_ID[name.removesuffix("_updated")]
        matrix = pmat.build(at, layer_collection=first)
    inverse = (matrix + 1.0).inv()
    j = PFMapDense(at.layers, data=rows(LINEAR, 2, 3))
    want = torch.einsum("knp,pq,lmq->knlm", j.data[..., :p], inverse.to_torch(), j.data[..., :p])
    close((j @ inverse @ j.T).to_torch(), want)
    close(inverse.mapTMmap(j, reduction="blocks"), torch.einsum("knln->nkl", want))
    added = PVector(at.layers, torch.ones(at.size, dtype=torch.float64))
    close((matrix + added).to_torch(), (matrix + 1.0).to_torch())


# ------------------------------------------------------------------------------------------ derivatives


def numbers(matrix: Any, v: Tensor, j: PFMapDense) -> tuple[Tensor, ...]:
    inverse = matrix.inv()
    return (
        matrix.logdet(),
        inverse.vTMv(v),
        inverse.trace(),
        inverse.mapTMmap(j, reduction="blocks"),
        matrix.get_diag(inverse=True),
        matrix.sample(1, torch.Generator().manual_seed(0)),
        (matrix**0.5).trace(),
        matrix.norm(),
    )


@pytest.mark.parametrize("form", ["tensor", "by layer", "PVector"])
@on_linear
def test_results_are_differentiable_in_the_damping(name, case, form):
    at, v, j = setting(case), rows(case), PFMapDense(setting(case).layers, data=rows(case, 1, 2))
    least = enough(name, case)
    size = {"tensor": (), "by layer": (len(at.layers),), "PVector": (at.size,)}[form]
    value = (least + torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(4))).requires_grad_()

    def results(value: Tensor) -> tuple[Tensor, ...]:
        added = PVector(at.layers, value) if form == "PVector" else value
        return numbers(matrix_of(name, case) + added, v, j)

    assert torch.autograd.gradcheck(results, value, eps=1e-5, atol=1e-5, rtol=1e-4, fast_mode=form == "PVector")


@on_linear
def test_results_are_differentiable_in_a_factor(name, case):
    v, j, least = rows(case), PFMapDense(setting(case).layers, data=rows(case, 1, 2)), enough(name, case)

    def results(factor: Tensor) -> tuple[Tensor, ...]:
        return numbers(factor * matrix_of(name, case) + 2 * least, v, j)

    assert torch.autograd.gradcheck(
        results, torch.tensor(0.8, dtype=torch.float64, requires_grad=True), eps=1e-5, atol=1e-5
    )


@on_linear
def test_results_of_one_damped_matrix_can_be_differentiated_one_after_the_other(name, case):
    value = torch.tensor(enough(name, case), dtype=torch.float64, requires_grad=True)
    matrix = matrix_of(name, case) + value
    matrix.logdet().backward()
    (first,) = torch.autograd.grad(matrix.logdet(), value)
    matrix.inv().trace().backward()
    close(first, torch.linalg.inv(damped("number", name, case)[1]).trace())


# ------------------------------------------------------------------------------------------ decompositions


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    made: list[str] = []
    original = getattr(torch.linalg, name)
    monkeypatch.setattr(torch.linalg, name, lambda *args, **options: made.append(name) or original(*args, **options))
    return made


@pytest.mark.parametrize("name", ["dense", "block_diag", "kfac", "ekfac"])
def test_dampings_share_one_eigendecomposition(name, monkeypatch):
    matrix = copy.deepcopy(matrix_of(name, LINEAR))
    matrix.pow(0.5)
    made = count_calls(monkeypatch, "eigh")
    close((matrix + 0.1).logdet(), torch.linalg.slogdet((matrix + 0.1).to_torch()).logabsdet)
    (matrix + 0.2).inv().inv().sample(2)
    assert not made


def test_a_damped_dense_matrix_is_inverted_by_cholesky_until_eigenvectors_are_known(monkeypatch):
    matrix = copy.deepcopy(matrix_of("dense", LINEAR))
    made = [count_calls(monkeypatch, name) for name in ("eigh", "cholesky_ex")]
    close((matrix + 0.1).inv().to_torch(), torch.linalg.inv((matrix + 0.1).to_torch()))
    (matrix + 0.1).logdet()
    assert [len(calls) for calls in made] == [0, 2]
    matrix.eigh()
    close((matrix + 0.1).inv().to_torch(), torch.linalg.inv((matrix + 0.1).to_torch()))
    assert [len(calls) for calls in made] == [1, 2]


def test_dampings_of_a_low_rank_matrix_share_one_svd(monkeypatch):
    matrix = copy.deepcopy(matrix_of("low_rank", LINEAR))
    made = count_calls(monkeypatch, "svd")
    (matrix + 0.1).logdet(), (matrix + 0.2).inv(), (matrix + 0.3).pow(-0.5), matrix.solve(rows(LINEAR), 0.1)
    assert made == ["svd"]


@pytest.mark.parametrize("name", ["dense", "block_diag", "low_rank"])
def test_a_change_in_place_renews_the_functions(name):
    matrix = copy.deepcopy(matrix_of(name, LINEAR))
    before = (matrix + 1.0).logdet()
    (matrix.data["0"].matrix if name == "block_diag" else matrix.data).mul_(2)
    assert not torch.allclose((matrix + 1.0).logdet(), before)
    close((matrix + 1.0).logdet(), torch.linalg.slogdet((matrix + 1.0).to_torch()).logabsdet)


def test_a_float32_cholesky_that_fails_is_retried_in_float64():
    layers = LayerCollection.from_model(nn.Linear(1, 1))
    matrix = nngeo.PMatDense(layers, data=torch.ones(2, 2)) + PVector(layers, torch.tensor([1e-6, 1.1e-6]))
    want = torch.linalg.slogdet(matrix.data.double()).logabsdet
    torch.testing.assert_close(matrix.logdet().double(), want, rtol=1e-5, atol=0.0)
    assert matrix.inv().to_torch().isfinite().all() and matrix.dtype == torch.float32


def test_damping_far_below_the_entries_is_enough_in_float32():
    layers = LayerCollection.from_model(nn.Linear(1, 1))
    matrix = nngeo.PMatDiag(layers, data=torch.tensor([1e4, 0.0])) + 1e-8
    close(matrix.inv().get_diag(), torch.tensor([1e-4, 1e8]))


# ------------------------------------------------------------------------------------------ classes


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(
            ("dense", "PMatDense"),
            ("diag", "PMatDiag"),
            ("block_diag", "PMatBlockDiag"),
            ("quasi_diag", "PMatQuasiDiag"),
        ),
        *(("low_rank", "PMatLowRankPlusDiag"), ("kfac", "PMatEKFAC"), ("ekfac", "PMatEKFAC"), ("mixed", "PMatMixed")),
        *(("ekfac_block_diag", "PMatEKFACBlockDiag"), ("eye", "PMatEye")),
    ],
)
def test_damping_gives_a_class_that_exists(name, kind):
    assert type(matrix_of(name, LINEAR) + 0.1).__name__ == kind


def test_damping_by_parameter_makes_kronecker_blocks_dense():
    added = PVector(setting(LINEAR).layers, torch.ones(setting(LINEAR).size, dtype=torch.float64))
    assert type(matrix_of("kfac", LINEAR) + added) is nngeo.PMatBlockDiag


@pytest.mark.parametrize("form", ["number", "PVector"])
@pytest.mark.parametrize("duplicate", ["copy", "state_dict"])
@every
def test_damped_matrices_and_their_inverses_survive_copies_and_state_dicts(name, case, form, duplicate):
    matrix = damped(form, name, case)[0]
    both = [matrix, matrix.inv()]
    again = [copy.deepcopy(m) if duplicate == "copy" else PMat.from_state_dict(m.state_dict()) for m in both]
    assert [type(m) for m in again] == [type(m) for m in both]
    close(torch.stack([m.to_torch() for m in again]), torch.stack([m.to_torch() for m in both]))
    close(again[1].logdet(), -matrix.logdet())


@every
def test_multiples_sums_and_differences_of_damped_matrices_are_exact(name, case):
    matrix, dense = damped("number", name, case)
    close((-2 * matrix).to_torch(), -2 * dense)
    close((matrix + 3 * matrix).logdet(), torch.linalg.slogdet(4 * dense).logabsdet)
    close((matrix - 0.5 * matrix).inv().to_torch(), 2 * torch.linalg.inv(dense))
    close((matrix - 0.125).to_torch(), dense - 0.125 * torch.eye(len(dense), dtype=torch.float64))


# ------------------------------------------------------------------------------------------ more examples

ADDITIVE = [pmat for pmat in STORED if pmat.serves(LINEAR)]
KERNEL_CASES = cases_of("linear", "conv2d_groups", "embedding_padding", "tokens", "layer_norm", "unused_layer")
SHARDED = [pytest.param(p, c, id=f"{p.id}-{c.id}") for c in KERNEL_CASES for p in STORED if p.serves(c)]
each_sharded = pytest.mark.parametrize("pmat, case", SHARDED)


def shards(case: Case) -> list[Any]:
    return [tuple(t[:2] for t in setting(case).batch), tuple(t[2:] for t in setting(case).batch)]


@each_sharded
def test_shards_pool_to_the_estimate_in_one_go(pmat: Representation, case):
    first, second = (pmat.build(setting(case), shard) for shard in shards(case))
    pooled = first.pooled(second)
    close(pooled.to_torch(), dense_of(pmat.id, case))
    close(PMat.pool([second, first]).to_torch(), dense_of(pmat.id, case))
    assert pooled.n_examples == case.n and type(pooled) is pmat.kind


@each_sharded
def test_an_update_is_the_estimate_in_one_go(pmat, case):
    first, second = shards(case)
    matrix = pmat.build(setting(case), first)
    before = (matrix + 1.0).logdet()
    assert matrix.update(second) is matrix
    close(matrix.to_torch(), dense_of(pmat.id, case))
    close(
        (matrix + 1.0).logdet(),
        torch.linalg.slogdet(dense_of(pmat.id, case) + torch.eye(len(matrix.get_diag()))).logabsdet,
    )
    assert matrix.n_examples == case.n and not torch.equal(before, (matrix + 1.0).logdet())


def test_what_two_processes_computed_is_combined_from_their_states():
    parts = [PMat.from_state_dict(build("ekfac", LINEAR, shard).state_dict()) for shard in shards(LINEAR)]
    close(PMat.pool(parts).to_torch(), dense_of("ekfac", LINEAR))


@each_pmat(
    [pmat for pmat in ADDITIVE if pmat.id not in ("kfac", "kfac_reduce", "ekfac", "ekfac_reduce", "ekfac_block_diag")]
)
def test_a_moving_average_is_that_of_the_matrices(pmat):
    at, (first, second) = setting(LINEAR), shards(LINEAR)
    matrix = pmat.build(at, first).ema_(second, 0.75)
    close(matrix.to_torch(), 0.75 * pmat.build(at, first).to_torch() + 0.25 * pmat.build(at, second).to_torch())
    assert matrix.n_examples == LINEAR.n


def test_a_moving_average_of_kronecker_factors_is_that_of_each_factor():
    first, second = (build("kfac", LINEAR, shard) for shard in shards(LINEAR))
    wanted = [
        (0.75 * first.data[n].a + 0.25 * second.data[n].a, first.data[n].g * 0.75 + 0.25 * second.data[n].g)
        for n in first.data
    ]
    averaged = build("kfac", LINEAR, shards(LINEAR)[0]).ema_(shards(LINEAR)[1], 0.75)
    torch.testing.assert_close([(block.a, block.g) for block in averaged.data.values()], wanted)
    in_basis = build("ekfac", LINEAR, shards(LINEAR)[0]).ema_(shards(LINEAR)[1], 0.75)
    close(in_basis.to_torch(), averaged.to_torch())


@each_pmat([pmat for pmat in WITH_EIGENBASIS if pmat.id != "ekfac_reduce"])
def test_updated_scalings_are_updated_in_their_eigenbasis(pmat):
    at, (first, second) = setting(LINEAR), shards(LINEAR)
    matrix, want = pmat.build(at, first), pmat.build(at, first)
    matrix.update_diag(first)
    matrix.update(second)
    want.update_diag(at.batch)
    close(matrix.to_torch(), want.to_torch())
    assert matrix.updated and matrix.n_examples == LINEAR.n
    with pytest.raises(NotImplementedError, match="two eigenbases do not pool.*update_diag"):
        matrix.pooled(build("ekfac_updated" if pmat.id == "ekfac" else "ekfac_block_diag_updated", LINEAR, second))


def test_updated_scalings_of_other_blocks_are_updated_too():
    (case,) = cases_of("layer_norm")
    first, second = shards(case)
    matrix = build("ekfac_block_diag_updated", case, first).update(second)
    exact = setting(case).block_fisher
    dense = [name for name, block in matrix.data.items() if not isinstance(block, KroneckerEigenBlock)]
    assert dense
    spans = [setting(case).slices[name] for name in dense]
    close(matrix.data[dense[0]].to_torch(), exact[spans[0], spans[0]])
    close(matrix.trace(), exact.trace())


def test_a_hessian_of_a_sum_is_updated_to_the_sum():
    at, (first, second) = setting(LINEAR), shards(LINEAR)
    generator = HessianGenerator(at.model, lambda y, t: nn.functional.cross_entropy(y, t, reduction="sum"))
    matrix = nngeo.PMatDense(at.layers, generator, examples=first).update(second)
    close(matrix.to_torch(), nngeo.PMatDense(at.layers, generator, examples=at.batch).to_torch())


# ------------------------------------------------------------------------------------------ sums of Kronecker products

KRONECKER = cases_of("linear", "conv2d_groups", "embedding_padding", "tokens", "called_twice", "unused_layer")


@each_of(KRONECKER)
def test_a_sum_of_kronecker_products_is_refused_and_names_what_is_exact(case):
    first, second = (build("kfac", case, shard) for shard in shards(case))
    with pytest.raises(NotImplementedError, match=r"exact=True.*pooled"):
        first + second
    with pytest.raises(NotImplementedError, match=r"exact=True.*pooled"):
        first - second
    with pytest.raises(NotImplementedError, match=r"exact=True.*pooled"):
        first.add(second)


@each_of(KRONECKER)
def test_kronecker_products_that_share_a_factor_add(case):
    first, dense = matrix_of("kfac", case), dense_of("kfac", case)
    close((first + first).to_torch(), 2 * dense)
    close((2 * first + first).to_torch(), 3 * dense)
    close((first - first).to_torch(), 0 * dense)
    close((first + first).trace(), 2 * first.trace())
    other = first._derived({n: KroneckerBlock(2 * b.a, b.g, b.view) for n, b in first.data.items()})
    close((first + other).to_torch(), 3 * dense)
    close((first + 0.0 * build("kfac", case, shards(case)[0])).to_torch(), dense)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "ekfac_updated"])
@each_of(KRONECKER)
def test_an_exact_sum_keeps_both_terms(case, name):
    first, second = (build(name, case, shard) for shard in shards(case))
    dense = first.to_torch() + second.to_torch()
    total = first.add(second, exact=True)
    close(total.to_torch(), dense)
    close(total.mv(rows(case, 2)), rows(case, 2) @ dense)
    close(torch.stack([total.trace(), total.norm(), total.norm(2)]), torch.stack([dense.trace(), *_norms(dense)[:2]]))
    close(total.get_diag(), dense.diagonal())
    eye = torch.eye(len(dense), dtype=torch.float64)
    close(total.solve(rows(case), 0.1), torch.linalg.solve(dense + 0.1 * eye, rows(case)))
    close((total + 0.1).inv().to_torch(), torch.linalg.inv(dense + 0.1 * eye))
    close((total + 0.1).logdet(), torch.linalg.slogdet(dense + 0.1 * eye).logabsdet)
    close(total.add(first, exact=True).to_torch(), dense + first.to_torch())
    close(PMat.from_state_dict((2 * total).state_dict()).to_torch(), 2 * dense)
    assert total.n_examples == case.n


@pytest.mark.parametrize("name", ["dense", "diag", "low_rank", "eye"])
def test_exact_sums_are_sums_where_those_are_exact(name):
    matrix = matrix_of(name, LINEAR)
    close(matrix.add(matrix, exact=True).to_torch(), 2 * dense_of(name, LINEAR))
    close(matrix.add(matrix).to_torch(), 2 * dense_of(name, LINEAR))


def test_eigenbases_add_where_they_are_the_same():
    first, second = (build("ekfac", LINEAR, shard) for shard in shards(LINEAR))
    close((first + (first + 0.5)).to_torch(), 2 * first.to_torch() + 0.5 * torch.eye(setting(LINEAR).size).double())
    assert isinstance(first.add(first, exact=True).data["0"], KroneckerEigenBlock)
    with pytest.raises(NotImplementedError, match="exact=True"):
        first + second


# ------------------------------------------------------------------------------------------ bad input


@every
def test_a_singular_matrix_says_so_with_its_smallest_eigenvalue(name, case):
    matrix = matrix_of(name, case)
    if name == "eye":
        matrix = 0.0 * matrix
    if name not in ("eye", "quasi_diag"):
        least = float(torch.linalg.eigvalsh(dense_of(name, case))[0])
        if least > 1e-10:
            pytest.skip("it is not singular")
        matrix_of(name, case).pinv()
    if name != "quasi_diag":
        with pytest.raises(ValueError, match="singular.*smallest eigenvalue"):
            matrix.inv()
        with pytest.raises(ValueError, match="(singular|indefinite).*smallest eigenvalue"):
            matrix.logdet()
        with pytest.raises(ValueError, match="smallest eigenvalue"):
            matrix.sample(1)


@every
def test_negative_damping_that_leaves_an_indefinite_matrix_says_so(name, case):
    values = torch.linalg.eigvalsh(dense_of(name, case))
    matrix = matrix_of(name, case) + float(-values[-1] / 2 - values[0] / 2 - 0.01)
    with pytest.raises(ValueError, match="indefinite.*smallest eigenvalue -"):
        matrix.logdet()
    with pytest.raises(ValueError, match="indefinite.*smallest eigenvalue -"):
        matrix.pow(0.5)
    with pytest.raises(ValueError, match="indefinite.*smallest eigenvalue -"):
        matrix.sample(1)


@pytest.mark.parametrize("name", ["diag", "kfac", "block_diag"])
def test_the_layer_of_a_singular_block_is_named(name):
    matrix = matrix_of(name, LINEAR)
    with pytest.raises(ValueError, match="Layer '0': The matrix is singular"):
        (0.0 * matrix + {"0": 0.0, "3": 1.0}).pow(-1.5)


BAD_DAMPING = {
    "text": ("0.1", TypeError, "number.*a str"),
    "none": (None, TypeError, "NoneType"),
    "flag": (True, TypeError, "bool"),
    "nan": (float("nan"), ValueError, "not finite"),
    "shape": (torch.ones(2, 3), ValueError, r"0-d, \(2,\).*\(2, 3\)"),
    "size": (torch.ones(5), ValueError, r"\(5,\)"),
    "sequence": ([0.1, 0.2, 0.3], ValueError, "2 values.*got 3"),
    "missing layer": ({"0": 1.0}, ValueError, "missing '3'"),
    "unknown layer": ({"0": 1.0, "3": 1.0, "9": 1.0}, ValueError, "unknown '9'"),
    "value": ({"0": 1.0, "3": "a"}, TypeError, "a str"),
}


@pytest.mark.parametrize("bad", BAD_DAMPING)
@on_linear
def test_bad_damping_is_refused_with_what_would_do(name, case, bad):
    damping, error, match = BAD_DAMPING[bad]
    with pytest.raises(error, match=match):
        matrix_of(name, case) + damping


def test_damping_over_other_layers_is_refused():
    at = setting(LINEAR)
    other = LayerCollection.from_model(at.model, "0")
    with pytest.raises(ValueError, match="lacks layers.*'3'"):
        matrix_of("diag", LINEAR) + PVector(other, torch.ones(other.numel(), dtype=torch.float64))


def test_counts_and_arguments_are_checked():
    matrix = matrix_of("diag", LINEAR)
    with pytest.raises(ValueError, match="no count of examples"):
        (matrix + 1.0).pooled(matrix)
    with pytest.raises(TypeError, match="PMatDiag.*PMatDense"):
        matrix.pooled(matrix_of("dense", LINEAR))
    with pytest.raises(ValueError, match="empty"):
        PMat.pool([])
    with pytest.raises(ValueError, match="`decay`.*2"):
        matrix.ema_(setting(LINEAR).batch, 2)
    with pytest.raises(ValueError, match="`k`.*0"):
        matrix.top_eigenpairs(0)
    with pytest.raises(ValueError, match="no generator"):
        (matrix + 1.0).update(setting(LINEAR).batch)
    with pytest.raises(NotImplementedError, match="PMatLowRank"):
        FIM(setting(LINEAR).model, setting(LINEAR).batch, PMatLowRankPlusDiag)


class Overflow(nn.Module):
    """Finite outputs, with gradients at the first layer that are not."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second((self.first(x) * 0.0).abs().sqrt() + x)


@pytest.mark.parametrize("name", ["dense", "diag", "block_diag", "quasi_diag", "low_rank", "kfac", "ekfac"])
def test_sums_that_are_not_finite_name_the_layer(name):
    kinds = {pmat.id: pmat.kind for pmat in STORED}
    with pytest.raises(ValueError, match="NaN or infinity at layer 'first'"):
        FIM(Overflow(), (torch.ones(2, 2),), kinds[name], "regression", check=False)


def test_what_would_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr("nngeo.linalg.memory.available_bytes", lambda device: 400)
    monkeypatch.setattr("nngeo.linalg.memory.SMALL", 0)
    added = PVector(setting(LINEAR).layers, torch.ones(setting(LINEAR).size, dtype=torch.float64))
    with pytest.raises(MemoryError, match="dense form of a KroneckerBlock.*0-d damping"):
        matrix_of("kfac", LINEAR) + added
    with pytest.raises(MemoryError, match="eigenbasis of a PMatLowRank"):
        matrix_of("low_rank", LINEAR).eigh()
