"""The user's model comes back as it was; also after an exception."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nngeo.layers.caches import ABSENT, INTERNAL, containers, note_filled
from nngeo.layers.strides import any_strides
from nngeo.layers.turn import TURN


class Snapshot:
    """A model's buffers, `requires_grad` flags, `.grad`, and tensors, plain values, dicts and lists kept as attributes.

    Parameters are never written to by nngeo. The other tensors are copied, because a model's forward may write to them.
    """

    @TURN
    def __init__(self, model: nn.Module):
        self._parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        # The attributes of scripted modules are not Python's; they have parameters and buffers.
        modules = list(model.modules())
        own = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]
        places: list[tuple[nn.Module, dict[str, Any]]] = [(m, place) for m in own for place in (m._buffers, vars(m))]
        self._before = [
            (m, place, len(place), {k: v for k, v in place.items() if k not in _KEPT and isinstance(v, _STATE)})
            for m, place in places
        ]
        self._containers = [(m, name, value, value.copy()) for m in own for name, value in containers(m)]
        tensors = [x for *_, found in self._before for x in found.values() if isinstance(x, Tensor)]
        tensors += [x for m in modules if isinstance(m, torch.jit.ScriptModule) for x in m.buffers(False)]
        self._copies = [(x, x.detach().clone()) for x in tensors]
        self._modules = modules
        self._device = self._parameters[0][0].device.type if self._parameters else "cpu"

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the model on leaving.

        Inside, it is this thread's turn, inference mode and autocast are off, and nothing is run compiled.
        """
        with TURN:
            for p, _, grad in self._parameters:
                if grad is not None:
                    p.grad = None  # a backward pass in a forward would add to it in place
            try:
                with (
                    torch.inference_mode(False),
                    torch.autocast(self._device, enabled=False),
                    _eager(),
                    any_strides(self._modules),
                ):
                    yield
            finally:
                self._restore()

    def _restore(self) -> None:
        for p, flag, grad in self._parameters:
            if p.requires_grad != flag:
                p.requires_grad_(flag)
            if p.grad is not grad:
                p.grad = grad
        for module, name, value, content in self._containers:
            note_filled(module, name, content, vars(module).get(name))
            vars(module)[name] = value
            value.clear()
            value.update(content) if isinstance(value, dict) else value.extend(content)
        for module, place, size, found in self._before:
            if len(place) > size:
                new = [name for name, value in place.items() if name not in found and isinstance(value, Tensor)]
                for name in new:
                    value = place.pop(name)
                    if place is vars(module):
                        note_filled(module, name, ABSENT, value)
            for name in [name for name, value in found.items() if value is None]:
                note_filled(module, name, None, place.get(name))
            place.update(found)
        with torch.no_grad(), torch._C.DisableTorchFunction():  # so that nobody takes this for a read of the model's
            for x, copy in self._copies:
                if not torch.equal(x, copy):
                    x.copy_(copy)


def _eager() -> AbstractContextManager[Any]:
    """Inside, what torch.compile has compiled is run as it was written: hooks, modes and second derivatives work."""
    # Without it nothing has been compiled, and to import it takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


_STATE = (type(None), bool, int, float, str, Tensor)
_KEPT = INTERNAL - {"training"}


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore a model on leaving, as `Snapshot` does. Inside, inference mode and autocast are off."""
    with Snapshot(model).restored():
        yield
