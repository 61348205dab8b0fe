"""Tables of what was measured: plain text, CSV, and reStructuredText."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from tests.benchmarks.growth import Point
from tests.benchmarks.jobs import JOBS
from tests.benchmarks.memory import MIB, SWEEP, Peak
from tests.benchmarks.times import FIRST, OURS, Row, Times

Table = tuple[list[str], list[list[str]]]


def times_as_csv(measured: Iterable[Times]) -> str:
    """One line for each network, number of threads, job and library."""
    lines = []
    for times in measured:
        for row in times.rows:
            floor, spread = times.floors[row.job], row.sweeps
            line = {"network": times.network, "threads": times.threads, "job": row.job, "library": row.library}
            line |= {"rounds": row.rounds, "sweeps_median": spread and spread.median}
            line |= {"sweeps_quartile1": spread and spread.low, "sweeps_quartile3": spread and spread.high}
            line |= {"seconds_median": row.seconds, "sweep_seconds_median": times.sweep.median}
            line |= {"floor_sweeps": floor.at_sweep, "floor_attainable": floor.attainable}
            line |= {"multiply_adds": floor.multiply_adds, "executed_by_nngeo": floor.executed}
            line |= {"bytes": floor.bytes, "written_by_nngeo": floor.written, "error": row.error}
            lines.append(line)
    return _csv(list(lines[0]), [list(line.values()) for line in lines])


def times_table(times: Times) -> Table:
    """Jobs by libraries: medians, for nngeo with quartiles."""
    peers = sorted({row.library for row in times.rows} - {OURS, FIRST})
    header = ["job", OURS, "quartiles", "first call", *peers, "floor"]
    lines = []
    for job, floor in times.floors.items():
        ours = times.row(job, OURS)
        others = [_median(times.row(job, library)) for library in (FIRST, *peers)]
        lines.append([JOBS[job].title, _median(ours), _quartiles(ours), *others, _figure(floor.at_sweep)])
    return header, lines


def floors_table(times: Times) -> Table:
    """What jobs cost at least, and how far above it nngeo is: its time, and the multiply-adds that it executes."""
    header = ["job", "multiply-adds", "executed", "bytes", "written", "floor", "above it", "attainable", "above it"]
    lines = []
    for job, floor in times.floors.items():
        ours = times.row(job, OURS)
        executed = "-" if floor.executed is None else f"{floor.executed / floor.multiply_adds:.2f}x"
        written = "-" if floor.written is None else f"{floor.written / floor.bytes:.2f}x"
        costs = [_large(floor.multiply_adds), executed, _large(floor.bytes), written]
        multiples = [[_figure(value), _above(ours, value)] for value in (floor.at_sweep, floor.attainable)]
        lines.append([JOBS[job].title, *costs, *multiples[0], *multiples[1]])
    return header, lines


def peaks_table(peaks: Sequence[Peak]) -> Table:
    """Peaks in MiB, and as multiples of the gradient sweep's."""
    units = {peak.network: peak.bytes for peak in peaks if peak.job == SWEEP}
    header = ["network", "job", "library", "peak, MiB", "sweeps"]
    lines = []
    for peak in peaks:
        unit, title = units.get(peak.network), "gradient sweep" if peak.job == SWEEP else JOBS[peak.job].title
        library = OURS if peak.library == "ours" else peak.library
        figures = ["fails", "-"] if peak.bytes is None else [f"{peak.bytes / MIB:.0f}", "-"]
        if peak.bytes is not None and unit:
            figures[1] = _figure(peak.bytes / unit)
        lines.append([peak.network, title, library, *figures])
    return header, lines


def peaks_as_csv(peaks: Iterable[Peak]) -> str:
    """One line a peak."""
    return _csv(("network", "job", "library", "bytes", "error"), [list(vars(peak).values()) for peak in peaks])


def growth_table(points: Sequence[Point]) -> Table:
    """Milliseconds of every job at every size."""
    jobs = list(dict.fromkeys(point.job for point in points))
    at = {(point.axis, point.value, point.job): f"{1e3 * point.seconds.median:.3g}" for point in points}
    sizes = list(dict.fromkeys((point.axis, point.value) for point in points))
    lines = [[axis, str(value), *[at.get((axis, value, job), "-") for job in jobs]] for axis, value in sizes]
    return ["axis", "size", *[f"{job}, ms" for job in jobs]], lines


def growth_as_csv(points: Iterable[Point]) -> str:
    """One line a point."""
    header = ("axis", "value", "job", "seconds_median", "seconds_quartile1", "seconds_quartile3", "executed", "needed")
    lines = []
    for point in points:
        spread = point.seconds
        seconds = [spread.median, spread.low, spread.high]
        lines.append([point.axis, point.value, point.job, *seconds, point.executed, point.needed])
    return _csv(header, lines)


def heading(times: Times) -> str:
    """The network, threads, the unit in milliseconds, and the machine's speeds."""
    threads = f"{times.threads} thread" + ("s" if times.threads > 1 else "")
    sweep = (
        f"a sweep takes {_duration(times.sweep.median)} ({_duration(times.sweep.low)} to {_duration(times.sweep.high)})"
    )
    rates = ", ".join(f"{name} {rate / 1e9:.3g}" for name, rate in times.speeds.items())
    return f"{times.network}, {threads}: {sweep}; 1e9 multiply-adds or bytes a second: {rates}"


def as_text(table: Table) -> str:
    """Aligned columns."""
    header, lines = table
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in [header, *lines])  # fmt: skip


def as_rst(table: Table, title: str) -> str:
    """A csv-table directive."""
    header, lines = table
    body = _csv(header, lines, quoting=csv.QUOTE_ALL)
    indented = "\n".join(f"   {line}" for line in body.splitlines())
    return f".. csv-table:: {title}\n   :header-rows: 1\n\n{indented}\n"


def _csv(header: Sequence[str], lines: Iterable[Sequence[Any]], quoting: Literal[0, 1] = csv.QUOTE_MINIMAL) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n", quoting=quoting)
    writer.writerow(header)
    writer.writerows([_digits(cell) for cell in line] for line in lines)
    return out.getvalue()


def _median(row: Row | None) -> str:
    if row is None:
        return "-"
    return "fails" if row.sweeps is None else _figure(row.sweeps.median)


def _quartiles(row: Row | None) -> str:
    return "" if row is None or row.sweeps is None else f"{_figure(row.sweeps.low)}-{_figure(row.sweeps.high)}"


def _above(row: Row | None, floor: float) -> str:
    return "-" if row is None or row.sweeps is None else f"{row.sweeps.median / floor:.2f}x"


def _figure(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _large(value: int) -> str:
    return f"{value / 1e9:.3g}e9" if value >= 1e9 else f"{value / 1e6:.3g}e6"


def _digits(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
