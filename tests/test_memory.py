"""Limits of the system, the process and its container, and what is refused because of them."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import nngeo
from nngeo import FIM, Hessian, LayerCollection
from nngeo.linalg import memory
from nngeo.linalg.limits import NO_LIMIT, free_bytes

MIB = 2**20
SYSTEM = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:  8000 kB\n"}
V2 = {
    "proc/self/cgroup": "0::/user/job\n",
    "sys/fs/cgroup/user/job/memory.max": "max\n",
    "sys/fs/cgroup/user/memory.max": "5000000\n",
    "sys/fs/cgroup/user/memory.current": "3000000\n",
    "sys/fs/cgroup/user/memory.stat": "active_file 7\ninactive_file 1000000\n",
}
V1 = {
    "proc/self/cgroup": "5:devices:/\n4:memory:/docker/of-the-host\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000000\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "3500000\n",
    "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
}
NONE = {"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}
LIMITS = {
    "the system's": (SYSTEM, 8000 * 1024),
    "of a group around": (SYSTEM | V2, 3000000),
    "of version 1, mounted at the root": (SYSTEM | V1, 500000),
    "none": (SYSTEM | NONE, 8000 * 1024),
    "more used than allowed": (SYSTEM | V1 | {"sys/fs/cgroup/memory/memory.usage_in_bytes": "9000000\n"}, 0),
}


@pytest.mark.parametrize(("files", "free"), LIMITS.values(), ids=LIMITS)
def test_the_least_of_the_limits_counts(files, free, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert NO_LIMIT > 8000 * 1024 and free_bytes(f"{tmp_path}/") == free


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limits_of_the_process_count(kind):
    code = getattr(resource, kind)
    before = resource.getrlimit(code)
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Vm")]
    used = {key: int(value) for key, value, *_ in lines}
    taken = used["VmSize:" if kind == "RLIMIT_AS" else "VmData:"] * 1024
    try:
        resource.setrlimit(code, (taken + 100 * MIB, before[1]))
        free = free_bytes()
    finally:
        resource.setrlimit(code, before)
    assert 50 * MIB < free <= 110 * MIB


LINEAR = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
NORM = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
RECURRENT = nn.RNN(3, 2, batch_first=True)
TIED = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
TIED[2].weight = TIED[0].weight
WEIGHT_NORM = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)))
MODELS = {"linear": LINEAR, "norm": NORM, "recurrent": RECURRENT, "tied": TIED, "weight norm": WEIGHT_NORM}
PLAIN = ["PMatBlockDiag", "PMatQuasiDiag", "PMatDiag", "PMatImplicit"]
ADVICE = {
    "linear": ["PMatBlockDiag", "PMatKFAC", "PMatEKFAC", "PMatQuasiDiag", "PMatDiag", "PMatImplicit"],
    "norm": ["PMatBlockDiag", "PMatEKFACBlockDiag", "PMatQuasiDiag", "PMatDiag", "PMatImplicit"],
    "recurrent": PLAIN[1:],
    "tied": PLAIN,
    "weight norm": PLAIN[1:],
}


def output(model: nn.Module) -> Callable[..., Any]:
    return lambda x, *_: model(x)[0][:, -1] if isinstance(model, nn.RNN) else model(x)


def advised(text: str) -> list[str]:
    return [name.strip(" .") for name in text.split("What would fit: ")[1].replace(" or ", ",").split(",")]


@pytest.mark.parametrize("name", MODELS)
def test_what_is_recommended_takes_the_model(name, monkeypatch):
    model, x = MODELS[name], torch.randn(5, 2, 3) if name == "recurrent" else torch.randn(5, 3)
    p = LayerCollection.from_model(model).numel()
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_bytes", lambda device: p**2 * 4 - 1)
        patch.setattr(memory, "SMALL", 0)
        with pytest.raises(MemoryError) as caught:
            FIM(model, (x,), nngeo.PMatDense, function=output(model))
    assert advised(str(caught.value)) == ADVICE[name]
    for kind in advised(str(caught.value)):
        FIM(model, (x,), getattr(nngeo, kind), function=output(model)).trace()


def test_what_is_recommended_for_a_hessian_takes_one(monkeypatch):
    batch, loss = (torch.randn(5, 3), torch.zeros(5, dtype=torch.long)), nn.functional.cross_entropy
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_bytes", lambda device: 8000)
        patch.setattr(memory, "SMALL", 0)
        with pytest.raises(MemoryError) as caught:
            Hessian(nn.Sequential(LINEAR, nn.Linear(2, 9)), batch, nngeo.PMatDense, loss)
    assert advised(str(caught.value)) == ["PMatBlockDiag", "PMatDiag", "PMatImplicit"]


OPERATIONS = {
    "solve": lambda F, v: F.solve(v, regul=0.1),
    "inv": lambda F, v: F.inv(0.1),
    "eigh": lambda F, v: F.eigh(),
    "pow": lambda F, v: F.pow(0.5, 0.1),
    "sample": lambda F, v: F.sample(100, inverse=False),
    "norm": lambda F, v: F.norm(2),
}


DECOMPOSED = [nngeo.PMatDense, nngeo.PMatBlockDiag, nngeo.PMatKFAC, nngeo.PMatLowRank]


@pytest.mark.parametrize("kind", DECOMPOSED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("call", OPERATIONS.values(), ids=OPERATIONS)
def test_work_that_does_not_fit_is_refused(call, kind, monkeypatch):
    F = FIM(LINEAR, (torch.randn(5, 3),), kind)
    v = torch.randn(F.size(0))
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_bytes", lambda device: 30)
        patch.setattr(memory, "SMALL", 0)
        with pytest.raises(MemoryError, match="GiB are free on cpu. (Use an iterative solver|What would fit)"):
            call(F, v)
    call(F, v)


@pytest.mark.parametrize(
    "call",
    [lambda F, v: F.inv(), lambda F, v: F.sample(1), lambda F, v: F.logdet(), lambda F, v: (F.pow(2)).solve(v, 0.1)],
    ids=["inv", "sample", "logdet", "solve"],
)
def test_matrices_of_rows_that_do_not_fit_are_refused(call, monkeypatch):
    F = FIM(LINEAR, (torch.randn(5, 3),), nngeo.PMatQuasiDiag) + 0.1
    v = torch.randn(F.size(0))
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_bytes", lambda device: 600)
        patch.setattr(memory, "SMALL", 0)
        with pytest.raises(MemoryError, match="Matrices of rows .* takes"):
            call(F, v)
    call(F, v)


@pytest.mark.parametrize("other", [None, torch.randn(50, 3)], ids=["square", "rectangular"])
def test_a_kernel_that_does_not_fit_is_refused_at_the_first_batch(other, monkeypatch):
    read = []

    class Dataset(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    monkeypatch.setattr(memory, "available_bytes", lambda device: 4 * 40**2)
    monkeypatch.setattr(memory, "SMALL", 0)
    monkeypatch.setattr("nngeo.generators.sizing.INPUTS", 0)  # so that mini-batches are not joined
    batches = DataLoader(Dataset(torch.randn(50, 3)), batch_size=5)
    with pytest.raises(MemoryError, match="FMatDense of 2 outputs and 50 examples.*fewer examples"):
        nngeo.NTK(LINEAR, batches, other)
    assert len(read) <= 10  # of 50
