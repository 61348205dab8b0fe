"""Products of Jacobians with vectors and metrics, for any module, example by example."""

from nngeo.products.curves import CubicSpline, Curve, DiscreteCurve
from nngeo.products.diagrules import DiagRule, register_diag_rule
from nngeo.products.energy import curve_energy, curve_length
from nngeo.products.functions import jacobian, jmp, jvp, mjp, vjp
from nngeo.products.geodesics import Geodesics, geodesics
from nngeo.products.laplacian import Laplacian, forward_laplacian
from nngeo.products.metric import Metric
from nngeo.products.metrics import Dense, Diagonal, Factor, LowRankPlusDiagonal
from nngeo.products.montecarlo import Sampled
from nngeo.products.sandwiches import jmjTp, jTmjp
from nngeo.products.softmax import Softmax
from nngeo.products.structured import BlockDiagonal, Kronecker
from nngeo.products.volume import log_volume, volume

__all__ = [
    "BlockDiagonal",
    "CubicSpline",
    "Curve",
    "Dense",
    "DiagRule",
    "Diagonal",
    "DiscreteCurve",
    "Factor",
    "Geodesics",
    "Kronecker",
    "Laplacian",
    "LowRankPlusDiagonal",
    "Metric",
    "Sampled",
    "Softmax",
    "curve_energy",
    "curve_length",
    "forward_laplacian",
    "geodesics",
    "jTmjp",
    "jacobian",
    "jmjTp",
    "jmp",
    "jvp",
    "log_volume",
    "mjp",
    "register_diag_rule",
    "vjp",
    "volume",
]
