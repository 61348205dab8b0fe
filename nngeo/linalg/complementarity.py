"""Linear complementarity problems with one matrix, by block principal pivoting (Kim & Park, 2011, algorithm 2)."""

from __future__ import annotations

from typing import Any

import torch
from scipy.optimize import nnls
from torch import Tensor

from nngeo.linalg.decompose import cholesky_factors, eigh
from nngeo.linalg.pivoting import pivoted

ENTRIES = 2**16  # of the systems factored at once: larger blocks are slower, by page faults and caches
MASKED = 40  # unknowns up to which systems of the full size are cheaper than those of the sets
FEW = 40  # unknowns up to which pivoting by numpy is faster
GUESSES = 50  # gradient steps for the guess
ROUNDS = 20  # of pivoting: nearly singular problems that need more are faster one by one


@torch.no_grad()
def complementary_solutions(
    m: Tensor, q: Tensor, passive: Tensor | None = None, *, max_iter: int = ROUNDS
) -> tuple[Tensor, Tensor]:
    """Solutions z (r, m) of `z >= 0, y = M z + q >= 0, z y = 0` for the rows of q (r, m), and which are solved (r,).

    M (m, m) is symmetric positive definite, so each row has one solution; it minimises `1/2 z'Mz + q'z` over z >= 0.
    Exact up to the rounding of one Cholesky solve. Cost: about five factorisations of the sets {z > 0}, no matter how
    many unknowns change at once. Rows that pivoting leaves go to `active_set_solutions`.

    Args:
        passive: where z > 0 is expected (r, m), to start from.
        max_iter: rounds of pivoting.
    """
    # On a unit diagonal one tolerance fits all unknowns; the sets do not depend on the scale.
    d = m.diagonal().rsqrt()
    m, q = m * d * d[:, None], q * d
    solve = _by_masks if len(m) <= MASKED else _on_sets
    if len(m) <= FEW and m.device.type == "cpu" and m.dtype == torch.float64:
        found, done = pivoted(m.numpy(), q.numpy(), None if passive is None else passive.numpy(), max_iter)
        z = torch.from_numpy(found)
        if done.all():
            return z.clamp_(min=0).mul_(d), torch.from_numpy(done)
        todo = _indices(~torch.from_numpy(done))
    else:
        z = torch.zeros_like(q)
        todo = _indices((q < 0).any(1))
    part = q[todo]
    sets = _guess(m, part) if passive is None else passive[todo]
    fewest, lives = torch.full_like(todo, len(m) + 1), torch.full_like(todo, 3)
    for _ in range(max_iter):
        if not len(todo):
            break
        solution = solve(m, part, sets)
        z[todo] = solution
        wrong = _wrong(m, part, solution, sets)
        count = wrong.sum(1)
        left = _indices(count)
        todo, part, sets, wrong, count, fewest, lives = (
            t[left] for t in (todo, part, sets, wrong, count, fewest, lives)
        )
        # All wrong unknowns change sides while that helps. After three failures only the last one does, which ends
        # (Murty's rule).
        lives = torch.where(count < fewest, 3, lives - 1)
        fewest = torch.minimum(count, fewest)
        if (lives < 0).any():
            last = wrong & (wrong.flip(1).cumsum(1).flip(1) == 1)
            wrong = torch.where(lives[:, None] < 0, last, wrong)
        sets = sets ^ wrong
    solved = torch.ones(len(z), dtype=torch.bool, device=z.device)
    if len(todo):
        z[todo], solved[todo] = active_set_solutions(m, part)
    return z.clamp_(min=0) * d, solved


