"""Normalisations by their definitions, for derivatives of the third order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nngeo.layers import rewrites


class PlainNorms(TorchFunctionMode):
    """Inside, layer and instance normalisation are sums and products, which autograd differentiates at will.

    The second derivative that torch has for them holds their means and scales for constants, so that its own
    derivative is silently wrong (torch 2.13). What is differentiated after a double backward needs this: the gradient
    of a curve's energy, of a Laplacian, of a volume.

    >>> x = torch.randn(2, 4)
    >>> with PlainNorms():
    ...     y = torch.nn.functional.layer_norm(x, (4,))
    >>> torch.allclose(y, torch.nn.functional.layer_norm(x, (4,)), atol=1e-6)
    True
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return _PLAIN.get(func, func)(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
    **__: Any,
) -> Tensor:
    return rewrites.layer_norm(input, normalized_shape, weight, bias, eps)[0]


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return rewrites.instance_norm(input, weight, bias, eps)


_PLAIN: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
    torch.instance_norm: lambda x, w, b, m, v, use, momentum, eps, *_: _instance_norm(
        x, m, v, w, b, use, momentum, eps
    ),
}
