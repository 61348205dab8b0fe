"""Times of Jacobian products as ratios to plain torch, one thread: `python -m tests.benchmarks.products`.

Both sides take turns, and the ratio of a row is the median over the rounds: a machine that is busy for a while slows
both. They return the same numbers, which is checked first (but for `diag_backprop`, which approximates).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from nngeo import products

Side = Callable[[], Tensor]


@dataclass(frozen=True)
class Comparison:
    """What nngeo computes, and what torch computes instead."""

    name: str
    ours: Side
    plain: Side
    goal: float
    same: bool = True  # both sides are equal, by definition

    def ratio(self, rounds: int) -> float:
        """The median over the rounds of our time over that of torch."""
        first, second = self.ours(), self.plain()
        if self.same:
            torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)
        times = [(_seconds(self.ours), _seconds(self.plain)) for _ in range(rounds)]
        ours, plain = (statistics.median(side) for side in zip(*times, strict=True))
        ratio = statistics.median(a / b for a, b in times)
        verdict = "<=" if ratio <= self.goal else "> "
        print(f"{self.name:58} {1e3 * ours:8.2f} ms {1e3 * plain:8.2f} ms {ratio:6.2f} {verdict} {self.goal:.2f}")
        return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'':58} {'nngeo':>11} {'torch':>11}  ratio    goal")
    for comparison in (*_diagonals(), *_pullbacks(), *_recursions()):
        comparison.ratio(rounds)


def lenet() -> nn.Module:
    """61,706 parameters: (b, 1, 28, 28) to (b, 10)."""
    body = [nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.MaxPool2d(2)]
    head = [nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)]
    return nn.Sequential(*body, nn.Flatten(), *head)


def decoder() -> nn.Module:
    """2 -> 128 -> 512 -> 3072, the last an image of 32 x 32 in colour."""
    return nn.Sequential(nn.Linear(2, 128), nn.Tanh(), nn.Linear(128, 512), nn.Tanh(), nn.Linear(512, 3072))


def _diagonals() -> list[Comparison]:
    """The exact diagonal of J' J, summed over the batch and for every example, against the full Jacobian squared."""
    model, x = lenet(), torch.randn(8, 1, 28, 28)
    diagonal = partial(products.jTmjp, model, x, None, "weight", result="diag")

    def rows() -> Tensor:
        return _jacobian(model, x).square().sum(1)

    def own_rows() -> Tensor:
        return products.jacobian(model, x, "weight").square().sum(1)

    return [
        Comparison("GGN diagonal of LeNet, b 8, (b, P): full Jacobian squared", diagonal, rows, 1 / 3),
        Comparison("... against nngeo's own full Jacobian squared", diagonal, own_rows, 1 / 3),
        Comparison("... summed over b", partial(diagonal, reduce="sum"), lambda: rows().sum(0), 1 / 3),
    ]


def _pullbacks() -> list[Comparison]:
    """The metric J' J that a decoder pulls back, against forward-mode columns and one product."""
    model, found = decoder(), []
    for b in (1, 16, 128):
        z = torch.randn(b, 2)

        def columns(z: Tensor = z) -> Tensor:
            def column(direction: Tensor) -> Tensor:
                return jvp(model, (z,), (direction.expand_as(z),))[1]

            J = vmap(column, out_dims=-1)(torch.eye(2))
            return J.mT @ J

        name = f"pullback metric of a decoder, b {b}: forward-mode columns"
        found.append(Comparison(name, partial(products.jTmjp, model, z), columns, 1.3))
    return found


def _recursions() -> list[Comparison]:
    """Diagonals kept between layers, against the gradient of every example."""
    model, x = lenet(), torch.randn(8, 1, 28, 28)
    w = torch.randn(8, 10)
    recursion = partial(products.jTmjp, model, x, None, result="diag", method="diag_backprop")
    rows = partial(products.vjp, model, x, w)
    return [
        Comparison("diag_backprop, weights (b, P): nngeo's vjp", partial(recursion, "weight"), partial(rows, "weight"),
                   1.3, same=False),
        Comparison("diag_backprop, weights (b, P): torch.func's vjp", partial(recursion, "weight"),
                   lambda: _vjp(model, x, w), 1.3, same=False),
        Comparison("diag_backprop, inputs (b, n): nngeo's vjp", partial(recursion, "input"), partial(rows, "input"),
                   1.3, same=False),
    ]  # fmt: skip


def _jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """(b, o, P), by torch.func."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(parameters: dict[str, Tensor], example: Tensor) -> Tensor:
        return functional_call(model, parameters, (example[None],))[0]

    parts = vmap(jacrev(outputs), (None, 0))(parameters, x)
    return torch.cat([part.flatten(2) for part in parts.values()], -1)


def _vjp(model: nn.Module, x: Tensor, w: Tensor) -> Tensor:
    """(b, P), by torch.func."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def pulled(example: Tensor, w: Tensor) -> dict[str, Tensor]:
        def outputs(parameters: dict[str, Tensor]) -> Tensor:
            return functional_call(model, parameters, (example[None],))[0]

        return vjp(outputs, parameters)[1](w)[0]

    return torch.cat([part.flatten(1) for part in vmap(pulled)(x, w).values()], -1)


def _seconds(side: Side) -> float:
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
