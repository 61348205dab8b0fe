"""Sweeps over examples that can be repeated, and leave the user's random numbers as they were."""

from __future__ import annotations

import copy
import random
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nngeo.generators.batches import Batch, Examples
from nngeo.layers.turn import TURN


class Sweeps:
    """Iterates over examples, with a progress bar; each loader gives the same batches in the same order every time."""

    def __init__(self) -> None:
        self._random: weakref.WeakKeyDictionary[Any, RandomNumbers] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # the state of a loader's random numbers is of no use elsewhere

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._random = weakref.WeakKeyDictionary()

    def batches(self, source: Any, device: torch.device, verbose: bool) -> Iterator[Batch]:
        """The batches of a loader (or whatever `Examples` takes), on a device."""
        examples = Examples(source)
        with TURN:
            numbers = self._random_of(examples)
        with tqdm(total=examples.total(), unit=" examples") if verbose else nullcontext() as bar:
            batches = iter(examples)
            while True:
                with nullcontext() if numbers is None else numbers.active():
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch.to(device)
                if bar is not None:
                    bar.update(batch.size)

    def _random_of(self, examples: Examples) -> RandomNumbers | None:
        if examples.single or type(examples.source) in (list, tuple):
            return None  # nothing is drawn in iterating over batches that are there
        if not isinstance(examples.source, Hashable):
            return RandomNumbers(examples.source)
        try:
            return self._random.setdefault(examples.source, RandomNumbers(examples.source)).begun()
        except TypeError:  # no weak references: tuples
            return RandomNumbers(examples.source)


class RandomNumbers:
    """Those of a sweep: the same in every sweep, and apart from the user's.

    A shuffling loader gives the same order, and random augmentations the same images, in every sweep that is `begun`.
    Torch's numbers, those of Python and of numpy; but not those of the workers of a loader with `persistent_workers`.
    Nothing global is held between two uses of `active`.
    """

    def __init__(self, source: Any):
        self._generators = list({id(g): g for g in _generators(source)}.values())
        self._start = self._now = self._states()

    def begun(self) -> RandomNumbers:
        """The numbers of one sweep, from the state in which this object was made; other threads may have their own."""
        sweep = copy.copy(self)
        sweep._now = self._start
        return sweep

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the random numbers are the sweep's; outside they are the user's."""
        with TURN:
            before = self._states()
            try:
                self._set(self._now)
                yield
            finally:
                self._now = self._states()
                self._set(before)

    def _states(self) -> list[tuple[Callable[[Any], Any], Any]]:
        """Functions that set a state, and the states."""
        states: list[tuple[Callable[[Any], Any], Any]] = [
            (torch.set_rng_state, torch.get_rng_state()),
            (random.setstate, random.getstate()),
            (np.random.set_state, np.random.get_state()),
        ]
        if torch.cuda.is_initialized():
            states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
        return states + [(g.set_state, g.get_state()) for g in self._generators]

    def _set(self, states: list[tuple[Callable[[Any], Any], Any]]) -> None:
        for put, state in states:
            put(state)


def _generators(owner: Any) -> Iterator[torch.Generator]:
    """Those of a loader, of its samplers, and of theirs."""
    generator = getattr(owner, "generator", None)
    if isinstance(generator, torch.Generator):
        yield generator
    for part in ("sampler", "batch_sampler"):
        if getattr(owner, part, None) is not None:
            yield from _generators(getattr(owner, part))
