"""Every representation on every case is what its definition says; its operations are those of its dense form."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

import nngeo
from nngeo import (
    FIM,
    LayerCollection,
    PFMapDense,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatEKFACBlockDiag,
    PMatEye,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatMixed,
    PVector,
)
from nngeo.representations import DenseBlock, DiagBlock, KroneckerBlock, KroneckerEigenBlock
from tests import networks, reference
from tests.cases import CASES
from tests.contracts import (
    PMATS,
    WITH_EIGENBASIS,
    Representation,
    Setting,
    Stream,
    block_diagonal,
    cases_of,
    cases_with,
    converted,
    dense,
    each_of,
    each_pair,
    each_pmat,
    each_seed,
    loader,
    matrix,
    pvector,
    setting,
    unused_is_known,
)

pytestmark = unused_is_known

EXACT = {"rtol": 1e-8, "atol": 1e-10}

# The operations are tested on these: linear maps, groups, embeddings, norms, attention, frozen and dead layers.
OPERATED = cases_of(
    "linear",
    "linear_root",
    "conv2d_groups",
    "conv_transpose2d",
    "tokens_ignore",
    "transposed_linear",
    "layer_norm",
    "attention",
    "frozen_layers",
    "frozen_weights",
    "dead_layer",
    "tied_linears",
)
SMALL = cases_of("linear", "conv1d", "tokens_ignore", "layer_norm", "dead_layer")
NORM = [case for case in cases_with("norm") if "attention" not in case.tags]
each_operated = each_pair(OPERATED)
each_small = each_pair(SMALL)


def stored(pmats: list[Representation] = PMATS) -> list[Representation]:
    return [pmat for pmat in pmats if pmat.stores]


def rows(at: Setting, count: int = 3) -> Tensor:
    """(count, P)."""
    return torch.stack([at.vector(seed) for seed in range(count)])


def pfmap(at: Setting) -> PFMapDense:
    """(2, 3, P)."""
    return PFMapDense(at.layers, data=rows(at, 6).unflatten(0, (2, 3)))


# ------------------------------------------------------------------------------------------ definitions


@each_pair(CASES)
def test_a_matrix_of_unequal_batches_is_its_definition(pmat, case):
    at = setting(case)
    built, v = pmat.build(at), at.vector()
    found = built.mv(v) if pmat.kind is PMatImplicit else built.to_torch()
    expected = pmat.expected(at)
    assert_close(found, expected @ v if pmat.kind is PMatImplicit else expected, **EXACT)


@each_pair(CASES)
def test_trace_and_diagonal_are_those_of_the_definition(pmat, case):
    at, built = setting(case), matrix(pmat, case)
    diagonal = pmat.expected(at).diagonal()
    assert_close(built.get_diag(), diagonal, **EXACT)
    assert_close(built.trace(), diagonal.sum(), **EXACT)


@each_pair(SMALL)
def test_one_batch_gives_the_same_as_many(pmat, case):
    at = setting(case)
    many, v = pmat.build(at), at.vector()
    assert_close(many.mv(v), matrix(pmat, case).mv(v), **EXACT)
    assert many.n_examples == matrix(pmat, case).n_examples == (case.n if pmat.stores else None)


@each_of([case for case in CASES if not case.kronecker])
def test_quasi_diag_is_the_diagonal_and_some_entries_beside_it(case):
    at = setting(case)
    found = at.fim(nngeo.PMatQuasiDiag).to_torch()
    assert_close(found, at.block_fisher * (found != 0), **EXACT)
    assert_close(found.diagonal(), at.fisher.diagonal(), **EXACT)


@each_of([case for case in CASES if not case.kronecker])
def test_ekfac_block_diag_is_exact_where_a_layer_is_no_linear_map(case):
    at = setting(case)
    built = at.fim(PMatEKFACBlockDiag)
    found = built.to_torch()
    dense_layers = [name for name, block in built.data.items() if isinstance(block, DenseBlock)]
    expected = block_diagonal(
        at, lambda name: (at.fisher if name in dense_layers else found)[at.slices[name], at.slices[name]]
    )
    assert_close(found, expected, **EXACT)


@each_of(NORM)
@pytest.mark.parametrize("kind", [PMatKFAC, PMatEKFAC], ids=lambda kind: kind.__name__)
def test_kfac_of_a_norm_layer_is_refused_by_name(kind, case):
    with pytest.raises(NotImplementedError, match=r"Layer '.*' \(.*Norm.*\) has no Kronecker factors.*PMatMixed"):
        setting(case).fim(kind)


# ------------------------------------------------------------------------------------------ Kronecker factors


def test_kfac_of_a_deep_linear_net_is_the_exact_block():
    (case,) = cases_of("linear_deep")
    at = setting(case)
    assert_close(at.fim(PMatKFAC).to_torch(), at.block_fisher, **EXACT)


@each_of([case for case in CASES if case.kronecker and not case.positions])
@pytest.mark.parametrize("kind", [PMatKFAC, PMatEKFAC], ids=lambda kind: kind.__name__)
def test_kfac_of_one_example_without_positions_is_the_exact_block(kind, case):
    at = setting(case)
    (one, *_) = reference.examples(at.batch)
    fisher = reference.fisher(at.model, one, case.variant, at.function)
    assert_close(at.fim(kind, one).to_torch(), reference.block_diagonal(fisher, at.slices), **EXACT)


def test_reduced_kfac_of_a_linear_net_that_averages_positions_is_the_exact_block():
    torch.manual_seed(0)
    net = networks.Net(lambda net, x: net.head(net.body(x).mean(1)), body=nn.Linear(3, 4), head=nn.Linear(4, 2))
    net, batch = net.double(), (torch.randn(5, 4, 3).double(), torch.randn(5, 2).double())
    expected = reference.block_diagonal(reference.fisher(net, batch, "regression"), reference.layer_slices(net))
    found = FIM(net, batch, PMatKFAC, "regression", weight_sharing="reduce").to_torch()
    assert_close(found, expected, **EXACT)


def test_the_sharing_of_weights_is_checked():
    (case,) = cases_of("linear")
    with pytest.raises(ValueError, match="Unknown weight_sharing='expanded'; known are 'expand', 'reduce'"):
        setting(case).fim(PMatKFAC, weight_sharing="expanded")


# ------------------------------------------------------------------------------------------ EKFAC


def eigenvectors(block: KroneckerEigenBlock) -> Tensor:
    """(p, p), in rows, in the order of the scalings."""
    n, o, i = block.scalings.shape
    units = torch.eye(n * o * i, dtype=block.ug.dtype).reshape(-1, n, o, i)
    return block.view.to_flat(block.basis.back(units))


def projected(built: Any, at: Setting, name: str) -> Tensor:
    """(p, p): the exact block with nothing but the diagonal kept in the block's eigenbasis."""
    exact, block = at.fisher[at.slices[name], at.slices[name]], built.data[name]
    if isinstance(block, DenseBlock):
        return exact
    u = eigenvectors(block)
    return u.T @ torch.einsum("qp,pr,qr->q", u, exact, u).diag() @ u


