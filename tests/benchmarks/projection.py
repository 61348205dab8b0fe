"""UPGrad's weights from Gramians of real losses, beside those of torchjd (one quadprog problem for each loss).

    python -m tests.benchmarks.projection

Gramians of the losses of single digits, from an MLP 784-512-512-10 at its initialisation and after SGD steps. In a
round both find the weights of one Gramian, in turns; figures are medians over rounds of CPU time (of the process, so
that what else the machine does counts less), and of the ratios inside of rounds. One thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from nngeo.descent.aggregation.upgrad import UPGradWeighting
from nngeo.descent.autogram import Engine
from tests.benchmarks.descent import network

Weights = Callable[[Tensor], Tensor]


def digits() -> tuple[Tensor, Tensor]:
    """1797 images (1797, 784), enlarged from 8 x 8, and their classes (1797,)."""
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return nn.functional.interpolate(images, size=28).flatten(1), torch.tensor(data.target)


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """SGD on the mean loss of batches of 64."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        batch = torch.randperm(len(x))[:64]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    optimizer.zero_grad()


def theirs() -> Weights | None:
    """UPGradWeighting of torchjd, where it is installed."""
    try:
        from torchjd.aggregation import UPGradWeighting as Weighting
    except ImportError:
        return None
    return Weighting()


def seconds(weights: Weights, gramian: Tensor) -> tuple[float, Tensor]:
    """CPU time of one call, and its result."""
    start = time.process_time()
    found = weights(gramian)
    return time.process_time() - start, found


def line(gramians: list[Tensor], ours: Weights, other: Weights | None) -> str:
    """The line of the table for some Gramians of one size, one round each."""
    text = f"{len(gramians[0]):5}"
    seconds(ours, gramians[0])  # not counted
    if other is None:
        return f"{text}{1e3 * statistics.median(seconds(ours, g)[0] for g in gramians):10.2f}"
    seconds(other, gramians[0][:2, :2])
    rounds = [(*seconds(ours, g), *seconds(other, g)) for g in gramians]
    own, peer = (1e3 * statistics.median(times) for times in ([r[0] for r in rounds], [r[2] for r in rounds]))
    ratio = statistics.median(r[2] / r[0] for r in rounds)
    apart = max(float((r[1] - r[3]).abs().max() / r[3].abs().max()) for r in rounds)
    return f"{text}{own:10.2f}{peer:12.2f}{ratio:8.1f}{apart:12.0e}"


def main() -> None:
    """Measure what the command line asks for, and print a table for each stage of training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32, 64, 128, 256])
    parser.add_argument(
        "--rounds", type=int, default=9, help="Gramians for each size; a third of them from 128 losses on"
    )
    parser.add_argument("--trained", type=int, nargs="*", default=[0, 200], help="SGD steps before")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = digits()
    for steps in options.trained:
        model, _ = network("mlp")
        train(model, x, y, steps)
        engine = Engine(model, batch_dim=0)

        def gramian(m: int, model: nn.Module = model, engine: Engine = engine) -> Tensor:
            batch = torch.randperm(len(x))[:m]
            return engine.compute_gramian(nn.functional.cross_entropy(model(x[batch]), y[batch], reduction="none"))

        print(f"\nafter {steps} steps of training\n    m   ours ms  torchjd ms   ratio  difference")
        for m in options.sizes:
            rounds = options.rounds if m < 128 else max(1, options.rounds // 3)
            print(line([gramian(m) for _ in range(rounds)], UPGradWeighting(), theirs()), flush=True)


if __name__ == "__main__":
    main()
