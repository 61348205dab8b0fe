"""Vectors of parameter space and of function space, with arithmetic."""

from nngeo.vectors.fvector import FVector
from nngeo.vectors.grad import grad
from nngeo.vectors.pvector import PVector
from nngeo.vectors.random import random_fvector, random_pvector, random_pvector_dict

__all__ = ["FVector", "PVector", "grad", "random_fvector", "random_pvector", "random_pvector_dict"]