@each_pair([case for case in CASES if case.kronecker], WITH_EIGENBASIS)
def test_updated_ekfac_is_the_exact_block_on_the_diagonal_of_its_eigenbasis(pmat, case):
    at = setting(case)
    built = pmat.build(at)
    built.update_diag(at.batches)
    assert_close(built.to_torch(), block_diagonal(at, lambda name: projected(built, at, name)), **EXACT)
    assert built.updated and built.n_examples == case.n


@each_of([case for case in CASES if not case.kronecker])
def test_updated_ekfac_block_diag_is_the_exact_block_on_the_diagonal_of_its_eigenbasis(case):
    at = setting(case)
    built = at.fim(PMatEKFACBlockDiag)
    built.update_diag(at.batches)
    assert_close(built.to_torch(), block_diagonal(at, lambda name: projected(built, at, name)), **EXACT)


@each_pair([case for case in CASES if case.kronecker], WITH_EIGENBASIS)
def test_updated_ekfac_keeps_the_exact_trace_and_comes_no_further_from_the_exact_block(pmat, case):
    at = setting(case)
    built = pmat.build(at, at.batch)
    before = (built.to_torch() - at.block_fisher).norm()
    built.update_diag(at.batch)
    assert_close(built.trace(), at.fisher.trace(), **EXACT)
    assert (built.to_torch() - at.block_fisher).norm() <= before * (1 + 1e-10) + 1e-12


def test_eigenvectors_of_ekfac_are_orthonormal_and_those_of_kfac():
    (case,) = cases_of("conv2d_groups")
    kfac, ekfac = matrix_of(PMatKFAC, case), matrix_of(PMatEKFAC, case)
    u = eigenvectors(ekfac.data["0"])
    assert_close(u @ u.T, torch.eye(len(u), dtype=u.dtype), **EXACT)
    values, _ = ekfac.get_eigendecomposition()
    (da, dg), _ = kfac.get_eigendecomposition()[0]["0"], None
    assert_close(values["0"], dg[:, :, None] * da[:, None, :], **EXACT)


def matrix_of(kind: type, case: Any) -> Any:
    (pmat, *_) = (pmat for pmat in PMATS if pmat.kind is kind)
    return matrix(pmat, case)


# ------------------------------------------------------------------------------------------ mixed


