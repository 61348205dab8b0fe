"""Who solves for the weights of projections onto the dual cone: the extension point of UPGrad and DualProj."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from nngeo.descent.aggregation.options import Option, check_finite, describe, number
from nngeo.linalg.arguments import instance
from nngeo.linalg.dualcone import dual_cone_weights, semidefinite_dual_cone_weights
from nngeo.linalg.precision import full_precision


def _boolean(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be True or False, found {value!r}.")
    return value


class DualConeProjector(ABC):
    """Weights w (..., m) of the projections `J'w` of `J'u` onto the dual cone of the rows of J, for u in U (..., m).

    From `G = J J'` (m, m): `w = argmin v'Gv over v >= u`.

    A subclass writes `project(U, G)` for U (r, m), or the whole `__call__(U, G)` for U (..., m).
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in vars(cls) and "project" not in vars(cls):
            setattr(cls, "project", cls.__call__)  # noqa: B010 (for the type checker it is an assignment to a method)

    @abstractmethod
    def project(self, U: Tensor, G: Tensor) -> Tensor:
        """Weights (r, m) for the rows of U (r, m)."""

    @full_precision
    @torch.no_grad()
    def __call__(self, U: Tensor, G: Tensor) -> Tensor:
        for name, tensor in (("U", U), ("G", G)):
            instance(name, tensor, Tensor)
        if G.dim() != 2 or G.shape[0] != G.shape[1]:
            raise ValueError(f"G should be a Gramian (m, m), found the shape {tuple(G.shape)}.")
        if U.dim() == 0 or U.shape[-1] != len(G):
            raise ValueError(f"U should be (..., {len(G)}) for this Gramian, found the shape {tuple(U.shape)}.")
        check_finite("G", G)
        return self.project(U.reshape(-1, len(G)), G).to(G).reshape(U.shape)

    def __repr__(self) -> str:
        return describe(self)


class Regularized(DualConeProjector):
    """A projector for `G / tr G + reg_eps I`, with G taken as zero where it is, or where `tr G < norm_eps`."""

    norm_eps = number(0)
    reg_eps = number(0)

    def __init__(self, *, norm_eps: float = 1e-4, reg_eps: float = 1e-4) -> None:
        self.norm_eps = norm_eps
        self.reg_eps = reg_eps

    def regularized(self, G: Tensor) -> Tensor:
        """The regularized Gramian (m, m) in double precision."""
        trace = float(G.double().trace())
        g = torch.zeros_like(G, dtype=torch.float64) if trace < self.norm_eps or trace == 0 else G.double() / trace
        g.diagonal().add_(self.reg_eps)
        return g


class PivotingProjector(Regularized):
    """All projections together by block principal pivoting, exact, on the device of G.

    `reg_eps` keeps the weights small and makes the projection inexact: where the exact one is zero or short, the
    result may go against some rows. With `reg_eps=0` it is exact, for singular and badly scaled Gramians too.
    `strict=True` uses neither epsilon and gives projections that are zero to rounding the weights zero; the result
    goes against no row, to rounding.

    >>> G = torch.tensor([[18.0, -22.0], [-22.0, 38.0]])
    >>> PivotingProjector()(torch.eye(2), G)
    tensor([[1.0000, 0.5789],
            [1.2218, 1.0000]])
    """

    strict = Option(_boolean)

    def __init__(self, *, norm_eps: float = 0.0, reg_eps: float = 1e-4, strict: bool = False) -> None:
        super().__init__(norm_eps=norm_eps, reg_eps=reg_eps)
        self.strict = strict

    def project(self, U: Tensor, G: Tensor) -> Tensor:
        if self.strict or self.reg_eps == 0:
            return semidefinite_dual_cone_weights(U, G, strict=self.strict)
        return dual_cone_weights(U, self.regularized(G))


class QuadprogProjector(Regularized):
    """One projection after the other by the solver of `quadprog` (Goldfarb & Idnani, 1983), on the CPU: for comparison.

    Needs the package quadprog: `pip install "nngeo[quadprog]"`.
    """

    def __init__(self, *, norm_eps: float = 1e-4, reg_eps: float = 1e-4) -> None:
        super().__init__(norm_eps=norm_eps, reg_eps=reg_eps)
        try:
            import quadprog  # type: ignore[import-not-found,import-untyped,unused-ignore]
        except ImportError as error:
            raise ImportError(
                'QuadprogProjector needs the package quadprog: pip install "nngeo[quadprog]". '
                "PivotingProjector does without."
            ) from error
        self._solve = quadprog.solve_qp

    def project(self, U: Tensor, G: Tensor) -> Tensor:
        g = self.regularized(G).cpu().numpy()
        rows = U.double().cpu().numpy()
        identity = torch.eye(len(g), dtype=torch.float64).numpy()
        solutions = [self._solve(g, 0 * u, identity, u)[0] for u in rows]
        return torch.stack([torch.from_numpy(solution) for solution in solutions]) if solutions else torch.zeros_like(U)
