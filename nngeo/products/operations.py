"""Which rule an operation of torch follows when a forward pass carries first and second derivatives."""

from __future__ import annotations

from typing import Any

import torch

from nngeo.products import matrixrules
from nngeo.products.secondorder import (
    Call,
    Rule,
    addition,
    addmm,
    affine,
    contraction,
    convolution,
    copied,
    division,
    fresh,
    general,
    linear,
    log_softmax,
    pointwise,
    product,
    softmax,
)


class Untracked(NotImplementedError):
    """An operation whose derivatives a forward pass does not carry."""


# Linear in the first argument; views among them.
_LINEAR = frozenset(
    "view _unsafe_view _reshape_alias expand t transpose permute slice select squeeze unsqueeze unbind split "
    "unsafe_split split_with_sizes unsafe_split_with_sizes diagonal alias neg sum mean flip roll "
    "unfold repeat cumsum index index_select gather tril triu im2col col2im pixel_shuffle pixel_unshuffle "
    "avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d "
    "upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d "
    "upsample_trilinear3d reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d _conj conj_physical _neg_view resolve_conj resolve_neg view_as_real view_as_complex _fft_r2c "
    "_fft_c2c _fft_c2r".split()
)
# Without a second derivative in all tensor arguments jointly (where torch selects entries: but for ties).
_AFFINE = frozenset(
    "rsub cat stack constant_pad_nd where masked_fill scatter scatter_add index_put index_add slice_scatter "
    "select_scatter max min amax amin sort topk median kthvalue cummax cummin adaptive_max_pool2d adaptive_max_pool3d "
    "max_pool2d_with_indices max_pool3d_with_indices complex".split()
)
# What such a tensor is filled with has no derivative; what is written to it later may have one.
_FRESH = "new_empty new_zeros new_ones new_full empty_like zeros_like ones_like full_like new_empty_strided".split()

# Where the first argument alone varies; where any one does; and for whatever varies.
FIRST: dict[str, Rule] = {
    **dict.fromkeys(_LINEAR, linear),
    **dict.fromkeys(["clone", "_to_copy"], copied),
    "div": division,
    "convolution": convolution,
}
ALONE: dict[str, Rule] = {
    **dict.fromkeys(["mul", "mm", "bmm", "mv", "dot"], linear),
    **dict.fromkeys(["baddbmm", "addmv", "addbmm", "convolution", "_trilinear"], affine),
    "addmm": addmm,
}
ANY: dict[str, Rule] = {
    **dict.fromkeys(_AFFINE, affine),
    **dict.fromkeys(_FRESH, fresh),
    "add": addition(1),
    "sub": addition(-1),
    "mul": product,
    "mm": contraction("kij,kjl->il"),
    "bmm": contraction("kbij,kbjl->bil"),
    "mv": contraction("kij,kj->i"),
    "dot": contraction("ki,ki->"),
    **dict.fromkeys(["addmm", "baddbmm", "addmv", "addbmm", "convolution", "_trilinear"], general),
    **dict.fromkeys(["prod", "cumprod", "logcumsumexp", "linalg_cross", "polar"], general),
    "_softmax": softmax,
    "_safe_softmax": softmax,
    "_log_softmax": log_softmax,
    "linalg_inv_ex": matrixrules.inverse,
    "_linalg_slogdet": matrixrules.slogdet,
    "_linalg_det": matrixrules.det,
    "linalg_cholesky_ex": matrixrules.cholesky,
    **dict.fromkeys(["_linalg_solve_ex", "linalg_solve_triangular"], matrixrules.solution),
    **dict.fromkeys(["_prelu_kernel", "leaky_relu"], pointwise),  # older versions of torch do not tag them so
}


# Rules that hold for complex numbers as they are; the others differentiate by gradients, or square what is complex.
_OF_COMPLEX = (linear, affine, copied, fresh, convolution, addmm, division, general)


def rule_of(func: Any, name: str, call: Call, complex_numbers: bool) -> Rule:
    """The rule of an operation some of whose arguments vary, and some may be complex.

    Derivatives are along real columns: no function has to be holomorphic.

    Raises:
        Untracked: there is none.
    """
    alone = len(call.values) == 1
    rule = (
        (FIRST.get(name) if call.arguments == (0,) else None) or (ALONE.get(name) if alone else None) or ANY.get(name)
    )
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = pointwise
    if rule is None or func.namespace != "aten" or func._overloadname == "dtype":  # the same bits, as other numbers
        raise Untracked(f"{func} has no rule")
    of_complex = rule in _OF_COMPLEX or name in ("add", "sub") or "linalg" in name
    if complex_numbers and not of_complex:
        return general
    return rule
