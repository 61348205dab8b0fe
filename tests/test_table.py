"""The table of representations holds: each of its cells, on seven networks, against the dense matrix."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import nngeo
from nngeo import FIM, Jacobian, PMat
from nngeo.representations import table
from tests.cases import CASES, Case

IDS = ("linear", "conv2d_groups", "linear_3d", "embedding_padding", "tokens", "called_twice", "dead_layer")
NETWORKS = [case for case in CASES if case.id in IDS]
EXACT = {"rtol": 1e-8, "atol": 1e-9}
CELLS = table.cells()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@functools.cache
def made(case: Case, name: str) -> PMat:
    model = case.make()
    if name == "PMatEye":
        return nngeo.PMatEye(nngeo.LayerCollection.from_model(model), 2.0, dtype=torch.float64)
    return FIM(model, case.batch(), getattr(nngeo, name), case.variant, function=case.function(model))


@functools.cache
def jacobian(case: Case) -> nngeo.PFMapDense:
    model = case.make()
    return Jacobian(model, case.batch(), case.function(model))


def eigenvectors_of(matrix: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    assert_close(rows @ rows.mT, torch.eye(len(rows), dtype=rows.dtype), **EXACT)
    return (rows @ matrix - values[:, None] * rows).norm()


def top(F: PMat, k: int = 2) -> Tensor:
    values, rows = F.top_eigenpairs(k)
    assert_close(eigenvectors_of(F.to_torch(), values, rows), values.new_zeros(()), rtol=0, atol=1e-7)
    return values


def joined(F: PMat, case: Case, tmp_path) -> PMat:
    new = F.to(F.dtype)
    new.generator = F.generator
    return new.update(case.batch(seed=1))


def saved(F: PMat, case: Case, tmp_path) -> Tensor:
    F.save(tmp_path / "F")
    return PMat.load(tmp_path / "F").to_torch()


def eigh(F: PMat) -> Tensor:
    values, basis = F.eigh()
    vectors = basis.to_torch()
    return (vectors * values) @ vectors.mT


def damped(M: Tensor) -> Tensor:
    return M + 0.1 * torch.eye(len(M), dtype=M.dtype)


def powered(M: Tensor, p: float) -> Tensor:
    values, vectors = torch.linalg.eigh(M)
    return (vectors * values**p) @ vectors.mT


# operation: (F, case, a folder) -> found, M -> expected
WAYS = {
    "mv": (lambda F, c, t: F.mv(drawn(3, F.size(0))), lambda M, c: drawn(3, len(M)) @ M),
    "vTMv": (lambda F, c, t: F.vTMv(drawn(F.size(0))), lambda M, c: drawn(len(M)) @ M @ drawn(len(M))),
    "mapTMmap": (
        lambda F, c, t: F.mapTMmap(jacobian(c), "diag"),
        lambda M, c: torch.einsum("knp,pq,knq->kn", jacobian(c).to_torch(), M, jacobian(c).to_torch()),
    ),
    "J F J'": (
        lambda F, c, t: (jacobian(c) @ F @ jacobian(c).T).to_torch(),
        lambda M, c: torch.einsum("knp,pq,lmq->knlm", jacobian(c).to_torch(), M, jacobian(c).to_torch()),
    ),
    "solve": (
        lambda F, c, t: damped_product(F, F.solve(drawn(F.size(0)), 0.1, **tight(F))),
        lambda M, c: drawn(len(M)),
    ),
    "trace": (lambda F, c, t: F.trace(), lambda M, c: M.trace()),
    "norm": (lambda F, c, t: F.norm(), lambda M, c: M.norm()),
    "norm 2": (lambda F, c, t: F.norm(2), lambda M, c: torch.linalg.matrix_norm(M, 2)),
    "get_diag": (lambda F, c, t: F.get_diag(), lambda M, c: M.diagonal()),
    "to_torch": (lambda F, c, t: F.to_torch(), lambda M, c: M),
    "F + damping": (lambda F, c, t: (F + 0.1).mv(drawn(F.size(0))), lambda M, c: damped(M) @ drawn(len(M))),
    "inv": (
        lambda F, c, t: damped_product(F, positive(F).inv(**tight(F)).mv(drawn(F.size(0))), shift(F.to_torch())),
        lambda M, c: drawn(len(M)),
    ),
    "pinv": (lambda F, c, t: projected(F), lambda M, c: M),
    "pow": (lambda F, c, t: positive(F).pow(-0.5).to_torch(), lambda M, c: powered(positive_dense(M), -0.5)),
    "logdet": (lambda F, c, t: positive(F).logdet(**draws(F)), lambda M, c: torch.linalg.slogdet(positive_dense(M))[1]),
    "sample": (
        lambda F, c, t: positive(F).sample(2, torch.Generator().manual_seed(0)),
        lambda M, c: drawn(2, len(M)) @ powered(positive_dense(M), -0.5),
    ),
    "get_diag(inverse)": (
        lambda F, c, t: positive(F).get_diag(inverse=True),
        lambda M, c: torch.linalg.inv(positive_dense(M)).diagonal(),
    ),
    "eigh": (lambda F, c, t: eigh(F), lambda M, c: M),
    "top_eigenpairs": (lambda F, c, t: top(F), lambda M, c: torch.linalg.eigvalsh(M).flip(0)[:2]),
    "cond": (lambda F, c, t: positive(F).cond(), lambda M, c: torch.linalg.cond(positive_dense(M))),
    "F + G": (lambda F, c, t: (F + F).to_torch(), lambda M, c: 2 * M),
    "update": (joined, None),
    "save": (saved, lambda M, c: M),
}


def tight(F: PMat) -> dict[str, float]:
    """Iterative solvers are as exact as they are asked to be."""
    return {"rtol": 1e-12} if isinstance(F, nngeo.PMatImplicit) else {}


def draws(F: PMat) -> dict:
    return {"generator": torch.Generator().manual_seed(0)} if isinstance(F, nngeo.PMatImplicit) else {}


def shift(M: Tensor) -> float:
    """Damping that makes a matrix positive; quasi-diagonal ones need not be."""
    return 0.1 + max(0.0, -2 * float(torch.linalg.eigvalsh(M)[0]))


def positive(F: PMat) -> PMat:
    return F + shift(F.to_torch())


def positive_dense(M: Tensor) -> Tensor:
    return M + shift(M) * torch.eye(len(M), dtype=M.dtype)


def damped_product(F: PMat, x: Tensor, by: float = 0.1) -> Tensor:
    return F.mv(x) + by * x


def projected(F: PMat) -> Tensor:
    M = F.to_torch()
    return M @ F.pinv(rtol=1e-9).to_torch() @ M


def test_the_table_has_no_gap_and_no_unknown_operation():
    assert {operation for operation, _ in CELLS} == set(WAYS)
    assert all(cost or kind == table.NONE for cost, kind in CELLS.values())


@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: case.id)
@pytest.mark.parametrize(("operation", "name"), CELLS, ids=lambda part: str(part))
def test_a_cell_is_what_the_table_says(operation, name, case, tmp_path):
    F, kind = made(case, name), CELLS[operation, name][1]
    way, expected = WAYS[operation]
    if kind == table.NONE:
        with pytest.raises((NotImplementedError, ValueError)):
            way(F, case, tmp_path)
    elif kind == table.ESTIMATED:
        found, error = way(F, case, tmp_path)
        assert abs(float(found) - float(expected(F.to_torch(), case))) <= 4 * float(error) + 1e-8
    elif operation == "update":
        model, batches = case.make(), [case.batch(), case.batch(seed=1)]
        in_basis = type(F) is nngeo.PMatEKFAC  # whose eigenbasis stays that of the first examples
        whole = FIM(model, batches[:1] if in_basis else batches, type(F), case.variant, function=case.function(model))
        if in_basis:
            whole.update_diag(batches)
        assert_close(way(F, case, tmp_path).to_torch(), whole.to_torch(), **EXACT)
    else:
        rtol = 1e-7 if operation == "cond" else 1e-8
        assert_close(way(F, case, tmp_path), expected(F.to_torch(), case), rtol=rtol, atol=1e-8)
