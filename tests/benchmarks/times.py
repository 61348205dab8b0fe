"""Times of all jobs, by all libraries, on one network: multiples of the gradient sweep of the same rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.benchmarks import floors, speeds
from tests.benchmarks.adapters import Adapter
from tests.benchmarks.floors import Cost
from tests.benchmarks.jobs import JOBS
from tests.benchmarks.networks import Problem
from tests.benchmarks.operations import Operations, operations
from tests.benchmarks.rounds import Clock, Spread, Task, measure
from tests.benchmarks.shapes import shapes_of
from tests.benchmarks.speeds import Speeds

OURS = "nngeo"
FIRST = "nngeo, first call"
# What is prepared, untimed, before these jobs has already looked at the model.
PREPARED = ("ekfac", "ekfac_mc", "linearized")


@dataclass(frozen=True)
class Row:
    """One job by one library: sweeps, or why there are none."""

    job: str
    library: str
    sweeps: Spread | None
    seconds: float | None
    rounds: int
    error: str | None


@dataclass(frozen=True)
class Floor:
    """What a job costs at least, and in sweeps: at the speed of the sweep, and at that of the machine.

    Beside it what nngeo executes, and the bytes that it writes; None if it was not measured.
    """

    multiply_adds: int
    bytes: int
    executed: int | None
    written: int | None
    at_sweep: float
    attainable: float


@dataclass(frozen=True)
class Times:
    """All that was measured on one network with one number of threads."""

    network: str
    threads: int
    sweep: Spread  # seconds
    speeds: dict[str, float]  # multiply-adds or bytes a second
    floors: dict[str, Floor]
    rows: tuple[Row, ...]

    def row(self, job: str, library: str) -> Row | None:
        """The row, if it was measured."""
        return next((row for row in self.rows if (row.job, row.library) == (job, library)), None)


def measure_times(
    problem: Problem, jobs: Sequence[str], libraries: Sequence[Adapter], rounds: int, threads: int
) -> Times:
    """Measure in interleaved rounds, each job of each library on a model of its own."""
    shapes = shapes_of(problem)
    costs = {job: floors.FLOORS[job](shapes) for job in jobs}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        machine = speeds.tasks(problem.device)
        tasks = [task for library in libraries for task in _tasks(problem, costs, library)]
        units = measure(problem.sweep, machine + tasks, rounds, Clock(problem.device))
        executed = {task.job: _executed(task) for task in tasks if task.library == OURS}
    finally:
        torch.set_num_threads(before)
    can, unit = Speeds(machine), floors.sweep(shapes)
    found = {}
    for job, cost in costs.items():
        per = JOBS[job].per
        found[job] = Floor(
            multiply_adds=cost.multiply_adds // per,
            bytes=cost.bytes // per,
            executed=None if (own := executed.get(job)) is None else own.multiply_adds // per,
            written=None if own is None else 4 * own.written // per,
            at_sweep=cost.sweeps(unit) / per,
            attainable=cost.attainable(can) / per,
        )
    rows = tuple(_row(task) for task in tasks)
    return Times(problem.network, threads, Spread.of(units), can.per_second, found, rows)


def _executed(task: Task) -> Operations | None:
    return None if task.run is None or task.error else operations(task.run)


def _tasks(problem: Problem, costs: Mapping[str, Cost], library: Adapter) -> list[Task]:
    ours = library.name == "ours"
    name = OURS if ours else f"{library.name} {library.version}"
    tasks = []
    for job in costs:
        if (prepare := library.jobs.get(job)) is None:
            continue
        per, touches = JOBS[job].per, costs[job].bytes if JOBS[job].large else 0
        tasks.append(Task(job, name, _bound(prepare, problem), per, touches=touches))
        if ours and job not in PREPARED:
            tasks.append(Task(job, FIRST, _anew(prepare, problem), per, fresh=True, touches=touches))
    return tasks


def _bound(prepare: Callable[[Problem], Any], problem: Problem) -> Callable[[], Callable[[], Any]]:
    return lambda: prepare(problem.copy())


def _anew(prepare: Callable[[Problem], Any], problem: Problem) -> Callable[[], Callable[[], Any]]:
    """On a model that the library has not seen, so that its accounting is part of the time."""

    def setup() -> Callable[[], Any]:
        unseen = problem.copy()
        return lambda: prepare(unseen)()

    return setup


def _row(task: Task) -> Row:
    if not task.ratios:
        return Row(task.job, task.library, None, None, 0, task.error or "not run")
    sweeps, seconds = Spread.of(task.ratios), statistics.median(task.seconds)
    return Row(task.job, task.library, sweeps, seconds, len(task.ratios), task.error)
