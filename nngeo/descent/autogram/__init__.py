"""Gramians of losses by layer rules, and gradients from the same factors."""

from nngeo.descent.autogram.engine import Engine

__all__ = ["Engine"]
