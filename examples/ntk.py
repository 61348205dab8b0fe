"""Predict what gradient descent does to a wide network, from its neural tangent kernel at initialisation.

Linearised in its weights, a network that descends the squared loss at rate r has after s steps the outputs
`f_s = y + (I - r K / n)^s (f_0 - y)`, with its kernel K on the n training digits (Jacot et al., 2018). The wider the
network, the closer it follows. Kernel ridge regression with K needs no training at all.

    python examples/ntk.py [--out ntk.png]
"""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from nngeo import NTK, FVector

WIDTHS, STEPS = (32, 256, 2048), 1000


def digits() -> tuple[Tensor, Tensor]:
    """The 1797 images (b, 64) with values in [0, 1], and their classes (b,), shuffled."""
    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes))
    return torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(classes)[order]


def one_hot(classes: Tensor) -> FVector:
    """(10, n), centred."""
    return FVector(nn.functional.one_hot(classes, 10).T - 0.1)


def ridge_accuracy(model: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Of kernel ridge regression on one-hot classes; the ridge is 1e-3 of the kernel's mean eigenvalue."""
    K, y = NTK(model, train[0]), one_hot(train[1])
    weights = K.solve(y, regul=1e-3 * K.trace().item() / y.to_torch().numel())
    predicted = (NTK(model, test[0], train[0]) @ weights).to_torch()
    return float((predicted.argmax(0) == test[1]).float().mean())


def closed_form(values: Tensor, vectors: Tensor, f: Tensor, y: Tensor, rate: float) -> Tensor:
    """(STEPS,): the squared loss of the linearised network before each step."""
    n = y.shape[1]
    coordinates = vectors.mT @ (f - y).flatten()
    kept = 1 - rate * values / n  # in each step, of each coordinate
    return (kept ** torch.arange(STEPS)[:, None] * coordinates).square().sum(1) / (2 * n)


def gradient_descent(model: nn.Module, images: Tensor, y: Tensor, rate: float) -> Tensor:
    """(STEPS,): the squared loss of the network itself before each step."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=rate), torch.zeros(STEPS)
    for s in range(STEPS):
        loss = (model(images).T - y).square().sum() / (2 * len(images))
        losses[s] = loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def main(out: str = "ntk.png") -> dict[str, dict[int, float]]:
    """By width: the accuracy of the kernel, and the largest distance of the two curves, relative to the first loss."""
    torch.manual_seed(0)
    images, classes = digits()
    train, test = (images[:400], classes[:400]), (images[400:], classes[400:])
    x, y = images[:100], one_hot(classes[:100]).to_torch()
    figure, axes = plt.subplots(1, len(WIDTHS), figsize=(11, 3.6), sharey=True, layout="constrained")
    found: dict[str, dict[int, float]] = {"accuracy": {}, "distance": {}}
    print(f"{'width':>5}{'accuracy of the kernel':>25}{'distance of the curves':>25}")
    for width, ax in zip(WIDTHS, axes, strict=True):
        model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        found["accuracy"][width] = accuracy = ridge_accuracy(model, train, test)
        values, vectors = NTK(model, x).get_eigendecomposition()
        rate = 100 / float(values[-1])
        curve = closed_form(values, vectors, model(x).T.detach(), y, rate)
        descent = gradient_descent(model, x, y, rate)
        found["distance"][width] = distance = float((curve - descent).abs().max() / curve[0])
        print(f"{width:>5}{accuracy:>25.3f}{distance:>25.4f}")
        ax.plot(descent, label="gradient descent")
        ax.plot(curve, "k--", label="closed form from the kernel")
        ax.set(title=f"width {width}", xlabel="step", xscale="symlog", yscale="log", ylim=(1e-2, 1))
    axes[0].set_ylabel("squared loss of 100 digits")
    axes[0].legend()
    figure.savefig(out, dpi=110)
    print(f"\nThe curves: {out}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="ntk.png", help="where to save the picture")
    main(out=parser.parse_args().out)
