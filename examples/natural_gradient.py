"""Train a network in a few steps of natural gradient, Adam needs hundreds.

Full-batch cross entropy of the digits of scikit-learn, down to 1e-3. KFAC
gives a direction; the exact Fisher matrix, by products through the network,
says how far to go along it and the step before (exact momentum); the damping
follows Levenberg and Marquardt (Martens & Grosse, 2015).

    python examples/natural_gradient.py [natural_gradient.png]
"""

import sys
import time
from collections.abc import Iterator
from functools import partial

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from nngeo.uses import NaturalGradient

TARGET = 1e-3
pixels, classes = (torch.tensor(a) for a in load_digits(return_X_y=True))
images = pixels.float() / 16


def adam(model: nn.Module) -> Iterator[Tensor]:
    """The losses; of .01, .02, .03, .05 and .1, this rate is the fastest."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    while True:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), classes)
        yield loss
        loss.backward()
        optimizer.step()


def kfac(model: nn.Module, momentum: float | str = 0.0) -> Iterator[Tensor]:
    """The losses."""
    how = {"damping": "lm", "momentum": momentum, "decay": 0.0}
    opt = NaturalGradient(model, trials=None, **how)
    loss = nn.CrossEntropyLoss()
    while True:
        opt.update((images,))
        yield opt.step(lambda: loss(model(images), classes))


METHODS = {"Adam": adam, "KFAC": kfac}
METHODS |= {"KFAC, exact momentum": partial(kfac, momentum="exact")}


def main(seeds: int = 3, out: str = "out.png") -> dict[str, float]:
    """Steps to the target by method: the mean over seeds."""
    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    ax.set(xlabel="step", ylabel="cross entropy", xscale="log", yscale="log")
    print(f"{'to a loss of 1e-3':<22}{'steps':>8}{'seconds':>10}")
    steps = {}
    for name, method in METHODS.items():
        start, counts = time.perf_counter(), []
        for seed in range(seeds):
            torch.manual_seed(seed)
            net = nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
            losses, curve = method(nn.Sequential(*net)), [1.0]
            while curve[-1] > TARGET:
                curve.append(next(losses).item())
            counts.append(len(curve) - 2)
        ax.plot(range(1, len(curve)), curve[1:], label=name)
        seconds = (time.perf_counter() - start) / seeds
        steps[name] = sum(counts) / seeds
        print(f"{name:<22}{steps[name]:>8.0f}{seconds:>10.2f}")
    ax.legend()
    figure.savefig(out, dpi=110)
    print(f"\nThe course of the losses: {out}")
    return steps


if __name__ == "__main__":
    main(out=(sys.argv + ["natural_gradient.png"])[1])