@torch.no_grad()
def active_set_solutions(m: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """What `complementary_solutions` returns, row by row on the CPU; for a semidefinite M, too.

    By non-negative least squares (Lawson & Hanson, 1974, chapter 23): `|Fz - b|` with `M = F'F` and `F'b = -q`. One
    unknown comes in at a time, so that sets of a singular M stay small.
    """
    eigenvalues, vectors = eigh(m)
    root = eigenvalues.clamp(min=0).sqrt()
    factor = (root[:, None] * vectors.T).cpu().numpy()
    b = torch.where(root > 0, -(q @ vectors) / root, 0)
    found = [_least_squares(factor, row) for row in b.cpu()]
    z = torch.stack([torch.zeros_like(q[0]) if row is None else row.to(q) for row in found])
    return z, torch.tensor([row is not None for row in found], device=q.device)


def _least_squares(factor: Any, b: Tensor) -> Tensor | None:
    try:
        return torch.from_numpy(nnls(factor, b.numpy(), maxiter=20 * len(b))[0])
    except RuntimeError:  # too many iterations
        return None


def _guess(m: Tensor, q: Tensor) -> Tensor:
    """Where z is likely to be positive (r, m), by an accelerated projected gradient method in single precision."""
    if len(m) < FEW:
        return q < 0
    m, q = m.float(), q.float()
    v = torch.ones_like(m[0])
    for _ in range(6):
        v = m @ (v / v.norm())
    step = 1 / v.norm()
    z = x = (-step * q).clamp_(min=0)
    t = 1.0
    for _ in range(GUESSES):
        before, z = z, (x - step * torch.addmm(q, x, m)).clamp_(min=0)
        t, momentum = (1 + (1 + 4 * t * t) ** 0.5) / 2, t - 1
        x = torch.lerp(before, z, 1 + momentum / t)
    return z > 0


def _by_masks(m: Tensor, q: Tensor, sets: Tensor) -> Tensor:
    """What `_on_sets` returns, by systems of the full size with an identity outside of the sets."""
    identity = torch.eye(len(m), dtype=m.dtype, device=m.device)
    systems = torch.where(sets[:, :, None] & sets[:, None, :], m, identity)
    factor = cholesky_factors(systems)[0]
    return torch.cholesky_solve(torch.where(sets, -q, 0)[:, :, None], factor)[:, :, 0]


def _on_sets(m: Tensor, q: Tensor, sets: Tensor) -> Tensor:
    """The z (r, m) that are zero outside the sets and have `M z + q` zero in them."""
    n = len(m)
    sizes, order = sets.sum(1).sort()
    places = sets[order].byte().sort(dim=1, descending=True, stable=True).indices
    # Sets of unlike sizes become systems of one size by unknowns of an identity beside M.
    wide = torch.block_diag(m, torch.eye(n, dtype=m.dtype, device=m.device)).flatten()
    b = torch.nn.functional.pad(-q[order], (0, n))
    z = torch.zeros_like(b)
    slots = torch.arange(n, device=m.device)
    # int32 indices are twice as fast to look up.
    small = torch.int32 if 4 * n * n < 2**31 else torch.int64
    for rows, size in _chunks(sizes.tolist(), m.device):
        at = torch.where(slots[:size] < sizes[rows, None], places[rows, :size], n + slots[:size])
        pairs = (2 * n * at[:, :, None] + at[:, None, :]).to(small)
        systems = wide.index_select(0, pairs.flatten()).view(pairs.shape)
        factor = cholesky_factors(systems)[0]
        solution = torch.cholesky_solve(b[rows].gather(1, at)[:, :, None], factor)[:, :, 0]
        z[rows] = z[rows].scatter(1, at, solution)
    return torch.empty_like(q).index_copy_(0, order, z[:, :n])


def _chunks(sizes: list[int], device: torch.device) -> list[tuple[slice, int]]:
    """Slices of ascending sizes with the largest size in each, so that the systems of a slice fit."""
    entries = ENTRIES if device.type == "cpu" else 2**9 * ENTRIES
    chunks, start = [], 0
    for end in range(1, len(sizes) + 1):
        if end == len(sizes) or (end + 1 - start) * sizes[end] ** 2 > entries:
            chunks.append((slice(start, end), sizes[end - 1]))
            start = end
    return chunks


def _wrong(m: Tensor, q: Tensor, z: Tensor, sets: Tensor) -> Tensor:
    """Unknowns (r, m) that are negative in the set, or whose gradient is outside, beyond rounding."""
    y = torch.addmm(q, z, m)
    rounding = 8 * torch.finfo(m.dtype).eps * (z.abs().sum(1) + q.abs().amax(1))[:, None]
    return torch.where(sets, z, y) < -rounding


def _indices(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 0]
