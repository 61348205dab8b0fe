"""Every module class of torch.nn under its own name, with Jacobian products; made when this file is imported."""

from __future__ import annotations

from torch import nn

from nngeo.nn import containers, layers  # noqa: F401 (their classes stand for those of torch.nn)
from nngeo.nn.twins import twins_of_torch

_CLASSES = twins_of_torch()
_AS_THEY_ARE = ("Buffer", "Parameter", "UninitializedBuffer", "UninitializedParameter", "functional", "init")

globals().update(_CLASSES, **{name: getattr(nn, name) for name in _AS_THEY_ARE})

__all__ = [*_CLASSES, *_AS_THEY_ARE]