@each_of(NORM)
def test_mixed_gives_each_layer_the_representation_of_its_type(case):
    at = setting(case)
    maps = (nn.Linear, nn.modules.conv._ConvNd)
    chosen = {nn.Linear: PMatKFAC, nn.modules.conv._ConvNd: PMatKFAC, nn.LayerNorm: PMatBlockDiag}
    built = at.fim(PMatMixed, default_representation=PMatDiag, map_layers_to=present(at, chosen))

    def block(name: str) -> Tensor:
        exact, module = at.fisher[at.slices[name], at.slices[name]], at.module(name)
        if isinstance(module, maps):
            return at.kfac_block(name)
        return exact if isinstance(module, nn.LayerNorm) else exact.diagonal().diag()

    assert_close(built.to_torch(), block_diagonal(at, block), **EXACT)


def present(at: Setting, chosen: dict[type, type]) -> dict[type, type]:
    """The types that some layer has: a key without a layer is an error."""
    modules = [at.module(name) for name in at.slices]
    return {kind: pmat for kind, pmat in chosen.items() if any(isinstance(module, kind) for module in modules)}


def test_mixed_goes_by_names_before_types_and_earlier_types_before_later_ones():
    at = setting(*cases_of("layer_norm"))
    generator = at.fim(PMatDiag).generator
    chosen = {nn.Linear: PMatKFAC, nn.Module: PMatDiag, "head": PMatEKFAC}
    built = PMatMixed.from_mapping(at.layers, generator, None, chosen, examples=at.batches)
    kinds = {name: type(block) for name, block in built.data.items()}
    expected = {"body.0": KroneckerBlock, "body.1": DiagBlock, "body.3": DiagBlock, "body.4": KroneckerBlock}
    assert kinds == expected | {"body.7": DiagBlock, "head": KroneckerEigenBlock}


def test_mixed_updates_the_eigenbases_that_it_has():
    at = setting(*cases_of("layer_norm"))
    options = {"default_representation": PMatDiag, "map_layers_to": {"head": PMatEKFAC, "body.0": PMatKFAC}}
    built = at.fim(PMatMixed, **options)
    built.update_diag(at.batches)
    s = at.slices["head"]
    assert_close(built.to_torch()[s, s], projected(built, at, "head"), **EXACT)
    s = at.slices["body.0"]
    assert_close(built.to_torch()[s, s], at.kfac_block("body.0"), **EXACT)


def test_mixed_refuses_names_that_no_layer_has():
    with pytest.raises(ValueError, match="names 'tail', which no layer is; there are '0' .Linear."):
        setting(*cases_of("linear")).fim(PMatMixed, default_representation=PMatDiag, map_layers_to={"tail": PMatKFAC})


def test_mixed_refuses_layers_that_nothing_is_said_about():
    with pytest.raises(ValueError, match=r"Layer '3' \(Linear\) is not in `map_layers_to`"):
        setting(*cases_of("linear")).fim(PMatMixed, map_layers_to={"0": PMatKFAC})


# ------------------------------------------------------------------------------------------ products


@each_operated
def test_a_matrix_is_symmetric_and_to_torch_is_a_copy(pmat, case):
    found = matrix(pmat, case).to_torch()
    assert_close(found, found.T, **EXACT)
    found.zero_()
    assert_close(matrix(pmat, case).to_torch(), dense(pmat, case))


@each_operated
def test_mv_answers_in_kind(pmat, case):
    at, built, m = setting(case), matrix(pmat, case), dense(pmat, case)
    v = at.vector()
    by_layer = PVector(at.layers, dict_repr=pvector(at, v).to_dict())
    assert_close(built.mv(pvector(at, v)).to_torch(), m @ v, **EXACT)
    assert_close(built.mv(by_layer).to_torch(), m @ v, **EXACT)
    assert_close(built.mv(v), m @ v, **EXACT)
    assert_close(built.mv(rows(at)), rows(at) @ m, **EXACT)
    assert_close(built.mv(pfmap(at)).to_torch(), pfmap(at).to_torch() @ m, **EXACT)


@each_operated
def test_the_operator_at_is_mv(pmat, case):
    at, built, m = setting(case), matrix(pmat, case), dense(pmat, case)
    assert_close((built @ pvector(at, at.vector())).to_torch(), m @ at.vector(), **EXACT)
    assert_close(built @ rows(at), rows(at) @ m, **EXACT)
    assert_close((built @ pfmap(at)).to_torch(), pfmap(at).to_torch() @ m, **EXACT)


@each_operated
def test_mmap_and_map_t_m_map_are_products_with_every_row(pmat, case):
    at, built, m = setting(case), matrix(pmat, case), dense(pmat, case)
    j = pfmap(at)
    products = torch.einsum("knp,pq,knq->kn", j.to_torch(), m, j.to_torch())
    assert_close(built.mmap(j).to_torch(), j.to_torch() @ m, **EXACT)
    assert_close(built.mapTMmap(j, reduction="diag"), products, **EXACT)
    assert_close(built.mapTMmap(j), products.sum(0), **EXACT)
    with pytest.raises(ValueError, match="Unknown reduction 'mean'"):
        built.mapTMmap(j, reduction="mean")


