"""The machinery of tests/benchmarks, and growth: what jobs execute, counted in multiply-adds, not timed."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.benchmarks import __main__ as command
from tests.benchmarks import floors, growth, report, rounds
from tests.benchmarks.adapters import PEERS, adapter, ours
from tests.benchmarks.jobs import JOBS, JOBS_OF
from tests.benchmarks.memory import ALLOCATOR, MIB, Resident, in_own_process
from tests.benchmarks.networks import NETWORKS, Problem, classification, perceptron, problem
from tests.benchmarks.operations import Operations, operations
from tests.benchmarks.rounds import Clock, Spread, Task, measure
from tests.benchmarks.shapes import shapes_of
from tests.benchmarks.times import measure_times

ROOT = Path(__file__).parents[1]
EVERY_JOB = [(network, job) for network, jobs in JOBS_OF.items() for job in jobs]
GROWING = ("diag", "diag_mc", "kfac", "kfac_mc", "mv", "jacobian")


def small(n: int = 4, batches: int = 2, classes: int = 5, width: int = 12, depth: int = 2) -> Problem:
    torch.manual_seed(0)
    return classification("small", perceptron((6, *[width] * depth, classes)), (6,), batches, n, classes)


def executed(made: Problem, job: str) -> Operations:
    """What a job executes on a model that was looked at before."""
    run = ours.JOBS[job](made)
    run()
    return operations(run)


# ------------------------------------------------------------------------------------------ counts of operations


@pytest.mark.parametrize("network", NETWORKS)
def test_a_sweep_executes_what_its_floor_counts(network):
    made = problem(network, quick=True)
    made.sweep()
    assert operations(made.sweep).multiply_adds == floors.sweep(shapes_of(made)).multiply_adds


# EKFAC: output gradients are rotated at every position, also where rotating their products is cheaper.
# NTK: the order is chosen for each pair of batches, not for all examples; few rows are multiplied in full.
ABOVE_FLOOR = {"linearized": 1.02, "ekfac": 1.05, "ekfac_mc": 1.05, "ntk": 1.8, "mv": 1.02}


@pytest.mark.parametrize(("network", "job"), EVERY_JOB)
def test_jobs_execute_little_more_than_their_floor(network, job):
    made = problem(network, quick=True)
    floor = floors.FLOORS[job](shapes_of(made)).multiply_adds
    assert executed(made, job).multiply_adds <= ABOVE_FLOOR.get(job, 1.06) * floor


@pytest.mark.parametrize("job", GROWING)
def test_operations_are_linear_in_batches(job):
    once, thrice = executed(small(batches=1), job), executed(small(batches=3), job)
    assert thrice.multiply_adds == 3 * once.multiply_adds
    assert thrice.written <= 3.05 * once.written  # the inputs of small batches are copied together


@pytest.mark.parametrize("job", GROWING)
def test_operations_are_linear_in_the_examples_of_a_batch(job):
    few, many = executed(small(n=4), job), executed(small(n=12), job)
    assert many.multiply_adds == 3 * few.multiply_adds
    assert many.written <= 3 * few.written


def test_memory_that_is_only_allocated_is_not_written():
    assert operations(lambda: torch.empty(5)).written == 0
    assert operations(lambda: torch.ones(5).new_empty(7)).written == 5


def test_memory_is_touched_before_each_run_of_what_fills_it(monkeypatch):
    happened: list[object] = []
    monkeypatch.setattr(rounds, "touch", happened.append)
    task = Task("job", "library", lambda: lambda: happened.append("run"), touches=3)
    measure(lambda: happened.append("sweep"), [task], 2, Clock(torch.device("cpu")))
    pairs = list(zip(happened, happened[1:], strict=False))
    assert pairs.count((3, "run")) == 2 == happened.count(3)


AXES: dict[str, tuple[Callable[[int], Problem], tuple[int, ...]]] = {
    "outputs": (lambda r: small(n=2, batches=1, classes=r), (10, 100, 1000)),
    "width": (lambda w: small(width=w), (8, 32, 128)),
    "depth": (lambda d: small(depth=d), (2, 8, 32)),
    "examples": (lambda n: small(n=n), (3, 12, 48)),
    "batches": (lambda n: small(batches=n), (1, 4, 16)),
}
each_axis = pytest.mark.parametrize("axis", AXES)
each_job = pytest.mark.parametrize("job", JOBS)


@cache
def grown(axis: str, job: str) -> list[tuple[Operations, floors.Cost]]:
    """What is executed, and what is needed, at each size."""
    build, sizes = AXES[axis]
    return [(executed(build(size), job), floors.FLOORS[job](shapes_of(build(size)))) for size in sizes]


@each_axis
@each_job
def test_operations_grow_no_faster_than_the_mathematics(job, axis):
    above = [found.multiply_adds / needed.multiply_adds for found, needed in grown(axis, job)]
    assert max(above) <= (2 if job == "ntk" else 1.1)  # of small kernels both halves are computed, which are equal


@each_axis
@each_job
def test_entries_written_grow_no_faster_than_the_mathematics(job, axis):
    # Sizes grow by 4 or 10: one power more would show, while lower powers lose their weight.
    few, some, many = (found.written / (needed.entries + needed.fresh) for found, needed in grown(axis, job))
    assert many <= 2 * some and some <= 3 * few


@each_job
def test_depth_costs_the_same_for_each_layer(job):
    few, some, many = (executed(small(depth=depth), job) for depth in (4, 6, 8))
    assert many.multiply_adds - some.multiply_adds == some.multiply_adds - few.multiply_adds
    assert many.written - some.written == some.written - few.written


@pytest.mark.parametrize("job", ["diag", "kfac", "ekfac", "jacobian"])
def test_parts_of_a_batch_execute_what_the_whole_does(job, monkeypatch):
    whole = executed(small(n=8), job)
    monkeypatch.setattr("nngeo.generators.sizing.TOGETHER", 2)
    monkeypatch.setattr("nngeo.generators.sizing.BUDGET", 400)  # all cotangents of two or three examples
    parts, forwards = small(n=8), list[int]()
    run = ours.JOBS[job](parts)
    run()
    parts.model.register_forward_hook(lambda module, args, out: forwards.append(len(out)))
    run()  # with a plan that knows of the hook
    forwards.clear()
    assert operations(run).multiply_adds == whole.multiply_adds
    assert max(forwards) <= 3 and sum(forwards) == 16


@pytest.mark.parametrize("job", ["diag", "kfac", "mv", "jacobian", "ntk"])
def test_entries_written_grow_no_faster_than_outputs(job):
    # Layers are wide: cotangents at the outputs themselves are outputs squared.
    few, many = (executed(small(classes=classes, width=128), job).written for classes in (5, 20))
    cotangents = {"ntk": 16, "jacobian": 4, "mv": 1}.get(job, 19 / 4)
    assert many <= 1.2 * cotangents * few


@pytest.mark.parametrize(("job", "own"), [("diag_mc", 1), ("kfac_mc", 0)])
@pytest.mark.parametrize(("few", "many"), [(5, 20), (10, 1000)])
def test_more_outputs_cost_monte_carlo_the_last_layer_only(job, own, few, many):
    n, i = 8, 128
    forward_backward_and_own = (2 + own) * n * i * (many - few) + own * n * (many - few)
    output_factor = (1 - own) * n * (many**2 - few**2)
    found = [executed(small(classes=classes, width=i), job).multiply_adds for classes in (few, many)]
    assert found[1] - found[0] == forward_backward_and_own + output_factor


@pytest.mark.parametrize("classes", [3, 30, 300])
def test_the_diagonal_of_a_linear_layer_costs_one_product_whatever_the_outputs(classes):
    made = classification("linear", nn.Linear(7, classes, bias=False), (7,), 1, 5, classes)
    assert executed(made, "diag").multiply_adds == 2 * 5 * 7 * classes  # the forward, and the squares


def test_the_counts_of_products_are_those_of_their_definitions():
    a, b, c = torch.randn(2, 3), torch.randn(3, 5), torch.randn(4, 2, 3)
    assert operations(lambda: a @ b).multiply_adds == 2 * 3 * 5
    assert operations(lambda: torch.zeros(2, 5).addmm_(a, b)).multiply_adds == 2 * 3 * 5
    assert operations(lambda: c @ b).multiply_adds == 4 * 2 * 3 * 5
    assert operations(lambda: a @ b[:, 0]).multiply_adds == 2 * 3
    conv = nn.Conv2d(4, 6, 3, groups=2)
    assert operations(lambda: conv(torch.randn(2, 4, 5, 5))).multiply_adds == 2 * 9 * 6 * 18


def test_a_product_that_is_not_known_is_an_error():
    with pytest.raises(NotImplementedError, match="PRODUCTS"):
        operations(lambda: torch.ops.aten._sparse_mm(torch.eye(2).to_sparse(), torch.eye(2)))


# ------------------------------------------------------------------------------------------ rounds


class Ticking(Clock):
    """A clock on which everything takes as long as it says."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def time(self, run):
        name, seconds = run()
        self.order.append(name)
        return seconds


