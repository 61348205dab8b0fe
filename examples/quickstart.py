"""The Fisher matrix of a small convolutional network on real data, in every representation.

Trains on the handwritten digits that come with scikit-learn (seconds, nothing is downloaded), estimates the Fisher
information matrix in each representation, prints what each costs and how far it is from the exact one, and draws
the matrices side by side.

    python examples/quickstart.py [--out quickstart.png] [--examples 600]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nngeo import (
    FIM,
    PMat,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatEKFACBlockDiag,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatMixed,
    PMatQuasiDiag,
    PVector,
)

# Every representation, with its options.
REPRESENTATIONS: list[tuple[type[PMat], dict]] = [
    (PMatDense, {}),
    (PMatLowRank, {}),
    (PMatBlockDiag, {}),
    (PMatEKFAC, {}),
    (PMatEKFACBlockDiag, {}),  # the same as PMatEKFAC for this network, which has no norm layers
    (PMatKFAC, {}),
    (PMatMixed, {"map_layers_to": {nn.Conv2d: PMatKFAC}, "default_representation": PMatBlockDiag}),
    (PMatQuasiDiag, {}),
    (PMatDiag, {}),
    (PMatImplicit, {}),
]


def digits() -> tuple[Tensor, Tensor]:
    """The 1797 images (b, 1, 8, 8) with values in [0, 1], and their classes (b,), shuffled."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target))
    return torch.tensor(bunch.images[:, None] / 16, dtype=torch.float32)[order], torch.tensor(bunch.target)[order]


def network() -> nn.Sequential:
    """Two convolutions and a linear layer: 920 parameters, few enough for the dense matrix."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 10, 3), nn.Tanh(), nn.Flatten()),
        nn.Linear(10, 10),
    )


def train(model: nn.Module, images: Tensor, classes: Tensor, epochs: int = 40) -> None:
    loader = DataLoader(TensorDataset(images, classes), batch_size=50, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()


@dataclass
class Row:
    """One representation of the Fisher: the matrix, and the seconds that it took to estimate."""

    matrix: PMat
    seconds: float

    @property
    def name(self) -> str:
        return type(self.matrix).__name__

    def kilobytes(self) -> float:
        if isinstance(self.matrix, PMatImplicit):
            return 0.0  # it keeps the model and the examples, and nothing of its own
        return sum(t.numel() * t.element_size() for t in _tensors(self.matrix.state_dict())) / 1024

    def error(self, dense: PMat, v: PVector) -> float:
        """Distance to the dense matrix, relative: in the Frobenius norm, or of a product where nothing is stored."""
        if isinstance(self.matrix, PMatImplicit):
            exact = dense.mv(v)
            return float((self.matrix.mv(v) - exact).norm() / exact.norm())
        return float((self.matrix.to_torch() - dense.to_torch()).norm() / dense.norm())


def _tensors(state: object) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)


def estimate(model: nn.Module, loader: DataLoader, representation: type[PMat], options: dict) -> Row:
    print(representation.__name__)
    start = time.perf_counter()
    matrix = FIM(model, loader, representation, variant="classif_logits", verbose=True, **options)
    return Row(matrix, time.perf_counter() - start)


def table(rows: list[Row], dense: PMat, v: PVector) -> str:
    names = f"{'representation':<20}{'parameters':>11}{'memory [kB]':>12}{'time [s]':>10}"
    lines = [f"{names}{'trace':>10}{'vTMv':>12}{'error':>10}"]
    for row in rows:
        trace, vtmv = float(row.matrix.trace()), float(row.matrix.vTMv(v))
        p, error = v.size()[0], row.error(dense, v)
        lines.append(
            f"{row.name:<20}{p:>11}{row.kilobytes():>12.1f}{row.seconds:>10.2f}{trace:>10.3f}{vtmv:>12.4f}{error:>10.1e}"
        )
    return "\n".join(lines)


def draw(rows: list[Row], path: str) -> None:
    """The matrices side by side: absolute values of their entries, on one logarithmic scale."""
    shown = [row for row in rows if not isinstance(row.matrix, PMatImplicit)]
    largest = float(shown[0].matrix.to_torch().abs().max())
    scale = LogNorm(largest * 1e-5, largest)
    figure, axes = plt.subplots(3, 3, figsize=(11, 11), layout="constrained")
    for row, ax in zip(shown, axes.flat, strict=True):
        # A pixel is the largest of its 4 x 4 entries, so that a thin diagonal is still seen.
        entries = nn.functional.max_pool2d(row.matrix.to_torch().abs()[None], 4)[0]
        image = ax.imshow(entries.clamp(min=scale.vmin), norm=scale, cmap="magma", interpolation="nearest")
        ax.set_title(f"{row.name} ({row.kilobytes():.0f} kB)", fontsize=10)
        ax.set(xticks=[], yticks=[])
    figure.colorbar(image, ax=axes, label="absolute value of the entry", shrink=0.8)
    figure.suptitle("One Fisher matrix, its representations (parameters in the order of the model)")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="quickstart.png", help="where to save the picture")
    parser.add_argument("--examples", type=int, default=600, help="the number of examples of the Fisher")
    options = parser.parse_args()

    torch.manual_seed(0)
    images, classes = digits()
    model = network()
    train(model, images[:1400], classes[:1400])
    model.eval()
    accuracy = (model(images[1400:]).argmax(-1) == classes[1400:]).float().mean()
    v = PVector.from_model(model).detach()
    print(f"{v.to_torch().numel()} parameters, {accuracy:.0%} of the test digits are recognised.\n")

    loader = DataLoader(TensorDataset(images[: options.examples], classes[: options.examples]), batch_size=100)
    rows = [estimate(model, loader, representation, options) for representation, options in REPRESENTATIONS]
    dense = rows[0].matrix
    print("\n" + table(rows, dense, v))
    draw(rows, options.out)
    print(f"\nThe matrices side by side: {options.out}")


if __name__ == "__main__":
    main()
