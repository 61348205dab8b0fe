"""Where a function stops gradients, which forward-mode tangents pass."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_STOPS = frozenset({"_set_grad_enabled", "detach", "detach_"})


class GradientStops(TorchFunctionMode):
    """Notes in `found` whether anything inside may have stopped a gradient: no_grad, detach, data, `padding_idx`."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.embedding or func is F.embedding_bag:
            position = 2 if func is F.embedding else 10
            given = args[position] if len(args) > position else (kwargs or {}).get("padding_idx")
            self.found |= given is not None
        elif func == _DATA or getattr(func, "__name__", "") in _STOPS:
            self.found = True
        return func(*args, **(kwargs or {}))


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
