"""Bases of the range of a matrix, from all but one of a few random vectors: what XTrace and XDiag share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nngeo.linalg.operator import Estimated, Operator


@dataclass(frozen=True)
class LeaveOneOut:
    """For m random vectors, the bases of A times all of them but one (Epperly, Tropp & Webber, 2024).

    With `A omega' = Q R`, the basis without the i-th vector spans what Q does less one direction, `Q s_i`: the
    projector on it is `P_i = Q (I - s_i s_i') Q'`. It costs 2 m products.
    """

    omega: Tensor  # (m, P)
    q: Tensor  # (m, P), orthonormal rows
    z: Tensor  # (m, P), A times the rows of q
    r: Tensor  # (m, m), upper triangular: column i holds the coordinates of A omega_i
    s: Tensor  # (m, m): column i is s_i

    @classmethod
    def of(cls, matrix: Operator, omega: Tensor) -> LeaveOneOut:
        """For the rows of omega (m, P), m < P."""
        q, r = torch.linalg.qr(matrix.mv(omega).mT)
        z = matrix.mv(q.mT)
        # s_i is orthogonal to all columns of R but the i-th: a column of R^-T. Where the rank is below m, any such
        # direction will do, because A is zero outside of all bases.
        largest = r.diagonal().abs().max()
        upper = (r / largest.masked_fill(largest == 0, 1)).double()
        noise = torch.finfo(r.dtype).eps * (upper.diagonal().abs() < torch.finfo(r.dtype).eps)
        eye = torch.eye(len(r), dtype=upper.dtype, device=r.device)
        s = torch.linalg.solve_triangular((upper + noise.diag()).mT, eye, upper=False)
        s = s / s.abs().amax(0)  # whose squares can't overflow
        return cls(omega, q.mT, z, r, (s / s.norm(dim=0)).to(r))

    def mean(self, draws: Tensor) -> Estimated:
        """Of the estimates (m, ...) that each leave out one vector; they share all others.

        The spread of m independent draws would understate the error: what is left of an estimate when the parts that
        depend on one vector have been averaged out depends on pairs of them, and a mean over pairs has twice the
        variance (Hoeffding, 1948). The error includes this factor.
        """
        value, error = Estimated.mean(draws)
        return Estimated(value, 2**0.5 * error)

    @property
    def h(self) -> Tensor:
        """(m, m), `Q' A Q`."""
        return self.q @ self.z.mT

    @property
    def w(self) -> Tensor:
        """(m, m), `Q' omega_i` in column i."""
        return self.q @ self.omega.mT
