"""Merge two networks into one, and leave out most of a network's weights.

Two networks go on from a common start, on turned and on mirrored digits. The
mean knows neither, weighed by Fisher matrices both (Matena & Raffel, 2022).

    python examples/merging.py
"""

import copy
from itertools import product

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from nngeo import FIM, PMat, PMatDiag, PMatEye, PMatKFAC, PVector
from nngeo.uses import merge, prune

pixels, digits = (torch.tensor(a) for a in load_digits(return_X_y=True))
images, N = pixels.float().view(-1, 8, 8) / 16, 1400
KINDS = PMatEye, PMatDiag, PMatKFAC  # the first: averages, magnitudes


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:N]), y[:N]).backward()
        optimizer.step()
    return model


def accuracy(model: nn.Module, w: PVector, x: Tensor, y: Tensor) -> float:
    w.to_model(model := copy.deepcopy(model))
    return float((model(x[N:]).argmax(1) == y[N:]).float().mean())


def fisher(kind: type[PMat], model: nn.Module, x: Tensor) -> PMat:
    eye = PMatEye(PVector.from_model(model).layer_collection)
    return eye if kind is PMatEye else FIM(model, (x[:N],), kind)


def results(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    order = torch.randperm(len(digits))
    x, y, found = images[order], digits[order], {}
    net = nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    start = train(nn.Sequential(*net), x, y, 200)
    tasks = x.rot90(1, (1, 2)), x.flip(2)
    experts = [train(copy.deepcopy(start), t, y, 200) for t in tasks]
    for kind in KINDS:
        F = [fisher(kind, experts[i], tasks[i]) for i in (0, 1)]
        w = merge(experts, F, damping=1e-3)
        each = [accuracy(start, w, task, y) / 2 for task in tasks]
        found[f"merged by {kind.__name__}"] = sum(each)
    w = PVector.from_model(start)
    for part, kind in product((0.7, 0.9), KINDS):
        v = prune(fisher(kind, start, x), w, part)
        name = f"{part:.0%} pruned by {kind.__name__}"
        found[name] = accuracy(start, v, x, y)
    return found


def main(seeds: int = 3, out: str = "merging.png") -> dict[str, float]:
    """Accuracies, the mean over seeds."""
    runs = [results(seed) for seed in range(seeds)]
    found = {name: sum(run[name] for run in runs) / seeds for name in runs[0]}
    print(*(f"{k:<24}{v:>6.2f}" for k, v in found.items()), sep="\n")
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    ax.set_xlabel("accuracy")
    ax.barh([*found][::-1], [*found.values()][::-1])
    figure.savefig(out, dpi=110)
    print(f"\nThe accuracies: {out}")
    return found


if __name__ == "__main__":
    main()
