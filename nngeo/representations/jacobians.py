"""The Jacobian on all examples, written where it stays while the mini-batches are swept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from nngeo.generators.batches import Examples
from nngeo.layers.collection import LayerCollection
from nngeo.linalg.memory import require_memory, room
from nngeo.representations.estimate import Estimate, positive_count

if TYPE_CHECKING:
    from nngeo.generators import BatchRecord


def jacobian_of(estimate: Estimate, examples: Any, *, pad: bool = False) -> tuple[Tensor, int]:
    """(k, n, P) over all examples, and n.

    Args:
        pad: whether mini-batches with fewer cotangents get rows of zeros; else they are an error.

    Raises:
        MemoryError: before more is allocated than fits.
    """
    batches, name = estimate._records(examples, factors=False), type(estimate).__name__
    if batches is None:
        raise NotImplementedError(f"A Hessian is not made of gradients of examples: there is no {name} of it.")
    rows = _Rows(estimate.layer_collection, name, Examples(examples).total(), pad)
    for batch in batches:
        rows.write(batch)
    return rows.finished()


class _Rows:
    """Room (k, at least n, P) for the gradients of mini-batches, and how far it is filled.

    `n` is how many examples there will be, as far as that is known: the room grows where there are more.
    """

    def __init__(self, layers: LayerCollection, name: str, n: int | None, pad: bool):
        self._layers, self._name, self._expected, self._pad = layers, name, n or 0, pad
        self._room: Tensor | None = None
        self._n = self._k = 0  # examples so far; cotangents of the mini-batch so far
        self._counts: set[int] = set()

    def write(self, batch: BatchRecord) -> None:
        """The next mini-batch, or the next chunk of its cotangents."""
        self._k = 0 if batch.first else self._k
        self._n += batch.n_examples if batch.first else 0
        self._counts.add(batch.count)
        if len(self._counts) > 1 and not self._pad:
            raise ValueError(f"The mini-batches have different numbers of outputs, {sorted(self._counts)}.")
        room = self._with_room(batch)
        record = next(iter(batch.layers.values()))
        rows = room[self._k : self._k + record.n_cotangents, self._n - batch.n_examples : self._n]
        for name, part in self._layers.split(rows).items():
            batch.layers[name].write(part)
        self._k += record.n_cotangents

    def finished(self) -> tuple[Tensor, int]:
        """(k, n, P) and n."""
        positive_count(self._n)
        assert self._room is not None  # there was a mini-batch
        return (self._room if self._room.shape[1] == self._n else self._room[:, : self._n].clone()), self._n

    def _with_room(self, batch: BatchRecord) -> Tensor:
        """Room for all cotangents of the examples so far; twice as much as there was, where it has to grow."""
        old = self._room
        if old is not None and batch.count <= old.shape[0] and self._n <= old.shape[1]:
            return old
        like = next(iter(batch.layers.values())).like
        before = (0, 0) if old is None else old.shape[:2]
        k = max(before[0], batch.count)
        n = max(self._expected, self._n, 2 * before[1] if self._n > before[1] else before[1])
        shape = (k, n, self._layers.numel())
        what, instead = f"{self._name} of {n} examples", "Use PFMapImplicit, or PMatImplicit, or fewer examples."
        require_memory(what, k * n * shape[2], like.dtype, like.device, instead)
        # Zeros, where mini-batches may have fewer cotangents than others.
        self._room = like.new_zeros(shape) if self._pad else room(shape, like)
        if old is not None:
            self._room[: before[0], : before[1]] = old
        return self._room
