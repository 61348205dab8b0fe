"""Generators run the model on examples; nothing else does."""

from nngeo.generators.base import Generator
from nngeo.generators.batches import Batch, Examples
from nngeo.generators.hessian import HessianGenerator
from nngeo.generators.jacobian import JacobianGenerator
from nngeo.generators.record import BatchRecord, LayerRecord

__all__ = ["Batch", "BatchRecord", "Examples", "Generator", "HessianGenerator", "JacobianGenerator", "LayerRecord"]
