"""Pictures of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from tests.benchmarks.growth import AXES, SWEEP, Point
from tests.benchmarks.growth import JOBS as GROWING
from tests.benchmarks.jobs import JOBS
from tests.benchmarks.times import FIRST, OURS, Times


def times_picture(times: Times) -> Figure:
    """Bars of all libraries by job, with quartiles, and a line at each floor."""
    libraries = [OURS, *sorted({row.library for row in times.rows} - {OURS, FIRST})]
    jobs = list(times.floors)
    figure, axes = plt.subplots(figsize=(8, 0.55 * len(jobs) + 1.2), layout="constrained")
    height = 0.8 / len(libraries)
    for index, library in enumerate(libraries):
        at, bars = [], []
        for place, job in enumerate(jobs):
            row = times.row(job, library)
            if row is not None and row.sweeps is not None:
                at.append(place - 0.4 + (index + 0.5) * height)
                bars.append(row.sweeps)
        if not bars:
            continue  # it fails in every job
        medians = np.array([bar.median for bar in bars])
        spread = np.abs(np.array([[bar.low for bar in bars], [bar.high for bar in bars]]) - medians)
        axes.barh(at, medians, height, xerr=spread, error_kw={"linewidth": 0.8}, label=library, color=f"C{index}")
    for place, job in enumerate(jobs):
        floor = times.floors[job].at_sweep
        label = "floor" if place == 0 else None
        axes.plot([floor, floor], [place - 0.45, place + 0.45], color="black", linewidth=1.5, label=label)
    axes.set(xscale="log", xlabel="gradient sweeps", title=f"{times.network}, threads: {times.threads}")
    axes.set_yticks(range(len(jobs)), [JOBS[job].title for job in jobs])
    axes.invert_yaxis()
    axes.legend(fontsize="small")
    return figure


def growth_picture(points: Sequence[Point]) -> Figure:
    """Seconds by size, one panel an axis; dashed, multiply-adds needed, at the sweep's speed at the largest size."""
    figure, panels = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for axis, panel in zip(AXES, panels.flat, strict=True):
        own = [point for point in points if point.axis == axis]
        last = max((point for point in own if point.job == SWEEP), key=lambda point: point.value)
        for index, job in enumerate((SWEEP, *GROWING)):
            line = sorted((point for point in own if point.job == job), key=lambda point: point.value)
            sizes = [point.value for point in line]
            color, label = f"C{index}", "gradient sweep" if job == SWEEP else JOBS[job].title
            panel.plot(sizes, [1e3 * point.seconds.median for point in line], "o-", color=color, label=label, ms=3)
            rate = 1e3 * last.seconds.median / last.needed
            panel.plot(sizes, [rate * point.needed for point in line], "--", color=color, linewidth=0.8)
        values = sorted({point.value for point in own})
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms")
        panel.set_xticks(values, [str(value) for value in values])
        panel.minorticks_off()
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    return figure


def save(figure: Figure, path: Path) -> None:
    """As PNG; the figure is closed."""
    figure.savefig(path, dpi=110)
    plt.close(figure)
