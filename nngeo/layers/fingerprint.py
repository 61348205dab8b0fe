"""The bits of tensors, and a number that tells one set of them from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """64 hexadecimal digits (SHA-256), equal for the same names, shapes, dtypes and bits, on any device."""
    found = hashlib.sha256()
    for name, x in tensors:
        found.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        found.update(raw_bytes(x))
    return found.hexdigest()


def raw_bytes(x: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
