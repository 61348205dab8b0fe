"""Decompositions are right, or an error that says of what; LAPACK is asked in one place."""

from __future__ import annotations

import ast
from math import comb
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nngeo import FIM, LayerCollection, PMatBlockDiag, PMatEKFAC, PMatKFAC, PMatLowRank, PVector
from nngeo.linalg.decompose import cholesky, cholesky_attempts, eigh, eigvalsh, pinv, svd

ROOT = Path(__file__).parent.parent / "nngeo"
FILES = sorted(ROOT.rglob("*.py"))
ITERATIVE = {"eigh", "eigvalsh", "eig", "eigvals", "svd", "svdvals", "svd_lowrank", "pca_lowrank", "symeig", "lobpcg"}
HIDDEN = {
    "pinv",
    "pinverse",
    "matrix_rank",
    "cond",
    "lstsq",
    "cholesky",
    "cholesky_ex",
    "matrix_norm",
    "polar",
    "sqrtm",
}
LIBRARIES = ("torch.", "torch.linalg.", "numpy.linalg.", "np.linalg.", "scipy.linalg.")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def _decompositions(path: Path) -> list[str]:
    """Every use of a decomposition of torch, NumPy or SciPy in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in ITERATIVE | HIDDEN:
            name = ast.unparse(node)
            found += [name] if name in {library + node.attr for library in LIBRARIES} else []
        if isinstance(node, ast.ImportFrom) and f"{node.module}." in LIBRARIES:
            found += [alias.name for alias in node.names if alias.name in ITERATIVE | HIDDEN | {"linalg"}]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lapack_is_asked_for_decompositions_in_one_place(path):
    found = _decompositions(path)
    assert bool(found) if path.name == "decompose.py" else not found


def test_a_bare_decomposition_is_found(tmp_path):
    path = tmp_path / "bare.py"
    path.write_text("import torch\nfrom scipy.linalg import svd\ntorch.linalg.eigh(x)\ntorch.linalg.inv(x)\nF.svd()\n")
    assert _decompositions(path) == ["svd", "torch.linalg.eigh"]


# Right, whatever the matrix


def _few_examples(n: int, p: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(n, p, dtype=dtype)
    return x.mT @ x / n


def _zero_columns(n: int, p: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(n, p, dtype=dtype) * (torch.rand(p) < 0.2)
    return x.mT @ x / n


def _indefinite(n: int, p: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(p, p, dtype=dtype) * (torch.rand(p) < 0.5)
    return x * x.any(0)[:, None] + (x * x.any(0)[:, None]).mT


MATRICES = {
    "few_examples": _few_examples,
    "zero_columns": _zero_columns,
    "indefinite": _indefinite,
    "zero": lambda n, p, dtype: torch.zeros(p, p, dtype=dtype),
    "one_entry": lambda n, p, dtype: torch.eye(p, dtype=dtype) * (torch.arange(p) == 1),
    "equal": lambda n, p, dtype: torch.ones(p, p, dtype=dtype),
    "identity": lambda n, p, dtype: torch.eye(p, dtype=dtype),
}
SCALES = pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
KINDS = pytest.mark.parametrize("kind", MATRICES)


def assert_eigenpairs(values, vectors, matrix, scale=1.0):
    p, eps = len(matrix), 50 * torch.finfo(matrix.dtype).eps
    assert (values.diff() >= 0).all()
    assert_close(vectors.mT @ vectors, torch.eye(p, dtype=matrix.dtype), rtol=0, atol=eps)
    size = float((matrix / scale).norm())
    assert_close((vectors * (values / scale)) @ vectors.mT, matrix / scale, rtol=0, atol=eps * size)


@DTYPES
@SCALES
@KINDS
def test_eigenpairs_make_up_the_matrix(kind, scale, dtype):
    torch.manual_seed(0)
    matrix = scale * MATRICES[kind](3, 40, dtype)
    values, vectors = eigh(matrix)
    assert_eigenpairs(values, vectors, matrix, scale)
    assert_close(eigvalsh(matrix) / scale, values / scale, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-12)


@DTYPES
@SCALES
@KINDS
def test_singular_pairs_make_up_the_rows(kind, scale, dtype):
    torch.manual_seed(0)
    rows = scale * MATRICES[kind](3, 40, dtype)[:, :30].mT  # (30, 40)
    s, vt = svd(rows)
    eps = 50 * torch.finfo(dtype).eps
    assert (s.diff() <= 0).all()
    assert_close(vt @ vt.mT, torch.eye(30, dtype=dtype), rtol=0, atol=eps)
    gram, size = (rows / scale).mT @ (rows / scale), float((rows / scale).norm())
    assert_close((vt.mT * (s / scale).square()) @ vt, gram, rtol=0, atol=eps * size**2)


@DTYPES
def test_rows_of_zeros_have_unit_vectors(dtype):
    matrix = torch.zeros(4, 4, dtype=dtype)
    matrix[1::2, 1::2] = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    values, vectors = eigh(matrix)
    assert_close(values, torch.tensor([-1.0, 0.0, 0.0, 3.0], dtype=dtype))
    assert torch.equal(vectors[:, 1:3], torch.eye(4, dtype=dtype)[:, ::2])


@DTYPES
def test_a_pseudo_inverse_is_torchs(dtype):
    torch.manual_seed(0)
    rows = torch.randn(5, 3, dtype=dtype) @ torch.randn(3, 7, dtype=dtype)
    exact = torch.linalg.pinv(rows.double(), rtol=1e-6).to(dtype)
    assert_close(pinv(rows), exact, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)


def test_nothing_has_no_eigenvalues():
    values, vectors = eigh(torch.zeros(2, 0, 0))
    assert values.shape == (2, 0) and vectors.shape == (2, 0, 0)


# Where LAPACK fails


class Failing:
    """A decomposition whose first calls raise, return NaN, or vectors that are not orthogonal."""

    def __init__(self, how: str, times: int, lapack=torch.linalg.eigh):
        self.how, self.left, self.lapack, self.dtypes = how, times, lapack, []

    def __call__(self, matrix):
        self.dtypes.append(matrix.dtype)
        found = tuple(self.lapack(matrix))
        self.left -= 1
        if self.left < 0:
            return found
        if self.how == "raises":
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        if self.how == "nan":
            return found[0] * torch.nan, *found[1:]
        if self.how == "wrong_values":
            return found[0].flip(-1), *found[1:]
        return found[0], found[1] * 1.1


HOW = pytest.mark.parametrize("how", ["raises", "nan", "wrong_values", "not_orthogonal"])


@HOW
@pytest.mark.parametrize("times", [1, 2, 3])
def test_further_attempts_are_made(how, times):
    torch.manual_seed(0)
    matrix, lapack = _zero_columns(5, 20, torch.float32), Failing(how, times)
    values, vectors = eigh(matrix, lapack=lapack)
    assert values.dtype == torch.float32
    assert_eigenpairs(values, vectors, matrix)
    assert lapack.dtypes == [torch.float32, torch.float32, torch.float64, torch.float64][: times + 1]


@HOW
def test_no_attempt_left_is_an_error_with_size_and_rank(how):
    torch.manual_seed(0)
    matrix = _few_examples(3, 20, torch.float32)
    with pytest.raises(ValueError, match=r"input factor A \(20, 20\), of rank 3, could not be decomposed"):
        eigh(matrix, "input factor A", lapack=Failing(how, 100))


@HOW
def test_matrices_of_a_stack_that_fail_are_done_alone(how):
    torch.manual_seed(0)
    stack = torch.stack([_few_examples(3, 20, torch.float32), _zero_columns(5, 20, torch.float32)])
    values, vectors = eigh(stack, lapack=Failing(how, 2))
    assert_eigenpairs(values[0], vectors[0], stack[0])
    assert_eigenpairs(values[1], vectors[1], stack[1])


def _alone(failing: Failing):
    return lambda matrix: (failing(matrix)[0],)


@pytest.mark.parametrize("how", ["raises", "nan"])
def test_eigenvalues_alone_have_further_attempts(how):
    torch.manual_seed(0)
    matrix = _few_examples(3, 20, torch.float32)
    found = eigvalsh(matrix, lapack=_alone(Failing(how, 2)))
    assert_close(found, eigh(matrix)[0], rtol=0, atol=1e-5)


def test_eigenvalues_that_do_not_add_up_are_not_taken():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="could not be decomposed"):
        eigvalsh(matrix, lapack=lambda m: (torch.linalg.eigvalsh(m) + 0.1,))


@pytest.mark.parametrize("how", ["raises", "nan", "not_orthogonal"])
def test_singular_values_have_further_attempts(how):
    torch.manual_seed(0)
    rows = torch.randn(5, 20)
    lapack = Failing(how, 1, lambda m: torch.linalg.svd(m, full_matrices=False)[1:])
    s, vt = svd(rows, lapack=lapack)
    assert_close((vt.mT * s.square()) @ vt, rows.mT @ rows)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("decompose", [eigh, eigvalsh, svd])
def test_what_is_not_finite_is_said(decompose, value):
    with pytest.raises(ValueError, match=r"kernel \(3, 3\) has 1 entries that are not finite"):
        decompose(torch.eye(3).where(torch.eye(3) + torch.arange(3) != 3, value), "kernel")


@DTYPES
def test_half_precision_is_decomposed_in_single(dtype):
    matrix = _few_examples(3, 10, dtype).half()
    values, vectors = eigh(matrix)
    assert values.dtype == vectors.dtype == torch.half


def test_eigenvalues_within_autocast_are_those_without():
    torch.manual_seed(0)
    matrix, lapack = _few_examples(3, 20, torch.float32), Failing("raises", 0)
    with torch.autocast("cpu", torch.bfloat16):
        eigh(matrix, lapack=lapack)
    assert len(lapack.dtypes) == 1


def test_derivatives_are_those_of_torch():
    torch.manual_seed(0)
    matrix = _few_examples(10, 6, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: eigh((m + m.mT) / 2)[0], (matrix,))
    assert torch.autograd.gradcheck(lambda m: eigh((m + m.mT) / 2, lapack=Failing("nan", 1))[0], (matrix,))


# Cholesky


def test_a_cholesky_factor_that_rounding_breaks_is_made_in_double():
    """In float32 the last pivot is 2^-26 - 2^-26 = 0; exactly it is 2^-50."""
    matrix = torch.tensor([[1.0, 2.0**-13], [2.0**-13, 2.0**-26]])
    (lower,) = cholesky_attempts(matrix, 2.0**-50)
    assert lower.dtype == torch.float64
    assert_close(lower[1, 1].square(), torch.tensor(2.0**-50, dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize("n", [8, 10, 12])
def test_a_cholesky_factor_has_the_digits_of_its_dtype_where_the_pivots_are_small(n):
    """Pascal's symmetric matrix from its largest entry on, of determinant 1, where float32 finds 1.9 for log |L|."""
    matrix = torch.tensor([[float(comb(i + j, i)) for j in reversed(range(n))] for i in reversed(range(n))])
    lower = cholesky(matrix)
    assert lower.dtype == torch.float32
    assert_close(lower.diagonal().log().sum(), torch.tensor(0.0), rtol=0, atol=1e-5)


