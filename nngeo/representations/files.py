"""Matrices in files: safetensors, with a header of plain JSON and a checksum; nothing in a file is ever executed."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nngeo.layers.fingerprint import raw_bytes
from nngeo.representations.replacing import replacing

KEY = "nngeo"
# Raised when what is stored gets another meaning; `read` then serves the older ones, too. tests/data has one of each.
VERSION = 1
CONVENTION = "mean over examples; coordinates in the order of model.named_parameters()"
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Save a `state_dict()`; see `replacing`. Written tensor by tensor, as safetensors' own writer needs a copy of all
    of them, or leaves a temporary file of its own when it is killed.

    Raises:
        TypeError: `path` is no path.
        OSError: the file can't be written.
    """
    check_path(path)
    tensors = {key: value.detach() for key, value in state.items() if isinstance(value, Tensor)}
    plain = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    about = {"version": VERSION, "convention": CONVENTION, "state": plain, "sha256": _checksum(plain, tensors)}
    header: dict[str, Any] = {"__metadata__": {KEY: json.dumps(about)}}
    end = 0
    for key, x in tensors.items():
        start, end = end, end + x.numel() * x.element_size()
        header[key] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for x in tensors.values():
            file.write(raw_bytes(x))


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `state_dict()` in a file.

    Raises:
        TypeError: `path` is no path.
        FileNotFoundError, OSError: there is none, or it can't be read.
        ValueError: it is no safetensors file, or damaged; or one that nngeo did not write, or of a later version.
    """
    check_path(path)
    with open(path, "rb"):  # for the system's own error
        pass
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of safetensors or torch, of many types
        raise ValueError(f"{path} is damaged or truncated, or no safetensors file: {error}.") from error
    if KEY not in metadata:
        raise ValueError(f"{path} holds tensors, but no matrix of nngeo: its header has no {KEY!r}.")
    try:
        about = json.loads(metadata[KEY])
        version, state = about["version"], dict(about["state"])
        whole = version != VERSION or _checksum(state, tensors) == about["sha256"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header can't be read ({error!r:.80}).") from error
    if version != VERSION:
        raise ValueError(
            f"{path} has format version {version!r:.40}, which this version of nngeo does not know (it reads "
            f"{VERSION}): upgrade nngeo, or the file is damaged."
        )
    if about.get("convention") != CONVENTION:
        found = about.get("convention")
        raise ValueError(f"{path} was written by another convention: {found!r:.200}, not {CONVENTION!r}.")
    if not whole:
        raise ValueError(f"{path} is damaged: its contents do not have the checksum that its header names.")
    return {**state, **tensors}


def check_path(path: Any) -> None:
    """Raise TypeError unless this is a path."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"`path` should be a str or a pathlib.Path; got a {type(path).__name__}.")


def _checksum(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all contents of a file, in any order."""
    found = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for key in sorted(tensors):
        x = tensors[key]
        found.update(json.dumps([key, str(x.dtype), list(x.shape)]).encode())
        found.update(raw_bytes(x))
    return found.hexdigest()
