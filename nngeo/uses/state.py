"""The state of a use as tensors alone, so that safetensors, torch.save and distributed checkpoints all take it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PLAIN = "plain"


def packed(**parts: Any) -> dict[str, Tensor]:
    """Parts (tensors, plain values, dicts of both) as one flat dict of tensors of their own.

    Plain values are JSON, as bytes, under "plain".
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, part in parts.items():
        entries = part.items() if isinstance(part, Mapping) else [("", part)]
        for key, value in entries:
            full = f"{name}:{key}" if isinstance(part, Mapping) else name
            if isinstance(value, Tensor):
                tensors[full] = value.detach().clone(memory_format=torch.contiguous_format)
            else:
                plain[full] = value
    return tensors | {PLAIN: torch.tensor(list(json.dumps(plain).encode()), dtype=torch.uint8)}


def unpacked(state: Mapping[str, Tensor], what: str) -> dict[str, Any]:
    """The parts of a `packed` state.

    Raises:
        ValueError: it is not one; `what` says of what it should be.
    """
    if not isinstance(state, Mapping) or PLAIN not in state:
        raise ValueError(f"This is not the state_dict of {what}: it has no {PLAIN!r}.")
    values = json.loads(bytes(state[PLAIN].tolist())) | {key: x for key, x in state.items() if key != PLAIN}
    parts: dict[str, Any] = {}
    for full, value in values.items():
        name, colon, key = full.partition(":")
        if colon:
            parts.setdefault(name, {})[key] = value
        else:
            parts[name] = value
    return parts
