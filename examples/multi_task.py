"""Teach a network a second task and spare the first: the mean of gradients against UPGrad (Quinton & Rey, 2024).

Two handwritten digits of scikit-learn lie over each other, one to the left and one to the right. A small network has
learned to read the left one. Then it has to read the right one as well, whose loss is in another unit, five times
larger. The tasks share a trunk and disagree on it. The mean follows the larger gradient; UPGrad makes no loss worse.

    python examples/multi_task.py [--out multi_task.png]
"""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import nngeo.descent as torchjd
from nngeo.descent.aggregation import Aggregator, Mean, UPGrad

PAIRS, WIDTH, STEPS, UNIT = 400, 24, 450, 5.0
METHODS: dict[str, Aggregator] = {"mean of gradients": Mean(), "UPGrad": UPGrad(strict=True)}


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    """Images (b, 96) of two digits that overlap by a third, and the classes (b,) of the left and the right one."""
    images, classes = (torch.tensor(x) for x in load_digits(return_X_y=True))
    images = images.float().view(-1, 8, 8) / 16
    left, right = (torch.randperm(len(images))[:PAIRS] for _ in range(2))
    both = torch.maximum(nn.functional.pad(images[left], (0, 4)), nn.functional.pad(images[right], (4, 0)))
    return both.flatten(1), classes[left], classes[right]


def two_digits() -> nn.ModuleDict:
    trunk = nn.Sequential(nn.Linear(96, WIDTH), nn.Tanh())
    return nn.ModuleDict({"trunk": trunk, "left": nn.Linear(WIDTH, 10), "right": nn.Linear(WIDTH, 10)})


def step(model: nn.ModuleDict, optimizer: torch.optim.Optimizer, A: Aggregator, batch: tuple[Tensor, ...]) -> Tensor:
    """The two losses (2,) before the step."""
    x, left, right = batch
    features = model["trunk"](x)
    losses = [cross_entropy(model["left"](features), left), UNIT * cross_entropy(model["right"](features), right)]
    optimizer.zero_grad()
    torchjd.mtl_backward(losses, features, A)
    optimizer.step()
    return torch.stack(losses).detach()


def course(A: Aggregator, seed: int) -> Tensor:
    """Both losses (steps, 2), from when the second task joins."""
    torch.manual_seed(seed)
    batch, model = pairs(), two_digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        cross_entropy(model["left"](model["trunk"](batch[0])), batch[1]).backward()
        optimizer.step()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return torch.stack([step(model, optimizer, A, batch) for _ in range(STEPS)])


def draw(found: dict[str, Tensor], path: str) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, losses in found.items():  # (seed, step, task)
        for task, ax in enumerate(axes):
            (line,) = ax.plot(losses.mean(0)[:, task].numpy(), linewidth=2, label=name)
            ax.plot(losses[..., task].T.numpy(), color=line.get_color(), alpha=0.3, linewidth=0.8)
            ax.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(float(found["UPGrad"][:, 0, 0].mean()), color="grey", linestyle=":", label="before")
    axes[0].set(title="Left digit, learned before", ylabel="loss (thin: each seed)", ylim=(0, None))
    axes[0].legend(frameon=False, loc="center right")
    axes[1].set(title="Right digit, new", ylabel="five times its cross entropy", yscale="log")
    axes[1].set_yticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    figure.supxlabel("steps after the second task joined", fontsize="medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(seeds: int = 3, out: str = "multi_task.png") -> dict[str, dict[str, float]]:
    """By method: the left loss before, its peak, and both losses after the last step; the mean over seeds."""
    found = {name: torch.stack([course(A, seed) for seed in range(seeds)]) for name, A in METHODS.items()}
    figures = {}
    print(f"{'loss':<20}{'left before':>14}{'worst':>9}{'after':>9}{'right after':>14}")
    for name, losses in found.items():
        left, right = losses.mean(0).T.tolist()
        figures[name] = {"before": left[0], "worst": max(left), "after": left[-1], "right": right[-1]}
        print(f"{name:<20}{left[0]:>14.3f}{max(left):>9.3f}{left[-1]:>9.3f}{right[-1]:>14.3f}")
    draw(found, out)
    print(f"\nBoth losses: {out}")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="multi_task.png", help="where to save the picture")
    main(out=parser.parse_args().out)
