"""Linear maps and rectifiers whose derivatives cost what they need, in recording and in being differentiated again.

torch differentiates them well once. Beyond that it multiplies a weight by the zero tangent of the data, records a graph
of tangents that nobody asks for, keeps every tangent as long as the tensor it belongs to, and runs four convolutions
where the derivative of a backward pass by its cotangent takes two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from nngeo.generators.maps import Affine, Convolution, Linear, Norm, Part


class Lean(TorchFunctionMode):
    """Inside, models use the functions below.

    Args:
        dual: whether tensors may be dual numbers. Else the graph is going to be differentiated by its cotangent, inside
            of `transposing`.
    """

    def __init__(self, dual: bool):
        super().__init__()
        self.dual, self.transposed = dual, False
        self._readers = DUAL if dual else REVERSE

    @contextmanager
    def transposing(self) -> Iterator[None]:
        """Inside, what a backward pass records can be differentiated by its cotangents, and by nothing else."""
        self.transposed = True
        try:
            yield
        finally:
            self.transposed = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if (read := self._readers.get(func)) is not None and (found := read(*args, **kwargs)):
            function, *inputs = found
            with torch._C.DisableTorchFunction():  # which would call every mode for every operation in there
                if _plain(inputs) and (self.dual or not _dual_numbers()):
                    return function.apply(self, *inputs)
        return func(*args, **kwargs)


def _plain(inputs: list[Any]) -> bool:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    return (
        all(type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided for x in tensors)
        and tensors[0].is_floating_point()
        and all(x.dtype == tensors[0].dtype for x in tensors)
        and not torch._C._are_functorch_transforms_active()
        # Checkpointing: what is run again in a backward pass has to save the same, and is run without this mode.
        and not _saved_elsewhere()
    )


def _dual_numbers() -> bool:
    """Whether tensors may be dual numbers: here, those that the model makes itself."""
    return forward_ad._current_level >= 0


def _saved_elsewhere() -> bool:
    """Whether hooks save what graphs keep: torch refuses to forbid them then; before 2.8 it tells in no other way."""
    try:
        with disable_saved_tensors_hooks("none are there"):
            return False
    except RuntimeError:
        return True


class _AffineFunction(torch.autograd.Function):
    """B(x, w) + b, B being linear in w and affine in x."""

    @staticmethod
    def forward(ctx: Any, mode: Lean, by: Affine, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.mode, ctx.by = mode, by
        if mode.dual:
            # What the graph keeps would keep its tangent.
            x, w = x.detach(), w.detach()
            ctx.now = x, w
        ctx.save_for_backward(x, w)
        return by(x, w, b)

    @staticmethod
    def jvp(ctx: Any, mode: None, by: None, x: Tensor | None, w: Tensor | None, b: Tensor | None) -> Tensor | None:
        with torch.no_grad():
            found = ctx.by.push(*ctx.now, x, w, b)
        ctx.now = None
        return found

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 5
        (x, w), needed = ctx.saved_tensors, tuple(ctx.needs_input_grad[2:])
        if ctx.mode.transposed and torch.is_grad_enabled():
            return (None, None, *_Adjoint.apply(ctx.by, needed, g, x.detach(), w.detach()))
        if ctx.mode.dual and torch.is_grad_enabled():
            raise NotImplementedError("A model that differentiates inside is not run by forward AD.")
        return (None, None, *ctx.by.pull(g, x, w, needed))


class _Adjoint(torch.autograd.Function):
    """The gradients by x, w and b, as a linear function of the cotangent."""

    @staticmethod
    def forward(ctx: Any, by: Affine, needed: tuple[bool, ...], g: Tensor, x: Tensor, w: Tensor) -> tuple[Part, ...]:
        ctx.set_materialize_grads(False)
        ctx.by = by
        ctx.save_for_backward(x, w)
        return by.pull(g, x, w, needed)

    @staticmethod
    def backward(ctx: Any, *tangents: Part) -> tuple[Part, ...]:
        return None, None, ctx.by.push(*ctx.saved_tensors, *tangents), None, None


class _Rectifier(torch.autograd.Function):
    """max(x, 0), of dual numbers."""

    @staticmethod
    def forward(ctx: Any, mode: Lean, x: Tensor) -> Tensor:
        y = torch.relu(x)
        ctx.now = y.detach()
        ctx.save_for_backward(ctx.now)
        return y

    @staticmethod
    def jvp(ctx: Any, mode: None, x: Tensor) -> Tensor:
        with torch.no_grad():
            found = torch.ops.aten.threshold_backward(x, ctx.now, 0)
        ctx.now = None
        return found

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, torch.ops.aten.threshold_backward(g, *ctx.saved_tensors, 0)


# Elements up to which a tangent may be kept: torch's own rectifier takes less time.
SMALL = 2**16
Reader = Callable[..., tuple[Any, ...] | None]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, ...] | None:
    return (_AffineFunction, Linear(), input, weight, bias) if weight.ndim == 2 and input.ndim > 1 else None


def _convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> tuple[Any, ...] | None:  # fmt: skip
    if isinstance(padding, str) or input.ndim != weight.ndim:
        return None
    n = weight.ndim - 2

    def spread(s: Any) -> list[int]:
        return [s] * n if isinstance(s, int) else list(s) * (n // len(s))

    by = Convolution(spread(stride), spread(padding), spread(dilation), groups)
    return _AffineFunction, by, input, weight, bias


def _norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> tuple[Any, ...] | None:  # fmt: skip
    if training or running_mean is None or running_var is None or weight is None:
        return None
    return _AffineFunction, Norm(running_mean, running_var, eps), input, weight, bias


def _relu(input: Tensor, inplace: bool = False) -> tuple[Any, ...] | None:
    return None if inplace or input.numel() < SMALL else (_Rectifier, input)


REVERSE: dict[Any, Reader] = {
    F.linear: _linear,
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
}
DUAL: dict[Any, Reader] = REVERSE | {F.batch_norm: _norm, F.relu: _relu, torch.relu: _relu, Tensor.relu: _relu}