@each_operated
def test_the_quadratic_form_has_gradients_of_every_order(pmat, case):
    at, built, m = setting(case), matrix(pmat, case), dense(pmat, case)
    v = at.vector().requires_grad_()
    value = built.vTMv(pvector(at, v))
    (first,) = torch.autograd.grad(value, v, create_graph=True)
    (second,) = torch.autograd.grad(first @ at.vector(1), v)
    assert value.shape == ()
    assert_close(value.detach(), v.detach() @ m @ v.detach(), **EXACT)
    assert_close(first.detach(), 2 * m @ v.detach(), **EXACT)
    assert_close(second, 2 * m @ at.vector(1), **EXACT)


@each_operated
def test_products_are_differentiable(pmat, case):
    at, built, m = setting(case), matrix(pmat, case), dense(pmat, case)
    v = at.vector().requires_grad_()
    (gradient,) = torch.autograd.grad(built.mv(v) @ at.vector(1), v)
    assert_close(gradient, m @ at.vector(1), **EXACT)


@each_operated
@pytest.mark.parametrize("regul", [1e-2, 10.0])
def test_solve_is_exact_tikhonov_damping(pmat, case, regul):
    at, built, m = setting(case), matrix(pmat, case), dense(pmat, case)
    damped = m + regul * torch.eye(at.size, dtype=m.dtype)
    solve = {"regul": regul} | pmat.solve_options
    assert_close(damped @ built.solve(pvector(at, at.vector()), **solve).to_torch(), at.vector(), rtol=1e-8, atol=1e-8)
    assert_close(built.solve(rows(at), **solve) @ damped, rows(at), rtol=1e-8, atol=1e-8)
    solved = built.solve(pfmap(at), **solve).to_torch()
    assert_close(solved @ damped, pfmap(at).to_torch(), rtol=1e-8, atol=1e-8)


@each_small
def test_conjugate_gradients_solve_for_every_matrix(pmat, case):
    at, built, m = setting(case), matrix(pmat, case), dense(pmat, case)
    regul = 1.0  # more than a quasi-diagonal matrix lacks to be positive
    damped = m + regul * torch.eye(at.size, dtype=m.dtype)
    solved = built.solve(at.vector(), regul=regul, solve="cg", rtol=1e-12)
    assert_close(damped @ solved, at.vector(), rtol=1e-8, atol=1e-8)


@each_small
def test_solve_is_differentiable(pmat, case):
    at, built, m = setting(case), matrix(pmat, case), dense(pmat, case)
    v = at.vector().requires_grad_()
    (gradient,) = torch.autograd.grad(built.solve(v, regul=0.1, **pmat.solve_options) @ at.vector(1), v)
    expected = torch.linalg.solve(m + 0.1 * torch.eye(at.size, dtype=m.dtype), at.vector(1))
    assert_close(gradient, expected, rtol=1e-7, atol=1e-8)


@each_pair(cases_of("dead_layer"), stored())
def test_a_singular_matrix_is_not_solved_without_damping(pmat, case):
    with pytest.raises(ValueError, match="regul"):
        matrix(pmat, case).solve(setting(case).vector(), regul=0.0)


@each_pair(cases_of("dead_layer"), stored())
def test_a_dead_layer_is_solved_with_the_default_damping(pmat, case):
    at = setting(case)
    solved = matrix(pmat, case).solve(at.vector())
    dead = at.slices["0"]
    assert torch.isfinite(solved).all()
    assert_close(solved[dead], at.vector()[dead] / 1e-8, rtol=1e-6, atol=0.0)


@each_small
@pytest.mark.parametrize("regul", [-1.0, float("nan")])
def test_negative_damping_is_refused(pmat, case, regul):
    with pytest.raises(ValueError, match="`regul` must not be negative"):
        matrix(pmat, case).solve(setting(case).vector(), regul=regul)


def test_unknown_solvers_are_listed():
    with pytest.raises(ValueError, match="Unknown solve='lu'; known are 'cg', 'minres', 'lsmr', 'default', 'factored'"):
        matrix_of(PMatKFAC, *cases_of("linear")).solve(setting(*cases_of("linear")).vector(), solve="lu")


def test_factored_damping_is_that_of_both_factors():
    (case,) = cases_of("linear")
    at, built = setting(case), matrix_of(PMatKFAC, case)
    block, regul = built.data["0"], 0.3
    a, g = block.a[0], block.g[0]
    pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
    damped = torch.kron(
        g + regul**0.5 / pi * torch.eye(len(g), dtype=g.dtype), a + pi * regul**0.5 * torch.eye(len(a), dtype=a.dtype)
    )
    matrix = at.vector()[at.slices["0"]]
    v = block.view.to_matrix(matrix)[0].flatten()  # row by row, as kron(g, a) has it
    expected = block.view.to_flat(torch.linalg.solve(damped, v).view(1, *block.view.shape[1:]))
    assert_close(built.solve(at.vector(), regul=regul, solve="factored")[at.slices["0"]], expected, **EXACT)


