"""Interleaved rounds: every round runs every library once, so that what the machine does beside it hits all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nngeo.linalg.memory import room

LONG = 5.0  # seconds: what takes longer, or is set up anew each time, is measured in a few rounds only
FEW = 3


@dataclass
class Task:
    """Something to time: `setup()` returns it, untimed; once for all rounds, or anew in each (`fresh`).

    What is set up once is also run once before the first round, for whatever a library does at its first call.

    Attributes:
        touches: bytes that are touched before each run (see `touch`).
    """

    job: str
    library: str
    setup: Callable[[], Callable[[], Any]]
    per: int = 1
    fresh: bool = False
    touches: int = 0
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)  # to the sweep of the same round
    error: str | None = None
    limit: int | None = None  # of rounds
    run: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = np.percentile(values, [25, 50, 75])
        return cls(float(median), float(low), float(high))


class Clock:
    """Seconds that a call takes, with a GPU's queue empty before and after."""

    def __init__(self, device: torch.device):
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def time(self, run: Callable[[], Any]) -> float:
        """The result is freed after the clock has stopped."""
        gc.collect()
        self._wait()
        start = time.perf_counter()
        result = run()
        self._wait()
        stop = time.perf_counter()
        del result
        return stop - start


def touch(size: int) -> None:
    """Write to so many bytes, in small pages and as many in huge ones, and free them.

    Hosts of virtual machines take back memory that was free for seconds, and return it many times more slowly than the
    system hands it out: without this, whoever comes first would pay for all.
    """
    small = torch.ones(size, dtype=torch.uint8)
    room((size,), small).fill_(1)


def measure(sweep: Callable[[], Any], tasks: Sequence[Task], rounds: int, clock: Clock) -> list[float]:
    """Fill `seconds` and `ratios` of the tasks; returns the sweep's seconds, one for each round.

    In a round the libraries follow each other job by job, starting with another one each time, and a sweep is among
    them; the unit of a round is the median of its sweeps.
    """
    gc.collect()
    gc.freeze()  # so that a collection before each call looks at the garbage of the last one only
    try:
        clock.time(sweep)
        for task in tasks:
            _prepare(task, clock)
        return [_round(sweep, tasks, index, clock) for index in range(rounds)]
    finally:
        gc.unfreeze()


def _round(sweep: Callable[[], Any], tasks: Sequence[Task], index: int, clock: Clock) -> float:
    """The unit: the median of the round's sweeps."""
    sweeps: list[float] = []
    for job in dict.fromkeys(task.job for task in tasks):
        group: list[Task | None] = [None, *[task for task in tasks if task.job == job]]
        shift = index % len(group)
        for task in group[shift:] + group[:shift]:
            if task is None:
                sweeps.append(clock.time(sweep))
            elif task.error is None and (task.limit is None or index < task.limit):
                _once(task, clock)
    unit = Spread.of(sweeps).median
    for task in tasks:
        if len(task.seconds) > len(task.ratios):
            task.ratios.append(task.seconds[-1] / unit)
    return unit


def _prepare(task: Task, clock: Clock) -> None:
    try:
        run = task.setup()
        if clock.time(run) > LONG or task.fresh or task.touches:
            task.limit = FEW
        if not task.fresh:
            task.run = run
    except Exception as error:  # whatever a library raises is its result here
        task.error = f"{type(error).__name__}: {error}".splitlines()[0]


def _once(task: Task, clock: Clock) -> None:
    try:
        run = task.setup() if task.run is None else task.run
        touch(task.touches)
        task.seconds.append(clock.time(run) / task.per)
    except Exception as error:
        task.error = f"{type(error).__name__}: {error}".splitlines()[0]
