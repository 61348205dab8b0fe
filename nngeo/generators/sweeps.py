"""Sweeps over examples that can be repeated, and leave the user's random numbers as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nngeo.generators.batches import Batch, Examples


class Sweeps:
    """Iterates over examples, with a progress bar; each source gives the same batches in the same order every time."""

    def __init__(self) -> None:
        self._random: list[tuple[Any, RandomNumbers]] = []

    def batches(self, source: Any, device: torch.device, verbose: bool) -> Iterator[Batch]:
        """The batches of a loader (or whatever `Examples` takes), on a device."""
        examples = Examples(source)
        random = self._random_of(examples.source)
        random.restart()
        with tqdm(total=examples.total(), unit=" examples", disable=not verbose) as bar:
            batches = iter(examples)
            while True:
                with random.active():
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch.to(device)
                bar.update(batch.size)

    def _random_of(self, source: Any) -> RandomNumbers:
        for known, random in self._random:
            if known is source:
                return random
        self._random.append((source, RandomNumbers(source)))
        return self._random[-1][1]


class RandomNumbers:
    """Those of a sweep: the same in every sweep, and apart from the user's.

    A shuffling loader gives the same order, and random augmentations the same images, in every sweep that `restart`
    begins. Nothing global is held between two uses of `active`.
    """

    def __init__(self, source: Any):
        self._generators = list({id(g): g for g in _generators(source)}.values())
        self._start = self._now = self._states()

    def restart(self) -> None:
        """Begin a sweep: back to the state in which this object was made."""
        self._now = self._start

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the random numbers are the sweep's; outside they are the user's."""
        before = self._states()
        self._set(self._now)
        try:
            yield
        finally:
            self._now = self._states()
            self._set(before)

    def _states(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return torch.get_rng_state(), devices, [g.get_state() for g in self._generators]

    def _set(self, states: tuple[Tensor, list[Tensor], list[Tensor]]) -> None:
        cpu, devices, loaders = states
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)
        for g, state in zip(self._generators, loaders, strict=True):
            g.set_state(state)


def _generators(owner: Any) -> Iterator[torch.Generator]:
    """Those of a loader, of its samplers, and of theirs."""
    generator = getattr(owner, "generator", None)
    if isinstance(generator, torch.Generator):
        yield generator
    for part in ("sampler", "batch_sampler"):
        if getattr(owner, part, None) is not None:
            yield from _generators(getattr(owner, part))
