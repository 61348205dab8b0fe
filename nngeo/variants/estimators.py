"""Three ways to get cotangents from a variant: its exact metric, draws of targets, or the targets that are given."""

from __future__ import annotations

import copy
import operator
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from nngeo.linalg.arguments import instance
from nngeo.variants.base import Cotangents, Variant


class Estimator(ABC):
    """What a generator asks for cotangents: `estimator(outputs, targets, mask)`."""

    def __init__(self, variant: Variant):
        self.variant = instance("variant", variant, Variant)

    @abstractmethod
    def __call__(self, outputs: Tensor, targets: tuple[Any, ...] = (), mask: Tensor | None = None) -> Cotangents:
        """Cotangents at outputs (b, ...), which are validated first and detached."""

    def count(self, outputs: Tensor, targets: tuple[Any, ...] = ()) -> int:
        """The number of cotangents at outputs (b, ...); nothing is drawn."""
        return self(outputs, targets).count

    @property
    def kind(self) -> tuple:
        """Equal where outputs of the same shape have as many cotangents."""
        return type(self), self.variant.name

    @property
    def reads_targets(self) -> bool:
        """Whether the targets of a batch matter."""
        return self.variant.reads_targets

    @property
    def by_example(self) -> bool:
        """Whether an example has the same cotangents in any batch, so that batches may be split."""
        return self.variant.by_example

    def begun(self) -> Estimator:
        """The estimator of one sweep over data, at its start; most have nothing to begin."""
        return self


class Exact(Estimator):
    """The variant's expected metric."""

    def __call__(self, outputs: Tensor, targets: tuple[Any, ...] = (), mask: Tensor | None = None) -> Cotangents:
        self.variant.validate(outputs)
        return self.variant.exact(outputs.detach(), targets, mask)


class MonteCarlo(Estimator):
    """Gradients at `trials` draws of the targets, divided by sqrt(trials): an unbiased estimate of the exact metric.

    When it is made, one number is drawn from `generator`, or from torch's global generator if there is none; it seeds
    a generator of its own, on the device of the outputs. `begun()` is at the first draw, so that every sweep over
    the same batches sees the same targets.
    """

    def __init__(self, variant: Variant, trials: int = 1, generator: torch.Generator | None = None):
        super().__init__(variant)
        self.trials = _checked_trials(trials)
        if not (generator is None or isinstance(generator, torch.Generator)):
            raise TypeError(f"`generator` must be a torch.Generator or None; found {type(generator).__name__}.")
        device = torch.device("cpu") if generator is None else generator.device
        self._seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, outputs: Tensor, targets: tuple[Any, ...] = (), mask: Tensor | None = None) -> Cotangents:
        self.variant.validate(outputs)
        outputs = outputs.detach()
        counted = self.variant.counted(outputs, targets, mask)
        generator = self._generator(outputs.device)
        draws = [self.variant.sample(outputs, generator) for _ in range(self.trials)]

        def one(draw: Tensor) -> Tensor:
            gradient = self.variant.gradient(outputs, draw, counted)
            return gradient if self.trials == 1 else gradient / self.trials**0.5

        def chunk(start: int, stop: int) -> Tensor:
            return torch.stack([one(draw) for draw in draws[start:stop]])

        def metric(v: Tensor) -> Tensor:
            return torch.stack([Cotangents.from_tensor(one(draw)[None]).metric(v) for draw in draws]).sum(0)

        return Cotangents(self.trials, chunk, metric)

    def count(self, outputs: Tensor, targets: tuple[Any, ...] = ()) -> int:
        """The number of draws."""
        return self.trials

    @property
    def kind(self) -> tuple:
        return *super().kind, self.trials

    @property
    def by_example(self) -> bool:
        """False: the draws are those of whole batches."""
        return False

    def begun(self) -> MonteCarlo:
        """The same estimator at the first draw."""
        sweep = copy.copy(self)
        sweep._generators = {}
        return sweep

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


class Empirical(Estimator):
    """Gradients at the targets of the batch, one cotangent: the matrix is the second moment of the gradients."""

    reads_targets = True

    def __call__(self, outputs: Tensor, targets: tuple[Any, ...] = (), mask: Tensor | None = None) -> Cotangents:
        self.variant.validate(outputs)
        if not targets or targets[0] is None:
            raise ValueError(
                f"Variant {self.variant.name!r} found no targets, which the empirical estimate needs: the batch should "
                "hold (inputs, targets), or 'labels' if it is a dict."
            )
        outputs = outputs.detach()
        counted = self.variant.counted(outputs, targets, mask)
        return Cotangents.from_tensor(self.variant.gradient(outputs, targets[0], counted)[None])


def _checked_trials(trials: Any) -> int:
    try:
        count = operator.index(trials)
    except TypeError:
        raise TypeError(f"`trials` must be an integer; found {type(trials).__name__}.") from None
    if count < 1:
        raise ValueError(f"`trials` must be 1 or more; found {count}.")
    return count
