"""torch.nn with Jacobian products: `import nngeo.nn as nnj`."""

from typing import TYPE_CHECKING, Any

from nngeo.nn import diagonals, log_likelihoods, utils  # noqa: F401 (diagonals registers its rules)
from nngeo.nn.abstract import AbstractDiagonalJacobian, AbstractJacobian
from nngeo.nn.classes import *  # noqa: F403 (the classes of torch.nn, whose list is torch's)
from nngeo.nn.classes import __all__ as _of_torch
from nngeo.nn.containers import Residual, SkipConnection
from nngeo.nn.convert import convert_to_nnj
from nngeo.nn.inverse import invert_block_diagonal
from nngeo.nn.layers import L2Norm, Reshape, Sinusoidal, TruncExp
from nngeo.nn.log_likelihoods import LogBernoulli, LogBinaryBernoulli, LogGaussian, LogLikelihood

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """The classes of torch.nn, which are not written out."""


__all__ = [
    *_of_torch,
    "AbstractDiagonalJacobian",
    "AbstractJacobian",
    "L2Norm",
    "LogBernoulli",
    "LogBinaryBernoulli",
    "LogGaussian",
    "LogLikelihood",
    "Reshape",
    "Residual",
    "Sinusoidal",
    "SkipConnection",
    "TruncExp",
    "convert_to_nnj",
    "invert_block_diagonal",
    "log_likelihoods",
    "utils",
]
