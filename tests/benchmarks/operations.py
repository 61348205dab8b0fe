"""Counts of what torch executes: multiply-adds of products, and entries written by anything."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


def _product(*factors: int) -> Callable[..., int]:
    """Multiply-adds of a product whose two factors are these arguments: rows of the first times all of the second."""

    def count(out: Any, *args: Any, **kwargs: Any) -> int:
        a, b = (args[index] for index in factors)
        if b.ndim == 1:
            return a.numel()
        return a.numel() * b.shape[-1]

    return count


def _convolution(out: Any, x: Tensor, w: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
                 *rest: Any, **kwargs: Any) -> int:  # fmt: skip
    return (x.numel() if transposed else out.numel()) * prod(w.shape[1:])  # `w` is (o, i / groups, *kernel)


def _convolution_backward(out: Any, g: Tensor, x: Tensor, w: Tensor, bias: Any, stride: Any, padding: Any,
                          dilation: Any, transposed: bool, *rest: Any, **kwargs: Any) -> int:  # fmt: skip
    mask = rest[-1]
    return (mask[0] + mask[1]) * (x.numel() if transposed else g.numel()) * prod(w.shape[1:])


def _attention(forward: bool) -> Callable[..., int]:
    def count(out: Any, *args: Any, **kwargs: Any) -> int:
        q, k, v = args[:3] if forward else args[1:4]
        scores = prod(q.shape[:-1]) * k.shape[-2]
        return scores * (q.shape[-1] + v.shape[-1]) * (1 if forward else 2)

    return count


PRODUCTS: dict[Any, Callable[..., int]] = {
    aten.mm: _product(0, 1),
    aten.bmm: _product(0, 1),
    aten.mv: _product(0, 1),
    aten.dot: _product(0, 1),
    aten.addmm: _product(1, 2),
    aten.addmm_: _product(1, 2),
    aten.addmv: _product(1, 2),
    aten.addmv_: _product(1, 2),
    aten.addbmm: _product(1, 2),
    aten.addbmm_: _product(1, 2),
    aten.baddbmm: _product(1, 2),
    aten.baddbmm_: _product(1, 2),
    aten.addr: lambda out, *args, **kwargs: out.numel(),
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention(True),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention(False),
    aten._scaled_dot_product_flash_attention: _attention(True),
    aten._scaled_dot_product_flash_attention_backward: _attention(False),
    aten._scaled_dot_product_efficient_attention: _attention(True),
    aten._scaled_dot_product_efficient_attention_backward: _attention(False),
    aten._scaled_dot_product_cudnn_attention: _attention(True),
    aten._scaled_dot_product_cudnn_attention_backward: _attention(False),
}

PRODUCTS |= {  # which not every build of torch has
    getattr(torch.ops.mkldnn, name): lambda out, x, w, *args, **kwargs: out.numel() * w.shape[-1]
    for name in ("_linear_pointwise",)
    if hasattr(torch.ops.mkldnn, name)
}
UNWRITTEN = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
UNWRITTEN |= {aten._unsafe_view}  # a view that torch does not call one
LIKE_A_PRODUCT = re.compile(r"(^|_)(\w*mm|\w*mv|v?dot|matmul|linear|conv\w*|\w*attention\w*|einsum|tensordot)(_|$)")


class Operations(TorchDispatchMode):
    """Counts while it is entered: `multiply_adds`, and `written`, the entries of results, but for views and empty ones.

    What a library computes outside of torch is not seen; a product of torch that has no entry in PRODUCTS is an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0
        self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := PRODUCTS.get(func.overloadpacket)) is not None:
            self.multiply_adds += count(out, *args, **(kwargs or {}))
        elif LIKE_A_PRODUCT.search(func.overloadpacket.__name__):
            raise NotImplementedError(f"{func} may be a product of matrices: say in PRODUCTS what it counts.")
        if not func.is_view and func.overloadpacket not in UNWRITTEN:
            self.written += sum(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


def operations(run: Callable[[], Any]) -> Operations:
    """The counts of one call."""
    with Operations() as counted:
        run()
    return counted