# ------------------------------------------------------------------------------------------ numbers


@each_operated
def test_norms_are_those_of_the_dense_form(pmat, case):
    built, m = matrix(pmat, case), dense(pmat, case)
    assert_close(built.norm(), m.norm(), **EXACT)
    assert_close(built.norm("fro"), m.norm(), **EXACT)
    assert_close(built.norm(2), torch.linalg.matrix_norm(m, 2), **EXACT)
    assert_close(built.norm(-2), torch.linalg.matrix_norm(m, -2), rtol=1e-8, atol=1e-9)
    with pytest.raises(ValueError, match="Unknown ord='nuc'; known are None, 'fro', 2, -2"):
        built.norm("nuc")


@each_operated
def test_trace_and_diagonal_are_those_of_the_dense_form(pmat, case):
    built, m = matrix(pmat, case), dense(pmat, case)
    assert_close(built.get_diag(), m.diagonal(), **EXACT)
    assert_close(built.trace(), m.trace(), **EXACT)
    built.get_diag().zero_()
    assert_close(built.get_diag(), m.diagonal(), **EXACT)


@each_operated
def test_sizes_are_those_of_a_square_matrix(pmat, case):
    built, p = matrix(pmat, case), setting(case).size
    assert built.size() == torch.Size([p, p])
    assert built.size(0) == built.size(1) == built.size(-1) == p
    assert built.dtype == torch.float64 and built.device.type == built.get_device().type == "cpu"
    assert type(built).__name__ in repr(built)


# ------------------------------------------------------------------------------------------ arithmetic


@each_operated
def test_scalars_multiply_and_divide(pmat, case):
    built, m, v = matrix(pmat, case), dense(pmat, case), setting(case).vector()
    assert_close((2.5 * built).mv(v), 2.5 * m @ v, **EXACT)
    assert_close((built * torch.tensor(2.5)).mv(v), 2.5 * m @ v, **EXACT)
    assert_close((built / 4).get_diag(), m.diagonal() / 4, **EXACT)
    assert_close((0.0 * built).mv(v), 0.0 * v, **EXACT)
    assert_close(built.mv(v), m @ v, **EXACT)


@each_operated
def test_negative_multiples_are_exact_or_refused(pmat, case):
    built, m, v = matrix(pmat, case), dense(pmat, case), setting(case).vector()
    if pmat.scales_negative:
        assert_close((-built).mv(v), -m @ v, **EXACT)
        assert_close((-2 * built).trace(), -2 * m.trace(), **EXACT)
        assert_close((-2 * built).norm(), 2 * m.norm(), **EXACT)
    else:
        with pytest.raises(NotImplementedError, match="negative multiple.*PMatDense"):
            _ = -built


@each_operated
def test_sums_and_differences_are_exact_or_refused(pmat, case):
    built, m = matrix(pmat, case), dense(pmat, case)
    if pmat.id == "implicit":
        with pytest.raises(NotImplementedError, match="[Ss]um"):
            built + built
        return
    assert_close((built + 0.5 * built).to_torch(), 1.5 * m, **EXACT)
    assert_close(sum([built, built]).to_torch(), 2 * m, **EXACT)
    assert (built + built).n_examples == 2 * case.n
    if pmat.scales_negative:
        assert_close((built - 0.25 * built).to_torch(), 0.75 * m, **EXACT)


@each_pmat([pmat for pmat in PMATS if pmat.adds])
def test_matrices_of_two_shards_add_up_to_that_of_all(pmat):
    (case,) = cases_of("linear")
    at = setting(case)
    shards = [tuple(t[:2] for t in at.batch), tuple(t[2:] for t in at.batch)]
    first, second = (pmat.build(at, shard) for shard in shards)
    total = (2 * first + 4 * second) / 6
    assert_close(total.to_torch(), dense(pmat, case), **EXACT)
    assert total.n_examples == 6


def test_different_representations_do_not_add():
    (case,) = cases_of("linear")
    with pytest.raises(TypeError, match="PMatDiag can be added to another one only, not to a PMatDense"):
        matrix_of(PMatDiag, case) + matrix_of(PMatDense, case)


def test_matrices_over_different_layers_do_not_add():
    at = setting(*cases_of("linear"))
    sub = at.fim(PMatDiag, layer_collection=LayerCollection.from_model(at.model, "0"))
    with pytest.raises(ValueError, match="Sum over different layers"):
        sub + at.fim(PMatDiag)


# ------------------------------------------------------------------------------------------ saving and copies


