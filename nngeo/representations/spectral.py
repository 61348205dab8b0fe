"""Damping and functions of a matrix, which are matrices of the same kind: inverse, powers, determinant, draws."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nngeo.layers.collection import LayerCollection
from nngeo.linalg.arguments import count, flag, number, random_source
from nngeo.linalg.memory import require_workspace
from nngeo.linalg.spectrum import Spectrum, logarithm, power, pseudo_inverse
from nngeo.representations.damping import Damping
from nngeo.representations.estimate import Estimate

if TYPE_CHECKING:
    from nngeo.representations.base import PMat

Function = Callable[[Tensor], Tensor]


class SpectralAlgebra(Estimate):
    """What follows from the eigenvalues. A representation gives damping and functions of itself; the rest is here.

    Results are exact for the matrix as it is stored. They are differentiable in the damping.
    """

    layer_collection: LayerCollection
    _origin: Mapping[str, Any] | None = None  # what a file says of the estimate

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """That of the results."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """That of the results."""

    # What a representation provides

    def _shifted(self, damping: Damping) -> PMat:
        raise self._without("damped form; give `regul` to `solve`")

    def _function(self, f: Function) -> PMat:
        """The matrix with f applied to its eigenvalues."""
        raise self._without("eigenvalues")

    def _spectrum(self) -> Spectrum:
        """All P eigenvalues, with their eigenbasis."""
        raise self._without("eigenvalues")

    def _inverse(self) -> PMat:
        return self._function(partial(power, exponent=-1.0))

    def _logdet(self) -> Tensor:
        return logarithm(self._spectrum().values).sum()

    def _top(self, k: int) -> tuple[Tensor, Tensor]:
        spectrum = self._spectrum()
        values, where = spectrum.values.topk(k)
        return values, spectrum.vectors(where)

    def _draws(self, normal: Callable[[int], Tensor], f: Function) -> Tensor:
        """f of the matrix, times standard normal vectors `normal(P)` (n, P)."""
        spectrum = self._spectrum()
        return spectrum.back(spectrum.into(normal(len(spectrum.values))) * f(spectrum.values))

    def norm(self, ord: str | int | None = None) -> Tensor:
        """The norm, 0-d; see PMat."""
        raise NotImplementedError

    # What users call

    def inv(self, regul: float = 0.0) -> PMat:
        """`(F + regul I)^-1`, a matrix.

        Raises:
            ValueError: `F + regul I` is singular, with its smallest eigenvalue; or `regul` is negative.
        """
        return self._with_regul(regul)._inverse()

    def pinv(self, atol: float | None = None, rtol: float | None = None) -> PMat:
        """The inverse within the range, and zero outside of it.

        Args:
            atol: eigenvalues up to `atol` in size count as zero; 0 if None.
            rtol: so do those up to `rtol` times the largest; if None the precision of the dtype times P, or 0 where
                `atol` is given.
        """
        eps = 0.0 if atol is not None else torch.finfo(self.dtype).eps * self.layer_collection.numel()
        rtol = eps if rtol is None else number("rtol", rtol, least=0)
        cutoff = max(0.0 if atol is None else number("atol", atol, least=0), rtol * float(self.norm(2).detach()))
        return self._function(partial(pseudo_inverse, cutoff=cutoff))

    def pow(self, exponent: float, regul: float = 0.0) -> PMat:
        """`(F + regul I)^exponent` for a real power: `F.pow(-0.5)` is the inverse of the symmetric square root.

        Raises:
            ValueError: a negative power of a singular matrix, or a fractional one of an indefinite one, with the
                smallest eigenvalue; or `regul` is negative.
        """
        exponent, matrix = number("exponent", exponent), self._with_regul(regul)
        return matrix._inverse() if exponent == -1 else matrix._function(partial(power, exponent=exponent))

    def _with_regul(self, regul: float) -> Any:
        return self + regul if number("regul", regul, least=0) else self

    def __pow__(self, exponent: float) -> PMat:
        return self.pow(exponent)

    def logdet(self) -> Tensor:
        """The logarithm of the determinant, 0-d.

        Raises:
            ValueError: the matrix is not positive definite; with its smallest eigenvalue.
        """
        return self._logdet()

    def sample(self, n: int = 1, generator: torch.Generator | None = None, *, inverse: bool = True) -> Tensor:
        """(n, P), draws from the normal distribution of mean zero and covariance `F^-1`; F with `inverse=False`.

        They are `F^(-1/2) z`, or `F^(1/2) z`, for standard normal z: the same z gives the same draws in every
        representation of one matrix. `PVector(F.layer_collection, draw)` makes a vector of a draw.

        Raises:
            ValueError: the matrix is not positive definite (or semidefinite, for `inverse=False`).
        """
        size = self.layer_collection.numel()
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        require_workspace(f"A sample of {count('n', n, least=0)} vectors", 3 * n * size, like)
        random_source(generator)
        device = self.device if generator is None else generator.device

        def normal(size: int) -> Tensor:
            return torch.randn(n, size, generator=generator, dtype=self.dtype, device=device).to(self.device)

        return self._draws(normal, partial(power, exponent=-0.5 if flag("inverse", inverse) else 0.5))

    def eigh(self) -> tuple[Tensor, Spectrum]:
        """All eigenvalues (P,), ascending, and the eigenvectors in this order.

        They are maps, not a matrix: `basis.back(c)` takes coordinates in the eigenbasis to vectors (..., P),
        `basis.into(v)` back; `basis.vectors(indices)` (k, P) are some, and `basis.to_torch()` (P, P) all of them.
        """
        spectrum = self._spectrum().ascending()
        return spectrum.values, spectrum

    def top_eigenpairs(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues (k,), descending, and their eigenvectors in rows (k, P)."""
        return self._top(count("k", k, most=self.layer_collection.numel(), of="the number of parameters"))

    def cond(self) -> Tensor:
        """The condition number in the 2-norm, 0-d; inf for a singular matrix."""
        return self.norm(2) / self.norm(-2)

    def _derived(self, data: Any) -> Any:
        """Other data in a matrix of this class, which is no estimate any more: without count and generator."""
        new = self._like(data, None)
        new.generator = new._origin = None
        return new

    def _without(self, what: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} has no {what}.")

    # Damping

    def __add__(self, other: Any) -> Any:
        return super().__add__(other) if isinstance(other, Estimate) else self._damped(other)  # type: ignore

    def __radd__(self, other: Any) -> Any:
        start = isinstance(other, int) and other == 0  # of sum([...])
        return self if start else self._damped(other)

    def __sub__(self, other: Any) -> Any:
        return super().__sub__(other) if isinstance(other, Estimate) else self._damped(other, -1.0)  # type: ignore

    def _damped(self, damping: Any, sign: float = 1.0) -> PMat:
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        parsed = Damping.of(damping, self.layer_collection, like)
        return self._shifted(parsed if sign > 0 else parsed.negative())
