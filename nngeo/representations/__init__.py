"""Matrices over parameters (PMat), over outputs (FMat), and maps between them (PFMap)."""

from nngeo.linalg.cg import ConvergenceWarning
from nngeo.representations.base import PMat
from nngeo.representations.block import Block
from nngeo.representations.blockdiag import DenseBlock, PMatBlockDiag
from nngeo.representations.dense import PMatDense
from nngeo.representations.diag import DiagBlock, PMatDiag
from nngeo.representations.eigenblock import KroneckerEigenBlock
from nngeo.representations.ekfac import PMatEKFAC
from nngeo.representations.eye import PMatEye
from nngeo.representations.fspace import FMatDense
from nngeo.representations.implicit import PMatImplicit
from nngeo.representations.implicitmap import PFMapImplicit
from nngeo.representations.kfac import PMatKFAC
from nngeo.representations.kroneckerblock import KroneckerBlock
from nngeo.representations.layerwise import LayerwisePMat
from nngeo.representations.lowrank import PMatLowRank
from nngeo.representations.lowrankdiag import PMatLowRankPlusDiag
from nngeo.representations.maps import PFMap, PFMapDense, random_pfmap
from nngeo.representations.mixed import PMatEKFACBlockDiag, PMatMixed
from nngeo.representations.quasidiag import PMatQuasiDiag, QuasiDiagBlock
from nngeo.representations.solvers import SOLVERS, register_solver

__all__ = [
    "SOLVERS",
    "Block",
    "ConvergenceWarning",
    "DenseBlock",
    "DiagBlock",
    "FMatDense",
    "KroneckerBlock",
    "KroneckerEigenBlock",
    "LayerwisePMat",
    "PFMap",
    "PFMapDense",
    "PFMapImplicit",
    "PMat",
    "PMatBlockDiag",
    "PMatDense",
    "PMatDiag",
    "PMatEKFAC",
    "PMatEKFACBlockDiag",
    "PMatEye",
    "PMatImplicit",
    "PMatKFAC",
    "PMatLowRank",
    "PMatLowRankPlusDiag",
    "PMatMixed",
    "PMatQuasiDiag",
    "QuasiDiagBlock",
    "random_pfmap",
    "register_solver",
]
