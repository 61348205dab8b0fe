"""Modules that carry Jacobian products, made of any modules, with the same parameters."""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from nngeo.linalg.arguments import instance, shown
from nngeo.nn.containers import Sequential
from nngeo.nn.twins import Module, twin


def convert_to_nnj(model: nn.Module | Iterable[nn.Module]) -> Module:
    """The model, with Jacobian products as methods of it and of every module in it.

    Each module is a new object, of a subclass of its class, with the same options, attributes, hooks and training flag;
    `state_dict()` has the same names. Parameters and buffers are shared with the model, and tied modules stay tied. The
    modules of an iterable become a `Sequential`.

    Raises:
        NotImplementedError: a scripted module, whose class has no subclasses.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Sequential(nn.GELU(), nn.Flatten()), nn.Linear(8, 2))
    >>> converted = convert_to_nnj(model)
    >>> converted[0].weight is model[0].weight
    True
    >>> converted.vjp(torch.ones(4, 1, 2, 2), None, torch.ones(4, 2)).shape
    torch.Size([4, 4])
    """
    if not isinstance(model, nn.Module):
        if isinstance(model, str | Tensor | type) or not isinstance(model, Iterable):
            raise TypeError(f"`model` should be a torch.nn.Module, or several; got {shown(model)}.")
        return Sequential(*(_converted(instance("model", module, nn.Module), {}) for module in model))
    return cast(Module, _converted(model, {}))


def _converted(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    if id(module) in known:
        return known[id(module)]
    if isinstance(module, torch.jit.ScriptModule):
        raise NotImplementedError(
            f"{type(module).__name__} is scripted and can't be given methods: convert the model before it is scripted, "
            "or use the functions of nngeo.products, which take any module."
        )
    kind = twin(type(module))
    made: Any = object.__new__(kind)
    known[id(module)] = made
    values = {name: _rebound(value, module, made) for name, value in vars(module).items()}
    for name in _DICTIONARIES & values.keys():
        values[name] = values[name].copy()
    values["_modules"] = {
        name: None if child is None else _converted(child, known) for name, child in module._modules.items()
    }
    vars(made).update(values)
    return made


# A new object may be given other parameters or hooks later on, which the old one does not get.
_DICTIONARIES = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))


def _rebound(value: Any, old: nn.Module, new: nn.Module) -> Any:
    """A method of the old object that is kept as an attribute, as one of the new."""
    return MethodType(value.__func__, new) if isinstance(value, MethodType) and value.__self__ is old else value
