"""Places where a model keeps what it computes from its parameters, as attention biases in eval mode are kept.

What such a place holds is a function of the parameters no more: with other parameters it stays what it was, and where
it was filled without gradients it has none. So known ones are empty whenever nngeo runs a model, and hold afterwards
what they held. A place is known once a run has filled it with what has gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Place = tuple[nn.Module, str, Any]  # an attribute or buffer, and a value of it

_EMPTY: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()
INTERNAL = frozenset(vars(nn.Module()))  # of every module: hooks and the like
ABSENT = object()  # in place of the value of an attribute that is not there


@contextmanager
def emptied(model: nn.Module) -> Iterator[list[Place]]:
    """Inside, the known caches of a model are empty; what they held."""
    known = [m for m in model.modules() if m in _EMPTY] if len(_EMPTY) else []
    with _set([(m, name, empty) for m in known for name, empty in _EMPTY[m].items()]) as before:
        yield before


@contextmanager
def filled_anew(model: nn.Module) -> Iterator[None]:
    """Inside, the known caches of a model are empty; raises where they are then filled with something else."""
    with emptied(model) as before:
        yield
        for module, name, value in before:
            if not _agree(value, read(module, name)):
                path = next(path for path, m in model.named_modules() if m is module)
                raise ValueError(
                    f"{'.'.join(filter(None, [path, name]))!r} of the model holds other values than the model computes "
                    "from its parameters: they have changed since it was filled. Empty it (often by `model.train(); "
                    "model.eval()`)."
                )


def containers(module: nn.Module) -> list[tuple[str, Any]]:
    """Names and values of attributes that are dicts and lists of the user's."""
    own = vars(module)
    return [(name, own[name]) for name in own.keys() - INTERNAL if type(own[name]) in (dict, list)]


def note_filled(module: nn.Module, name: str, empty: Any, value: Any) -> None:
    """Know a place from now on if it was empty and then filled with what has gradients."""
    parts = _tensors(value)
    if (empty is None or empty is ABSENT or empty in ({}, [])) and any(x.requires_grad for x in parts):
        _EMPTY.setdefault(module, {})[name] = empty


def find(model: nn.Module, forward: Callable[[], Any], restored: Callable[[], AbstractContextManager]) -> None:
    """Look for places that were filled before: emptied, `forward` fills them with the same values, with gradients.

    Each attempt is inside `restored`, which puts back what a forward does to the model.
    """
    for name, modules in filled(model).items():
        for absent in (False, True):
            # A buffer that is empty is None.
            empty = [(m, name, _empty_as(read(m, name), absent and name in vars(m))) for m in modules]
            with restored(), _set(empty) as before, torch.enable_grad():
                try:
                    forward()
                except Exception:  # whatever a model raises without something that it needs
                    continue
                after = [read(m, name) for m in modules]
            if all(_tensors(now) and _agree(value, now) for (*_, value), now in zip(before, after, strict=True)):
                for (module, _, holds), now in zip(empty, after, strict=True):
                    note_filled(module, name, holds, now)
                break


def read(module: nn.Module, name: str) -> Any:
    """The value of an attribute or buffer, or ABSENT."""
    return _values(module, name).get(name, ABSENT)


def filled(model: nn.Module) -> dict[str, list[nn.Module]]:
    """By name, the modules that keep tensors, but parameters, in attributes, or in buffers of no state dict."""
    found: dict[str, list[nn.Module]] = {}
    for m in model.modules():
        # The attributes of scripted modules are not Python's.
        names = [] if isinstance(m, torch.jit.ScriptModule) else [*vars(m), *m._non_persistent_buffers_set]
        for name in names:
            held = [x for x in _tensors(read(m, name)) if not isinstance(x, nn.Parameter)]
            if name not in INTERNAL and any(x.is_floating_point() for x in held):
                found.setdefault(name, []).append(m)
    return found


@contextmanager
def _set(places: list[Place]) -> Iterator[list[Place]]:
    """Inside, places hold other values; what they held."""
    before = [(m, name, read(m, name)) for m, name, _ in places]
    try:
        for m, name, value in places:
            _put(m, name, value.copy() if type(value) in (dict, list) else value)
        yield before
    finally:
        for place in before:
            _put(*place)


def _put(module: nn.Module, name: str, value: Any) -> None:
    if value is ABSENT:
        vars(module).pop(name, None)
    else:
        _values(module, name)[name] = value


def _values(module: nn.Module, name: str) -> dict[str, Any]:
    return module._buffers if name in module._buffers else vars(module)


def _empty_as(value: Any, absent: bool) -> Any:
    return type(value)() if type(value) in (dict, list) else ABSENT if absent else None


def _tensors(value: Any) -> list[Tensor]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [x for x in parts if isinstance(x, Tensor)]


def _agree(value: Any, other: Any) -> bool:
    """Whether two values of a place are the same up to rounding, where both hold something."""
    if isinstance(value, dict) and isinstance(other, dict):
        return all(_agree(value[key], other[key]) for key in value.keys() & other.keys())
    if isinstance(value, list) and isinstance(other, list):
        return all(map(_agree, value, other))
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return True
    tolerance = 1e3 * max(torch.finfo(x.dtype).eps for x in (value, other) if x.is_floating_point())
    value, other = value.detach().double(), other.detach().double()
    return value.shape == other.shape and bool((value - other).norm() <= tolerance * value.norm())
