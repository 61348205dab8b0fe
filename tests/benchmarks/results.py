"""All that a run has measured so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.benchmarks import report
from tests.benchmarks.growth import Point
from tests.benchmarks.memory import Peak
from tests.benchmarks.times import Times


@dataclass
class Results:
    """Grows while a run goes on."""

    machine: dict[str, str]
    times: list[Times] = field(default_factory=list)
    peaks: list[Peak] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)

    def texts(self) -> list[str]:
        """The tables as plain text, in the order in which they were measured."""
        found = ["\n".join(f"{name}: {value}" for name, value in self.machine.items())]
        for times in self.times:
            tables = report.times_table(times), report.floors_table(times)
            found.append("\n".join([report.heading(times), "", *[report.as_text(table) + "\n" for table in tables]]))
        if self.peaks:
            found.append(report.as_text(report.peaks_table(self.peaks)) + "\n")
        if self.points:
            found.append(report.as_text(report.growth_table(self.points)) + "\n")
        return found
