"""Every operation of every representation against dense algebra; every estimate against plain autograd loops."""

from __future__ import annotations

import copy
import io
import mmap
import pickle
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset

from nngeo.generators import HessianGenerator, JacobianGenerator
from nngeo.layers.collection import LayerCollection
from nngeo.linalg import memory
from nngeo.linalg.cg import ConvergenceWarning
from nngeo.representations import (
    SOLVERS,
    DenseBlock,
    DiagBlock,
    FMatDense,
    KroneckerBlock,
    KroneckerEigenBlock,
    PFMapDense,
    PFMapImplicit,
    PMat,
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
    PMatQuasiDiag,
    QuasiDiagBlock,
    random_pfmap,
    register_solver,
)
from nngeo.variants import Exact, make_variant
from nngeo.vectors import FVector, PVector, random_fvector, random_pvector
from tests import reference

random_vector = partial(random_pvector, dtype=torch.float64)
close = partial(assert_close, rtol=1e-8, atol=1e-10)


# ------------------------------------------------------------------------------------------ networks


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x)).tanh().mean(1))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).tanh()).tanh().mean(1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))


def conv() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 2, 2, bias=False), nn.Flatten(), nn.Linear(2, 3))
    )


def numbers(*shape: int) -> Tensor:
    return torch.randn(5, *shape, dtype=torch.float64)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: numbers(4)),
    "conv": (conv, lambda: numbers(2, 3, 3)),
    "words": (Words, lambda: torch.randint(5, (5, 4))),
    "tokens": (Tokens, lambda: torch.randint(5, (5, 4))),
}
MATRIX_NETS = ["mlp", "conv", "words"]  # of which every layer is a linear map


@dataclass(frozen=True)
class Problem:
    """A classifier and five examples in two batches; J and F by plain autograd loops."""

    model: nn.Module
    layers: LayerCollection
    batches: list[tuple[Tensor, Tensor]]
    generator: JacobianGenerator
    jacobian: Tensor  # (k, n, P)
    fisher: Tensor  # (P, P)

    @property
    def n(self) -> int:
        return sum(len(x) for x, _ in self.batches)

    def mask(self) -> Tensor:
        """(P, P), True within layers."""
        blocks = [torch.ones(layer.numel(), layer.numel()) for layer in self.layers.layers.values()]
        return torch.block_diag(*blocks).bool()


@cache
def problem(net: str) -> Problem:
    build, draw = NETS[net]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model, x, y = build().double().eval(), draw(), torch.randint(3, (5,))
        torch.nn.init.normal_(model.get_parameter("norm.weight")) if net == "tokens" else None
    jacobian = reference.jacobian(model, (x, y))
    p = model(x).detach().softmax(-1)
    metric = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    fisher = torch.einsum("knp,nkl,lnq->pq", jacobian, metric, jacobian) / len(x)
    generator = JacobianGenerator(model, Exact(make_variant("classif_logits")))
    return Problem(
        model, LayerCollection.from_model(model), [(x[:2], y[:2]), (x[2:], y[2:])], generator, jacobian, fisher
    )


# ------------------------------------------------------------------------------------------ representations


def updated(kind: type[Any]) -> Callable[[LayerCollection, Problem], PMat]:
    def build(layers: LayerCollection, at: Problem) -> PMat:
        matrix = kind(layers, at.generator, examples=at.batches, update_diag=False)
        matrix.update_diag(at.batches)
        return matrix

    return build


def estimated(kind: type[Any], **options: Any) -> Callable[[LayerCollection, Problem], PMat]:
    return lambda layers, at: kind(layers, at.generator, examples=at.batches, **options)


BUILDERS: dict[str, Callable[[LayerCollection, Problem], PMat]] = {
    "dense": estimated(PMatDense),
    "diag": estimated(PMatDiag),
    "blockdiag": estimated(PMatBlockDiag),
    "quasidiag": estimated(PMatQuasiDiag),
    "lowrank": estimated(PMatLowRank),
    "implicit": estimated(PMatImplicit),
    "eye": lambda layers, at: PMatEye(layers, 0.7, dtype=torch.float64),
    "kfac": estimated(PMatKFAC),
    "kfac reduce": estimated(PMatKFAC, weight_sharing="reduce"),
    "ekfac": estimated(PMatEKFAC, update_diag=False),
    "ekfac updated": updated(PMatEKFAC),
    "ekfac blockdiag": updated(PMatEKFACBlockDiag),
    "mixed": estimated(
        PMatMixed, default_representation=PMatDiag, map_layers_to={nn.Linear: PMatKFAC, "embed": PMatBlockDiag}
    ),
}
FACTORED = ("kfac", "kfac reduce", "ekfac", "ekfac updated")


def _defined(name: str, net: str) -> bool:
    if name == "mixed":
        return net in ("words", "tokens")
    return net in MATRIX_NETS or name not in FACTORED


PAIRS = [(name, net) for name in BUILDERS for net in NETS if _defined(name, net)]
EVERY = pytest.mark.parametrize(("name", "net"), PAIRS, ids=lambda value: str(value))


@cache
def built(name: str, net: str) -> PMat:
    return BUILDERS[name](problem(net).layers, problem(net))


@cache
def dense_of(name: str, net: str) -> Tensor:
    """Column by column, from products."""
    matrix = built(name, net)
    units = torch.eye(matrix.size(0), dtype=torch.float64)
    return torch.stack([matrix.mv(PVector(matrix.layer_collection, unit)).to_torch() for unit in units], 1)


