"""Tensors in, tensors out: decompositions that are kept, Kronecker bases, conjugate gradients, gradients as factors."""

from __future__ import annotations

import copy
import pickle
from functools import cache

import pytest
import torch
from torch.testing import assert_close

from nngeo.linalg.cache import Cache, version
from nngeo.linalg.cg import conjugate_gradients
from nngeo.linalg.kronecker import KroneckerBasis, eigenbasis, outer
from nngeo.linalg.matrixview import MatrixView
from nngeo.linalg.outer import OuterProducts
from nngeo.linalg.selected import SelectedProducts, concatenate
from nngeo.linalg.symmetric import SymmetricMatrix, reciprocal


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(p: int, rank: int | None = None, seed: int = 0) -> torch.Tensor:
    rows = randn(rank or p + 2, p, seed=seed)
    return rows.mT @ rows


# ------------------------------------------------------------------------------------------ cache


def test_a_value_is_made_once_for_each_key():
    cache, made = Cache(), []
    found = [cache.get("name", key, lambda key=key: made.append(key) or key) for key in (1, 1, 2, 2)]
    assert found == [1, 1, 2, 2] and made == [1, 2]


def test_an_inplace_change_is_another_version():
    tensor = torch.zeros(2)
    before = version(tensor)
    tensor.add_(1)
    assert version(tensor) != before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_of_a_cache_are_empty(duplicate):
    cache = Cache()
    cache.get("name", 0, lambda: 1)
    assert duplicate(cache).get("name", 0, lambda: 2) == 2


# ------------------------------------------------------------------------------------------ symmetric

DEFINITE, INDEFINITE = positive(5), positive(5) - 4 * torch.eye(5, dtype=torch.float64)


@pytest.mark.parametrize("matrix", [DEFINITE, INDEFINITE], ids=["definite", "indefinite"])
@pytest.mark.parametrize("regul", [0.0, 1e-8, 0.3])
def test_symmetric_solve_is_exact(matrix, regul):
    v = randn(2, 3, 5)
    x = SymmetricMatrix(matrix).solve(v, regul)
    assert_close(x @ matrix + regul * x, v)


def test_symmetric_solve_factors_once_for_each_regul_and_state(monkeypatch):
    made = []
    factor = SymmetricMatrix._factor
    monkeypatch.setattr(SymmetricMatrix, "_factor", lambda self, regul: made.append(regul) or factor(self, regul))
    matrix, v = SymmetricMatrix(DEFINITE.clone()), randn(5)
    first = [matrix.solve(v, regul) for regul in (0.1, 0.1, 0.2)]
    matrix.tensor.mul_(2)
    assert made == [0.1, 0.1 + 0.1] and not torch.equal(matrix.solve(v, 0.2), first[-1])


@pytest.mark.parametrize("matrix", [positive(5, rank=2), torch.zeros(4, 4)], ids=["low rank", "zero"])
def test_a_singular_matrix_without_damping_is_refused(matrix):
    with pytest.raises(ValueError, match="singular.*regul"):
        SymmetricMatrix(matrix).solve(torch.ones(len(matrix), dtype=matrix.dtype), 0.0)


def test_a_float32_cholesky_that_fails_is_retried_in_float64():
    # The least eigenvalue, 1e-9, is below the rounding of float32.
    matrix = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    x = SymmetricMatrix(matrix).solve(torch.tensor([1.0, -1.0]), 1e-9)
    assert x.dtype == torch.float32
    assert_close(x, torch.tensor([1e9, -1e9]))


@pytest.mark.parametrize("ord", ["fro", 2, -2])
def test_symmetric_norms_are_those_of_torch(ord):
    assert_close(SymmetricMatrix(INDEFINITE).norm(ord), torch.linalg.matrix_norm(INDEFINITE, ord))


def test_the_reciprocal_of_a_zero_needs_damping():
    values = torch.tensor([0.0, 1.0])
    assert_close(reciprocal(values, 0.5), torch.tensor([2.0, 1 / 1.5]))
    with pytest.raises(ValueError, match="block is singular"):
        reciprocal(values, 0.0, "block")


# ------------------------------------------------------------------------------------------ kronecker


