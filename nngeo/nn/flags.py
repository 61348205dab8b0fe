"""NNJ's flags in the words of `nngeo.products`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nngeo.linalg.arguments import flag
from nngeo.products import Diagonal


def is_weight(wrt: Any) -> bool:
    """Whether the Jacobian by the parameters is meant."""
    if not isinstance(wrt, str | tuple | list):
        raise TypeError(f'`wrt` is {wrt!r}; it should be "input", "weight", or the name of an argument, or several.')
    return isinstance(wrt, str) and wrt in ("weight", "weights")


def options_of(to_diag: bool, diag_backprop: bool, matrix: Any, from_diag: bool) -> dict[str, Any]:
    """`result` and `method`.

    Raises:
        ValueError: diagonals are to be kept between layers, but a full matrix is given or asked for.
    """
    for name, value in {"from_diag": from_diag, "to_diag": to_diag, "diag_backprop": diag_backprop}.items():
        flag(name, value)
    if not diag_backprop:
        return {"result": "diag" if to_diag else "dense"}
    if not to_diag:
        raise ValueError("`diag_backprop=True` knows only diagonals: ask for one by `to_diag=True`.")
    if isinstance(matrix, Tensor | list | tuple) and not from_diag:
        raise ValueError(
            "`diag_backprop=True` starts from a diagonal: pass one with `from_diag=True`, or None for the identity."
        )
    return {"result": "diag", "method": "diag_backprop"}


def plain(operand: Any, options: dict[str, Any]) -> Any:
    """Tensors, in lists too, without the graph that a residual `val - target` brings along, unless one is wanted."""
    if options.get("create_graph"):
        return operand
    if isinstance(operand, list | tuple):
        return [plain(part, options) for part in operand]
    return operand.detach() if isinstance(operand, Tensor) else operand


def as_metric(matrix: Any, from_diag: bool) -> Any:
    """A metric of `nngeo.products`, from a tensor with an axis of examples; None and metrics stay as they are."""
    if not isinstance(matrix, Tensor):
        return matrix
    if matrix.ndim != 3 - from_diag:
        raise ValueError(
            f"`matrix` has shape {tuple(matrix.shape)}; it should be "
            + ("(b, n), diagonals of b examples" if from_diag else "(b, n, n), or (b, n) with `from_diag=True`")
            + ". For one matrix that all examples share, pass a metric of nngeo.products."
        )
    return Diagonal(matrix) if from_diag else matrix