def vector(net: str, *lead: int) -> Tensor:
    p = problem(net).layers.numel()
    return torch.randn(*lead, p, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------ operations


@EVERY
def test_the_matrix_is_symmetric_and_to_torch_gives_it(name, net):
    matrix, dense = built(name, net), dense_of(name, net)
    close(dense, dense.mT)
    close(matrix.to_torch(), dense)
    assert matrix.size() == dense.shape and matrix.size(1) == len(dense)


@EVERY
def test_mv_of_many_vectors_is_the_dense_product(name, net):
    v = vector(net, 2, 3)
    close(built(name, net).mv(v), v @ dense_of(name, net))


@EVERY
def test_matmul_is_mv(name, net):
    matrix, v = built(name, net), vector(net)
    close(matrix @ v, matrix.mv(v))
    close((matrix @ PVector(problem(net).layers, v)).to_torch(), matrix.mv(v))


@EVERY
def test_mmap_maps_each_row(name, net):
    matrix, j = built(name, net), random_pfmap(problem(net).layers, (2, 3), dtype=torch.float64)
    want = j.to_torch() @ dense_of(name, net)
    close(matrix.mmap(j).to_torch(), want)
    close((matrix @ j).to_torch(), want)


@EVERY
def test_mapTMmap_is_the_diagonal_of_the_dense_product(name, net):
    matrix, j = built(name, net), random_pfmap(problem(net).layers, (2, 3), dtype=torch.float64)
    want = torch.einsum("knp,pq,knq->kn", j.to_torch(), dense_of(name, net), j.to_torch())
    close(matrix.mapTMmap(j, reduction="diag"), want)
    close(matrix.mapTMmap(j), want.sum(0))


@EVERY
def test_vTMv_is_the_dense_form(name, net):
    v = vector(net)
    found = built(name, net).vTMv(PVector(problem(net).layers, v))
    assert found.shape == ()
    close(found, v @ dense_of(name, net) @ v)


@EVERY
def test_vTMv_is_differentiable_twice(name, net):
    v, dense = vector(net).requires_grad_(), dense_of(name, net)
    (first,) = torch.autograd.grad(built(name, net).vTMv(v), v, create_graph=True)
    close(first, 2 * dense @ v)
    (second,) = torch.autograd.grad(first @ vector(net), v)
    close(second, 2 * dense @ vector(net))


@EVERY
def test_trace_and_diagonal_are_the_dense_ones(name, net):
    matrix, dense = built(name, net), dense_of(name, net)
    close(matrix.get_diag(), dense.diagonal())
    close(matrix.trace(), dense.trace())
    assert matrix.trace().shape == ()


@pytest.mark.parametrize("ord", ["fro", None, 2, -2])
@EVERY
def test_norms_are_the_dense_ones(name, net, ord):
    matrix = built(name, net)
    close(matrix.norm(ord), torch.linalg.matrix_norm(dense_of(name, net), ord or "fro"))


@pytest.mark.parametrize("form", ["tensor", "PVector", "PFMapDense"])
@EVERY
def test_solve_is_exact_tikhonov_damping(name, net, form):
    matrix, layers = built(name, net), problem(net).layers
    exact = {"rtol": 1e-13} if name == "implicit" else {}
    rows = vector(net) if form == "PVector" else vector(net, 2, 2)
    wrap = {"tensor": torch.clone, "PVector": partial(PVector, layers), "PFMapDense": partial(PFMapDense, layers, None)}
    x = matrix.solve(wrap[form](rows), regul=1e-1, **exact)
    damped = dense_of(name, net) + 1e-1 * torch.eye(rows.shape[-1], dtype=torch.float64)
    want = torch.linalg.solve(damped, rows.reshape(-1, len(damped)).mT).mT.reshape(rows.shape)
    close(x if form == "tensor" else x.to_torch(), want)


@pytest.mark.parametrize("solve", ["default", "factored"])
def test_damping_far_below_the_entries_is_enough_in_float32(solve):
    matrix = PMat.from_state_dict(built("kfac", "mlp").state_dict())
    matrix.data = {name: type(b)(1e4 * b.a.float(), 1e4 * b.g.float(), b.view) for name, b in matrix.data.items()}
    assert matrix.solve(vector("mlp").float(), 1e-8, solve=solve).isfinite().all()


@EVERY
def test_solve_has_a_default_damping_that_singular_matrices_survive(name, net):
    matrix, v = built(name, net), vector(net)
    x = matrix.solve(v)
    assert (matrix.mv(x) + 1e-8 * x - v).norm() < 1e-5 * v.norm()


@EVERY
def test_conjugate_gradients_solve_every_representation(name, net):
    matrix, v, dense = built(name, net), vector(net, 2), dense_of(name, net)
    regul = 0.1 + 2 * float(-torch.linalg.eigvalsh(dense)[0].clamp(max=0))  # a quasi-diagonal matrix may be indefinite
    x = matrix.solve(v, regul=regul, solve="cg", rtol=1e-13)
    close(matrix.mv(x) + regul * x, v)


@EVERY
def test_scalars_multiply_from_both_sides(name, net):
    matrix, dense, v = built(name, net), dense_of(name, net), vector(net)
    results = [2 * matrix, matrix * 2, matrix / 0.5, torch.tensor(2.0) * matrix, matrix * torch.tensor(2.0)]
    close(torch.stack([result.mv(v) for result in results]), (2 * dense @ v).expand(5, -1))
    close((2 * matrix).trace(), 2 * dense.trace())


@EVERY
def test_minus_changes_the_sign(name, net):
    if name == "lowrank":
        with pytest.raises(NotImplementedError, match="PMatDense"):
            -built(name, net)
    else:
        close((-built(name, net)).mv(vector(net)), -dense_of(name, net) @ vector(net))


@EVERY
def test_sums_are_exact_or_refused_with_a_reason(name, net):
    matrix, v = built(name, net), vector(net)
    if name != "implicit":
        close((matrix + 2 * matrix).mv(v), 3 * dense_of(name, net) @ v)
        close(sum([matrix, matrix]).mv(v), 2 * dense_of(name, net) @ v)
    else:
        with pytest.raises(NotImplementedError, match="mv"):
            matrix + matrix


@pytest.mark.parametrize("name", ["dense", "diag", "blockdiag", "quasidiag", "eye"])
def test_differences_are_exact(name):
    matrix = built(name, "conv")
    close((2 * matrix - matrix).to_torch(), dense_of(name, "conv"))


def test_mixed_matrices_add_where_their_blocks_do():
    at = problem("words")
    options = {"default_representation": PMatDiag, "map_layers_to": {"head": PMatBlockDiag}}
    matrix = PMatMixed(at.layers, at.generator, examples=at.batches, **options)
    close((matrix + matrix).to_torch(), 2 * matrix.to_torch())


def test_a_sum_counts_the_examples_of_both():
    matrix = built("diag", "mlp")
    assert matrix.n_examples == 5 and (matrix + matrix).n_examples == 10


# ------------------------------------------------------------------------------------------ layers


@EVERY
def test_a_matrix_over_some_layers_acts_on_vectors_of_all(name, net):
    at = problem(net)
    first = next(iter(at.layers))
    layers = LayerCollection([at.layers[first]])
    if name == "mixed":
        part = PMatMixed(layers, at.generator, examples=at.batches, default_representation=PMatDiag)
    else:
        part = BUILDERS[name](layers, at)
    p = layers.numel()
    v = PVector(at.layers, vector(net))
    want = torch.zeros_like(v.to_torch())
    want[:p] = part.mv(vector(net)[:p])
    close(part.mv(v).to_torch(), want)
    solved = part.solve(v, regul=0.1)
    want[:p] = part.solve(vector(net)[:p], regul=0.1)
    close(solved.to_torch(), want)
    assert solved.layer_collection == at.layers
    close(part.vTMv(v), part.vTMv(vector(net)[:p]))
    j = random_pfmap(at.layers, (2, 3), dtype=torch.float64)
    close(part.mmap(j).to_torch()[..., :p], part.mv(j.to_torch()[..., :p]))


def test_the_order_of_the_layers_of_a_vector_does_not_matter():
    at = problem("mlp")
    turned = LayerCollection([at.layers["2"], at.layers["0"]])
    v = random_vector(turned)
    close(built("dense", "mlp").mv(v).restrict(at.layers).to_torch(), at.fisher @ v.restrict(at.layers).to_torch())


# ------------------------------------------------------------------------------------------ bad input


@EVERY
def test_a_vector_that_lacks_layers_is_refused(name, net):
    layers = problem(net).layers
    small = LayerCollection([next(iter(layers.layers.values()))])
    with pytest.raises(ValueError, match=f"lacks layers.*'{list(layers)[-1]}'"):
        built(name, net).mv(random_vector(small))


@EVERY
def test_a_tensor_of_another_width_is_refused_with_both_shapes(name, net):
    p = problem(net).layers.numel()
    with pytest.raises(ValueError, match=rf"\(\.\.\., {p}\).*\(2, {p + 1}\)"):
        built(name, net).mv(torch.zeros(2, p + 1))


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "eye"])
def test_another_dtype_is_refused_with_the_conversion(name):
    with pytest.raises(ValueError, match=r"float64 on cpu.*float32 on cpu.*v\.to\(F\.dtype\)"):
        built(name, "words").mv(vector("words").float())


