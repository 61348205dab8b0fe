"""Jobs: plain objects on the public API, each short enough to read, and to write the next one after it."""

from nngeo.uses.ewc import EWC
from nngeo.uses.influence import influence, self_influence
from nngeo.uses.kernels import alignment, cka, effective_rank, kernel_predict
from nngeo.uses.laplace import Laplace
from nngeo.uses.lds import lds
from nngeo.uses.merging import merge
from nngeo.uses.natural import NaturalGradient
from nngeo.uses.pruning import prune
from nngeo.uses.quadratic import Quadratic

__all__ = [
    "EWC",
    "Laplace",
    "NaturalGradient",
    "Quadratic",
    "alignment",
    "cka",
    "effective_rank",
    "influence",
    "kernel_predict",
    "lds",
    "merge",
    "prune",
    "self_influence",
]