def _always(name: str, seconds: float) -> Task:
    return Task("job", name, lambda: lambda: (name, seconds))


def test_every_round_runs_every_library_once_and_starts_with_another():
    clock = Ticking()
    measure(lambda: ("sweep", 2.0), [_always("a", 4.0), _always("b", 6.0)], 3, clock)
    assert clock.order[3:] == ["sweep", "a", "b", "a", "b", "sweep", "b", "sweep", "a"]


def test_times_are_multiples_of_the_sweep_of_their_round():
    seconds = iter([9.0, 2.0, 4.0, 8.0])
    a = _always("a", 8.0)
    units = measure(lambda: ("sweep", next(seconds)), [a], 3, Ticking())
    assert units == [2.0, 4.0, 8.0]
    assert a.ratios == [4.0, 2.0, 1.0]
    assert Spread.of(a.ratios) == Spread(2.0, 1.5, 3.0)


def test_a_library_that_fails_is_reported_and_the_others_are_measured():
    def fails():
        raise ValueError("no such layer")

    a, b = Task("job", "a", lambda: fails), _always("b", 6.0)
    measure(lambda: ("sweep", 2.0), [a, b], 2, Ticking())
    assert (a.error, a.ratios, b.ratios) == ("ValueError: no such layer", [], [3.0, 3.0])