@pytest.mark.parametrize("diagonal", [False, True], ids=["dense", "diagonal"])
def test_a_kronecker_product_is_diagonal_in_the_eigenbases_of_its_factors(diagonal):
    g = torch.stack([positive(3), positive(3, seed=1)])
    a = torch.stack([positive(4, seed=2), positive(4, seed=3)])
    a = a.diagonal(dim1=1, dim2=2).clone() if diagonal else a
    (da, ua), (dg, ug) = eigenbasis(a), eigenbasis(g)
    basis, v = KroneckerBasis(ua, ug), randn(5, 2, 3, 4)
    assert_close(basis.scale(v, outer(dg, da)), g @ v @ (torch.diag_embed(a) if diagonal else a))
    assert_close(basis.back(basis.into(v)), v)
    units = torch.eye(24, dtype=torch.float64).reshape(24, 2, 3, 4)
    scalings = randn(2, 3, 4, seed=4)
    dense = basis.scale(units, scalings).reshape(24, 24)
    assert_close(basis.diagonal(scalings).flatten(), dense.diagonal())


def test_eigenvalues_that_are_rounding_are_zero():
    values, _ = eigenbasis(positive(6, rank=2)[None])
    assert int((values != 0).sum()) == 2


# ------------------------------------------------------------------------------------------ cg


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cg_solves_all_rows(seed):
    matrix, b = positive(8, seed=seed), randn(4, 8, seed=seed)
    b[1] = 0
    found = conjugate_gradients(lambda x: x @ matrix, b, rtol=1e-12)
    assert found.converged and not found.indefinite
    assert_close(found.x, torch.linalg.solve(matrix, b.mT).mT)


def test_cg_multiplies_only_the_rows_that_are_not_done():
    matrix, rows = positive(6), []
    b = torch.stack([torch.linalg.eigh(matrix)[1][:, 0], randn(6)])  # an eigenvector is done in one step
    conjugate_gradients(lambda x: rows.append(len(x)) or x @ matrix, b, rtol=1e-10)
    assert rows[0] == rows[-1] == 2 and set(rows[1:-1]) == {1}  # the last one computes the residuals


def test_cg_starts_from_a_guess():
    matrix, x = positive(6), randn(1, 6)
    found = conjugate_gradients(lambda v: v @ matrix, x @ matrix, x0=x)
    assert found.iterations == 0 and found.converged


def test_cg_with_the_inverse_as_preconditioner_takes_one_step():
    matrix, b = positive(6), randn(3, 6)
    found = conjugate_gradients(lambda v: v @ matrix, b, precondition=lambda r: torch.linalg.solve(matrix, r.mT).mT)
    assert found.iterations == 1 and found.converged


def test_cg_reports_what_it_did_not_reach():
    matrix, b = positive(6), randn(2, 6)
    found = conjugate_gradients(lambda v: v @ matrix, b, max_iter=2, rtol=1e-10)
    assert not found.converged and found.iterations == 2
    assert_close(found.residuals, (b - found.x @ matrix).norm(dim=-1) / b.norm(dim=-1))


def test_cg_reports_an_indefinite_matrix():
    found = conjugate_gradients(lambda v: -v, randn(2, 3))
    assert found.indefinite and not found.converged


# ------------------------------------------------------------------------------------------ gradients as factors


def linear(positions: int, seed: int = 0) -> OuterProducts:
    return OuterProducts(randn(2, 3, positions, 4, seed=seed), randn(2, 2, 3, positions, 5, seed=seed + 1))


def selected(positions: int, seed: int = 0) -> SelectedProducts:
    index = torch.randint(4, (3, positions), generator=torch.Generator().manual_seed(seed))
    return SelectedProducts(index, index > 0, 4, randn(1, 2, 3, positions, 5, seed=seed))


PRODUCTS = [linear(1), linear(3), selected(1), selected(4)]
IDS = ["one position", "positions", "one selected", "selected"]


@pytest.mark.parametrize("products", PRODUCTS, ids=IDS)
def test_squares_are_those_of_the_dense_gradients(products):
    assert_close(products.squares(), products.dense().square().sum((0, 1)))


@pytest.mark.parametrize(
    "pair", list(zip(PRODUCTS, [linear(2, 5), linear(3, 5), selected(2, 5), selected(4, 5)], strict=True)), ids=IDS
)
def test_gram_is_that_of_the_dense_gradients(pair):
    left, right = (products.dense().flatten(2) for products in pair)
    assert_close(pair[0].gram(pair[1]), torch.einsum("kbp,lcp->kblc", left, right))


