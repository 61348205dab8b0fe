"""Jacobian descent: several losses at once, their gradients combined by an aggregator."""

from nngeo.descent import aggregation, autogram, autojac, linalg, scalarization
from nngeo.descent.aggregation.stateful import Stateful
from nngeo.descent.autogram import Engine
from nngeo.descent.autojac import jac, jac_to_grad
from nngeo.descent.backward import backward
from nngeo.descent.mtl_backward import mtl_backward

__all__ = [
    "Engine",
    "Stateful",
    "aggregation",
    "autogram",
    "autojac",
    "backward",
    "jac",
    "jac_to_grad",
    "linalg",
    "mtl_backward",
    "scalarization",
]
