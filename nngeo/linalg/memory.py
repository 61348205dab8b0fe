"""Refuse what can't fit, before it is allocated; and room for what is large."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

from nngeo.linalg.limits import free_bytes

GIB = 2**30

# Bytes from which it is worth asking how much is free, which takes 0.2 ms.
SMALL = 2**20

# Bytes from which room is worth asking the system for it.
LARGE = 2**26


def available_bytes(device: torch.device) -> int | None:
    """Bytes that the system, the process and its container leave on a device; None where none of them tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    return free_bytes()


def require_memory(
    what: str, numel: int, dtype: torch.dtype, device: torch.device, instead: str | Callable[[], str]
) -> None:
    """Raise unless `numel` entries fit; `instead` is a sentence, or a function that returns it.

    Raises:
        MemoryError: how many GiB `what` takes, how many there are, and what to use `instead`.
    """
    needed = numel * dtype.itemsize
    free = available_bytes(device) if needed >= SMALL else None
    if free is not None and needed > free:
        advice = instead if isinstance(instead, str) else instead()
        raise MemoryError(
            f"{what} takes {needed / GIB:.3g} GiB ({numel:.3g} entries of {dtype}); "
            f"{free / GIB:.3g} GiB are free on {device}. {advice}"
        )


def room(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of a shape, of the type of another one and on its device.

    Where Linux has them, in huge pages (of 2 MiB instead of 4 KiB): handing out new memory in small ones takes the
    system several times longer than filling it takes.
    """
    size = prod(shape) * like.element_size()
    if size < LARGE or like.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system that was built without them: then in small ones
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def require_workspace(what: str, numel: int, like: Tensor) -> None:
    """`require_memory` for what a computation allocates, of the type of a tensor."""
    instead = "Use an iterative solver (solve='cg'), or a representation with smaller blocks (PMatKFAC, PMatDiag)."
    require_memory(what, numel, like.dtype, like.device, instead)
