"""The states in which models are differentiated; each is as it was, outside."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nngeo.generators.untouched import untouched
from nngeo.layers.kernels import plain_kernels


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter requires a gradient."""
    with untouched(model), torch.enable_grad():
        for p in model.parameters():
            p.requires_grad_(False)
        yield


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Inside, inference mode and autocast are off."""
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def second_derivatives(model: nn.Module, *, forward: bool = False) -> Iterator[None]:
    """Inside, kernels have second derivatives; with `forward`, only forward-mode ones are needed."""
    with plain_kernels(model, twice=not forward), quiet():
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, torch does not warn of itself."""
    with warnings.catch_warnings():
        # The first forward-mode derivative of a process warns about torch's own use of torch.jit.
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        # Where torch has no batching rule, the vectorised pass is a loop: as fast as one written here.
        warnings.filterwarnings("ignore", message=".*performance drop", category=UserWarning)
        yield
