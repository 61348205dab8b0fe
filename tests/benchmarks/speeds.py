"""What the machine can do: a matrix product, copying, and writing to fresh memory, timed among the jobs."""

from __future__ import annotations

import torch

from tests.benchmarks.rounds import Spread, Task

SIZE = 1024  # of the square matrices
ENTRIES = 2**24  # of the copied tensor
FRESH = 2**25  # of the tensor that is written to fresh memory
MATMUL, ONEDNN, COPY, WRITE = "matrix product", "the same by oneDNN", "copy", "write"


def tasks(device: torch.device) -> list[Task]:
    """Matrix products of a size at which they are fast, a copy of 64 MiB, and ones in 128 MiB allocated anew.

    On some processors torch.mm is far from the fastest product there is: where oneDNN offers one, it is timed, too.
    """

    def matmul():
        a, b = torch.randn(2, SIZE, SIZE, device=device)
        out = torch.empty(SIZE, SIZE, device=device)
        return lambda: torch.mm(a, b, out=out)

    def onednn():
        a, b = torch.randn(2, SIZE, SIZE)
        return lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

    def copy():
        a, b = torch.randn(2, ENTRIES, device=device)
        return lambda: b.copy_(a)

    def write():
        return lambda: torch.ones(FRESH, device=device)

    named = {MATMUL: matmul, COPY: copy, WRITE: write}
    if device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        named[ONEDNN] = onednn
    return [Task(name, "machine", setup) for name, setup in named.items()]


class Speeds:
    """Multiply-adds and bytes for each gradient sweep's time: what can be done while one sweep runs."""

    def __init__(self, measured: list[Task]):
        work = {MATMUL: SIZE**3, ONEDNN: SIZE**3, COPY: 2 * 4 * ENTRIES, WRITE: 4 * FRESH}
        known = [task for task in measured if task.error is None]
        self.per_sweep = {task.job: work[task.job] / Spread.of(task.ratios).median for task in known}
        self.per_second = {task.job: work[task.job] / Spread.of(task.seconds).median for task in known}

    @property
    def products(self) -> float:
        """Multiply-adds of the fastest matrix product in a sweep's time."""
        return max(self.per_sweep[name] for name in (MATMUL, ONEDNN) if name in self.per_sweep)