@pytest.mark.parametrize("products", PRODUCTS, ids=IDS)
@pytest.mark.parametrize("identity", [False, True], ids=["both sides", "outputs only"])
def test_rotated_gradients_are_the_dense_ones_in_the_bases(products, identity):
    n = len(products.g)
    ua, ug = torch.linalg.qr(randn(n, 4, 4))[0], torch.linalg.qr(randn(n, 5, 5, seed=1))[0]
    want = ug.mT @ products.dense() if identity else ug.mT @ products.dense() @ ua
    assert_close(products.rotate(None if identity else ua, ug).dense(), want)
    assert_close(products.rotated_squares(None if identity else ua, ug), want.square().sum((0, 1)))


@pytest.mark.parametrize("positions", [1, 4])
def test_the_input_moment_of_selected_rows_is_that_of_one_hot_inputs(positions):
    products = selected(positions)
    hot = torch.nn.functional.one_hot(products.index, 4).double() * products.keep[..., None]
    dense = OuterProducts(hot[None], products.g)
    assert_close(torch.diag_embed(products.input_moment("expand")), dense.input_moment("expand"))
    assert_close(products.input_moment("reduce"), dense.input_moment("reduce"))


# Groups n, cotangents k, examples b, positions t, outputs o, inputs i: around every choice of a product's form.
SIZES = [
    *[(1, k, 3, 16, o, i) for k in (1, 9) for o in (6, 32) for i in (27, 28)],
    *[(1, 1, 3, 300, 6, 27), (1, 9, 2, 300, 32, 27), (1, 9, 2, 16, 64, 577), (1, 1, 2, 300, 64, 577)],
    *[(2, 9, 3, 16, 6, 28), (2, 1, 3, 300, 32, 27), (2, 2, 2, 16, 64, 577)],
    *[(1, 9, 4, 1, 64, 577), (2, 9, 4, 1, 6, 27), (1, 1, 1, 1, 32, 28), (1, 1, 1, 16, 32, 27)],
]
LAYOUTS = {
    "as a tensor": lambda a: a,
    "by feature": lambda a: a.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "by example": lambda a: a.mT.contiguous().mT,
}


def in_layout(layout: str, a: torch.Tensor, g: torch.Tensor) -> OuterProducts:
    """The same products; inputs that are made when they are asked for come in new memory."""
    if layout == "as a tensor":
        return OuterProducts(a, g)
    # What is asked for is a hint, which inputs need not follow.
    return OuterProducts(lambda examples, by_example: LAYOUTS[layout](a[:, examples]), g, a.shape[-1])


@pytest.fixture(params=[None, 1, 3000, "oneDNN"], ids=["usual parts", "parts of one", "parts of some", "oneDNN early"])
def parts(request, monkeypatch):
    """Small temporaries: parts of examples, and of rows; or small products by oneDNN, too."""
    if request.param == "oneDNN":
        monkeypatch.setattr("nngeo.linalg.contraction.LARGE", 2**8)
        monkeypatch.setattr("nngeo.linalg.contraction.onednn_gains", lambda threads: True)
    elif request.param is not None:
        monkeypatch.setattr("nngeo.linalg.squares.CACHED", request.param)
        monkeypatch.setattr("nngeo.linalg.outer.CACHED", request.param)
        monkeypatch.setattr("nngeo.linalg.outer.PART", request.param)


