"""Time against the number of examples, outputs, units and layers of a perceptron, beside counts of multiply-adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tests.benchmarks import floors
from tests.benchmarks.adapters import ours
from tests.benchmarks.networks import Problem, classification, perceptron
from tests.benchmarks.operations import operations
from tests.benchmarks.rounds import Clock, Spread, Task, measure
from tests.benchmarks.shapes import shapes_of

SWEEP = "sweep"
JOBS = ("diag", "diag_mc", "kfac", "kfac_mc", "mv")
SIZE, WIDTH = 64, 256  # of a batch, of a layer


@dataclass(frozen=True)
class Point:
    """One job at one size: seconds, and multiply-adds executed and at least needed."""

    axis: str
    value: int
    job: str
    seconds: Spread
    executed: int
    needed: int


def examples(n: int) -> Problem:
    """n examples in batches."""
    return classification("growth", perceptron((WIDTH, WIDTH, WIDTH, 10)), (WIDTH,), n // SIZE, SIZE)


def outputs(classes: int) -> Problem:
    """One batch."""
    return classification("growth", perceptron((WIDTH, WIDTH, WIDTH, classes)), (WIDTH,), 1, SIZE, classes)


def width(units: int) -> Problem:
    """Two hidden layers; one batch."""
    return classification("growth", perceptron((units, units, units, 10)), (units,), 1, SIZE)


def depth(layers: int) -> Problem:
    """One batch; gradients keep their size on the way (He et al., 2015)."""
    model = perceptron((WIDTH,) * layers + (10,))
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return classification("growth", model, (WIDTH,), 1, SIZE)


AXES: dict[str, tuple[Callable[[int], Problem], tuple[int, ...]]] = {
    "examples": (examples, (64, 128, 256, 512, 1024, 2048)),
    "outputs": (outputs, (10, 30, 100, 300, 1000)),
    "width": (width, (64, 128, 256, 512, 1024, 2048)),
    "depth": (depth, (1, 2, 4, 8, 16, 32)),
}


def measure_growth(rounds: int, quick: bool = False, device: str = "cpu") -> list[Point]:
    """All points on one thread, one size after the other, the jobs of a size in interleaved rounds."""
    torch.set_num_threads(1)
    points: list[Point] = []
    for axis, (build, values) in AXES.items():
        for value in values[:2] if quick else values:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                problem = build(value).to(device)
            points += _points(problem, axis, value, rounds)
    return points


def _points(problem: Problem, axis: str, value: int, rounds: int) -> Sequence[Point]:
    tasks = [Task(job, "ours", _setup(problem, job)) for job in JOBS]
    units = measure(problem.sweep, tasks, rounds, Clock(problem.device))
    shapes = shapes_of(problem)
    unit = floors.sweep(shapes).multiply_adds
    found = [Point(axis, value, SWEEP, Spread.of(units), unit, unit)]
    for task in tasks:
        if task.run is None or not task.seconds:
            raise RuntimeError(f"{task.job} at {axis}={value}: {task.error}")
        executed = operations(task.run).multiply_adds
        needed = floors.FLOORS[task.job](shapes).multiply_adds
        found.append(Point(axis, value, task.job, Spread.of(task.seconds), executed, needed))
    return found


def _setup(problem: Problem, job: str) -> Callable[[], Callable[[], object]]:
    return lambda: ours.JOBS[job](problem)
