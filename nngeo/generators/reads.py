"""What a model lets the data decide: what Python runs, where it reads values, and which rows are picked by tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# What gives Python a number, numbers, or the memory.
_VALUES = {"item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__complex__", "__index__"}
_VALUES |= {"__contains__", "__dlpack__", "data_ptr", "storage", "untyped_storage", "equal", "allclose", "is_nonzero"}
_VALUES |= {"__format__", "__repr__"}

# Results whose shape depends on values.
_LENGTHS = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "repeat_interleave"}
_LENGTHS |= {"one_hot"}

# Sizes and places, which may be given as tensors; those of reshaped tensors come after the tensor itself.
_NEW = {"arange", "linspace", "logspace", "eye", "zeros", "ones", "empty", "full", "rand", "randn", "tensor"}
_SIZES = {"view", "reshape", "expand", "repeat", "tile", "narrow", "split", "chunk", "unflatten", "select", "roll"}
_SIZES |= {"new_zeros", "new_ones", "new_empty", "new_full", "tril", "triu"}

# Rows are picked by tensors.
_PICKS = {"nonzero", "argwhere", "masked_select", "index_select", "gather", "take", "take_along_dim", "topk", "sort"}
_PICKS |= {"argsort", "index_add", "index_add_", "index_copy", "index_copy_", "index_put", "index_put_", "scatter"}
_PICKS |= {"scatter_", "scatter_add", "scatter_add_"}


class Reads(TorchFunctionMode):
    """Notes whether Python reads values, and whether rows are picked by tensors, while it is active.

    What compiled code does is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = self.picks = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "")
        self.found |= name in _VALUES or name in _LENGTHS
        self.picks |= name in _PICKS
        if name in _NEW or name in _SIZES:
            given = args if name in _NEW else args[1:]
            self.found |= any(isinstance(x, Tensor) for x in tree_leaves((given, kwargs)))
        if name in ("__getitem__", "__setitem__"):
            self.found |= any(map(_reads, args[1] if isinstance(args[1], tuple) else (args[1],)))
            self.picks |= any(isinstance(leaf, Tensor) for leaf in tree_leaves(args[1]))
        return func(*args, **(kwargs or {}))


def _reads(index: Any) -> bool:
    """Whether an index is a slice between tensors, or picks as many rows as the values say."""
    if isinstance(index, slice):
        return any(isinstance(x, Tensor) for x in (index.start, index.stop, index.step))
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
