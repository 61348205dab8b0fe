"""Models that are differentiated more than twice."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from nngeo.generators.untouched import untouched
from nngeo.layers.kernels import plain_kernels
from nngeo.layers.plainnorms import PlainNorms


@contextmanager
def many_derivatives(model: nn.Module) -> Iterator[None]:
    """Inside, a model is differentiable as often as one likes; it comes back as it was."""
    with untouched(model), plain_kernels(model), PlainNorms(), warnings.catch_warnings():
        # See nngeo.generators.differentiable.
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*performance drop", category=UserWarning)
        yield
