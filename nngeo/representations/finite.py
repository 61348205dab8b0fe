"""Refuse sums with NaN or infinity, before something is computed from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor


def require_finite(by_layer: Mapping[str, Iterable[Tensor]], what: str) -> None:
    """Nothing, if the tensors of all layers are finite.

    Raises:
        ValueError: with the layers whose are not.
    """
    bad = [repr(name) for name, tensors in by_layer.items() if not all(_is_finite(x) for x in tensors)]
    if bad:
        raise ValueError(
            f"The sums of {what} hold NaN or infinity at layer{'s' * (len(bad) > 1)} {', '.join(bad)}: gradients there "
            "are not finite. Look for overflow (large outputs, float16), or a function without derivative (sqrt at 0)."
        )


def _is_finite(x: Tensor) -> bool:
    # The sum is many times faster; it is not finite where an entry is not, and rarely elsewhere.
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())
