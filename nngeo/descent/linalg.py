"""The linear algebra of aggregators by the names that TorchJD has for it: projectors, and types of matrices."""

from torch import Tensor

from nngeo.descent.aggregation.projectors import DualConeProjector, PivotingProjector, QuadprogProjector


class Matrix(Tensor):
    """A tensor (m, n), in annotations: what is passed are plain tensors."""


class PSDMatrix(Matrix):
    """A symmetric positive semidefinite tensor (m, m), in annotations."""


__all__ = ["DualConeProjector", "Matrix", "PSDMatrix", "PivotingProjector", "QuadprogProjector"]
