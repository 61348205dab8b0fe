"""Aggregators of Jacobians, and the weightings that most of them are made of."""

from nngeo.descent.aggregation.aligned_mtl import AlignedMTL, AlignedMTLWeighting
from nngeo.descent.aggregation.base import (
    Aggregator,
    GramianWeightedAggregator,
    GramianWeighting,
    RowWeighting,
    WeightedAggregator,
    Weighting,
)
from nngeo.descent.aggregation.cagrad import CAGrad, CAGradWeighting
from nngeo.descent.aggregation.config import ConFIG, ConFIGWeighting
from nngeo.descent.aggregation.constant import Constant, ConstantWeighting
from nngeo.descent.aggregation.cr_mogm import CRMOGM, CRMOGMWeighting
from nngeo.descent.aggregation.dualproj import DualProj, DualProjWeighting
from nngeo.descent.aggregation.excess_mtl import ExcessMTL, ExcessMTLWeighting
from nngeo.descent.aggregation.fairgrad import FairGrad, FairGradWeighting
from nngeo.descent.aggregation.graddrop import GradDrop
from nngeo.descent.aggregation.gradvac import GradVac, GradVacWeighting
from nngeo.descent.aggregation.imtl_g import IMTLG, IMTLGWeighting
from nngeo.descent.aggregation.krum import Krum, KrumWeighting
from nngeo.descent.aggregation.mean import Mean, MeanWeighting
from nngeo.descent.aggregation.mgda import MGDA, MGDAWeighting
from nngeo.descent.aggregation.modo import MoDo, MoDoWeighting
from nngeo.descent.aggregation.nash_mtl import NashMTL, NashMTLWeighting
from nngeo.descent.aggregation.pcd import PCD, PCDWeighting
from nngeo.descent.aggregation.pcgrad import PCGrad, PCGradWeighting
from nngeo.descent.aggregation.projectors import DualConeProjector, PivotingProjector, QuadprogProjector
from nngeo.descent.aggregation.random import Random, RandomWeighting
from nngeo.descent.aggregation.sdmgrad import SDMGrad, SDMGradWeighting
from nngeo.descent.aggregation.stateful import Memory, Stateful
from nngeo.descent.aggregation.sum import Sum, SumWeighting
from nngeo.descent.aggregation.trimmed_mean import TrimmedMean
from nngeo.descent.aggregation.upgrad import UPGrad, UPGradWeighting

__all__ = [
    "Aggregator",
    "AlignedMTL",
    "AlignedMTLWeighting",
    "CAGrad",
    "CAGradWeighting",
    "CRMOGM",
    "CRMOGMWeighting",
    "ConFIG",
    "ConFIGWeighting",
    "Constant",
    "ConstantWeighting",
    "DualConeProjector",
    "DualProj",
    "DualProjWeighting",
    "ExcessMTL",
    "ExcessMTLWeighting",
    "FairGrad",
    "FairGradWeighting",
    "GradDrop",
    "GradVac",
    "GradVacWeighting",
    "GramianWeightedAggregator",
    "GramianWeighting",
    "IMTLG",
    "IMTLGWeighting",
    "Krum",
    "KrumWeighting",
    "MGDA",
    "MGDAWeighting",
    "Mean",
    "MeanWeighting",
    "Memory",
    "MoDo",
    "MoDoWeighting",
    "NashMTL",
    "NashMTLWeighting",
    "PCD",
    "PCDWeighting",
    "PCGrad",
    "PCGradWeighting",
    "PivotingProjector",
    "QuadprogProjector",
    "Random",
    "RandomWeighting",
    "RowWeighting",
    "SDMGrad",
    "SDMGradWeighting",
    "Stateful",
    "Sum",
    "SumWeighting",
    "TrimmedMean",
    "UPGrad",
    "UPGradWeighting",
    "WeightedAggregator",
    "Weighting",
]
