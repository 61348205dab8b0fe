"""Matrices in files: safetensors, with a header of plain JSON; nothing in a file is ever executed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "nngeo"
CONVENTION = "mean over examples; coordinates in the order of model.named_parameters(); version 1"


def write(path: str | Path, state: Mapping[str, Any]) -> None:
    """Save a `state_dict()`. The file is there as a whole or not at all: it is written beside its place and renamed."""
    tensors = {key: value.contiguous() for key, value in state.items() if isinstance(value, Tensor)}
    plain = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    header = json.dumps({"convention": CONVENTION, "state": plain})
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, name, metadata={FORMAT: header})
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read(path: str | Path) -> dict[str, Any]:
    """The `state_dict()` in a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no safetensors file, or truncated; or one that nngeo did not write, or by another convention.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, or no safetensors file: {error}.") from error
    if FORMAT not in metadata:
        raise ValueError(f"{path} holds tensors, but no matrix of nngeo: its header has no {FORMAT!r}.")
    header = json.loads(metadata[FORMAT])
    if header.get("convention") != CONVENTION:
        raise ValueError(f"{path} was written by another convention: {header.get('convention')!r}, not {CONVENTION!r}.")
    return {**header["state"], **tensors}
