"""The user's model comes back as it was; also after an exception."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore buffers, `requires_grad` flags, `.grad`, and tensors and plain values kept as attributes, on leaving.

    Parameters are never written to by nngeo. The other tensors are copied, because a model's forward may write to them.
    Inside, inference mode and autocast are off.
    """
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    places = [place for module in model.modules() for place in (module._buffers, vars(module))]
    before = [(place, {name: value for name, value in place.items() if _is_state(value)}) for place in places]
    copies = [(x, x.detach().clone()) for _, found in before for x in found.values() if isinstance(x, Tensor)]
    device = parameters[0][0].device.type if parameters else "cpu"
    try:
        with torch.inference_mode(False), torch.autocast(device, enabled=False):
            yield
    finally:
        for p, flag, grad in parameters:
            p.requires_grad_(flag)
            p.grad = grad
        for place, found in before:
            for name in [name for name, value in place.items() if isinstance(value, Tensor) and name not in found]:
                del place[name]
            place.update(found)
        with torch.no_grad():
            for x, copy in copies:
                if not torch.equal(x, copy):
                    x.copy_(copy)


def _is_state(value: Any) -> bool:
    return value is None or isinstance(value, Tensor | bool | int | float | str)
