"""Small linear complementarity problems on the CPU, where calls of torch take longer than the arithmetic."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ROUNDS = 6  # most problems need two or three; those that come back to a set that they left would use up all
MANY = 2**8  # unknowns in all rows above which a guess is cheaper than the rounds that it saves
GUESSES = 25  # gradient steps for the guess


def pivoted(m: Array, q: Array, sets: NDArray[np.bool_] | None, max_iter: int) -> tuple[Array, NDArray[np.bool_]]:
    """Solutions z (r, m) of `z >= 0, y = M z + q >= 0, z y = 0` for rows of q (r, m), and which are solved (r,).

    By block principal pivoting from the sets (r, m) of unknowns above zero, for a positive definite M (m, m) with unit
    diagonal: all unknowns on the wrong side change it together, which is not sure to end. Rows that are not solved are
    left at anything, those that `ROUNDS` of pivoting leave among them.
    """
    z, solved = np.zeros_like(q), np.ones(len(q), dtype=bool)
    todo = np.flatnonzero((q < 0).any(1))
    part, identity = q[todo], np.eye(len(m))
    sets = _guess(m, part) if sets is None else sets[todo]
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


def _guess(m: Array, q: Array) -> NDArray[np.bool_]:
    """Where z is likely to be positive (r, m): where many are asked for, by accelerated projected gradient steps."""
    if q.size < MANY:
        return q < 0
    v = np.ones(len(m))
    for _ in range(6):
        v = m @ (v / np.linalg.norm(v))
    step = 1 / np.linalg.norm(v)
    shift = (step * q).astype(np.float32)
    keep = (np.eye(len(m)) - step * m).astype(np.float32)
    z = x = np.maximum(-shift, 0)
    t = 1.0
    for _ in range(GUESSES):
        before, z = z, np.maximum(x @ keep - shift, 0)
        t, momentum = (1 + (1 + 4 * t * t) ** 0.5) / 2, t - 1
        x = z + np.float32(momentum / t) * (z - before)
    return z > 0