@each_pair(OPERATED, stored())
def test_a_saved_matrix_comes_back(pmat, case):
    built, m = matrix(pmat, case), dense(pmat, case)
    file = io.BytesIO()
    torch.save(built.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = 3.0 * built
    other.load_state_dict(state)
    assert_close(other.to_torch(), m, **EXACT)
    assert other.n_examples == built.n_examples
    again = nngeo.PMat.from_state_dict(state)
    assert type(again) is pmat.kind
    assert_close(again.to_torch(), m, **EXACT)
    assert again.layer_collection.numel() == setting(case).size and again.dtype == torch.float64


@each_pair(SMALL, stored())
def test_a_loaded_matrix_shares_no_memory_with_the_state(pmat, case):
    built = 1.0 * matrix(pmat, case)
    state = copy.deepcopy(built.state_dict())
    built.load_state_dict(state)
    _zero(state)
    assert_close(built.to_torch(), dense(pmat, case), **EXACT)


def _zero(state: dict[str, Any]) -> None:
    for value in state.values():
        if isinstance(value, Tensor):
            value.zero_()


@each_pair(SMALL, stored())
def test_an_eigenbasis_or_inverse_in_use_is_renewed_after_loading(pmat, case):
    at = setting(case)
    built = 2.0 * matrix(pmat, case)
    built.solve(at.vector(), regul=0.5)
    built.norm(2)
    built.load_state_dict(matrix(pmat, case).state_dict())
    expected = matrix(pmat, case).solve(at.vector(), regul=0.5)
    assert_close(built.solve(at.vector(), regul=0.5), expected, **EXACT)
    assert_close(built.norm(2), matrix(pmat, case).norm(2), **EXACT)


@each_pmat(stored())
def test_a_state_of_other_layers_is_refused(pmat):
    state = matrix(pmat, *cases_of("linear")).state_dict()
    with pytest.raises(ValueError, match="other layers"):
        (1.0 * matrix(pmat, *cases_of("linear_root"))).load_state_dict(state)


@each_operated
def test_copies_are_equal_and_independent(pmat, case):
    built, v = matrix(pmat, case), setting(case).vector()
    copied = copy.deepcopy(built)
    assert_close(copied.mv(v), dense(pmat, case) @ v, **EXACT)
    if pmat.stores:
        _zero(copied.state_dict())  # which shares its memory
        assert_close(built.mv(v), dense(pmat, case) @ v, **EXACT)


@each_operated
def test_pickled_matrices_come_back(pmat, case):
    built, v = matrix(pmat, case), setting(case).vector()
    again = pickle.loads(pickle.dumps(built))
    if pmat.stores or again.generator is not None:
        assert_close(again.mv(v), dense(pmat, case) @ v, **EXACT)
    else:
        with pytest.raises(ValueError, match="pickle whose generator could not be pickled"):
            again.mv(v)


# ------------------------------------------------------------------------------------------ counting examples


def kept_batches(count: int) -> Any:
    """Batches whose last examples are not seen: of 11 examples, the first `count`."""
    return [(x, y) for x, y in zip(*(t[:count].split(4) for t in ELEVEN), strict=True)]


ELEVEN = (
    torch.randn(11, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64),
    torch.randint(3, (11,), generator=torch.Generator().manual_seed(6)),
)
SOURCES = {
    "drop_last": (lambda: DataLoader(TensorDataset(*ELEVEN), 4, drop_last=True), 8),
    "batch_sampler": (
        lambda: DataLoader(TensorDataset(*ELEVEN), batch_sampler=BatchSampler(SequentialSampler(range(9)), 2, False)),
        9,
    ),
    "iterable": (lambda: DataLoader(Stream(*ELEVEN), 3), 11),
    "sampler": (lambda: DataLoader(TensorDataset(*ELEVEN), 4, sampler=[0, 1, 2, 3, 4]), 5),
    "generator": (lambda: (batch for batch in kept_batches(6)), 6),
    "list": (lambda: kept_batches(7), 7),
    "one_batch": (lambda: tuple(t[:3] for t in ELEVEN), 3),
}


@each_pmat(PMATS)
@pytest.mark.parametrize("source", SOURCES)
def test_the_mean_is_over_the_examples_seen(pmat, source):
    at = setting(*cases_of("linear"))
    make, n = SOURCES[source]
    built, expected = pmat.build(at, make()), pmat.build(at, tuple(t[:n] for t in ELEVEN))
    assert_close(built.mv(at.vector()), expected.mv(at.vector()), **EXACT)
    assert built.n_examples == (n if pmat.stores else None)


# ------------------------------------------------------------------------------------------ precision


@each_pair(cases_of("linear", "conv2d_zeros", "tokens_ignore", "layer_norm", "attention"))
def test_a_float32_model_gives_float32_close_to_float64(pmat, case):
    at = setting(case)
    model = case.make().float()
    batch = converted(at.batch, torch.float32)
    built = FIM(model, batch, pmat.kind, case.variant, function=case.function(model), **pmat.options(at))
    found = built.to_torch()
    assert found.dtype == built.get_diag().dtype == built.trace().dtype == torch.float32
    scale = float(dense(pmat, case).abs().max())
    assert_close(found.double(), dense(pmat, case), rtol=1e-4, atol=1e-5 * scale)


@each_pmat(PMATS)
@pytest.mark.parametrize("size", [1, 300], ids=["300 batches", "one batch"])
def test_a_bfloat16_model_accumulates_in_float32(pmat, size):
    # Every entry of the matrix is one. A sum in bfloat16 stops at 256.
    model = nn.Linear(1, 1).bfloat16()
    x = torch.ones(300, 1, dtype=torch.bfloat16)
    options = {} if pmat.id != "mixed" else {"default_representation": PMatDiag, "map_layers_to": {"": PMatBlockDiag}}
    options = options or (pmat.options(setting(*cases_of("linear"))) if pmat.id != "mixed" else {})
    built = FIM(model, [(part,) for part in x.split(size)], pmat.kind, "regression", **options)
    assert built.dtype == torch.float32
    assert_close(built.get_diag(), torch.ones(2))
    assert_close(built.mv(torch.ones(2)).sum(), built.to_torch().sum())


# ------------------------------------------------------------------------------------------ some of the layers


@each_pair(cases_of("linear", "conv2d_groups", "layer_norm", "vision_transformer", "parameter_list", "tied_embedding"))
@pytest.mark.parametrize("which", ["first", "last"])
def test_a_matrix_over_one_layer_acts_on_the_vectors_of_all(pmat, case, which):
    at = setting(case)
    name = list(at.layers)[0 if which == "first" else -1]
    sub, s = LayerCollection.from_model(at.model, lambda layer, module: layer == name), at.slices[name]
    options = pmat.options(at)
    if pmat.id == "mixed":
        options = {"default_representation": PMatBlockDiag}
    built = at.fim(pmat.kind, layer_collection=sub, **options)
    block, v = torch.zeros(at.size, at.size, dtype=torch.float64), at.vector()
    block[s, s] = at.fisher[s, s] if pmat.id == "mixed" else pmat.expected(at)[s, s]
    product = built.mv(pvector(at, v))
    assert product.layer_collection == at.layers
    assert_close(product.to_torch(), block @ v, **EXACT)
    assert_close(built.vTMv(pvector(at, v)), v @ block @ v, **EXACT)
    assert_close(built.mv(pfmap(at)).to_torch(), pfmap(at).to_torch() @ block, **EXACT)
    solved = built.solve(pvector(at, v), regul=0.5, **pmat.solve_options).to_torch()
    inside = torch.zeros_like(v)
    inside[s] = v[s]
    assert_close(block @ solved + 0.5 * solved, inside, rtol=1e-8, atol=1e-9)
    assert_close(built.to_torch(), block[s, s], **EXACT)


@each_pmat(PMATS)
def test_layers_out_of_order_keep_their_own_coordinates(pmat):
    at = setting(*cases_of("linear"))
    back = LayerCollection([at.layers["3"], at.layers["0"]])
    options = pmat.options(at)
    built = at.fim(pmat.kind, layer_collection=back, **options)
    v = pvector(at, at.vector())
    assert_close(built.mv(v).to_torch(), pmat.expected(at) @ at.vector(), **EXACT)


@each_small
def test_vectors_that_lack_a_layer_are_refused(pmat, case):
    at = setting(case)
    sub = LayerCollection.from_model(at.model, lambda layer, module: layer == next(iter(at.layers)))
    with pytest.raises(ValueError, match="The PVector lacks layers of the matrix"):
        matrix(pmat, case).mv(nngeo.random_pvector(sub, dtype=torch.float64))


@each_small
def test_vectors_of_another_dtype_are_refused(pmat, case):
    at = setting(case)
    with pytest.raises(ValueError, match=r"torch.float64 on cpu, what it is applied to is torch.float32"):
        matrix(pmat, case).mv(at.vector().float())


# ------------------------------------------------------------------------------------------ the identity


def eye() -> PMatEye:
    return PMatEye(setting(*cases_of("linear")).layers, 2.5, dtype=torch.float64)


def test_the_identity_has_the_operations_of_all_matrices():
    at = setting(*cases_of("linear"))
    v, m = at.vector(), 2.5 * torch.eye(at.size, dtype=torch.float64)
    assert_close(eye().to_torch(), m)
    assert_close(eye().mv(pvector(at, v)).to_torch(), m @ v)
    assert_close(eye().vTMv(v), v @ m @ v)
    assert_close(eye().solve(v, regul=0.5), v / 3)
    assert_close(eye().trace(), m.trace())
    assert_close(torch.stack([eye().norm(ord) for ord in (None, 2, -2)]), torch.stack([m.norm(), m[0, 0], m[0, 0]]))
    assert_close((2 * eye() - 0.5 * eye()).get_diag(), 1.5 * m.diagonal())
    assert_close(eye().mapTMmap(pfmap(at)), 2.5 * pfmap(at).to_torch().square().sum((0, 2)))


def test_the_identity_is_saved_with_its_dtype():
    again = nngeo.PMat.from_state_dict(eye().state_dict())
    assert_close(again.to_torch(), eye().to_torch())
    assert_close(pickle.loads(pickle.dumps(eye())).to_torch(), eye().to_torch())
    assert_close(copy.deepcopy(eye()).to_torch(), eye().to_torch())


# ------------------------------------------------------------------------------------------ low rank


@each_seed
def test_a_low_rank_matrix_solves_outside_of_its_span(seed):
    at = setting(*cases_of("linear"))
    one = reference.examples(at.batch)[0]
    built = at.fim(PMatLowRank, one)
    m, v = built.to_torch(), at.vector(seed)
    assert torch.linalg.matrix_rank(m) == 2 < at.size
    assert_close(m @ built.solve(v, regul=1e-6) + 1e-6 * built.solve(v, regul=1e-6), v, rtol=1e-8, atol=1e-8)
    assert_close(built.norm(-2), torch.zeros((), dtype=torch.float64))


def test_low_rank_matrices_pad_batches_with_fewer_cotangents():
    """Token losses of sequences of different lengths."""
    at = setting(*cases_of("tokens_regression"))
    generator = torch.Generator().manual_seed(0)
    batches = [
        tuple(torch.randn(n, t, d, generator=generator, dtype=torch.float64) for d in (3, 2))
        for n, t in ((2, 4), (3, 2), (1, 5))
    ]
    parts = [len(x) * reference.fisher(at.model, (x, y), "regression") for x, y in batches]
    assert_close(at.fim(PMatLowRank, batches).to_torch(), sum(parts) / 6, **EXACT)
    assert_close(at.fim(PMatDense, batches).to_torch(), sum(parts) / 6, **EXACT)


# ------------------------------------------------------------------------------------------ matrices that change


def test_decompositions_follow_data_changed_in_place():
    at = setting(*cases_of("linear"))
    built = at.fim(PMatDense)
    built.solve(at.vector(), regul=0.5)
    built.data.mul_(2)
    expected = torch.linalg.solve(2 * at.fisher + 0.5 * torch.eye(at.size, dtype=torch.float64), at.vector())
    assert_close(built.solve(at.vector(), regul=0.5), expected, **EXACT)


def test_decompositions_follow_the_data_of_a_block_changed_in_place():
    at = setting(*cases_of("linear"))
    built = at.fim(PMatKFAC)
    built.solve(at.vector(), regul=0.5)
    built.data["0"].g.mul_(2)
    m = built.to_torch()
    expected = torch.linalg.solve(m + 0.5 * torch.eye(at.size, dtype=torch.float64), at.vector())
    assert_close(built.solve(at.vector(), regul=0.5), expected, **EXACT)


def test_exactly_one_of_data_and_examples_is_taken():
    at = setting(*cases_of("linear"))
    with pytest.raises(ValueError, match="PMatDense takes exactly one of `data` and `examples`"):
        PMatDense(at.layers)


def test_matrices_are_made_of_data_without_a_generator():
    at = setting(*cases_of("linear"))
    assert_close(PMatDense(at.layers, data=at.fisher).to_torch(), at.fisher)
    assert_close(PMatDiag(at.layers, data=at.fisher.diagonal()).to_torch(), at.fisher.diagonal().diag())
    blocks = {name: at.fisher[s, s] for name, s in at.slices.items()}
    assert_close(PMatBlockDiag(at.layers, data=blocks).to_torch(), at.block_fisher)
    factor = at.jacobian
    assert_close(PMatLowRank(at.layers, data=factor).to_torch(), factor.flatten(0, 1).T @ factor.flatten(0, 1))


def test_what_needs_a_generator_says_so():
    at = setting(*cases_of("linear"))
    built = at.fim(PMatEKFAC)
    again = nngeo.PMat.from_state_dict(built.state_dict())
    with pytest.raises(ValueError, match="This PMatEKFAC has no generator"):
        again.update_diag(at.batches)
    given = PMatEKFAC.from_state_dict(built.state_dict(), built.generator)
    given.update_diag(at.batches)
    built.update_diag(at.batches)
    assert_close(given.to_torch(), built.to_torch(), **EXACT)


def test_a_matrix_of_a_model_on_loaders_is_that_of_its_batches():
    (case,) = cases_of("conv2d_groups")
    at = setting(case)
    assert_close(at.fim(PMatDense, loader(case)).to_torch(), at.fisher, **EXACT)
    shuffled = at.fim(PMatKFAC, loader(case, shuffle=True))
    assert_close(shuffled.to_torch(), matrix_of(PMatKFAC, case).to_torch(), **EXACT)
