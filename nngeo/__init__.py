"""Geometry of neural networks on PyTorch: Fisher and Gauss-Newton matrices, tangent kernels, Jacobians."""

from nngeo.factories import FIM, GGN, NTK, FIM_MonteCarlo, GramMatrix, Hessian, Jacobian
from nngeo.layers import LayerCollection, register_rule
from nngeo.representations import (
    FMatDense,
    PFMapDense,
    PFMapImplicit,
    PMat,
    PMatBlockDiag,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatEKFACBlockDiag,
    PMatEye,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
    PMatMixed,
    PMatQuasiDiag,
    random_pfmap,
)
from nngeo.variants import register_variant
from nngeo.vectors import FVector, PVector, grad, random_fvector, random_pvector, random_pvector_dict

__version__ = "0.1.0"

__all__ = [
    "FIM",
    "FIM_MonteCarlo",
    "FMatDense",
    "FVector",
    "GGN",
    "GramMatrix",
    "Hessian",
    "Jacobian",
    "LayerCollection",
    "NTK",
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
    "PMatMixed",
    "PMatQuasiDiag",
    "PVector",
    "grad",
    "random_fvector",
    "random_pfmap",
    "random_pvector",
    "random_pvector_dict",
    "register_rule",
    "register_variant",
]