def test_the_identity_acts_on_every_dtype():
    assert built("eye", "mlp").mv(vector("mlp").float()).dtype == torch.float32


@pytest.mark.parametrize("other", [None, 3.0, [1.0], {}], ids=lambda other: type(other).__name__)
def test_other_types_are_refused(other):
    with pytest.raises(TypeError, match=f"PVector.*{type(other).__name__}"):
        built("dense", "mlp").mv(other)


def test_options_that_are_unknown_are_refused_with_the_known_ones():
    matrix, v, j = built("kfac", "mlp"), vector("mlp"), random_pfmap(problem("mlp").layers, (1, 1), dtype=torch.float64)
    with pytest.raises(ValueError, match="'cholesky'.*'cg', 'minres', 'lsmr', 'default', 'factored'"):
        matrix.solve(v, solve="cholesky")
    with pytest.raises(ValueError, match="'nuc'.*fro"):
        matrix.norm("nuc")
    with pytest.raises(ValueError, match="'mean'.*sum"):
        matrix.mapTMmap(j, reduction="mean")
    with pytest.raises(ValueError, match="negative"):
        matrix.solve(v, regul=-1.0)
    with pytest.raises(ValueError, match="'fold'.*expand"):
        PMatKFAC(matrix.layer_collection, data=matrix.data, weight_sharing="fold")


def test_sums_of_different_kinds_are_refused_by_name():
    at = problem("mlp")
    with pytest.raises(TypeError, match="PMatDiag.*PMatDense"):
        built("diag", "mlp") + built("dense", "mlp")
    with pytest.raises(ValueError, match="different layers"):
        built("diag", "mlp") + built("diag", "conv")
    with pytest.raises(TypeError):
        built("diag", "mlp") * "2"
    with pytest.raises(ValueError, match="exactly one"):
        PMatDiag(at.layers, at.generator)
    with pytest.raises(ValueError, match="exactly one"):
        PMatDiag(at.layers, at.generator, data=torch.zeros(27), examples=at.batches)


@pytest.mark.parametrize("kind", [PMatDense, PMatDiag, PMatLowRank, PFMapDense, FMatDense])
def test_data_of_a_wrong_shape_are_refused(kind):
    with pytest.raises(ValueError, match=r"`data` should be .*\(3,\)"):
        kind(problem("mlp").layers, data=torch.zeros(3))


def test_blocks_are_checked_against_the_layers():
    layers = problem("mlp").layers
    with pytest.raises(ValueError, match="'0' is over 3"):
        PMatDiag(layers, data={"0": DiagBlock(torch.zeros(3)), "2": DiagBlock(torch.zeros(12))})
    with pytest.raises(ValueError, match="should have the layers 0, 2"):
        PMatBlockDiag(layers, data={"0": torch.zeros(15, 15)})
    with pytest.raises(TypeError, match="should be a Block"):
        PMatKFAC(layers, data={"0": 1, "2": 2})


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in ("eye", "mixed", "implicit")])
def test_no_examples_are_an_error(name):
    with pytest.raises(ValueError, match="(?i)example|batch"):
        at = problem("mlp")
        BUILDERS[name](at.layers, Problem(at.model, at.layers, [], at.generator, at.jacobian, at.fisher))


@pytest.mark.parametrize("shapes", [[(2, 2), (2, 2), (1, 2), (1, 3)], [(1, 3), (1, 2), (5, 1), (1, 5)]], ids=str)
def test_rows_of_unequal_mini_batches_find_room_as_they_come(shapes):
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)).double()
    batches = [(torch.randint(5, shape), torch.randint(2, shape)) for shape in shapes]
    generator, layers = JacobianGenerator(model, Exact(make_variant("token_logits"))), LayerCollection.from_model(model)
    found = PMatLowRank(layers, generator, examples=iter(batches))  # which does not tell how many there are
    close(found.to_torch(), PMatDense(layers, generator, examples=batches).to_torch())


class Endless(Dataset):
    def __len__(self) -> int:
        return 10**15

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((4,), float(index), dtype=torch.float64)


DRAWN = [0, 10**14, 2, 2, 5]
LOADERS = {
    "sampler": lambda: DataLoader(Endless(), batch_size=2, sampler=DRAWN),
    "batch sampler": lambda: DataLoader(Endless(), batch_sampler=[DRAWN[:3], DRAWN[3:]]),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", [PMatLowRank, PFMapDense])
def test_few_examples_of_a_large_dataset_take_little_memory(kind, loader):
    model = nn.Linear(4, 3).double()
    generator, layers = JacobianGenerator(model, Exact(make_variant("regression"))), LayerCollection.from_model(model)
    drawn = torch.stack([Endless()[index] for index in DRAWN])
    found, expected = (kind(layers, generator, examples=x).to_torch() for x in (LOADERS[loader](), drawn))
    close(found, expected)


@pytest.mark.parametrize("kind", [PMatDense, PMatBlockDiag, PMatLowRank, PFMapDense, FMatDense])
def test_what_does_not_fit_in_memory_is_refused_with_its_size(kind, monkeypatch):
    at = problem("mlp")
    monkeypatch.setattr(memory, "available_bytes", lambda device: 400)
    monkeypatch.setattr(memory, "SMALL", 0)
    with pytest.raises(MemoryError, match=r"GiB.*GiB are free on cpu.*(PMatDiag|PMatImplicit|fewer examples)"):
        kind(at.layers, at.generator, examples=at.batches)


def test_large_results_are_usual_tensors_wherever_their_memory_is_from(monkeypatch):
    at, found = problem("mlp"), []
    for size in (2**60, 0):
        monkeypatch.setattr(memory, "LARGE", size)
        found.append(PFMapDense(at.layers, at.generator, examples=at.batches).to_torch())
    usual, large = found
    assert torch.equal(large, usual) and large.dtype == usual.dtype
    assert torch.equal(pickle.loads(pickle.dumps(large)), usual)
    assert torch.equal(copy.deepcopy(large).mul_(2), 2 * usual)


def test_room_needs_no_huge_pages(monkeypatch):
    monkeypatch.setattr(memory, "LARGE", 0)
    monkeypatch.delattr("mmap.MADV_HUGEPAGE", raising=False)
    assert memory.room((2, 3), torch.ones(1)).fill_(2).sum() == 12


@pytest.mark.parametrize("kind", [PFMapDense, FMatDense])
def test_a_copy_that_does_not_fit_is_refused(kind, monkeypatch):
    at = problem("mlp")
    found = kind(at.layers, at.generator, examples=at.batches)
    copy_of = found.to_torch()
    assert torch.equal(copy_of, found.data) and copy_of.data_ptr() != found.data.data_ptr()
    monkeypatch.setattr(memory, "available_bytes", lambda device: 400)
    monkeypatch.setattr(memory, "SMALL", 0)
    with pytest.raises(MemoryError, match=rf"A copy of this {kind.__name__}.*Use `data`"):
        found.to_torch()


def test_room_is_there_where_the_system_refuses_huge_pages(monkeypatch):
    class Small(mmap.mmap):
        def madvise(self, *advice):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory, "LARGE", 0)
    monkeypatch.setattr(mmap, "mmap", Small)
    assert memory.room((2, 3), torch.ones(1)).fill_(2).sum() == 12


