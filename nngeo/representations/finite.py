"""Refuse sums with NaN or infinity, before something is computed from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from nngeo.generators.outputs import is_finite


def require_finite(by_layer: Mapping[str, Collection[Tensor]], what: str) -> None:
    """Nothing, if the tensors of all layers are finite.

    Raises:
        ValueError: with the layers whose are not.
    """
    sums = [x.sum() for tensors in by_layer.values() for x in tensors]
    if not sums or is_finite(torch.stack(sums)):
        return
    bad = [repr(name) for name, tensors in by_layer.items() if not all(is_finite(x) for x in tensors)]
    if bad:
        raise ValueError(
            f"The sums of {what} hold NaN or infinity at layer{'s' * (len(bad) > 1)} {', '.join(bad)}: gradients there "
            "are not finite. Look for overflow (large outputs, float16), or a function without derivative (sqrt at 0)."
        )
