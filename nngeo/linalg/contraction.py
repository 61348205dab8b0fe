"""Products of matrices along their last axis: what every statistic of a linear map is made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

# Multiplications that take oneDNN longer than preparing a call does, and the columns of a block of a symmetric product.
LARGE = 2**20
BLOCK = 128

# Numbers in a register: products whose columns are no multiple of it take longer, up to NARROW columns several times.
LANES = 16
NARROW = 64


def inner(x: Tensor, y: Tensor) -> Tensor:
    """x y' (m, l) of x (m, c) and y (l, c); with leading axes in common, one product for each of their entries.

    In float32 on a CPU by oneDNN where that was measured to be faster on this machine (see `onednn_gains`); elsewhere
    by torch.matmul.
    """
    if x.ndim == 2:
        return _inner(x, y)
    if not one_by_one(x.shape[-2] * y.shape[-2] * x.shape[-1], x, y):
        return x @ y.mT
    xs, ys = x.flatten(0, -3), y.flatten(0, -3)
    if len(xs) == 1:
        return _inner(xs[0], ys[0]).reshape(*x.shape[:-1], y.shape[-2])
    out = x.new_empty(len(xs), x.shape[-2], y.shape[-2])
    for one, left, right in zip(out, xs, ys, strict=True):
        one.copy_(_inner(left, right))
    return out.unflatten(0, x.shape[:-2])


def one_by_one(multiplications: int, x: Tensor, y: Tensor) -> bool:
    """Whether products of so many multiplications each are taken one after the other, `by_onednn`."""
    return multiplications >= LARGE and _onednn(x, y)


def turned(columns: int, rows: int) -> bool:
    """Whether a product with so many columns and rows is faster the other way round, transposed in memory."""
    return columns % LANES > 0 and rows % LANES == 0


def by_onednn(x: Tensor, y: Tensor, turn: bool) -> Tensor:
    """x y' (m, l) of x (m, c) and y (l, c), where `one_by_one` allows it; transposed in memory, if it is to `turn`."""
    if turn:
        return by_onednn(y, x, False).mT
    # Other strides than contiguous ones lead to a kernel that is slower by orders of magnitude.
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), y.contiguous(), None, "none", [], "")


def moment(x: Tensor) -> Tensor:
    """x x' (..., m, m) of x (..., m, c): where c is large, a symmetric product by blocks, half of which are copied."""
    m, c = x.shape[-2:]
    if m <= BLOCK or c <= BLOCK:
        return inner(x, x)
    if x.ndim > 2:
        return torch.stack([moment(one) for one in x.flatten(0, -3)]).unflatten(0, x.shape[:-2])
    x = x.contiguous()
    out = x.new_empty(m, m)
    for start in range(0, m, BLOCK):
        stop = min(start + BLOCK, m)
        block = _inner(x[start:stop], x[:stop])
        out[start:stop, :stop] = block
        out[:start, start:stop] = block[:, :start].mT
    return out


def add_inner(total: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The total (..., m, l), to which x y' is added in place; where c is small, without writing the product first."""
    if x.ndim == 2 and x.shape[-1] <= BLOCK:
        return total.addmm_(x, y.mT)
    if x.ndim == 3 and len(x) == 1:
        first = x[0]
        add_inner(total[0], first, first if x is y else y[0])
        return total
    return total.add_(moment(x) if x is y else inner(x, y))


def _inner(x: Tensor, y: Tensor) -> Tensor:
    if not one_by_one(x.shape[0] * y.shape[0] * x.shape[1], x, y):
        return x @ y.mT
    # Whoever writes a large product where it stays would have to copy it.
    return by_onednn(x, y, len(y) < NARROW and turned(len(y), len(x)))


@cache
def onednn_gains(threads: int) -> bool:
    """Measure whether oneDNN takes under 0.9 of torch.matmul's time here, once a process and number of threads.

    It takes about 15 ms. On some processors oneDNN multiplies at twice the speed of the library behind torch.matmul, on
    others at 0.65 of it.
    """

    def measured() -> bool:
        x = torch.ones(256, 256)
        library, onednn = [], []
        for _ in range(15):
            library.append(_seconds(lambda: x @ x.mT))
            onednn.append(_seconds(lambda: by_onednn(x, x, False)))
        return min(onednn) < 0.9 * min(library)

    # A thread of its own has none of the caller's modes and transforms, which would count or trace these products.
    with ThreadPoolExecutor(1) as fresh:
        return fresh.submit(measured).result()


def _seconds(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _onednn(x: Tensor, y: Tensor) -> bool:
    return bool(
        x.dtype == y.dtype == torch.float32
        and x.device.type == y.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))
        and onednn_gains(torch.get_num_threads())
    )
