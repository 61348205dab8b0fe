"""Matrices and maps of a network from examples: what users call."""

from nngeo.factories.fisher import FIM, GGN, FIM_MonteCarlo
from nngeo.factories.hessian import Hessian
from nngeo.factories.jacobian import NTK, GramMatrix, Jacobian

__all__ = ["FIM", "FIM_MonteCarlo", "GGN", "GramMatrix", "Hessian", "Jacobian", "NTK"]
