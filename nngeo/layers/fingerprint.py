"""What tells one set of weights from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """64 hexadecimal digits (SHA-256), equal for the same names, shapes, dtypes and bits, on any device."""
    found = hashlib.sha256()
    for name, x in parameters:
        found.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        found.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