def test_the_dense_form_of_a_small_matrix_may_not_fit(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 400)
    monkeypatch.setattr(memory, "SMALL", 0)
    with pytest.raises(MemoryError, match="dense form of this PMatDiag"):
        built("diag", "mlp").to_torch()


# ------------------------------------------------------------------------------------------ copies and files

STORED = [pair for pair in PAIRS if pair[0] != "implicit"]


@pytest.mark.parametrize(("name", "net"), STORED)
def test_a_state_dict_survives_a_file_that_is_read_safely(name, net):
    matrix, file = built(name, net), io.BytesIO()
    torch.save(matrix.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = PMat.from_state_dict(state)
    assert type(again) is type(matrix) and again.layer_collection == matrix.layer_collection
    assert again.n_examples == matrix.n_examples and getattr(again, "updated", 0) == getattr(matrix, "updated", 0)
    close(again.mv(vector(net)), matrix.mv(vector(net)))
    twice = 2 * matrix
    twice.load_state_dict(state)
    close(twice.mv(vector(net)), matrix.mv(vector(net)))


def test_a_state_of_another_class_or_model_is_refused():
    state = built("diag", "mlp").state_dict()
    with pytest.raises(ValueError, match="of a PMatDiag, not of a PMatDense"):
        (2 * built("dense", "mlp")).load_state_dict(state)
    with pytest.raises(ValueError, match="other layers"):
        (2 * built("diag", "conv")).load_state_dict(state)
    with pytest.raises(ValueError, match="no 'class', 'layers'|no 'class'"):
        PMat.from_state_dict({"n_examples": 3})
    with pytest.raises(TypeError, match="list"):
        PMat.from_state_dict([])
    with pytest.raises(ValueError, match="no PMatDense"):
        PMatDense.from_state_dict(state)
    with pytest.raises(ValueError, match="'0'"):
        PMat.from_state_dict({key: value for key, value in state.items() if key != "0/entries"})


def test_an_implicit_matrix_has_nothing_to_save():
    with pytest.raises(NotImplementedError, match="no data"):
        built("implicit", "mlp").state_dict()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@EVERY
def test_copies_work_and_share_no_data(name, net, duplicate):
    matrix = built(name, net)
    again = duplicate(matrix)
    close(again.mv(vector(net)), matrix.mv(vector(net)))
    close(again.solve(vector(net), 0.1), matrix.solve(vector(net), 0.1))
    tensors = [value for value in ({} if name == "implicit" else again.state_dict()).values() if torch.is_tensor(value)]
    before = matrix.mv(vector(net))
    [tensor.zero_() for tensor in tensors]
    close(matrix.mv(vector(net)), before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copied_ekfac_can_be_updated(duplicate):
    matrix = duplicate(built("ekfac", "mlp"))
    matrix.update_diag(problem("mlp").batches)
    close(matrix.to_torch(), dense_of("ekfac updated", "mlp"))
    assert not built("ekfac", "mlp").updated


def test_a_pickle_without_its_generator_says_so_when_it_is_needed():
    at = problem("mlp")
    generator = copy.copy(at.generator)
    generator.lock = threading.Lock()  # which can't be pickled
    matrix = pickle.loads(pickle.dumps(PMatEKFAC(at.layers, generator, examples=at.batches, update_diag=False)))
    close(matrix.to_torch(), dense_of("ekfac", "mlp"))
    with pytest.raises(ValueError, match="could not be pickled"):
        matrix.update_diag(at.batches)


@EVERY
def test_results_are_new_tensors(name, net):
    matrix = built(name, net)
    results = [matrix.to_torch(), matrix.get_diag(), matrix.mv(vector(net)), matrix.solve(vector(net), 0.1)]
    [result.zero_() for result in results]
    close(matrix.mv(vector(net)), dense_of(name, net) @ vector(net))
    close(matrix.get_diag(), dense_of(name, net).diagonal())


def test_a_change_of_the_data_in_place_renews_the_decompositions():
    matrix = copy.deepcopy(built("dense", "mlp"))
    before = matrix.solve(vector("mlp"), 0.1), matrix.norm(2)
    matrix.data.mul_(2)
    assert not torch.allclose(matrix.solve(vector("mlp"), 0.1), before[0])
    close(matrix.norm(2), 2 * before[1])


@EVERY
def test_the_repr_names_class_and_size(name, net):
    text = repr(built(name, net))
    assert type(built(name, net)).__name__ in text and str(problem(net).layers.numel()) in text


# ------------------------------------------------------------------------------------------ estimates

NET = pytest.mark.parametrize("net", NETS)


@pytest.fixture(params=[None, 1], ids=["whole", "chunked"])
def chunks(request, monkeypatch):
    """All cotangents of a mini-batch at once, or each on its own."""
    if request.param is not None:
        monkeypatch.setattr("nngeo.generators.sizing.BUDGET", request.param)


@pytest.mark.parametrize("name", ["dense", "lowrank", "implicit"])
@NET
def test_the_whole_matrix_is_the_fisher(name, net, chunks):
    at = problem(net)
    close(BUILDERS[name](at.layers, at).to_torch(), at.fisher)


@NET
def test_block_diagonal_is_the_fisher_within_layers(net, chunks):
    at = problem(net)
    close(estimated(PMatBlockDiag)(at.layers, at).to_torch(), at.fisher * at.mask())


@NET
def test_the_diagonal_is_that_of_the_fisher(net, chunks):
    at = problem(net)
    close(estimated(PMatDiag)(at.layers, at).get_diag(), at.fisher.diagonal())


def cross_terms(layers: LayerCollection) -> Tensor:
    """(P, P), True between each weight of a linear layer and the bias of its row, and on the diagonal."""
    rows = []
    for layer in layers.layers.values():
        shapes = list(layer.shapes.values())
        row = [torch.arange(shape[0]).repeat_interleave(shape.numel() // shape[0]) for shape in shapes]
        is_bias = torch.cat([torch.full((shape.numel(),), i == 1) for i, shape in enumerate(shapes)])
        same = torch.cat(row)[:, None] == torch.cat(row)
        crossed = same & (is_bias[:, None] != is_bias) & (len(shapes) == 2 and layer.kind != "LayerNorm")
        rows.append(crossed | torch.eye(layer.numel()).bool())
    return torch.block_diag(*rows)


@NET
def test_quasi_diagonal_is_the_fisher_between_weights_and_their_bias(net, chunks):
    at = problem(net)
    close(estimated(PMatQuasiDiag)(at.layers, at).to_torch(), at.fisher * cross_terms(at.layers))


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "mixed"])
def test_estimates_do_not_depend_on_the_split_into_batches_and_chunks(name, chunks):
    at = problem("conv")
    whole = [tuple(torch.cat(parts) for parts in zip(*at.batches, strict=True))]
    one = BUILDERS[name](at.layers, Problem(at.model, at.layers, whole, at.generator, at.jacobian, at.fisher))
    assert one.n_examples in (5, None)
    close(one.to_torch(), dense_of(name, "conv"))


def factors_of(model: nn.Module, at: Problem) -> dict[str, tuple[Tensor, Tensor]]:
    """Moments of inputs (ones appended) and of output gradients of the Linear layers of an MLP, by autograd."""
    x = torch.cat([x for x, _ in at.batches])
    noted: dict[str, tuple[Tensor, Tensor]] = {}
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_hook(lambda m, i, o, n=n: noted.update({n: (i[0].detach(), o)})) for n, m in linear]
    p = model(x).softmax(-1)
    [hook.remove() for hook in hooks]
    eye = torch.eye(3, dtype=torch.float64)
    cotangents = (p.mT.sqrt()[..., None] * (eye[:, None] - p)).detach()
    outputs = p.log()  # equal to the logits up to a constant, which these cotangents don't see
    found = {}
    for name, (a, out) in noted.items():
        a = torch.cat([a, a.new_ones(len(a), 1)], 1)
        g = torch.stack([torch.autograd.grad(outputs, out, c, retain_graph=True)[0] for c in cotangents])
        found[name] = a.mT @ a / len(x), torch.einsum("kbo,kbp->op", g, g) / len(x)
    return found


def test_kronecker_factors_are_mean_moments_of_inputs_and_output_gradients(chunks):
    at = problem("mlp")
    matrix = estimated(PMatKFAC)(at.layers, at)
    want = factors_of(at.model, at)
    close({name: (block.a[0], block.g[0]) for name, block in matrix.data.items()}, want)


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_kfac_of_one_example_with_one_position_is_the_exact_block(net):
    at = problem(net)
    one = [(at.batches[0][0][:1], at.batches[0][1][:1])]
    last = LayerCollection([list(at.layers.layers.values())[-1]])
    exact = PMatBlockDiag(last, at.generator, examples=one)
    close(PMatKFAC(last, at.generator, examples=one).to_torch(), exact.to_torch())


def test_reduce_averages_inputs_and_sums_gradients_over_positions():
    model = nn.Sequential(nn.Linear(2, 3), nn.Flatten(), nn.Linear(12, 3)).double()
    x = torch.randn(1, 4, 2, dtype=torch.float64)
    layers = LayerCollection.from_model(model, ["0"])
    generator = JacobianGenerator(model, Exact(make_variant("regression")))
    block = PMatKFAC(layers, generator, examples=[(x,)], weight_sharing="reduce").data["0"]
    a = torch.cat([x[0].mean(0), torch.ones(1, dtype=torch.float64)])
    g = model[2].weight.detach().unflatten(1, (4, 3)).sum(1)
    close((block.a[0], block.g[0]), (a[:, None] * a, g.mT @ g))


def test_an_embedding_keeps_the_diagonal_of_its_input_moment():
    matrix = built("kfac", "words")
    assert matrix.data["embed"].a.shape == (1, 5)
    assert built("kfac reduce", "words").data["embed"].a.shape == (1, 5, 5)


@pytest.mark.parametrize("net", MATRIX_NETS)
def test_factored_damping_is_that_of_martens_and_grosse(net):
    matrix, parts = built("kfac", net), problem(net).layers.split(vector(net))
    want = [solved_with_damped_factors(matrix.data[name], part, 0.05) for name, part in parts.items()]
    close(matrix.solve(vector(net), 0.05, solve="factored"), torch.cat(want))


def solved_with_damped_factors(block: Any, v: Tensor, regul: float) -> Tensor:
    a = torch.diag_embed(block.a) if block.a.ndim == 2 else block.a
    pi = (a.diagonal(dim1=1, dim2=2).mean(1) / block.g.diagonal(dim1=1, dim2=2).mean(1)).sqrt()[:, None, None]
    a = a + pi * regul**0.5 * torch.eye(a.shape[-1], dtype=torch.float64)
    g = block.g + regul**0.5 / pi * torch.eye(block.g.shape[-1], dtype=torch.float64)
    half = torch.linalg.solve(g, block.view.to_matrix(v))
    return block.view.to_flat(torch.linalg.solve(a, half.mT).mT)


@pytest.mark.parametrize("solve", ["default", "factored", "cg"])
def test_a_dead_layer_solves(solve):
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3)).double()
    nn.init.constant_(model[0].bias, -100.0)
    at = problem("mlp")
    generator = JacobianGenerator(model, at.generator.estimator)
    layers = LayerCollection.from_model(model)
    x = torch.randn(4, 3, dtype=torch.float64)
    matrix = PMatKFAC(layers, generator, examples=[(x, torch.zeros(4, dtype=torch.long))])
    v = random_vector(layers).to_torch()
    found = matrix.solve(v, 1e-2, solve=solve)
    assert found.isfinite().all()
    if solve == "default":
        close(found[:8], v[:8] / 1e-2)


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


