"""Layers: which parameters, in which order, and how gradients by them are computed."""

from nngeo.layers import conv, embedding, linear, norm  # noqa: F401 (they register their rules)
from nngeo.layers.collection import Layer, LayerCollection
from nngeo.layers.modules import Affine1d, Cosine1d, WeightNorm1d, WeightNorm2d
from nngeo.layers.rule import LayerRule, LinearMapRule, ScaleRule, register_rule, rule_for

__all__ = [
    "Affine1d",
    "Cosine1d",
    "Layer",
    "LayerCollection",
    "LayerRule",
    "LinearMapRule",
    "ScaleRule",
    "WeightNorm1d",
    "WeightNorm2d",
    "register_rule",
    "rule_for",
]
