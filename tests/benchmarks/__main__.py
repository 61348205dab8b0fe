"""Measure nngeo beside its peers: times, peaks of memory, and growth, in multiples of a gradient sweep.

Peers that are not installed are skipped. docs/benchmarks.rst shows what `--out docs/benchmarks` writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path

from tests.benchmarks.adapters import PEERS, adapter
from tests.benchmarks.growth import measure_growth
from tests.benchmarks.jobs import JOBS, JOBS_OF
from tests.benchmarks.machine import machine
from tests.benchmarks.memory import measure_peaks
from tests.benchmarks.networks import NETWORKS, problem
from tests.benchmarks.results import Results
from tests.benchmarks.times import measure_times

PARTS = ("times", "memory", "growth")
SMALL = ("mlp", "cnn")


def main() -> None:
    """Measure what the command line asks for, and show every table as soon as it is there."""
    options = _arguments()
    results = Results(machine(options.device))
    show = _shown_and_published(results, options.out)
    show()
    libraries = [found for name in ("ours", *options.peers) if (found := adapter(name)) is not None]
    for network in options.networks if "times" in options.parts else ():
        jobs = [job for job in JOBS_OF[network] if job in options.jobs]
        for threads in options.threads:
            made = problem(network, options.quick, options.device)
            rounds = options.rounds if network in SMALL else max(2, options.rounds // 3)
            results.times.append(measure_times(made, jobs, libraries, rounds, threads))
            show()
    if "memory" in options.parts:
        results.peaks += measure_peaks([library.name for library in libraries], options.quick, options.device)
        show()
    if "growth" in options.parts:
        results.points += measure_growth(options.rounds, options.quick, options.device)
        show()


def _shown_and_published(results: Results, folder: Path | None) -> Callable[[], None]:
    """Prints the last table of the results, and writes the files of all of them, if there is a folder."""
    if folder is None:
        return lambda: print(results.texts()[-1], flush=True)
    from tests.benchmarks.publish import publish  # which needs matplotlib

    def show() -> None:
        print(results.texts()[-1], flush=True)
        publish(results, folder)

    return show


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--parts", default=list(PARTS), type=_several(PARTS), metavar="NAME,NAME")
    parser.add_argument("--networks", default=list(NETWORKS), type=_several(NETWORKS), metavar="NAME,NAME")
    parser.add_argument("--jobs", default=list(JOBS), type=_several(JOBS), metavar="NAME,NAME")
    parser.add_argument("--peers", default=list(PEERS), type=_several(PEERS), metavar="NAME,NAME", help="'' for none")
    parser.add_argument("--threads", default=[1], type=int, nargs="+")
    parser.add_argument("--rounds", default=9, type=int, help=f"of {' and '.join(SMALL)}; a third of it of the others")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="small networks: whether it works, not how fast")
    parser.add_argument("--out", type=Path, help="folder for CSV files, tables and pictures; they need matplotlib")
    return parser.parse_args()


def _several(known: Collection[str]) -> Callable[[str], list[str]]:
    def split(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        if wrong := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(wrong)}; known are {', '.join(known)}")
        return names

    return split


if __name__ == "__main__":
    main()
