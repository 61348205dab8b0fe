"""Predictions of a tangent kernel, and comparisons of kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.linalg.arguments import flag, number, shown, tensor
from nngeo.linalg.length import length
from nngeo.linalg.precision import full_precision
from nngeo.linalg.symmetric import SymmetricMatrix, require_symmetric
from nngeo.representations import FMatDense
from nngeo.vectors import FVector

Kernel = FMatDense | Tensor


@full_precision
def kernel_predict(
    K: Kernel,
    y: Tensor,
    K_cross: Kernel,
    t: float | None = None,
    ridge: float = 0.0,
    f0: Tensor | float = 0.0,
    f0_cross: Tensor | float = 0.0,
    rate: float = 1.0,
) -> Tensor:
    """Outputs (m, k) of the linearized network on other examples, after training for a time (Jacot et al., 2018).

    `f0_cross + K_cross (K + ridge)^-1 (1 - exp(-(K + ridge) rate t / n)) (y - f0)`: gradient flow on
    `(|f - y|^2 + ridge |w - w0|^2) / (2 n)`, s steps of gradient descent at a small rate r being rate t = r s. At its
    end (t=None) it is kernel ridge regression, or the interpolation of least norm.

    Args:
        K: of the n training examples: `NTK(model, x)`, (k, n, k, n), or one (n, n) for all outputs.
        y: (n, k).
        K_cross: `NTK(model, new, x)`, (k, m, k, n), or (m, n).
        t: time; None for the end.
        ridge: added to the kernel.
        f0: (n, k), the outputs of the network at w0; 0 for one that starts there at zero.
        f0_cross: (m, k), those on the other examples.

    Costs O((k n)^3) once for a kernel, by eigenvalues; for the end with a ridge by Cholesky, for each ridge.

    Raises:
        ValueError: shapes that do not fit, or a negative time, rate or ridge.

    >>> kernel_predict(torch.eye(2), torch.tensor([[1.0], [2.0]]), torch.eye(2), ridge=1.0)
    tensor([[0.5000],
            [1.0000]])
    """
    n, k = tensor("y", y, "(n, k)", ndim=2).shape
    rows, columns = _shapes(K, K_cross, n, k)
    if rows != n or columns != n:
        raise ValueError(
            f"`y` {tuple(y.shape)}, `K` and `K_cross` do not fit: K is of {rows} examples, K_cross of {columns}."
        )
    ridge, rate = number("ridge", ridge, least=0), number("rate", rate, least=0)
    t = None if t is None else number("t", t, least=0)
    f0, f0_cross = _outputs("f0", f0, n, k), _outputs("f0_cross", f0_cross, None, k)
    missing = y - f0
    if t is None and ridge > 0:
        weights = _solve(K, missing, ridge)
    else:
        values, vectors = _eigen(K)
        coordinates = vectors.mT @ (missing.mT.reshape(-1, 1) if isinstance(K, FMatDense) else missing)
        weights = vectors @ (_gains(values, ridge, None if t is None else rate * t / n)[:, None] * coordinates)
        weights = weights.reshape(k, n).mT if isinstance(K, FMatDense) else weights
    if isinstance(K_cross, FMatDense):
        return f0_cross + K_cross.mv(FVector(weights.mT)).to_torch().mT
    return f0_cross + K_cross @ weights


@full_precision
def alignment(K: Kernel, y: Tensor, *, centred: bool = False) -> Tensor:
    """The cosine between a kernel and that of targets y (n, k), `<K, y y'> / (|K| |y y'|)` (Cristianini et al., 2001).

    Args:
        K: (n, n), or (k, n, k, n), of which the outputs are summed.
        centred: whether the means over examples are taken out of both (Cortes et al., 2012).
    """
    y = tensor("y", y, "(n, k)", ndim=2)
    return _cosine(by_example("K", K), y @ y.mT, flag("centred", centred))


@full_precision
def cka(K1: Kernel, K2: Kernel) -> Tensor:
    """Centred kernel alignment of two kernels on the same examples, from 0 to 1 (Kornblith et al., 2019).

    1 for kernels that are equal up to a factor and the means over examples.
    """
    return _cosine(by_example("K1", K1), by_example("K2", K2), True)


@full_precision
def effective_rank(K: Kernel, ridge: float | None = None) -> Tensor:
    """How many eigenvalues count, 0-d.

    The exponential of the entropy of the eigenvalues over their sum (Roy & Vetterli, 2007); with a ridge the effective
    dimension `tr K (K + ridge)^-1`.
    """
    values = _eigen(_checked("K", K))[0].clamp(min=0)
    if ridge is not None:
        ridge = number("ridge", ridge, least=0)
        return (values / (values + ridge)).sum()
    share = values / values.sum()
    return (-torch.special.xlogy(share, share).sum()).exp()


def by_example(name: str, K: Kernel) -> Tensor:
    """(n, n), summed over outputs (the trace of each block)."""
    K = _checked(name, K)
    return torch.einsum("knkm->nm", K.data) if isinstance(K, FMatDense) else K


def _checked(name: str, K: Kernel) -> Kernel:
    if isinstance(K, FMatDense):
        return K
    if tensor(name, K, "(n, n), or a kernel of NTK", ndim=2).shape[0] != K.shape[1]:
        raise ValueError(f"`{name}` should be a kernel (n, n); it has the shape {tuple(K.shape)}.")
    return K


def _outputs(name: str, f: Tensor | float, n: int | None, k: int) -> Tensor | float:
    """Outputs (n, k), or one number for all."""
    if not isinstance(f, Tensor):
        return number(name, f)
    if f.ndim and (f.ndim != 2 or f.shape[1] != k or n not in (None, len(f))):
        raise ValueError(f"`{name}` should be ({'m' if n is None else n}, {k}), or a number; it is {shown(f)}.")
    return f


def _cosine(K1: Tensor, K2: Tensor, centred: bool) -> Tensor:
    if K1.shape != K2.shape:
        raise ValueError(f"Kernels should be of the same examples; found {tuple(K1.shape)} and {tuple(K2.shape)}.")
    if centred:
        K1, K2 = (K - K.mean(0, keepdim=True) - K.mean(1, keepdim=True) + K.mean() for K in (K1, K2))
    return (K1 / length(K1) * (K2 / length(K2))).sum()


def _shapes(K: Kernel, K_cross: Kernel, n: int, k: int) -> tuple[int, int]:
    """The numbers of training examples of the two."""
    found = []
    for name, kernel in (("K", K), ("K_cross", K_cross)):
        if not isinstance(kernel, FMatDense):
            tensor(name, kernel, "(..., n), or a kernel of NTK")
        shape = tuple(kernel.data.shape if isinstance(kernel, FMatDense) else kernel.shape)
        if len(shape) == 4 and (shape[0] != k or shape[2] != k) or len(shape) not in (2, 4):
            raise ValueError(f"`{name}` should be ({k}, ..., {k}, {n}) or (..., {n}) for y ({n}, {k}); it is {shape}.")
        found.append(shape[-1])
    return found[0], found[1]


def _eigen(K: Kernel) -> tuple[Tensor, Tensor]:
    if isinstance(K, FMatDense):
        return K.get_eigendecomposition()
    return _symmetric(K).eigh()


def _symmetric(K: Tensor) -> SymmetricMatrix:
    require_symmetric(K, "`K`")
    return SymmetricMatrix(K)


def _solve(K: Kernel, missing: Tensor, ridge: float) -> Tensor:
    """(n, k)."""
    if isinstance(K, FMatDense):
        return K.solve(FVector(missing.mT.contiguous()), regul=ridge).to_torch().mT
    return _symmetric(K).solve(missing.mT, ridge).mT


def _gains(values: Tensor, ridge: float, time: float | None) -> Tensor:
    """What is learned along each eigenvector, over its eigenvalue; nothing along those of rounding alone."""
    noise = torch.finfo(values.dtype).eps * len(values) * values.abs().max()
    values = values.clamp(min=0) + ridge
    kept = values > noise
    safe = values.where(kept, torch.ones_like(values))
    if time is None:
        return torch.where(kept, 1 / safe, torch.zeros_like(values))
    return torch.where(kept, -torch.expm1(-safe * time) / safe, torch.full_like(values, time))
