"""The states in which models are differentiated; each is as it was, outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nngeo.generators.differentiable import quiet
from nngeo.generators.untouched import untouched
from nngeo.layers.kernels import plain_kernels
from nngeo.layers.turn import TURN


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter requires a gradient."""
    with untouched(model), torch.enable_grad():
        for p in model.parameters():
            p.requires_grad_(False)
        yield


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Inside, it is this thread's turn, and inference mode and autocast are off."""
    with TURN, torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def second_derivatives(model: nn.Module, *, forward: bool = False) -> Iterator[None]:
    """Inside, kernels have second derivatives; with `forward`, only forward-mode ones are needed."""
    with plain_kernels(model, twice=not forward), quiet():
        yield