def test_what_is_fresh_is_set_up_in_every_round():
    setups = []

    def setup():
        setups.append(1)
        return lambda: ("a", 1.0)

    measure(lambda: ("sweep", 1.0), [Task("job", "a", setup, fresh=True)], 2, Ticking())
    assert len(setups) == 3


# ------------------------------------------------------------------------------------------ jobs and peers


@pytest.mark.parametrize(("network", "job"), EVERY_JOB)
def test_every_job_is_done_and_has_a_floor(network, job):
    assert job in JOBS and job in ours.JOBS and job in floors.FLOORS


@pytest.mark.parametrize("peer", PEERS)
def test_absent_peers_are_skipped(peer, monkeypatch):
    monkeypatch.delitem(sys.modules, f"tests.benchmarks.adapters.{peer}", raising=False)
    monkeypatch.setitem(sys.modules, peer, None)
    assert adapter(peer) is None


# BackPACK's KFAC weighs positions otherwise; the other peers know neither some layers of the last two, nor tokens.
SAME = [
    *[("nngeometry", network, job) for network in ("mlp", "cnn") for job in ("diag", "kfac", "mv", "ntk", "jacobian")],
    *[("nngeometry", "resnet18", job) for job in ("diag", "kfac")],
    *[("backpack", network, "diag") for network in ("mlp", "cnn", "resnet18")],
    ("backpack", "mlp", "kfac"),
    *[("curvlinops", network, job) for network in ("mlp", "cnn", "resnet18") for job in ("kfac", "mv")],
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("peer", "network", "job"), SAME)
def test_peers_compute_the_same(peer, network, job):
    if (other := adapter(peer)) is None:
        pytest.skip(f"{peer} is not installed")
    made = problem(network, quick=True)

    def flat(library) -> Tensor:
        own = made.copy()
        return library.flat[job](library.jobs[job](own)(), own)

    mine = flat(adapter("ours"))
    assert_close(flat(other), mine, rtol=1e-4, atol=1e-5 * float(mine.abs().max()))


# ------------------------------------------------------------------------------------------ memory and reports


HELD = """
import torch
from tests.benchmarks.memory import MIB, Resident
meter = Resident()
before = meter.reset()
for _ in range(3):
    torch.ones(16 * MIB)  # of 64 MiB, freed at once
print(meter.most() - before)
"""


def test_peaks_are_those_of_what_is_held_at_a_time():
    if not Resident().resets:
        pytest.skip("the mark can't be reset here")
    run = [sys.executable, "-c", HELD]
    found = subprocess.run(run, env=os.environ | ALLOCATOR, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 60 * MIB < int(found.stdout) < 80 * MIB


def test_a_peak_is_measured_in_a_process_of_its_own():
    peak = in_own_process("MLP, 1000 digits", "ntk", "ours", quick=True)
    assert peak.error is None and peak.bytes >= 4 * 400**2  # the kernel of 40 examples and 10 outputs


def test_what_a_process_of_its_own_raises_is_reported():
    peak = in_own_process("MLP, 1000 digits", "no such job", "ours", quick=True)
    assert peak.bytes is None and "no such job" in peak.error


def test_tables_hold_every_job_and_library():
    times = measure_times(problem("mlp", quick=True), ["diag", "mv"], [adapter("ours")], 1, 1)
    header, lines = report.times_table(times)
    assert header == ["job", "nngeo", "quartiles", "first call", "floor"]
    assert [line[0] for line in lines] == [JOBS["diag"].title, JOBS["mv"].title]
    rows = list(csv.DictReader(io.StringIO(report.times_as_csv([times]))))
    assert {(row["job"], row["library"]) for row in rows} == {
        (job, library) for job in ("diag", "mv") for library in ("nngeo", "nngeo, first call")
    }
    assert all(float(row["sweeps_median"]) > 0 and not row["error"] for row in rows)


def test_one_command_measures_and_writes_what_the_documentation_shows(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(growth, "JOBS", ("diag",))
    out = tmp_path / "benchmarks"
    asked = ["--quick", "--rounds=1", "--networks=mlp", "--jobs=diag,mv", "--peers=", "--parts=times,growth"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *asked, f"--out={out}"])
    command.main()
    assert {path.name for path in out.iterdir()} == {
        *("machine.inc", "tables.txt", "times.csv", "times.inc", "times_mlp_1.png"),
        *("growth.csv", "growth.inc", "growth.png"),
    }
    assert (out / "tables.txt").read_text().rstrip() == capsys.readouterr().out.rstrip()
