"""Files for the documentation: CSV, plain text, reStructuredText to include, and pictures (with matplotlib)."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks import pictures, report
from tests.benchmarks.results import Results

DOCS = Path(__file__).parents[2] / "docs"


def publish(results: Results, folder: Path) -> None:
    """Write all that was measured so far; what was not measured leaves the files that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.txt").write_text("\n".join(results.texts()))
    (folder / "machine.inc").write_text("".join(f":{name}: {value}\n" for name, value in results.machine.items()))
    if results.times:
        (folder / "times.csv").write_text(report.times_as_csv(results.times))
        (folder / "times.inc").write_text(_times(results, folder))
    if results.peaks:
        (folder / "memory.csv").write_text(report.peaks_as_csv(results.peaks))
        table = report.as_rst(report.peaks_table(results.peaks), "Peak memory above the model and its data")
        (folder / "memory.inc").write_text(table)
    if results.points:
        (folder / "growth.csv").write_text(report.growth_as_csv(results.points))
        pictures.save(pictures.growth_picture(results.points), folder / "growth.png")
        (folder / "growth.inc").write_text(_image(folder, "growth.png", "Time by size of the problem"))


def _times(results: Results, folder: Path) -> str:
    parts = []
    for times in results.times:
        name = f"times_{times.network}_{times.threads}.png"
        pictures.save(pictures.times_picture(times), folder / name)
        parts += [
            report.as_rst(report.times_table(times), report.heading(times)),
            report.as_rst(report.floors_table(times), "The floors of these jobs, and how far above them nngeo is"),
            _image(folder, name, f"The same as a picture: {times.network}"),
        ]
    return "\n".join(parts)


def _image(folder: Path, name: str, text: str) -> str:
    own = folder.resolve()
    place = "/" + own.relative_to(DOCS).as_posix() if own.is_relative_to(DOCS) else folder.name
    return f".. image:: {place}/{name}\n   :alt: {text}\n"
