"""Eigenvalues, singular values and Cholesky factors, or an error: the one place that asks LAPACK for them.

LAPACK's iterations raise, or return NaN without a word, on ordinary matrices: of low rank, or with rows of zeros. So
what they return is looked at, and there are further attempts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from scipy import linalg as scipy_linalg
from torch import Tensor

from nngeo.linalg.memory import require_workspace

Found = tuple[Tensor, ...]
Lapack = Callable[[Tensor], Found]
Reduction = Callable[[Tensor], tuple[Tensor, Callable[[Found], Found]] | None]
Check = Callable[[Tensor, Found], Tensor]  # of matrices (..., m, p) and what was found: which of them are right (...)


def eigh(matrix: Tensor, what: str = "matrix", *, lapack: Lapack | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., p), ascending, and eigenvectors in columns (..., p, p), of symmetric matrices; differentiable.

    Rows of zeros are left out, which is exact and cheaper, where no derivative is asked for. Where LAPACK fails, it is
    given `M + c I`, c the mean eigenvalue, then both in float64; on a GPU, all of it on the CPU, too. A stack is done
    at once, and those of its matrices that fail are done one by one.

    Args:
        what: names the matrix in errors.
        lapack: decomposes a stack of matrices; torch.linalg.eigh if None.

    Raises:
        ValueError: entries that are not finite, or no attempt has succeeded; with the size and the rank.
    """
    both = lapack or torch.linalg.eigh
    values, vectors = _each(matrix, what, (both, _shifted(both)), _are_eigenpairs, _without_zero_rows)
    return values, vectors


def eigvalsh(matrix: Tensor, what: str = "matrix", *, lapack: Lapack | None = None) -> Tensor:
    """Eigenvalues (..., p), ascending, of symmetric matrices (..., p, p); otherwise as `eigh`."""
    alone = lapack or (lambda m: (torch.linalg.eigvalsh(m),))
    return _each(matrix, what, (alone, _shifted(alone)), _are_eigenvalues, _without_zero_rows)[0]


def svd(rows: Tensor, what: str = "matrix", *, lapack: Lapack | None = None) -> tuple[Tensor, Tensor]:
    """Singular values (..., r), descending, and right singular vectors (..., r, p) of (..., m, p), r = min(m, p).

    Columns of zeros are left out, as rows are in `eigh`; where LAPACK fails, it is given the transpose, then both in
    float64, and its other algorithm on the CPU where no derivative is asked for.
    """
    right = lapack or (lambda m: torch.linalg.svd(m, full_matrices=False)[1:])
    last = () if rows.requires_grad else (_by_bidiagonal,)
    s, vt = _each(rows, what, (right, _transposed, *last), _are_singular_pairs, _without_zero_columns)
    return s, vt


def pinv(matrix: Tensor, what: str = "matrix") -> Tensor:
    """The pseudo-inverse (p, m) of (m, p): singular values that rounding can't tell from zero count as zero."""
    s, vt = svd(matrix, what)
    kept = s > max(matrix.shape) * torch.finfo(s.dtype).eps * s[:1]
    s, vt = s[kept, None], vt[kept]
    return (vt / s).mT @ (vt @ matrix.mT / s)


def cholesky(matrix: Tensor, what: str = "matrix") -> Tensor:
    """The lower factor L (p, p) of a positive definite matrix, in its dtype, computed in float64; differentiable.

    Raises:
        ValueError: it is not positive definite.
    """
    for lower in cholesky_attempts(matrix.double()):
        return lower.to(matrix.dtype)
    raise ValueError(f"The {what} {_size(matrix)} is not positive definite.")


def cholesky_attempts(matrix: Tensor, shift: float = 0.0) -> Iterator[Tensor]:
    """L (p, p) with `L L' = M + shift I`, in the own dtype and in float64, as far as rounding leaves them one."""
    require_workspace(f"The Cholesky factor of a matrix {_size(matrix)}", 2 * matrix.numel(), matrix)
    for dtype in dict.fromkeys((matrix.dtype, torch.float64)):
        shifted = matrix.to(dtype, copy=True)
        shifted.diagonal().add_(shift)
        lower, positive = cholesky_factors(shifted)
        if positive:
            yield lower


