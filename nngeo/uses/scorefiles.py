"""Scores in files, part by part, so that a call that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nngeo.generators import Batch, Examples

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
        """Those in the directory, or those that `solve` finds, which are saved there."""
        path = self.directory / "solutions.safetensors"
        if not path.exists():
            found = solve()
            _save({"solutions": found, "gradients": self.gradients, "settings": _bytes(self.settings)}, path)
            return found
        kept = load_file(path)
        gradients, settings = kept["gradients"].to(self.gradients), bytes(kept["settings"].tolist()).decode()
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
            path, digest = self.directory / f"scores_{i:06d}.safetensors", _digest(batches)
            if not path.exists():
                found = torch.cat(list(score([batch.content for batch in batches])), 1)
                _save({"scores": found, "digest": _bytes(digest)}, path)
                yield found
                continue
            kept = load_file(path)
            if bytes(kept["digest"].tolist()).decode() != digest:
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


def _digest(batches: list[Batch]) -> str:
    found = hashlib.sha256()
    for batch in batches:
        for tensor in batch.tensors():
            found.update(str((tuple(tensor.shape), tensor.dtype)).encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """As a whole or not at all."""
    name = path.with_suffix(".part")
    save_file({key: x.contiguous() for key, x in tensors.items()}, name)
    os.replace(name, path)
