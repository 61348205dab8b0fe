"""Where users of NNJ look for these."""

from nngeo.nn.convert import convert_to_nnj
from nngeo.nn.inverse import invert_block_diagonal

__all__ = ["convert_to_nnj", "invert_block_diagonal"]
