"""One step of Jacobian descent with a loss per example, in multiples of a plain step.

    python -m tests.benchmarks.descent

Times are medians over interleaved rounds, on one thread: in a round everything runs once, in turns, so that what else
the machine does hits all alike, and ratios are medians of the ratios inside of rounds. `--clock cpu` counts the seconds
of the process instead of those on the wall, for machines that are shared. Memory is the peak of what torch's allocator
holds during one step beyond model and data, gradients included, summed up from the events of torch's profiler.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nngeo.descent.aggregation.upgrad import UPGradWeighting
from nngeo.descent.autogram import Engine


@dataclass
class Entry:
    """Something to time, and what it took in each round."""

    name: str
    model: nn.Module
    run: Callable[[], Any]
    rounds: int
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)


def network(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A classifier of ten classes, and the shape of its inputs: an MLP 784-512-512-10, or a convolutional network."""
    torch.manual_seed(0)
    if kind == "mlp":
        layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
        return nn.Sequential(*layers), (784,)
    convolutions = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Flatten(), nn.Linear(64 * 36, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*convolutions, *head), (3, 32, 32)


def batches(shape: tuple[int, ...], b: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Normal inputs, and the classes that a random linear map gives them."""
    teacher = torch.randn(torch.Size(shape).numel(), 10)
    while True:
        x = torch.randn(b, *shape)
        yield x, (x.flatten(1) @ teacher).argmax(1)


def train(model: nn.Module, data: Iterator[tuple[Tensor, Tensor]], steps: int) -> None:
    """Adam on the mean loss of fresh batches."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        x, y = next(data)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()


def entries(kind: str, b: int, trained: int, rounds: int) -> list[Entry]:
    """The plain step first. Every entry has a model of its own, with the same weights."""
    model, shape = network(kind)
    data = batches(shape, b)
    train(model, data, trained)
    x, y = next(data)
    criterion = nn.CrossEntropyLoss(reduction="none")

    def cleared(own: nn.Module) -> Tensor:
        for p in own.parameters():
            p.grad = None
        return criterion(own(x), y)

    plain, own = deepcopy(model), [deepcopy(model) for _ in range(3)]
    engines = [Engine(m, batch_dim=0) for m in own]
    w, upgrad = torch.full((b,), 1 / b), UPGradWeighting()

    def two_passes() -> None:
        losses = cleared(own[2])
        losses.backward(upgrad(engines[2].compute_gramian(losses)))

    found = [
        Entry("plain step: forward, backward of the mean", plain, lambda: cleared(plain).mean().backward(), rounds),
        Entry("forward alone", plain, lambda: cleared(plain), rounds),
        Entry("Gramian, forward included", own[0], lambda: engines[0].compute_gramian(cleared(own[0])), rounds),
        Entry("step, fixed weights", own[1], lambda: engines[1].step(cleared(own[1]), lambda gramian: w), rounds),
        Entry("step, UPGrad", own[1], lambda: engines[1].step(cleared(own[1]), upgrad), rounds),
        Entry("Gramian, UPGrad, losses.backward(w)", own[2], two_passes, rounds),
    ]
    return found + torchjd_entries(model, cleared)


def torchjd_entries(model: nn.Module, cleared: Callable[[nn.Module], Tensor]) -> list[Entry]:
    """The same by torchjd, in a few rounds only; none where it is not installed."""
    try:
        from torchjd.aggregation import UPGradWeighting as Weighting
        from torchjd.autogram import Engine as TheirEngine
    except ImportError:
        return []
    copies = [deepcopy(model) for _ in range(2)]
    engines, weighting = [TheirEngine(m, batch_dim=0) for m in copies], Weighting()

    def step() -> None:
        losses = cleared(copies[1])
        losses.backward(weighting(engines[1].compute_gramian(losses)))

    return [
        Entry(
            "torchjd: Gramian, forward included", copies[0], lambda: engines[0].compute_gramian(cleared(copies[0])), 5
        ),
        Entry("torchjd: Gramian, UPGrad, losses.backward(w)", copies[1], step, 5),
    ]


def measure(found: list[Entry], rounds: int, clock: Callable[[], float]) -> None:
    """Fill the seconds and ratios; the first round does not count."""
    for index in range(-1, rounds):
        latest: dict[str, float] = {}
        for entry in found:
            if index < entry.rounds:
                start = clock()
                entry.run()
                latest[entry.name] = clock() - start
        for entry in found if index >= 0 else ():
            if entry.name in latest:
                entry.seconds.append(latest[entry.name])
                entry.ratios.append(latest[entry.name] / latest[found[0].name])


def peak(entry: Entry) -> int:
    """Bytes that torch's allocator holds at most during a step, beyond model and data."""
    entry.run()
    entry.model.zero_grad()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        entry.run()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def main() -> None:
    """Measure what the command line asks for, and print a table for each network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--network", choices=["mlp", "cnn"], default="mlp")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--trained", type=int, nargs="*", default=[0, 200], help="steps of training before")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    for steps in options.trained:
        found = entries(options.network, options.batch, steps, options.rounds)
        measure(found, options.rounds, clock)
        print(f"\n{options.network}, batch {options.batch}, after {steps} steps of training, {options.clock} clock")
        print(f"{'':46}{'ms':>9}{'x plain':>9}{'peak MB':>9}{'x plain':>9}")
        peaks = [peak(entry) for entry in found]
        for entry, most in zip(found, peaks, strict=True):
            time_ms, ratio = 1e3 * statistics.median(entry.seconds), statistics.median(entry.ratios)
            print(f"{entry.name:46}{time_ms:9.2f}{ratio:9.2f}{most / 2**20:9.2f}{most / peaks[0]:9.2f}")


if __name__ == "__main__":
    main()
