"""Train a network in a few steps of natural gradient, where Adam needs hundreds.

Full-batch cross entropy of the handwritten digits of scikit-learn, down to 1e-3. A step combines the natural gradient
`(F_kfac + damping I)^-1 g` with the step before (the momentum). The two coefficients minimise the quadratic model
`g's + s'(F + damping I)s / 2` exactly: its F is the exact Fisher matrix, and never formed. The damping follows
Levenberg and Marquardt: less where the model foresees what happens, more where it does not (Martens & Grosse, 2015).

    python examples/natural_gradient.py [--out natural_gradient.png]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from nngeo import FIM, PMatImplicit, PMatKFAC, PVector, grad

TARGET = 1e-3
pixels, labels = load_digits(return_X_y=True)
images, classes = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(images), classes)


def adam(model: nn.Module, lr: float = 0.05) -> Iterator[Tensor]:
    """The loss before each step. Of the rates .01, .02, .03, .05 and .1, this one needs the fewest."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    while True:
        optimizer.zero_grad()
        loss = loss_of(model)
        yield loss
        loss.backward()
        optimizer.step()


def natural_gradient(model: nn.Module, momentum: bool = True, damping: float = 1.0) -> Iterator[Tensor]:
    """The loss before each step."""
    w = PVector.from_model(model)
    last = torch.empty(0, *w.size())
    while True:
        loss = loss_of(model)
        yield loss
        g = grad(loss, w).to_torch()
        kfac, exact = (FIM(model, (images,), kind) for kind in (PMatKFAC, PMatImplicit))
        directions = torch.cat([-kfac.solve(g, regul=damping)[None], last])
        # The quadratic model on the span of the directions, and where it is least.
        slope = directions @ g
        curvature = directions @ (exact.mv(directions) + damping * directions).mT
        coefficients = torch.linalg.solve(curvature, -slope)
        step = coefficients @ directions
        PVector(w.layer_collection, step).add_to_model(model)
        agreement = (loss_of(model) - loss) / (coefficients @ slope / 2)  # of the change with the one foreseen
        damping *= 0.5 if agreement > 0.75 else 2 if agreement < 0.25 else 1
        if agreement < 0:  # uphill: back
            PVector(w.layer_collection, -step).add_to_model(model)
        last = step[None] if momentum else last


def main(seeds: int = 3, out: str = "natural_gradient.png") -> dict[str, float]:
    """Steps to the target by method: the mean over seeds."""
    methods = {"Adam": adam, "KFAC": partial(natural_gradient, momentum=False), "KFAC with momentum": natural_gradient}
    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    ax.set(xlabel="step", ylabel="cross entropy of the digits", xscale="log", yscale="log")
    print(f"{'to a loss of 1e-3':<20}{'steps':>8}{'s / step':>10}")
    steps = {}
    for name, method in methods.items():
        start, count = time.perf_counter(), 0
        for seed in range(seeds):
            torch.manual_seed(seed)
            losses = method(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
            curve = [next(losses).item()]
            while curve[-1] > TARGET:
                curve.append(next(losses).item())
            count += len(curve) - 1
            ax.plot(range(1, len(curve) + 1), curve, f"C{len(steps)}", label=None if seed else name)
        steps[name] = count / seeds
        print(f"{name:<20}{steps[name]:>8.0f}{(time.perf_counter() - start) / count:>10.4f}")
    ax.legend(frameon=False)
    figure.savefig(out, dpi=110)
    print(f"\nThe course of the losses: {out}")
    return steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="natural_gradient.png", help="where to save the picture")
    main(out=parser.parse_args().out)
