"""Walk between handwritten digits along geodesics of the metric that a decoder gives to its latent space.

A decoder f maps two latent coordinates to images. Distances between coordinates mean little; `J' J`, pulled back from
the pixels, measures how much the image changes (Tosi et al., 2014; Arvanitidis et al., 2018). A geodesic is the path
along which it changes least in all: it goes around where the volume `sqrt(det J' J)` is large.

    python examples/latent_geometry.py [--out latent_geometry.png]
"""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from nngeo.products import CubicSpline, Curve, curve_energy, geodesics, log_volume

PAIRS, STEPS = [(0, 1), (4, 9), (2, 4)], 1500


def layers(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    pairs = zip(widths[:-1], widths[1:], strict=True)
    return nn.Sequential(*(m for i, o in pairs for m in (nn.Linear(i, o), nn.Tanh())))[:-1]


def train(images: Tensor) -> tuple[nn.Module, nn.Module]:
    """An encoder (b, 64) -> (b, 2) and a decoder back, by the squared error."""
    encoder, decoder = layers(64, 64, 32, 2), nn.Sequential(*layers(2, 32, 64, 64), nn.Sigmoid())
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        batch = images[torch.randint(len(images), (256,))]
        z = encoder(batch)
        loss = (decoder(z) - batch).square().sum(1).mean() + 1e-2 * z.square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return encoder, decoder


def middle(z: Tensor) -> Tensor:
    """(2,), the code that is nearest to the median of all."""
    return z[(z - z.median(0).values).norm(dim=1).argmin()]


def draw_space(ax: plt.Axes, decoder: nn.Module, z: Tensor, classes: Tensor, curves: dict[str, Curve]) -> None:
    """The volume, the codes of all images, and the curves."""
    x, y = (torch.linspace(float(c.min()) - 0.3, float(c.max()) + 0.3, 100) for c in z.T)
    volume = log_volume(decoder, torch.cartesian_prod(x, y)).reshape(100, 100).T
    shade = ax.pcolormesh(x.numpy(), y.numpy(), volume.numpy(), cmap="Greys", shading="gouraud", vmin=-2)
    ax.figure.colorbar(shade, ax=ax, label="log volume", shrink=0.7)
    ax.scatter(*z.T, c=classes, cmap="tab10", s=5, alpha=0.6, linewidths=0)
    for (name, curve), style in zip(curves.items(), ("b--", "r-"), strict=True):
        for j, path in enumerate(curve(torch.linspace(0, 1, 100))):
            ax.plot(*path.T, style, lw=2, label=None if j else name)
    for digit in range(10):
        at, box = middle(z[classes == digit]).tolist(), {"boxstyle": "circle,pad=0.1", "fc": "w", "alpha": 0.7, "lw": 0}
        ax.text(*at, str(digit), weight="bold", ha="center", va="center", bbox=box)
    ax.set(xlabel="first latent coordinate", ylabel="second")
    ax.legend(loc="lower left")


def main(out: str = "latent_geometry.png") -> dict[str, list[float]]:
    """Lengths and energies of the straight lines and of the geodesics between the digits of each pair."""
    torch.manual_seed(0)
    data, labels = load_digits(return_X_y=True)
    images, classes = torch.tensor(data / 16, dtype=torch.float32), torch.tensor(labels)
    encoder, decoder = train(images)
    z = encoder(images).detach()
    start, end = (torch.stack([middle(z[classes == pair[side]]) for pair in PAIRS]) for side in (0, 1))
    found, straight = geodesics(decoder, start, end, segments=12), CubicSpline.straight(start, end)
    figures = {"straight length": found.straight_length, "geodesic length": found.length}
    figures |= {"straight energy": curve_energy(decoder, straight), "geodesic energy": found.energy}
    print(" " * 6 + "".join(f"{name:>18}" for name in figures))
    for (a, b), *row in zip(PAIRS, *figures.values(), strict=True):
        print(f"{a} to {b}" + "".join(f"{value:>18.2f}" for value in row))
    figure, curves = plt.figure(figsize=(14, 6), layout="constrained"), {"straight": straight, "geodesic": found.curve}
    left, right = figure.subfigures(1, 2)
    draw_space(left.subplots(), decoder, z, classes, curves)
    for j, ax in enumerate(right.subplots(2 * len(PAIRS), 1)):  # images at equal times
        (a, b), (name, curve) = PAIRS[j // 2], list(curves.items())[j % 2]
        frames = decoder(curve(torch.linspace(0, 1, 10))[j // 2]).detach().reshape(10, 8, 8)
        strip = nn.functional.pad(frames, (1, 1)).permute(1, 0, 2).flatten(1)
        ax.imshow(strip.numpy(), cmap="gray_r", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[], title=f"{a} to {b}, {name}: length {figures[f'{name} length'][j // 2].item():.2f}")
    figure.savefig(out, dpi=110)
    print(f"\nThe latent space: {out}")
    return {**{name: value.tolist() for name, value in figures.items()}, "converged": found.converged.tolist()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="latent_geometry.png", help="where to save the picture")
    main(out=parser.parse_args().out)