def cholesky_factors(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """L (..., p, p) in the own dtype, and whether each matrix is positive definite (...): else its L means nothing."""
    lower, info = torch.linalg.cholesky_ex(matrices)
    return lower, (info == 0) & lower.detach().diagonal(dim1=-2, dim2=-1).isfinite().all(-1)


# Attempts


def _each(
    matrices: Tensor,
    what: str,
    ways: tuple[Lapack, ...],
    check: Check,
    reduced: Reduction,
) -> Found:
    """What the first way finds for a stack, and for each matrix it fails for, what is found one by one."""
    dtype = matrices.dtype
    matrices = matrices.to(torch.promote_types(dtype, torch.float32))  # there are none in half precision
    if matrices.numel() == 0:
        return ways[0](matrices)
    if not bool(matrices.detach().isfinite().all()):
        count = int((~matrices.detach().isfinite()).sum())
        raise ValueError(f"The {what} {_size(matrices)} has {count} entries that are not finite.")
    small = min(matrices.shape[-2:])
    # A copy, what is found, and the work of the divide-and-conquer on one of the matrices.
    require_workspace(f"The decomposition of a {what} {_size(matrices)}", 2 * matrices.numel() + 2 * small**2, matrices)
    single = matrices.shape[:-2].numel() == 1
    stack = matrices.flatten(0, -3) if matrices.ndim > 2 else matrices[None]
    found = None if single else _attempt(ways[0], stack)
    right = [False] * len(stack) if found is None else check(stack, found).tolist()
    if found is None or not all(right):
        parts = [
            tuple(x[j] for x in found) if found and right[j] else _one(stack[j], what, ways, check, reduced)
            for j in range(len(stack))
        ]
        found = tuple(torch.stack(x) for x in zip(*parts, strict=True))
    return tuple(x.reshape(*matrices.shape[:-2], *x.shape[1:]).to(dtype) for x in found)


def _one(
    matrix: Tensor,
    what: str,
    ways: tuple[Lapack, ...],
    check: Check,
    reduced: Reduction,
) -> Found:
    differentiable = matrix.requires_grad and torch.is_grad_enabled()
    part, whole = (matrix, None) if differentiable else reduced(matrix) or (matrix, None)
    for form in _forms(part):
        for way in ways:
            found = _attempt(way, form)
            if found is not None and bool(check(form, found)):
                found = tuple(x.to(matrix) for x in found)
                if all(bool(x.detach().isfinite().all()) for x in found):
                    return whole(found) if whole else found
    raise ValueError(
        f"The {what} {_size(matrix)}, of rank {_rank(matrix)}, could not be decomposed, in {matrix.dtype} nor in "
        f"float64; its largest entry is {float(matrix.abs().max()):.3g}. Use a representation without decompositions "
        "(PMatDiag), or add damping first."
    )


def _forms(matrix: Tensor) -> Iterator[Tensor]:
    """The matrix in its own dtype and in float64, then the same on the CPU."""
    devices = dict.fromkeys((matrix.device, torch.device("cpu")))
    for device in devices:
        for dtype in dict.fromkeys((matrix.dtype, torch.float64)):
            yield matrix.to(device, dtype)


def _attempt(lapack: Lapack, matrices: Tensor) -> Found | None:
    try:
        return tuple(lapack(matrices))
    except (RuntimeError, scipy_linalg.LinAlgError) as error:  # some libraries of a GPU report a plain RuntimeError
        if "memory" in str(error):
            raise
        return None


def _shifted(lapack: Lapack) -> Lapack:
    """The eigenvalues of `M + c I` less c: no eigenvalue of many is zero, and all have the same vectors."""

    def decompose(matrix: Tensor) -> Found:
        c = matrix.detach().diagonal(dim1=-2, dim2=-1).abs().mean()
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        values, *vectors = lapack(matrix + c * identity)
        return values - c, *vectors

    return decompose


def _transposed(rows: Tensor) -> Found:
    u, s, _ = torch.linalg.svd(rows.mT, full_matrices=False)
    return s, u.mT


def _by_bidiagonal(rows: Tensor) -> Found:
    """By QR iterations on a bidiagonal matrix, which converge where the divide-and-conquer of the others does not."""
    found = scipy_linalg.svd(rows.detach().cpu().numpy(), full_matrices=False, lapack_driver="gesvd")[1:]
    return tuple(torch.from_numpy(x).to(rows) for x in found)


# Without zeros


def _without_zero_rows(matrix: Tensor) -> tuple[Tensor, Callable[[Found], Found]] | None:
    """A symmetric matrix without its rows and columns of zeros, and its eigenpairs from those of the part."""
    kept = _some(matrix.detach().any(-1))
    if bool(kept.all()):
        return None
    inside, outside = (mask.nonzero()[:, 0] for mask in (kept, ~kept))

    def whole(found: Found) -> Found:
        part, p = found[0], len(kept)
        below = int((part < 0).sum())
        order = torch.arange(p, device=part.device)
        zeros, columns = order[below : below + len(outside)], torch.cat([order[:below], order[below + len(outside) :]])
        values = part.new_zeros(p).index_copy_(0, columns, part)
        if len(found) == 1:
            return (values,)
        vectors = part.new_zeros(p, p)
        vectors[inside[:, None], columns] = found[1]
        vectors[outside, zeros] = 1
        return values, vectors

    return matrix[inside][:, inside], whole


def _without_zero_columns(rows: Tensor) -> tuple[Tensor, Callable[[Found], Found]] | None:
    """Rows without their columns of zeros, and the singular pairs from those of the part."""
    kept = _some(rows.detach().any(0))
    if bool(kept.all()):
        return None
    inside, outside = (mask.nonzero()[:, 0] for mask in (kept, ~kept))

    def whole(found: Found) -> Found:
        s, vt = found
        missing = min(rows.shape) - len(s)
        vectors = vt.new_zeros(min(rows.shape), len(kept))
        vectors[: len(s), inside] = vt
        vectors[torch.arange(len(s), len(vectors), device=s.device), outside[:missing]] = 1
        return torch.cat([s, s.new_zeros(missing)]), vectors

    return rows[:, inside], whole


def _some(kept: Tensor) -> Tensor:
    """The mask, of one entry where it is of none: LAPACK takes no empty matrices."""
    return kept if kept.any() else (torch.arange(len(kept), device=kept.device) == 0)


# Checks


def _probe(like: Tensor, size: int) -> Tensor:
    """(size, 1), a vector without a pattern, the same each time, of length one."""
    z = (torch.arange(1, size + 1, dtype=torch.float64, device="cpu") ** 2).sin()
    return (z / z.norm()).to(like)[:, None]


def _tolerance(matrices: Tensor) -> float:
    return (100 + max(matrices.shape[-2:])) * torch.finfo(matrices.dtype).eps


@torch.no_grad()
def _are_eigenpairs(matrices: Tensor, found: Found) -> Tensor:
    """Whether `V V' z = z` and `V diag(values) V' z = M z`, relative to the largest entry, so that none overflows."""
    values, vectors = found
    with torch.autocast(matrices.device.type, enabled=False):
        z, size = _probe(matrices, matrices.shape[-1]), matrices.abs().amax((-2, -1), keepdim=True)
        size = torch.where(size > 0, size, 1)
        turned, relative = vectors.mT @ z, values[..., None] / size
        orthogonal = (vectors @ turned - z).flatten(-2).norm(dim=-1)
        residual = (vectors @ (relative * turned) - (matrices / size) @ z).flatten(-2).norm(dim=-1)
    tolerance = _tolerance(matrices)
    return (orthogonal <= tolerance) & (residual <= tolerance * relative.abs().amax((-2, -1)))


@torch.no_grad()
def _are_eigenvalues(matrices: Tensor, found: Found) -> Tensor:
    """Whether they have the sum and the sum of squares that the matrix tells."""
    size = matrices.abs().amax((-2, -1), keepdim=True)
    size = torch.where(size > 0, size, 1)
    relative, entries = found[0] / size[..., 0], matrices / size
    length = entries.flatten(-2).norm(dim=-1)
    sums = relative.sum(-1) - entries.diagonal(dim1=-2, dim2=-1).sum(-1)
    tolerance = _tolerance(matrices) * length
    return ((relative.norm(dim=-1) - length).abs() <= tolerance) & (sums.abs() <= matrices.shape[-1] ** 0.5 * tolerance)


@torch.no_grad()
def _are_singular_pairs(matrices: Tensor, found: Found) -> Tensor:
    """Whether the right vectors V are orthonormal, and `|M V'w| = |diag(s) w|` and `|M|` that of s."""
    s, vt = found
    with torch.autocast(matrices.device.type, enabled=False):
        w, size = _probe(matrices, s.shape[-1]), matrices.abs().amax((-2, -1), keepdim=True)
        size = torch.where(size > 0, size, 1)
        back, relative, entries = vt.mT @ w, s[..., None] / size, matrices / size
        orthogonal = (vt @ back - w).flatten(-2).norm(dim=-1)
        lengths = (entries @ back).flatten(-2).norm(dim=-1) - (relative * w).flatten(-2).norm(dim=-1)
        whole = relative.flatten(-2).norm(dim=-1)
        missing = entries.flatten(-2).norm(dim=-1) - whole
    tolerance = _tolerance(matrices)
    return (orthogonal <= tolerance) & (lengths.abs() <= tolerance * whole) & (missing.abs() <= tolerance * whole)


def _size(matrices: Tensor) -> str:
    return f"({', '.join(map(str, matrices.shape))})"


def _rank(matrix: Tensor) -> int:
    """By QR with pivots, which does not iterate."""
    entries = matrix.detach().to("cpu", torch.float64)
    r = torch.from_numpy(scipy_linalg.qr(entries.numpy(), mode="r", pivoting=True)[0]).diagonal().abs()
    return int((r > max(entries.shape) * torch.finfo(matrix.dtype).eps * r.max()).sum())
