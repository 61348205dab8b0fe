"""Peak memory of a job above the model and its data: `python -m tests.benchmarks.memory NETWORK JOB LIBRARY`.

Each job runs in a process of its own, first on a few examples, so that what is loaded or remembered once is there; then
the mark of the largest resident memory is reset (Linux: /proc/self/clear_refs) and the job runs on all examples. The
figure is the new mark less the resident memory before: everything that was in memory at a time, the result included,
whoever allocated it, to a few pages. The C library is told to give freed blocks of more than 64 KiB back at once. Where
/proc is missing the mark can't be reset, and is that of the whole process (getrusage). On CUDA it is torch's own count.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.adapters import adapter
from tests.benchmarks.networks import Problem, classification, perceptron, resnet18

SWEEP = "sweep"
MIB = 2**20

# For the C library: freed memory goes back to the system at once.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Peak:
    """Bytes at most in use at a time, or why they are unknown."""

    network: str
    job: str
    library: str
    bytes: int | None
    error: str | None = None


def resnet(quick: bool = False) -> Problem:
    """ResNet-18 with one batch of 128."""
    made = resnet18(quick)
    x, y = made.batches[0]
    n = 8 if quick else 128
    made.batches = [(torch.randn(n, *x.shape[1:]), torch.randint(10, (n,)))]
    return made


def digits(quick: bool = False) -> Problem:
    """784-512-512-10 with 1000 digits (random ones), 10 batches of 100."""
    widths = (20, 16, 16, 10) if quick else (784, 512, 512, 10)
    return classification("mlp", perceptron(widths), widths[:1], 10, 4 if quick else 100)


NETWORKS: dict[str, Callable[[bool], Problem]] = {
    "ResNet-18, a batch of 128": resnet,
    "MLP, 1000 digits": digits,
}
JOBS = {
    "ResNet-18, a batch of 128": [SWEEP, "diag", "diag_mc", "kfac", "kfac_mc", "mv"],
    "MLP, 1000 digits": [SWEEP, "diag", "kfac", "mv", "ntk"],
}
LIBRARIES = {"diag": ["nngeometry", "backpack"], "kfac": ["nngeometry", "curvlinops"], "mv": ["curvlinops"]}


def measure_peaks(peers: Sequence[str], quick: bool = False, device: str = "cpu") -> list[Peak]:
    """All peaks, the gradient sweep's included, each in a process of its own."""
    found = []
    for network, jobs in JOBS.items():
        for job in jobs:
            libraries = ["torch"] if job == SWEEP else ["ours", *LIBRARIES.get(job, [])]
            for library in libraries:
                if library in ("torch", "ours") or library in peers:
                    found.append(in_own_process(network, job, library, quick, device))
    return found


def in_own_process(network: str, job: str, library: str, quick: bool = False, device: str = "cpu") -> Peak:
    """The peak of one job, from a new interpreter."""
    command = [sys.executable, "-m", "tests.benchmarks.memory", network, job, library, "--device", device]
    run = subprocess.run(
        command + ["--quick"] * quick,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | ALLOCATOR,
    )
    try:
        return Peak(network, job, library, json.loads(run.stdout.splitlines()[-1])["bytes"])
    except (IndexError, ValueError, KeyError):
        lines = run.stderr.strip().splitlines()
        return Peak(network, job, library, None, lines[-1] if lines else f"exit status {run.returncode}")


def peak(problem: Problem, job: str, library: str) -> int:
    """Bytes at most in use by a job, in this process."""
    few = problem.copy()
    few.batches = [(x[:4].clone(), y[:4].clone()) for x, y in problem.batches[:1]]
    _prepared(few, job, library)()
    del few
    run = _prepared(problem, job, library)
    meter = Cuda(problem.device) if problem.device.type == "cuda" else Resident()
    before = meter.reset()
    result = run()
    used = meter.most() - before
    del result
    return used


def _prepared(problem: Problem, job: str, library: str) -> Callable[[], Any]:
    if job == SWEEP:
        return problem.sweep
    if (found := adapter(library)) is None:
        raise ModuleNotFoundError(f"{library} is not installed")
    return found.jobs[job](problem)


class Resident:
    """The resident memory of this process."""

    def reset(self) -> int:
        """Bytes in use now; what is freed has been given back, and the mark starts here."""
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        return self._status("VmRSS") if self.resets else self.most()

    @property
    def resets(self) -> bool:
        """Whether the system let the mark be reset, which it is."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def most(self) -> int:
        """The mark."""
        try:
            return self._status("VmHWM")
        except OSError:
            scale = 1 if sys.platform == "darwin" else 1024
            return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def _status(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


class Cuda:
    """What torch has allocated on a GPU."""

    def __init__(self, device: torch.device):
        self.device = device

    def reset(self) -> int:
        """Bytes in use now; the mark starts here."""
        gc.collect()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def most(self) -> int:
        """The mark."""
        return torch.cuda.max_memory_allocated(self.device)


def main() -> None:
    """Print the peak of one job as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory")
    parser.add_argument("network", choices=list(NETWORKS))
    parser.add_argument("job")
    parser.add_argument("library")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    problem = NETWORKS[options.network](options.quick).to(options.device)
    print(json.dumps({"bytes": peak(problem, options.job, options.library)}))


if __name__ == "__main__":
    main()