KINDS = [PMatDense, PMatDiag, PMatBlockDiag, PMatQuasiDiag, PMatLowRank, PMatImplicit, PMatKFAC, PMatEKFAC]


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_is_never_called_is_zero(kind):
    model, at = Idle().double(), problem("mlp")
    layers = LayerCollection.from_model(model)
    generator = JacobianGenerator(model, at.generator.estimator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matrix = kind(layers, generator, examples=at.batches)
        dense, solved = matrix.to_torch(), matrix.solve(torch.ones(21, dtype=torch.float64), 0.5)
    assert dense[:15].any() and not dense[15:].any() and not dense[:, 15:].any()
    assert_close(solved[15:], torch.full((6,), 2.0).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_models_give_float32(kind):
    model, x = mlp(), torch.randn(3, 4)
    layers = LayerCollection.from_model(model)
    generator = JacobianGenerator(model, problem("mlp").generator.estimator)
    matrix = kind(layers, generator, examples=[(x, torch.zeros(3, dtype=torch.long))])
    results = [matrix.to_torch(), matrix.get_diag(), matrix.trace(), matrix.norm(), matrix.solve(torch.ones(27), 0.1)]
    assert {result.dtype for result in results} == {torch.float32}


# ------------------------------------------------------------------------------------------ ekfac and mixed


@pytest.mark.parametrize("net", MATRIX_NETS)
def test_ekfac_is_kfac_until_it_is_updated(net):
    close(dense_of("ekfac", net), dense_of("kfac", net))
    assert "updated=False" in repr(built("ekfac", net)) and "updated=True" in repr(built("ekfac updated", net))


@pytest.mark.parametrize("net", MATRIX_NETS)
def test_updated_ekfac_has_the_exact_trace_and_is_closer_than_kfac(net, chunks):
    at = problem(net)
    exact, matrix = at.fisher * at.mask(), updated(PMatEKFAC)(at.layers, at)
    close(matrix.trace(), exact.trace())
    assert (matrix.to_torch() - exact).norm() <= (dense_of("kfac", net) - exact).norm()


@pytest.mark.parametrize("net", MATRIX_NETS)
def test_updated_scalings_are_the_diagonal_of_the_fisher_in_the_basis(net):
    at, matrix = problem(net), built("ekfac updated", net)
    basis = torch.block_diag(*[eigenvectors_of(block) for block in matrix.data.values()])
    found = torch.cat([block.scalings.flatten() for block in matrix.data.values()])
    close(found, (basis @ at.fisher @ basis.mT).diagonal())


def eigenvectors_of(block: Any) -> Tensor:
    """(p, p), in rows, in the order of the scalings."""
    units = torch.eye(block.scalings.numel(), dtype=torch.float64).reshape(-1, *block.scalings.shape)
    return block.view.to_flat(block.basis.back(units))


def test_ekfac_blockdiag_has_dense_blocks_where_there_are_no_factors():
    at, matrix = problem("tokens"), built("ekfac blockdiag", "tokens")
    kinds = {name: type(block) for name, block in matrix.data.items()}
    assert kinds == {"embed": KroneckerEigenBlock, "norm": DenseBlock, "head": KroneckerEigenBlock}
    close(matrix.trace(), at.fisher.trace())


def test_mixed_follows_names_before_types_before_the_default():
    at = problem("tokens")
    mapping = {nn.Linear: PMatKFAC, nn.Module: PMatQuasiDiag, "norm": PMatBlockDiag}
    matrix = PMatMixed.from_mapping(at.layers, at.generator, PMatDiag, mapping, examples=at.batches)
    kinds = {name: type(block) for name, block in matrix.data.items()}
    assert kinds == {"embed": QuasiDiagBlock, "norm": DenseBlock, "head": KroneckerBlock}


def test_mixed_is_made_of_the_blocks_of_its_representations():
    matrix, layers = built("mixed", "words"), problem("words").layers
    parts = [built("blockdiag", "words").data["embed"], built("kfac", "words").data["head"]]
    close(matrix.to_torch(), torch.block_diag(*[part.to_torch() for part in parts]))
    close(
        matrix.solve(vector("words"), 0.1, solve="factored")[15:],
        built("kfac", "words").solve(vector("words"), 0.1, solve="factored")[15:],
    )
    assert layers["embed"].numel() == 15


def test_bad_mappings_are_refused():
    at = problem("tokens")
    build = partial(PMatMixed, at.layers, at.generator, examples=at.batches)
    with pytest.raises(ValueError, match=r"Conv2d.*'embed' \(Embedding\)"):
        build(default_representation=PMatDiag, map_layers_to={nn.Conv2d: PMatKFAC})
    with pytest.raises(ValueError, match="'embed'.*no `default_representation`"):
        build(map_layers_to={nn.Linear: PMatKFAC})
    with pytest.raises(TypeError, match="PMatDense.*PMatBlockDiag"):
        build(default_representation=PMatDense)
    with pytest.raises(NotImplementedError, match="'norm'.*PMatMixed"):
        build(default_representation=PMatKFAC)


@pytest.mark.parametrize("net", MATRIX_NETS)
def test_eigendecompositions_give_the_matrix_again(net):
    kfac, (values, vectors) = built("kfac", net), built("kfac", net).get_eigendecomposition()
    close({n: (a.sum(), g.sum()) for n, (a, g) in values.items()}, {n: factor_traces(b) for n, b in kfac.data.items()})
    assert vectors.keys() == values.keys()
    values, vectors = built("dense", net).get_eigendecomposition()
    close(vectors * values @ vectors.mT, dense_of("dense", net))
    values, vectors = built("lowrank", net).get_eigendecomposition()
    close(vectors * values @ vectors.mT, dense_of("lowrank", net))
    values, vectors = built("blockdiag", net).get_eigendecomposition()
    close(torch.block_diag(*[vectors[n] * values[n] @ vectors[n].mT for n in values]), dense_of("blockdiag", net))
    values, _ = built("ekfac updated", net).get_eigendecomposition()
    close(torch.cat([v.flatten() for v in values.values()]).sum(), built("ekfac updated", net).trace())


def factor_traces(block: Any) -> tuple[Tensor, Tensor]:
    a = block.a.sum() if block.a.ndim == 2 else block.a.diagonal(dim1=1, dim2=2).sum()
    return a, block.g.diagonal(dim1=1, dim2=2).sum()


# ------------------------------------------------------------------------------------------ low rank


def test_low_rank_without_damping_solves_within_its_span_only():
    matrix, v = built("lowrank", "conv"), vector("conv")
    inside = matrix.mv(v)
    close(matrix.mv(matrix.solve(inside, regul=0.0)), inside)
    with pytest.raises(ValueError, match="rank.*not in its range"):
        matrix.solve(v, regul=0.0)


def test_a_low_rank_sum_stacks_rows_of_different_counts():
    at, matrix = problem("mlp"), built("lowrank", "mlp")
    other = PMatLowRank(at.layers, data=random_pfmap(at.layers, (1, 2), dtype=torch.float64).data)
    close((matrix + other).to_torch(), matrix.to_torch() + other.to_torch())


@pytest.mark.parametrize("ord", [2, -2])
def test_the_norms_of_more_rows_than_parameters_are_the_dense_ones(ord):
    at = problem("mlp")
    matrix = PMatLowRank(at.layers, data=random_pfmap(at.layers, (10, 5), dtype=torch.float64).data)
    close(matrix.norm(ord), torch.linalg.matrix_norm(matrix.to_torch(), ord))
    close(matrix.mv(matrix.solve(vector("mlp"), 0.0)), vector("mlp"))


# ------------------------------------------------------------------------------------------ implicit and solvers


def test_an_iterator_serves_every_product():
    at = problem("mlp")
    matrix = PMatImplicit(at.layers, at.generator, examples=iter(at.batches))
    close(torch.stack([matrix.mv(vector("mlp")) for _ in range(3)]), (at.fisher @ vector("mlp")).expand(3, -1))


def test_cg_warns_when_it_does_not_converge():
    with pytest.warns(ConvergenceWarning, match="2 iterations.*residual.*rtol=1.0e-10.*max_iter"):
        built("implicit", "mlp").solve(vector("mlp"), 1e-3, max_iter=2, rtol=1e-10)


def test_cg_names_an_indefinite_matrix():
    with pytest.warns(ConvergenceWarning, match="no positive curvature"):
        (-built("implicit", "mlp")).solve(vector("mlp"), 1e-3)


def test_a_preconditioner_saves_products(monkeypatch):
    at, matrix, count = problem("conv"), built("implicit", "conv"), []
    mv = JacobianGenerator.mv
    monkeypatch.setattr(JacobianGenerator, "mv", lambda *args: count.append(1) or mv(*args))
    plain = matrix.solve(vector("conv"), 1e-3, rtol=1e-10)
    before = len(count)
    helped = matrix.solve(vector("conv"), 1e-3, rtol=1e-10, preconditioner=built("dense", "conv"))
    assert len(count) - before < 4 < before
    assert_close(plain, helped, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="other layers"):
        matrix.solve(vector("conv"), 1e-3, preconditioner=built("dense", "mlp"))
    assert at.n == 5


def test_cg_starts_where_it_is_told():
    at, matrix = problem("mlp"), built("implicit", "mlp")
    x = matrix.solve(vector("mlp"), 0.1, rtol=1e-12)
    again = matrix.solve(vector("mlp"), 0.1, x0=PVector(at.layers, x), max_iter=0)
    close(again, x)


def test_a_solve_by_cg_is_differentiable():
    matrix, v = built("implicit", "mlp"), vector("mlp").requires_grad_()
    x = matrix.solve(v, 0.1, rtol=1e-13, x0=torch.ones(27).double())
    (grad,) = torch.autograd.grad(x.sum(), v)
    close(grad, built("dense", "mlp").solve(torch.ones(27).double(), 0.1))


@EVERY
def test_a_registered_solver_serves_every_representation(name, net):
    @register_solver("one step")
    def one_step(matrix: PMat, v: Tensor, regul: float, *, step: float = 1.0) -> Tensor:
        return step * matrix.mv(v)

    try:
        close(built(name, net).solve(vector(net), solve="one step", step=2.0), 2 * dense_of(name, net) @ vector(net))
    finally:
        del SOLVERS["one step"]


# ------------------------------------------------------------------------------------------ hessian


def loss(prediction: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(prediction, target, reduction="sum")


@pytest.mark.parametrize("kind", [PMatDense, PMatBlockDiag, PMatDiag, PMatImplicit])
def test_a_hessian_is_that_of_the_summed_loss(kind):
    at = problem("mlp")
    whole = tuple(torch.cat(parts) for parts in zip(*at.batches, strict=True))
    want = reference.hessian(at.model, whole, loss)
    keep = {PMatBlockDiag: at.mask(), PMatDiag: torch.eye(len(want)).bool()}.get(kind, torch.ones_like(want).bool())
    matrix = kind(at.layers, HessianGenerator(at.model, loss), examples=at.batches)
    close(matrix.to_torch(), want * keep)
    close(matrix.get_diag(), want.diagonal())
    close(matrix.mv(vector("mlp")), (want * keep) @ vector("mlp"))


@pytest.mark.parametrize("kind", [PMatKFAC, PMatEKFAC, PMatQuasiDiag, PMatLowRank, FMatDense, PFMapDense])
def test_a_hessian_has_no_matrices_made_of_gradients_of_examples(kind):
    at = problem("mlp")
    with pytest.raises(NotImplementedError, match="Hessian"):
        kind(at.layers, HessianGenerator(at.model, loss), examples=at.batches)


# ------------------------------------------------------------------------------------------ maps and Gram matrices


@cache
def identity(net: str) -> JacobianGenerator:
    return JacobianGenerator(problem(net).model, Exact(make_variant("identity")))


@NET
def test_the_dense_map_is_the_jacobian(net, chunks):
    at = problem(net)
    j = PFMapDense(at.layers, identity(net), examples=at.batches)
    close(j.to_torch(), at.jacobian)
    assert j.size() == at.jacobian.shape and j.n_examples == 5


@pytest.mark.parametrize("kind", [PFMapDense, PFMapImplicit])
@NET
def test_maps_push_and_pull_by_the_jacobian(net, kind):
    at = problem(net)
    j = kind(at.layers, identity(net), examples=iter(at.batches))
    v, u = random_vector(at.layers), random_fvector(5, 3, dtype=torch.float64)
    want = at.jacobian @ v.to_torch(), torch.einsum("kn,knp->p", u.to_torch(), at.jacobian)
    close((j.jvp(v).to_torch(), j.vjp(u).to_torch()), want)
    close(((j @ v).to_torch(), (j.T @ u).to_torch()), want)
    close((3 * j / 2).jvp(v).to_torch(), 1.5 * want[0])
    assert j.size() == at.jacobian.shape and j.size(2) == at.layers.numel()
    assert j.dtype == torch.float64 and j.get_device().type == "cpu"


def test_a_map_is_its_layers():
    at = problem("mlp")
    j = PFMapDense(at.layers, identity("mlp"), examples=at.batches)
    parts = {name: tensors for name, _, tensors in j.iter_by_layer()}
    assert [tuple(t.shape) for t in parts["0"]] == [(3, 5, 3, 4), (3, 5, 3)]
    close(PFMapDense.from_dict(at.layers, None, parts).to_torch(), j.to_torch())
    close((j + j - 3 * j).to_torch(), -j.to_torch())


def test_maps_refuse_what_does_not_fit():
    at, j = problem("mlp"), random_pfmap(problem("mlp").layers, (3, 5), dtype=torch.float64)
    with pytest.raises(TypeError, match="PVector, got Tensor"):
        j.jvp(vector("mlp"))
    with pytest.raises(TypeError, match="FVector, got Tensor"):
        j.vjp(torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"\(3, 5\).*\(3, 4\)"):
        j.vjp(random_fvector(4, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="float32"):
        j.jvp(random_pvector(at.layers, dtype=torch.float32))


def test_a_random_map_is_that_of_its_generator():
    layers = problem("mlp").layers
    first, second = (random_pfmap(layers, (2, 3), generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert first.size() == (2, 3, 27) and torch.equal(first.data, second.data)


@NET
def test_the_gram_matrix_is_the_product_of_jacobians(net, chunks):
    at = problem(net)
    k = FMatDense(at.layers, identity(net), examples=at.batches)
    want = torch.einsum("knp,lmp->knlm", at.jacobian, at.jacobian)
    close(k.to_torch(), want)
    close(k.to_matrix(), want.reshape(15, 15))
    j = PFMapDense(at.layers, data=at.jacobian)
    close((j @ j.T).to_torch(), want)


def test_a_gram_matrix_reads_a_shuffling_loader_once():
    at = problem("mlp")
    x, y = (torch.cat(parts) for parts in zip(*at.batches, strict=True))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2, shuffle=True)
    values, _ = FMatDense(at.layers, identity("mlp"), examples=loader).get_eigendecomposition()
    want = at.jacobian.flatten(0, 1) @ at.jacobian.flatten(0, 1).mT
    close(values, torch.linalg.eigvalsh(want))


@NET
def test_a_kernel_between_two_sets_of_examples_is_rectangular(net, chunks):
    at = problem(net)
    k = FMatDense(at.layers, identity(net), examples=at.batches, examples2=at.batches[1:])
    want = torch.einsum("knp,lmp->knlm", at.jacobian, at.jacobian[:, 2:])
    close(k.to_torch(), want)
    u = random_fvector(3, 3, dtype=torch.float64)
    close((k @ u).to_torch(), torch.einsum("knlm,lm->kn", want, u.to_torch()))
    assert k.size() == (3, 5, 3, 3)
    with pytest.raises(ValueError, match=r"square.*\(3, 5, 3, 3\)"):
        k.trace()


def test_gram_matrices_have_the_algebra_of_their_matrix():
    at = problem("mlp")
    k = FMatDense(at.layers, data=torch.einsum("knp,lmp->knlm", at.jacobian, at.jacobian))
    dense, u = k.to_matrix(), random_fvector(5, 3, dtype=torch.float64)
    flat = u.to_torch().flatten()
    close(k.mv(u).to_torch().flatten(), dense @ flat)
    close(k.vTMv(u), flat @ dense @ flat)
    close(k.trace(), dense.trace())
    close(k.solve(u, 0.1).to_torch().flatten(), torch.linalg.solve(dense + 0.1 * torch.eye(15).double(), flat))
    close([k.norm(), k.norm(2), k.norm(-2)], [torch.linalg.matrix_norm(dense, ord) for ord in ("fro", 2, -2)])
    close((k + k / 2 - 2 * k).to_matrix(), -dense / 2)
    close(pickle.loads(pickle.dumps(copy.deepcopy(k))).to_matrix(), dense)
    with pytest.raises(ValueError, match=r"\(3, 5\).*\(3, 4\)"):
        k.mv(random_fvector(4, 3, dtype=torch.float64))
    with pytest.raises(TypeError, match="FVector, got Tensor"):
        k.mv(flat)
    with pytest.raises(ValueError, match="float32"):
        k.mv(FVector(u.to_torch().float()))


# ------------------------------------------------------------------------------------------ two passes


@pytest.mark.parametrize("net", MATRIX_NETS)
def test_ekfac_has_exact_scalings_from_the_start(net):
    at = problem(net)
    matrix = PMatEKFAC(at.layers, at.generator, examples=at.batches)
    close(matrix.to_torch(), dense_of("ekfac updated", net))
    assert matrix.updated and matrix.n_examples == built("ekfac updated", net).n_examples


def mixed_ekfac(at: Problem, **options: Any) -> PMatMixed:
    mapping = {"head": PMatEKFAC}
    return PMatMixed(
        at.layers, at.generator, default_representation=PMatDiag, map_layers_to=mapping, examples=at.batches, **options
    )


def test_ekfac_among_other_blocks_has_exact_scalings_from_the_start():
    at = problem("tokens")
    block_diag = PMatEKFACBlockDiag(at.layers, at.generator, examples=at.batches)
    close(block_diag.to_torch(), dense_of("ekfac blockdiag", "tokens"))
    close(mixed_ekfac(at).trace(), at.fisher.trace())
    assert not mixed_ekfac(at, update_diag=False).updated


TWICE = {
    "ekfac": lambda at, examples: PMatEKFAC(at.layers, at.generator, examples=examples),
    "ekfac block diag": lambda at, examples: PMatEKFACBlockDiag(at.layers, at.generator, examples=examples),
    "mixed": lambda at, examples: PMatMixed(
        at.layers, at.generator, default_representation=PMatEKFAC, map_layers_to={}, examples=examples
    ),
}


class Once:
    """Batches that are there for one reading."""

    def __init__(self, batches: Any, again: Any = ()):
        self.readings = [batches, again]

    def __iter__(self) -> Any:
        return iter(self.readings.pop(0))


@pytest.mark.parametrize("build", TWICE.values(), ids=TWICE)
def test_examples_that_can_be_read_once_only_are_refused_by_ekfac(build):
    at = problem("mlp")
    iterator = iter(at.batches)
    with pytest.raises(ValueError, match=r"reads the examples twice.*is an iterator.*update_diag=False"):
        build(at, iterator)
    assert len(list(iterator)) == len(at.batches)  # nothing was read
    with pytest.raises(ValueError, match=r"gave 5 examples, and then 0.*update_diag=False"):
        build(at, Once(at.batches))
    with pytest.raises(ValueError, match="gave 5 examples, and then 2"):
        build(at, Once(at.batches, at.batches[:1]))


def test_one_reading_is_enough_where_no_scalings_are_needed():
    at = problem("mlp")
    close(
        PMatEKFAC(at.layers, at.generator, examples=iter(at.batches), update_diag=False).to_torch(),
        dense_of("ekfac", "mlp"),
    )
    mixed = PMatMixed(
        at.layers, at.generator, default_representation=PMatKFAC, map_layers_to={}, examples=iter(at.batches)
    )
    close(mixed.to_torch(), dense_of("kfac", "mlp"))


def test_shards_of_ekfac_pool_before_their_scalings_are_made_exact():
    at = problem("mlp")
    shards = [PMatEKFAC(at.layers, at.generator, examples=[batch], update_diag=False) for batch in at.batches]
    pooled = PMat.pool(shards)
    pooled.update_diag(at.batches)
    close(pooled.to_torch(), dense_of("ekfac updated", "mlp"))


def test_an_ekfac_without_exact_scalings_stays_so_when_examples_join():
    at = problem("mlp")
    matrix = PMatEKFAC(at.layers, at.generator, examples=at.batches[:1], update_diag=False).update(at.batches[1:])
    close(matrix.to_torch(), dense_of("ekfac", "mlp"))
    assert not matrix.updated


# ------------------------------------------------------------------------------------------ shards without a layer

UNREACHED = {
    "kfac": (lambda at, **o: PMatKFAC(at.layers, at.generator, **o), 2),
    "ekfac of one pass": (lambda at, **o: PMatEKFAC(at.layers, at.generator, update_diag=False, **o), 2),
    "ekfac": (lambda at, **o: PMatEKFAC(at.layers, at.generator, **o), 1),
}


@pytest.mark.parametrize(("build", "power"), UNREACHED.values(), ids=UNREACHED)
@pytest.mark.parametrize("order", [1, -1], ids=["without it second", "without it first"])
def test_a_layer_that_a_shard_never_reached_is_pooled_with_the_weight_of_the_other(build, power, order):
    """Each factor, or each scaling, is a mean over all examples, to which those of the shard add nothing."""
    at = problem("mlp")
    reached = build(at, examples=at.batches[:1])
    name, layer = next(iter(at.layers.layers.items()))
    unreached = reached._like({name: type(reached.data[name]).zeros(layer, at.fisher)}, 6)
    unreached.data |= {other: block for other, block in reached.data.items() if other != name}
    found = PMat.pool([reached, unreached][::order]).data[name]
    weight = reached.n_examples / (reached.n_examples + 6)
    close(found.to_torch(), weight**power * reached.data[name].to_torch())
