"""Learn five tasks in sequence without forgetting the first: elastic weight consolidation (Kirkpatrick et al., 2017).

Each task is the handwritten digits of scikit-learn with their pixels shuffled in another way. After a task the Fisher
matrix F_t at its weights w_t says which directions matter for it, and `F_t.vTMv(w - w_t)` keeps later tasks from moving
along them. Another representation of F_t is another name.

    python examples/ewc.py [--out ewc.png]
"""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from nngeo import FIM, PMat, PMatDiag, PMatKFAC, PVector

TASKS, TRAIN, EPOCHS = 5, 1400, 60

# How to remember, and how strongly: for each, the best of 1, 3, 10 and 30.
METHODS: dict[str, tuple[type[PMat] | None, float]] = {
    "no penalty": (None, 0),
    "PMatDiag": (PMatDiag, 3),
    "PMatKFAC": (PMatKFAC, 10),
}


def digits() -> tuple[Tensor, Tensor]:
    """The 1797 images (b, 64) with values in [0, 1], and their classes (b,), shuffled."""
    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(classes))
    return torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(classes)[order]


def accuracies(representation: type[PMat] | None, strength: float, seed: int) -> Tensor:
    """(task, task): on the test digits of every task (column), after each task that was learned (row)."""
    torch.manual_seed(seed)
    images, classes = digits()
    tasks = [images[:, torch.randperm(64)] for _ in range(TASKS)]
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    w = PVector.from_model(model)
    remembered: list[tuple[PMat, PVector]] = []
    rows = []
    for x in tasks:
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(EPOCHS):
            for batch in torch.randperm(TRAIN).split(128):
                loss = nn.functional.cross_entropy(model(x[batch]), classes[batch])
                penalty = sum(F_t.vTMv(w - w_t) for F_t, w_t in remembered)
                optimizer.zero_grad()
                (loss + strength / 2 * penalty).backward()
                optimizer.step()
        if representation is not None:
            F = FIM(model, (x[:TRAIN],), representation, variant="classif_logits")
            remembered.append((F, w.clone().detach()))
        rows.append([(model(t[TRAIN:]).argmax(-1) == classes[TRAIN:]).float().mean() for t in tasks])
    return torch.tensor(rows)


def draw(found: dict[str, Tensor], path: str) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    numbers = torch.arange(1, TASKS + 1).numpy()
    for i, (name, accuracy) in enumerate((name, accuracy.numpy()) for name, accuracy in found.items()):
        left.plot(numbers, [accuracy[t, : t + 1].mean() for t in range(TASKS)], "o-", label=name)
        right.bar(numbers + 0.27 * (i - 1), accuracy[-1], width=0.25, label=name)
    left.set(title="Mean over the tasks seen so far", xlabel="tasks learned", ylabel="test accuracy", ylim=(0, 1))
    right.set(title="Each task, after the last", xlabel="task")
    left.legend(frameon=False, loc="lower left")
    for ax in (left, right):
        ax.set_xticks(numbers)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(seeds: int = 3, out: str = "ewc.png") -> dict[str, float]:
    """Mean accuracy over the five tasks after the last, by method: the mean over seeds."""
    print(f"{'after task 5':<14}" + "".join(f"{f'task {t + 1}':>8}" for t in range(TASKS)) + f"{'mean':>8}")
    found = {}
    for name, (representation, strength) in METHODS.items():
        found[name] = torch.stack([accuracies(representation, strength, seed) for seed in range(seeds)]).mean(0)
        last = [*found[name][-1].tolist(), float(found[name][-1].mean())]
        print(f"{name:<14}" + "".join(f"{value:>8.2f}" for value in last))
    draw(found, out)
    print(f"\nThe course of learning: {out}")
    return {name: float(accuracy[-1].mean()) for name, accuracy in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="ewc.png", help="where to save the picture")
    main(out=parser.parse_args().out)
