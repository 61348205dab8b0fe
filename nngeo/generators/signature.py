"""What is remembered of a model depends on these: its structure, and the code of the function that calls it."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nngeo.layers.collection import LayerCollection


def signature(model: nn.Module, layers: LayerCollection) -> tuple:
    """What a plan depends on; equal for equal structures."""
    modules, names, seen = [], dict[int, Any](), dict[int, Any]()
    for name, module in model.named_modules():
        values = tuple([(k, plain(v, seen)) for k, v in vars(module).items() if k not in _OF_MODULES])
        hooks = (*module._forward_hooks, *module._forward_pre_hooks)
        parameters = [(k, p) for k, p in module._parameters.items() if p is not None]
        own = tuple([(k, names.setdefault(id(p), (name, k)), p.shape, p.requires_grad) for k, p in parameters])
        modules.append((name, type(module), values, hooks, own))
    return layers, tuple(modules)


_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
_VALUES = (type(None), bool, int, float, str)


def plain(value: Any, seen: dict[int, Any] | None = None, depth: int = 4) -> Any:
    """Something hashable that changes where a setting does: with plain values, in containers and plain objects, too."""
    if isinstance(value, _VALUES):
        return value
    if callable(value):
        return id(value)
    if depth == 0 or isinstance(value, Tensor):
        return type(value)
    seen = {} if seen is None else seen
    if id(value) not in seen:
        seen[id(value)] = type(value)  # of what contains itself
        parts = value.items() if isinstance(value, dict) else getattr(value, "__dict__", {}).items()
        items = enumerate(value) if isinstance(value, list | tuple) else parts
        found = tuple((k if isinstance(k, str | int) else type(k), plain(v, seen, depth - 1)) for k, v in items)
        seen[id(value)] = (type(value), found)
    return seen[id(value)]


class Same:
    """An object, held weakly, as a key: equal to itself only.

    Raises:
        TypeError: it can't be held weakly.
    """

    __slots__ = ("_id", "_of")

    def __init__(self, of: Any):
        self._of, self._id = weakref.ref(of), id(of)

    def __hash__(self) -> int:
        return self._id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self._of() is not None and self._of() is other._of()


# Entries up to which a tensor that a function refers to is known by its values: it may be a flag.
FEW = 8


def code_of(function: Any) -> Any:
    """Something hashable that is equal for functions that do the same: a `lambda` made anew is the same function.

    That is their code, and what it refers to, in closures, defaults, and globals: modules, trained tensors, functions
    of torch and other objects as themselves, numbers by value, other tensors by shape and dtype.

    Raises:
        TypeError: something is neither hashable nor can be held weakly.
    """
    return _code(function, 4, set())


def _code(value: Any, depth: int, above: set[int]) -> Any:
    if isinstance(value, (*_VALUES, complex, bytes, types.EllipsisType, types.CodeType, torch.dtype, torch.device)):
        return type(value), value
    known = isinstance(value, nn.Module | type | types.ModuleType) or _is_of_torch(value)
    if known or depth == 0 or id(value) in above:
        return Same(value)
    if isinstance(value, Tensor):
        return Same(value) if value.requires_grad or isinstance(value, nn.Parameter) else _contents(value)
    if isinstance(value, np.ndarray | np.generic):
        return type(value), value.shape, str(value.dtype), tuple(value.flat) if value.size <= FEW else ()
    if isinstance(value, range | slice):
        return repr(value)
    parts = _parts(value)
    if parts is None:
        return Same(value), plain(getattr(value, "__dict__", None))
    return type(value), tuple(_code(part, depth - 1, above | {id(value)}) for part in parts)


def _is_of_torch(value: Any) -> bool:
    return isinstance(value, types.FunctionType) and (value.__module__ or "").split(".")[0] == "torch"


def _contents(tensor: Tensor) -> Any:
    few = tuple(tensor.flatten().tolist()) if tensor.numel() <= FEW and tensor.layout == torch.strided else ()
    return Tensor, tensor.shape, tensor.dtype, tensor.device, few


def _parts(value: Any) -> list[Any] | None:
    """What a value consists of; None for objects."""
    if isinstance(value, types.FunctionType):
        return [value.__code__, value.__defaults__, value.__kwdefaults__, *_cells(value), *_globals(value)]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, types.BuiltinMethodType):
        return [value.__name__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    return [part for item in value.items() for part in item] if isinstance(value, dict) else None


def _cells(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not bound yet
            yield None


def _globals(function: types.FunctionType) -> Iterator[Any]:
    waiting, known = [function.__code__], function.__globals__
    while waiting:
        code = waiting.pop()
        yield from (known[name] for name in code.co_names if name in known)
        waiting.extend(constant for constant in code.co_consts if isinstance(constant, types.CodeType))
