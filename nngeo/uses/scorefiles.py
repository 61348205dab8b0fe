"""Scores in files, part by part, so that a call that was killed goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nngeo.generators import Batch, Examples
from nngeo.layers.fingerprint import fingerprint
from nngeo.representations.files import read, write

PART = 1024  # examples of a file, at least


class ScoreFiles:
    """A directory with the solutions of the queries and the scores of the training examples, `scores_*.safetensors`.

    Args:
        gradients: of the queries: they tell whether a directory is of the same queries and weights.
        settings: what else the scores depend on.

    Raises:
        ValueError: the directory is of other scores.
    """

    def __init__(self, directory: Path, gradients: Tensor, settings: list[Any]):
        self.directory, self.gradients, self.settings = directory, gradients, str(settings)
        directory.mkdir(parents=True, exist_ok=True)

    def solutions(self, solve: Callable[[], Tensor]) -> Tensor:
        """Read the solutions from the directory, or save there those that `solve` finds."""
        path = self.directory / "solutions.safetensors"
        if not path.exists():
            found = solve()
            write(path, {"solutions": found, "gradients": self.gradients, "settings": self.settings})
            return found
        kept = read(path)
        gradients, settings = kept["gradients"].to(self.gradients), kept["settings"]
        same = gradients.shape == self.gradients.shape and torch.allclose(gradients, self.gradients, rtol=1e-3)
        if not same or settings != self.settings:
            raise ValueError(
                f"{self.directory} holds scores of other queries, weights or settings ({settings}, here "
                f"{self.settings}): choose another directory for `store`."
            )
        return kept["solutions"].to(self.gradients)

    def scores(self, train: Examples, score: Callable[[Any], Iterable[Tensor]]) -> Iterator[Tensor]:
        """(q, b, ...) of one file after the other, computed where there is none.

        Raises:
            ValueError: a file is of other examples than the loader gives in its place.
        """
        for i, batches in enumerate(_parts(train)):
            path = self.directory / f"scores_{i:06d}.safetensors"
            digest = fingerprint(("", x) for batch in batches for x in batch.tensors())
            if not path.exists():
                found = torch.cat(list(score([batch.content for batch in batches])), 1)
                write(path, {"scores": found, "digest": digest})
                yield found
                continue
            kept = read(path)
            if kept["digest"] != digest:
                raise ValueError(f"{path} is of other training examples: the loader should not shuffle.")
            yield kept["scores"].to(self.gradients)


def _parts(train: Examples) -> Iterator[list[Batch]]:
    part: list[Batch] = []
    for batch in train:
        part.append(batch)
        if sum(x.size for x in part) >= PART:
            yield part
            part = []
    if part:
        yield part
