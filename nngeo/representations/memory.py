"""Refuse what can't fit, before it is allocated; and room for what is large."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

from nngeo.layers.collection import LayerCollection

GIB = 2**30

# Bytes from which room is worth asking the system for it.
LARGE = 2**26


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo") as meminfo:  # counts the disk cache as free, which sysconf does not
            line = next(line for line in meminfo if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def require_memory(
    what: str, numel: int, dtype: torch.dtype, device: torch.device, instead: str | Callable[[], str]
) -> None:
    """Nothing, if `numel` entries fit; `instead` is a sentence, or a function that returns it.

    Raises:
        MemoryError: how many GiB `what` takes, how many there are, and what to use `instead`.
    """
    needed = numel * dtype.itemsize
    free = available_bytes(device) if needed else None
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


def copied(what: str, data: Tensor) -> Tensor:
    """A copy, if it fits; see `require_memory`."""
    require_memory(what, data.numel(), data.dtype, data.device, "Use `data`, the tensor itself.")
    return data.clone()


def what_fits(layers: LayerCollection, dtype: torch.dtype, device: torch.device) -> str:
    """A sentence that names the representations of these parameters that would fit."""
    entries = {
        "PMatBlockDiag": sum(layer.numel() ** 2 for layer in layers.layers.values()),
        "PMatKFAC or PMatEKFAC": sum(
            shape[0] ** 2 + prod(shape[1:]) ** 2
            for layer in layers.layers.values()
            for shape in layer.shapes.values()
            if shape
        ),
        "PMatQuasiDiag": 2 * layers.numel(),
        "PMatDiag": layers.numel(),
    }
    free = available_bytes(device)
    fitting = [name for name, numel in entries.items() if free is None or numel * dtype.itemsize <= free]
    return f"What would fit: {', '.join([*fitting, 'PMatImplicit'])}."