def test_a_matrix_without_a_cholesky_factor_is_refused():
    with pytest.raises(ValueError, match=r"covariance \(2, 2\) is not positive definite"):
        cholesky(torch.diag(torch.tensor([1.0, -1.0])), "covariance")


# What users see


class Net(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.wide = nn.Linear(width, 5)

    def forward(self, x):
        return self.wide(x)


@pytest.mark.parametrize("kind", [PMatKFAC, PMatEKFAC])
@pytest.mark.parametrize("n", [1, 4, 64])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_inputs_that_are_mostly_zero_give_finite_solutions(kind, n, seed):
    torch.manual_seed(seed)
    model = Net(300)
    x = torch.randn(n, 300) * (torch.rand(300) < 0.1)
    F, v = FIM(model, (x,), kind), PVector.from_model(model).detach()
    assert_close((F + 1e-2).mv(F.solve(v, 1e-2)).to_torch(), v.to_torch(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "call",
    [lambda F: F.solve(torch.ones(6), 1e-3), lambda F: F.norm(2), lambda F: F.get_eigendecomposition()],
    ids=["solve", "norm", "eigendecomposition"],
)
def test_errors_name_the_layer(call):
    layers = LayerCollection.from_model(nn.Sequential(nn.Linear(1, 1), nn.Linear(3, 1)))
    data = {"0": torch.eye(2), "1": torch.full((4, 4), torch.inf)}
    with pytest.raises(ValueError, match=r"Layer '1': .*\(4, 4\)"):
        call(PMatBlockDiag(layers, data=data))


def test_rows_of_columns_of_zeros_are_a_low_rank_matrix():
    torch.manual_seed(0)
    model = Net(20)
    F = FIM(model, (torch.randn(50, 20) * (torch.arange(20) < 2),), PMatLowRank)
    values, vectors = F.get_eigendecomposition()
    assert values.shape == (105,)
    assert_close(vectors.mT @ vectors, torch.eye(105), rtol=0, atol=1e-5)
    assert_close((vectors * values) @ vectors.mT, F.to_torch())
