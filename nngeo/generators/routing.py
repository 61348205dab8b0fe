"""Models that let the data decide which rows a layer sees: mixtures of experts, sorted or compacted tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeo.generators.outputs import random_like
from nngeo.generators.recording import Recording
from nngeo.generators.watch import LayoutChanged

# The number of factors: so many examples are told apart by one backward.
LEVELS = 8


def check_rows(recording: Recording) -> None:
    """Raise LayoutChanged where rows that the plan gives to one example depend on another.

    Cotangents are multiplied by a factor for each example, and so must be the gradients at its rows. A few powers of
    two serve as factors, in one backward pass for each digit of the examples' numbers.
    """
    b, outputs = recording.batch.size, recording.outputs
    if b == 1 or not outputs.requires_grad:
        return
    noise, numbers = random_like(outputs), torch.arange(b, device=outputs.device)
    plain = recording.pull(noise[None], retain=True)
    while bool(numbers.any()):
        factors = torch.exp2(numbers % LEVELS).to(outputs)
        scaled = recording.pull((noise * _rowwise(factors, noise))[None], retain=True)
        for source in recording.plan.sources.values():
            for host in source.hosts:
                before, after = (recording.views(host, source, grads[host]) for grads in (plain, scaled))
                for (view, call, found), (_, _, other) in zip(before, after, strict=True):
                    pairs = enumerate(zip(found, other, strict=True))
                    rows = [
                        (view.gradient(call, j, g)[0], view.gradient(call, j, h)[0])
                        for j, (g, h) in pairs
                        if g is not None and h is not None
                    ]
                    if not all(_is_scaled(x, y, factors) for x, y in rows):
                        raise LayoutChanged(host)
        numbers = numbers // LEVELS


def _is_scaled(x: Tensor, y: Tensor, factors: Tensor) -> bool:
    expected = x * _rowwise(factors.to(x), x)
    tolerance = min(10 * torch.finfo(x.dtype).eps ** 0.5, 0.1)
    return bool(((y - expected).flatten(1).norm(dim=1) <= tolerance * expected.flatten(1).norm(dim=1)).all())


def _rowwise(factors: Tensor, x: Tensor) -> Tensor:
    return factors.view(-1, *[1] * (x.ndim - 1))
