"""Every aggregator by a name, and the Jacobians they are tried on: of every rank, shape, scale and stationarity."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nngeo.descent import aggregation

BUILDERS: dict[str, Callable[[Any, int], Any]] = {
    "mean": lambda lib, m: lib.Mean(),
    "sum": lambda lib, m: lib.Sum(),
    "constant": lambda lib, m: lib.Constant(preference(m)),
    "random": lambda lib, m: lib.Random(),
    "upgrad": lambda lib, m: lib.UPGrad(),
    "upgrad_preference": lambda lib, m: lib.UPGrad(preference(m)),
    "dualproj": lambda lib, m: lib.DualProj(),
    "dualproj_preference": lambda lib, m: lib.DualProj(preference(m)),
    "mgda": lambda lib, m: lib.MGDA(),
    "mgda_long": lambda lib, m: lib.MGDA(epsilon=1e-5, max_iters=300),
    "aligned_mtl": lambda lib, m: lib.AlignedMTL(),
    "aligned_mtl_preference": lambda lib, m: lib.AlignedMTL(preference(m)),
    "aligned_mtl_median": lambda lib, m: lib.AlignedMTL(scale_mode="median"),
    "aligned_mtl_rmse": lambda lib, m: lib.AlignedMTL(scale_mode="rmse"),
    "config": lambda lib, m: lib.ConFIG(),
    "config_preference": lambda lib, m: lib.ConFIG(preference(m)),
    "imtl_g": lambda lib, m: lib.IMTLG(),
    "pcgrad": lambda lib, m: lib.PCGrad(),
    "gradvac": lambda lib, m: lib.GradVac(),
    "gradvac_slow": lambda lib, m: lib.GradVac(beta=0.1, eps=1e-6),
    "graddrop": lambda lib, m: lib.GradDrop(),
    "graddrop_leak": lambda lib, m: lib.GradDrop(f=torch.square, leak=preference(m)),
    "excess_mtl": lambda lib, m: lib.ExcessMTL(),
    "excess_mtl_warmup": lambda lib, m: lib.ExcessMTL(robust_step_size=0.1, n_warmup_steps=2),
    "pcd": lambda lib, m: lib.PCD(),
    "pcd_half": lambda lib, m: lib.PCD(tau=0.5, beta=0.9),
    "krum": lambda lib, m: lib.Krum(n_byzantine=0),
    "krum_selected": lambda lib, m: lib.Krum(n_byzantine=m - 3, n_selected=2),
    "trimmed_mean": lambda lib, m: lib.TrimmedMean(trim_number=(m - 1) // 2),
    "cagrad_half": lambda lib, m: lib.CAGrad(c=0.5),
    "cagrad": lambda lib, m: lib.CAGrad(c=1.0),
    "cagrad_two": lambda lib, m: lib.CAGrad(c=2.0),
    "nash_mtl": lambda lib, m: lib.NashMTL(n_tasks=m),
    "nash_mtl_free": lambda lib, m: lib.NashMTL(n_tasks=m, max_norm=0.0),
    "fairgrad_mean": lambda lib, m: lib.FairGrad(alpha=0.0),
    "fairgrad_half": lambda lib, m: lib.FairGrad(alpha=0.5),
    "fairgrad": lambda lib, m: lib.FairGrad(alpha=1.0),
    "fairgrad_two": lambda lib, m: lib.FairGrad(alpha=2.0),
}
OURS: dict[str, Callable[[Any, int], Any]] = {
    "upgrad_strict": lambda lib, m: lib.UPGrad(strict=True),
    "upgrad_exact": lambda lib, m: lib.UPGrad(reg_eps=0.0),
    "dualproj_strict": lambda lib, m: lib.DualProj(strict=True),
    "cr_mogm": lambda lib, m: lib.CRMOGM(lib.UPGradWeighting()),
    "modo": lambda lib, m: lib.MoDo(),
    "sdmgrad": lambda lib, m: lib.SDMGrad(),
}
EVERY = [*BUILDERS, *OURS]
FEWEST = {"krum": 3, "krum_selected": 3}  # rows

Sampler = Callable[[int, int, int, torch.Generator], Tensor]


def build(name: str, m: int, lib: Any = aggregation) -> Any:
    """The aggregator of this name for m rows, ours or that of another library with the same names."""
    return {**BUILDERS, **OURS}[name](lib, m)


def preference(m: int) -> Tensor:
    return torch.linspace(0.2, 0.9, m, dtype=torch.float64)


def normal(m: int, n: int, rank: int, generator: torch.Generator) -> Tensor:
    draw = {"generator": generator, "dtype": torch.float64}
    return torch.randn(m, rank, **draw) @ torch.randn(rank, n, **draw) / max(rank, 1) ** 0.5  # type: ignore[call-overload]


def strongly_stationary(m: int, n: int, rank: int, generator: torch.Generator) -> Tensor:
    """Some v > 0 has `v'J = 0`."""
    v = torch.rand(m, generator=generator, dtype=torch.float64) + 0.2
    j = normal(m, n, rank, generator)
    return j - torch.outer(v, v @ j) / (v @ v)


def weakly_stationary(m: int, n: int, rank: int, generator: torch.Generator) -> Tensor:
    """Some v >= 0 has `v'J = 0`, but no v > 0: only the last rows have a component, positive, in the last column."""
    k = (m + 1) // 2
    j = normal(m, n, rank, generator)
    j[:k] = strongly_stationary(k, n, rank, generator)
    j[:k, -1] = 0
    j[k:, -1] = j[k:, -1].abs() + 0.5
    return j


def not_stationary(m: int, n: int, rank: int, generator: torch.Generator) -> Tensor:
    """Some d has `Jd > 0`: the last column is positive."""
    j = normal(m, n, rank, generator)
    j[:, -1] = j[:, -1].abs() + 0.5
    return j


SAMPLERS: dict[str, Sampler] = {
    "normal": normal,
    "strong": strongly_stationary,
    "weak": weakly_stationary,
    "not": not_stationary,
}
SHAPES = [(1, 1), (1, 20), (2, 1), (2, 3), (3, 3), (4, 3), (5, 8), (9, 11), (20, 100)]
RANKS = [
    f"normal {m}x{n} rank {r}"
    for m, n in SHAPES
    for r in sorted({0, 1, (min(m, n) + 1) // 2, min(m, n)} - ({0} if m % 2 else set()))
]
STATIONARY = [f"strong {m}x{n} rank {r}" for m, n, r in [(2, 3, 1), (4, 3, 2), (5, 8, 5), (9, 11, 4), (20, 100, 20)]]
WEAK = [f"weak {m}x{n} rank {r}" for m, n, r in [(3, 4, 2), (5, 8, 5), (9, 11, 4), (20, 100, 20)]]
NOT = [f"not {m}x{n} rank {r}" for m, n, r in [(1, 1, 1), (2, 3, 1), (4, 3, 2), (5, 8, 5), (9, 11, 4), (20, 100, 20)]]
MATRICES = RANKS + STATIONARY + WEAK + NOT


def matrix(name: str, seed: int = 0, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """The Jacobian (m, n) that a name like "normal 4x3 rank 2" describes."""
    kind, shape, _, rank = name.split()
    m, n = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    return SAMPLERS[kind](m, n, int(rank), generator).to(dtype)


def pairs(names: list[str], matrices: list[str]) -> list[tuple[str, str]]:
    """Aggregators with the matrices that have enough rows for them."""
    rows = {j: int(j.split()[1].split("x")[0]) for j in matrices}
    return [(name, j) for name in names for j in matrices if rows[j] >= FEWEST.get(name, 1)]
