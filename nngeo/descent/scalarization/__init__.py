"""Scalarizers: several losses to one, whose ordinary gradient is followed; the baseline of every aggregator."""

from nngeo.descent.scalarization.base import Scalarizer
from nngeo.descent.scalarization.dwa import DWA
from nngeo.descent.scalarization.famo import FAMO
from nngeo.descent.scalarization.geometric_mean import GeometricMean
from nngeo.descent.scalarization.learned import IMTLL, UW
from nngeo.descent.scalarization.linear import Constant, Mean, Random, Sum
from nngeo.descent.scalarization.preference import COSMOS, PBI, STCH

__all__ = [
    "COSMOS",
    "Constant",
    "DWA",
    "FAMO",
    "GeometricMean",
    "IMTLL",
    "Mean",
    "PBI",
    "Random",
    "STCH",
    "Scalarizer",
    "Sum",
    "UW",
]
