"""What can be said of a matrix from its products alone, as methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nngeo.linalg.arguments import shown
from nngeo.linalg.cache import Cache
from nngeo.linalg.decompose import eigvalsh
from nngeo.linalg.diagonal import estimate_diag
from nngeo.linalg.eigenpairs import Eigenpairs, top_eigenpairs
from nngeo.linalg.length import length
from nngeo.linalg.operator import Estimated
from nngeo.linalg.quadrature import SpectralDensity, logdet, spectral_density, trace_of
from nngeo.linalg.trace import estimate_trace
from nngeo.representations.base import PMat

SMALL = 4096  # parameters up to which a norm may form the matrix


class MatrixFree(PMat):
    """Estimates and iterations for a matrix that is never formed. Each is a function of `nngeo.linalg`, for any PMat.

    Random estimates are `Estimated(value, error)`, with the standard error. With a `generator` they leave torch's
    global random numbers alone. `samples` counts products; those of one call share the forward of a mini-batch.
    """

    def top_eigenpairs(self, k: int = 1, **options: Any) -> Eigenpairs:
        """Eigenvalues (k,) at one end of the spectrum, and their eigenvectors in rows (k, P).

        By Lanczos; `options` are those of `linalg.eigenpairs.top_eigenpairs`: `which` of "largest", "smallest" and
        "magnitude", `method` of "lanczos" and "lobpcg", `rtol`, `max_products`, `basis`, `generator`; and
        `preconditioner` for LOBPCG, a PMat, whose `solve` is used.
        """
        if (near := options.get("preconditioner")) is not None:
            if not hasattr(near, "solve"):
                raise TypeError(f"`preconditioner` should be a PMat; got {shown(near)}.")
            options["preconditioner"] = near.solve
        return top_eigenpairs(self, k, **options)

    def estimate_trace(
        self, samples: int = 30, *, method: str = "xtrace", generator: torch.Generator | None = None
    ) -> Estimated:
        """The trace by "hutchinson", "hutch++" or "xtrace", from `samples` products."""
        return estimate_trace(self, samples, method=method, generator=generator)

    def estimate_diag(
        self, samples: int = 30, *, method: str = "xdiag", generator: torch.Generator | None = None
    ) -> Estimated:
        """The diagonal (P,) by "hutchinson" or "xdiag", from `samples` products."""
        return estimate_diag(self, samples, method=method, generator=generator)

    def trace_of(
        self,
        f: Callable[[Tensor], Tensor],
        *,
        samples: int = 10,
        steps: int = 50,
        generator: torch.Generator | None = None,
    ) -> Estimated:
        """The sum of f over the eigenvalues, by stochastic Lanczos quadrature: samples x steps products.

        `F.trace_of(torch.square)` is the square of the Frobenius norm. The error does not count that of the
        quadrature: see `linalg.quadrature`.
        """
        return trace_of(self, f, samples=samples, steps=steps, generator=generator)

    def spectral_density(
        self,
        *,
        points: int = 1000,
        broadening: float | None = None,
        samples: int = 10,
        steps: int = 50,
        generator: torch.Generator | None = None,
    ) -> SpectralDensity:
        """(grid, density, broadening): the density of the eigenvalues, smoothed; samples x steps products."""
        return spectral_density(
            self, points=points, broadening=broadening, samples=samples, steps=steps, generator=generator
        )

    def logdet(  # type: ignore[override]
        self, *, samples: int = 10, steps: int = 50, generator: torch.Generator | None = None
    ) -> Estimated:
        """The logarithm of the determinant of a positive definite matrix, `F + damping`; samples x steps products.

        Raises:
            ValueError: an eigenvalue of zero or less was met.
        """
        return logdet(self, samples=samples, steps=steps, generator=generator)

    def _resolution(self) -> float:
        """From the largest eigenvalue, by four steps of the power method; in float64 it is not worth these products."""
        eps = torch.finfo(self.dtype).eps
        if eps < 1e-10:
            return 0.0

        def largest() -> float:
            v = torch.randn(self.layer_collection.numel(), generator=torch.Generator().manual_seed(0))
            v = v.to(self.device, self.dtype)
            for _ in range(4):
                v = self.mv(v / length(v).clamp(min=torch.finfo(v.dtype).tiny)).detach()
            return float(length(v))

        return 10 * eps * self.__dict__.setdefault("_cache", Cache()).get("largest", None, largest)

    def _norm(self, ord: str | int) -> Tensor:
        """2 by Lanczos; -2 by Lanczos for a positive matrix; "fro", and -2 for others, by forming a small one."""
        p = self.layer_collection.numel()
        generator = torch.Generator("cpu").manual_seed(0)  # the same number every time
        if ord == 2:
            return top_eigenpairs(self, 1, which="magnitude", generator=generator).values[0].abs()
        if p <= SMALL:
            dense = self.to_torch()
            return length(dense) if ord == "fro" else eigvalsh(dense).abs().min()
        if ord == -2:
            least = top_eigenpairs(self, 1, which="smallest", generator=generator).values[0]
            if least > 0:
                return least
        raise NotImplementedError(
            f"norm({ord!r}) of a {type(self).__name__} over {p} parameters would form the matrix, which is done up to "
            f"{SMALL}; norm(-2) of a positive definite one is not formed. The Frobenius norm can be estimated: "
            "`F.trace_of(torch.square).value.sqrt()`. Or use another representation."
        )

    def _without(self, what: str) -> NotImplementedError:
        return NotImplementedError(
            f"{type(self).__name__} has no {what}: it is known by its products with vectors only. It has "
            "`top_eigenpairs(k)`, `spectral_density()`, `trace_of(f)`, `logdet()` and `inv()`. For all eigenvalues, "
            "functions of the matrix and draws, use PMatDense, PMatLowRank or PMatKFAC."
        )
