"""Likelihoods of targets given outputs, and how to get cotangents from them."""

from nngeo.variants.base import Cotangents, Variant
from nngeo.variants.bernoulli import BinaryLogits
from nngeo.variants.categorical import ClassifLogits, SegmentationLogits, TokenLogits
from nngeo.variants.causal import CausalLM
from nngeo.variants.estimators import Empirical, Estimator, Exact, MonteCarlo
from nngeo.variants.gaussian import Identity, Regression
from nngeo.variants.logsoftmax import ClassifLogSoftmax
from nngeo.variants.loss import OutputHessian
from nngeo.variants.poisson import PoissonLogRate
from nngeo.variants.registry import VARIANTS, FunctionVariant, make_variant, register_variant

__all__ = [
    "VARIANTS",
    "BinaryLogits",
    "CausalLM",
    "ClassifLogSoftmax",
    "ClassifLogits",
    "Cotangents",
    "Empirical",
    "Estimator",
    "Exact",
    "FunctionVariant",
    "Identity",
    "MonteCarlo",
    "OutputHessian",
    "PoissonLogRate",
    "Regression",
    "SegmentationLogits",
    "TokenLogits",
    "Variant",
    "make_variant",
    "register_variant",
]
