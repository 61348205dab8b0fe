"""Small linear complementarity problems on the CPU, where calls of torch take longer than the arithmetic."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ROUNDS = 6  # most problems need two or three; those that come back to a set that they left would use up all


def pivoted(m: Array, q: Array, sets: NDArray[np.bool_], max_iter: int) -> tuple[Array, NDArray[np.bool_]]:
    """Solutions z (r, m) of `z >= 0, y = M z + q >= 0, z y = 0` for rows of q (r, m), and which are solved (r,).

    By block principal pivoting from the sets (r, m) of unknowns above zero, for a positive definite M (m, m) with unit
    diagonal: all unknowns on the wrong side change it together, which is not sure to end. Rows that are not solved are
    left at anything, those that `ROUNDS` of pivoting leave among them.
    """
    z, solved = np.zeros_like(q), np.ones(len(q), dtype=bool)
    todo = np.flatnonzero((q < 0).any(1))
    part, sets, identity = q[todo], sets[todo], np.eye(len(m))
    for _ in range(min(max_iter, ROUNDS)):
        if not len(todo):
            return z, solved
        systems = np.where(sets[:, :, None] & sets[:, None, :], m, identity)
        try:
            found = np.linalg.solve(systems, np.where(sets, -part, 0)[:, :, None])[:, :, 0]
        except np.linalg.LinAlgError:  # a set on which M is singular
            break
        rounding = 8 * np.finfo(m.dtype).eps * (np.abs(found).sum(1) + np.abs(part).max(1))
        wrong = np.where(sets, found, part + found @ m) < -rounding[:, None]
        z[todo] = found
        left = wrong.any(1)
        todo, part, sets = todo[left], part[left], sets[left] ^ wrong[left]
    solved[todo] = False
    return z, solved
