"""Learn five tasks in sequence without forgetting the first.

Each task is the digits of scikit-learn with their pixels shuffled in another
way. After a task `penalty.consolidate` finds the Fisher matrix there: which
directions matter for it. Elastic weight consolidation (Kirkpatrick et al.,
2017) keeps the weights from moving along them, with one matrix for all tasks.

    python examples/ewc.py [ewc.png]
"""

import sys

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from nngeo import PMatDiag, PMatKFAC
from nngeo.uses import EWC

TASKS, TRAIN, EPOCHS = 5, 1400, 60
# How to remember, and how strongly: for each, the best of 1, 3, 10 and 30.
METHODS = {"no penalty": (PMatDiag, 0), "PMatDiag": (PMatDiag, 3)}
METHODS |= {"PMatKFAC": (PMatKFAC, 10)}


def accuracies(representation: type, strength: float, seed: int) -> Tensor:
    """(task, task): of every task (column), after each one (row)."""
    torch.manual_seed(seed)
    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes))
    images = torch.tensor(images / 16, dtype=torch.float32)[order]
    classes = torch.tensor(classes)[order]
    tasks = [images[:, torch.randperm(64)] for _ in range(TASKS)]
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    penalty = EWC(model, representation, variant="classif_logits")
    rows = []
    for x in tasks:
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(EPOCHS):
            for batch in torch.randperm(TRAIN).split(128):
                f = model(x[batch])
                loss = nn.functional.cross_entropy(f, classes[batch])
                optimizer.zero_grad()
                (loss + strength / 2 * penalty()).backward()
                optimizer.step()
        penalty.consolidate((x[:TRAIN],))
        found = [model(task[TRAIN:]).argmax(-1) for task in tasks]
        rows.append([(f == classes[TRAIN:]).float().mean() for f in found])
    return torch.tensor(rows)


def main(seeds: int = 3, out: str = "ewc.png") -> dict[str, float]:
    """Mean accuracy over the five tasks after the last, by method."""
    names = "".join(f"{f'task {t + 1}':>8}" for t in range(TASKS))
    print(f"{'after task 5':<14}{names}{'mean':>8}")
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    ax.set(xlabel="tasks learned", ylabel="accuracy on these", ylim=(0, 1))
    found = {}
    for name, how in METHODS.items():
        runs = [accuracies(*how, seed) for seed in range(seeds)]
        mean = torch.stack(runs).mean(0)
        found[name] = float(mean[-1].mean())
        last = "".join(f"{value:>8.2f}" for value in mean[-1])
        print(f"{name:<14}{last}{found[name]:>8.2f}")
        curve = [mean[t, : t + 1].mean() for t in range(TASKS)]
        ax.plot(range(1, TASKS + 1), curve, "o-", label=name)
    ax.legend(frameon=False)
    figure.savefig(out, dpi=110)
    print(f"\nThe course of learning: {out}")
    return found


if __name__ == "__main__":
    main(out=(sys.argv + ["ewc.png"])[1])