each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_size = pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to rounding of sums whose terms are as large as the largest entry."""
    atol = float(expected.abs().max()) * (1e-12 if found.dtype == torch.float64 else 1e-5)
    assert_close(found.double(), expected, rtol=0, atol=atol)


def factors(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    n, k, b, t, o, i = sizes
    return randn(n, b, t, i).to(dtype), randn(n, k, b, t, o, seed=1).to(dtype)


@cache
def dense(sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """(k, b, n, o, i), in float64."""
    a, g = factors(sizes, dtype)
    return torch.einsum("nkbto,nbti->kbnoi", g.double(), a.double())


@each_dtype
@each_layout
@each_size
def test_squares_are_those_of_sums_over_positions(sizes, layout, dtype, parts):
    products = in_layout(layout, *factors(sizes, dtype))
    near(products.squares(), dense(sizes, dtype).square().sum((0, 1)))


@each_dtype
@each_layout
@each_size
def test_input_moments_are_sums_of_outer_products(sizes, layout, dtype, parts):
    a, g = factors(sizes, dtype)
    products, into = in_layout(layout, a, g), torch.ones(len(a), a.shape[-1], a.shape[-1], dtype=dtype)
    expected = torch.einsum("nbti,nbtj->nij", a.double(), a.double())
    near(products.input_moment(), expected)
    near(products.input_moment(into=into), expected + 1)
    mean = a.double().mean(2)
    near(products.input_moment("reduce"), torch.einsum("nbi,nbj->nij", mean, mean))


@each_dtype
@each_layout
@each_size
def test_squares_of_rotated_gradients_are_those_in_the_bases(sizes, layout, dtype, parts):
    n, _, _, _, o, i = sizes
    ua, ug = torch.linalg.qr(randn(n, i, i))[0].to(dtype), torch.linalg.qr(randn(n, o, o))[0].to(dtype)
    products = in_layout(layout, *factors(sizes, dtype))
    rotated = products.rotate(ua, ug)
    expected = ug.double().mT @ dense(sizes, dtype) @ ua.double()
    near(rotated.squares(), expected.square().sum((0, 1)))
    near(products.rotated_squares(ua, ug), expected.square().sum((0, 1)))
    near(products.rotate(None, ug).squares(ua.mT), expected.square().sum((0, 1)))
    near(rotated.one(0, 0).dense()[0, 0], expected[0, 0])


@each_layout
def test_every_entry_of_float32_squares_is_right_in_most_digits(layout):
    """Sums of squares do not cancel: neither may what is small beside the rest."""
    a, g = randn(1, 4, 16, 27), randn(1, 9, 4, 16, 32, seed=1)
    a *= torch.logspace(-6, 0, 27, dtype=torch.float64)
    a, g = a.float(), g.float()
    expected = torch.einsum("nkbto,nbti->nkboi", g.double(), a.double()).square().sum((1, 2))
    assert_close(in_layout(layout, a, g).squares().double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("layout", ["by feature", "by example"])
def test_gradients_of_one_example_are_made_from_its_inputs_only(layout):
    asked, (a, g) = [], factors((2, 3, 5, 4, 6, 7), torch.float64)
    products = OuterProducts(
        lambda examples, by_example: asked.append(examples) or LAYOUTS[layout](a[:, examples]), g, 7
    )
    near(products.one(1, 3).dense()[0, 0], dense((2, 3, 5, 4, 6, 7), torch.float64)[1, 3])
    assert asked and all(range(5)[examples] == range(3, 4) for examples in asked)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("job", [OuterProducts.squares, OuterProducts.input_moment], ids=["squares", "input moment"])
def test_every_input_is_made_once(job, calls, parts):
    asked, (a, g) = [], factors((1, 2, 7, 4, 6, 27), torch.float64)
    products = OuterProducts(lambda examples, by_example: asked.extend(range(7)[examples]) or a[:, examples], g, 27)
    job(concatenate([products] * calls))
    assert sorted(asked) == sorted([*range(7)] * calls)


@each_layout
def test_calls_of_one_map_are_further_positions(layout, parts):
    shapes = (2, 3, 5, 4, 6, 7), (2, 3, 5, 2, 6, 7)
    both = concatenate([in_layout(layout, *factors(sizes, torch.float64)) for sizes in shapes])
    total = sum(dense(sizes, torch.float64) for sizes in shapes)
    near(both.squares(), total.square().sum((0, 1)))


VIEWS = [
    MatrixView(1, 3, 4, True),
    MatrixView(2, 3, 4, True),
    MatrixView(2, 3, 4, False, transposed=True),
    MatrixView(2, 3, 4, True, transposed=True, kernel=2),
    MatrixView(1, 3, 0, True),
]


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_a_view_is_a_bijection(view):
    p = view.groups * view.rows * (view.columns + view.bias)
    flat = randn(2, p)
    assert view.to_matrix(flat).shape == (2, *view.shape)
    assert_close(view.to_flat(view.to_matrix(flat)), flat)


@pytest.mark.parametrize("regul", [1e-8, 1e-6, 1e-2], ids=str)
def test_float32_solves_of_a_singular_matrix_are_those_of_float64(regul):
    rows = torch.randn(5, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix, v = rows.mT @ rows / 5, torch.ones(60, dtype=torch.float64)
    exact = SymmetricMatrix(matrix).solve(v, regul)
    assert (SymmetricMatrix(matrix.float()).solve(v.float(), regul).double() - exact).norm() < 1e-4 * exact.norm()
