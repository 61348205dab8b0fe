"""Subclasses that add Jacobian products: of every class of torch.nn, under its name, and of any other module class."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from nngeo.nn.abstract import AbstractDiagonalJacobian, AbstractJacobian

Kind = type[nn.Module]
AnyKind = TypeVar("AnyKind", bound=Kind)

# Where output j depends on input j alone. Softmax and GLU are missing on purpose.
_ELEMENTWISE = frozenset(
    "AlphaDropout CELU Dropout ELU FeatureAlphaDropout Flatten GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity "
    "LeakyReLU LogSigmoid Mish PReLU RReLU ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink "
    "Threshold Unflatten".split()
)
_TWINS: dict[Kind, Kind] = {}  # of the classes of torch.nn
_OTHERS: weakref.WeakKeyDictionary[Kind, weakref.ref[Kind]] = weakref.WeakKeyDictionary()


def stands_for(kind: Kind) -> Callable[[AnyKind], AnyKind]:
    """Let a class that is written out be the twin of one of torch.nn."""

    def register(made: AnyKind) -> AnyKind:
        _TWINS[kind] = made
        return made

    return register


@stands_for(nn.Module)
class Module(AbstractJacobian, nn.Module):
    """nn.Module with Jacobian products: a base for networks of one's own, and of all classes of this package.

    >>> import torch
    >>> class Net(Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = nn.Linear(3, 2)
    ...
    ...     def forward(self, x):
    ...         return self.layer(x).sin()
    >>> Net().jacobian(torch.ones(4, 3), wrt="weight").shape
    torch.Size([4, 2, 8])
    """


def twins_of_torch() -> dict[str, Kind]:
    """{name: class} for every module class that torch.nn has."""
    found = [kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, nn.Module)]
    for kind in sorted(found, key=lambda kind: len(kind.__mro__)):  # parents first
        if kind not in _TWINS:
            _TWINS[kind] = _twin_of_torch(kind)
    return {kind.__name__: made for kind, made in _TWINS.items()}


def twin(kind: Kind) -> Kind:
    """The class with Jacobian products: itself where it has them, its twin, or a subclass that is made for it."""
    if issubclass(kind, AbstractJacobian):
        return kind
    known = _TWINS.get(kind) or _OTHERS.get(kind, lambda: None)()
    if known is None:
        names = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce_ex__": _reduce, "_made_of": kind}
        known = type(kind.__name__, (Module, kind), names)
        _OTHERS[kind] = weakref.ref(known)  # the twin keeps its parent alive
    return known


def _twin_of_torch(kind: Kind) -> Kind:
    parent = next(_TWINS[base] for base in kind.__mro__[1:] if base in _TWINS)
    new = kind.__name__ in _ELEMENTWISE and not issubclass(parent, AbstractDiagonalJacobian)
    diagonal = (AbstractDiagonalJacobian,) if new else ()
    names: dict[str, Any] = {
        "__module__": "nngeo.nn",
        "__doc__": f"torch.nn.{kind.__name__} with the Jacobian products of `AbstractJacobian`.",
    }
    if grown := getattr(kind, "cls_to_become", None):  # of a lazy module, when it has seen its first input
        names["cls_to_become"] = _TWINS[grown]
    with warnings.catch_warnings():  # of the classes that torch has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        return type(kind.__name__, (*diagonal, parent, kind), names)


def _reduce(self: Any, protocol: Any) -> tuple:
    """Pickled by the class that it was made of, which can be found by its name."""
    _, _, *state = super(type(self), self).__reduce_ex__(protocol)
    return (_bare, (self._made_of,), *state)


def _bare(kind: Kind) -> nn.Module:
    return object.__new__(twin(kind))
