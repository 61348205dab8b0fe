"""The derivative that a class defines by its own `jacobian`, in place of autograd's, while products are computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Function

Method = TypeVar("Method", bound=Callable[..., Any])

_BY_AUTOGRAD: set[Any] = set()  # implementations of `jacobian` that compute what autograd does
_CHANGED: weakref.WeakKeyDictionary[nn.Module, _Own] = weakref.WeakKeyDictionary()  # while products are computed
_CLASSES: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()


class HasJacobian:
    """Modules with a method `jacobian(x, val, wrt)`, which is their derivative."""

    jacobian: Any


def by_autograd(method: Method) -> Method:
    """The method, noted as one that adds nothing to what autograd knows."""
    _BY_AUTOGRAD.add(method)
    return method


@contextmanager
def own_derivatives(model: nn.Module, *, root: bool = True) -> Iterator[None]:
    """Inside, every module of the model whose class defines `jacobian` is differentiated by it, wherever it stands.

    Its `forward` need not be differentiable. `root=False` leaves out the model itself, whose `jacobian` may be what is
    being computed. Modules change their class for the time, so that no rule made for the parent's class serves them.
    """
    changed = [
        _Own(module, type(module), [(p, p.requires_grad) for p in module.parameters()])
        for module in model.modules()
        if has_own_jacobian(type(module)) and (root or module is not model)
    ]
    try:
        for own in changed:
            own.module.__class__ = _differentiated(own.kind)
            _CHANGED[own.module] = own
        yield
    finally:
        for own in changed:
            own.module.__class__ = own.kind
            _CHANGED.pop(own.module, None)


def has_own_jacobian(kind: type) -> bool:
    """Whether a class defines the Jacobian itself."""
    return issubclass(kind, HasJacobian) and kind.jacobian not in _BY_AUTOGRAD and "_nngeo_plain" not in vars(kind)


def _differentiated(kind: type) -> type:
    """The class with a `forward` that is differentiated by `jacobian`."""
    if kind not in _CLASSES:
        names = {"forward": _forward, "_nngeo_plain": True, "__module__": kind.__module__}
        _CLASSES[kind] = type(kind.__name__, (kind,), names)
    return _CLASSES[kind]


def _forward(self: nn.Module, x: Tensor) -> Tensor:
    return _Value.apply(_CHANGED[self], x, *self.parameters())


@dataclass(frozen=True, eq=False)
class _Own:
    """A module as it is outside of products, with what it computes for other tensors in place of its parameters."""

    module: Any
    kind: Any
    parameters: list[tuple[nn.Parameter, bool]]  # and whether they require gradients

    def value(self, x: Tensor, *parameters: Tensor) -> Tensor:
        with self._holding(parameters):
            return self.kind.forward(self.module, x)

    def jacobian(self, wrt: str, x: Tensor, value: Tensor, *parameters: Tensor) -> Tensor:
        """(b, o, n), with a column for each entry of `module.parameters()` for "weight"."""
        with self._holding(parameters):
            found = self.kind.jacobian(self.module, x, value, wrt)
        n = x[0].numel() if wrt == "input" else sum(p.numel() for p in parameters)
        b, o = len(x), value[0].numel()
        if found is None:
            return x.new_zeros(b, o, n)
        if wrt == "input" and found.shape == (b, n) and n == o:
            return torch.diag_embed(found)
        if found.shape != (b, o, n):
            raise ValueError(
                f"{self.kind.__name__}.jacobian(x, val, wrt={wrt!r}) returned {tuple(found.shape)}; for x "
                f"{tuple(x.shape)} and outputs {tuple(value.shape)} it should be {(b, o, n)}: example, output, and "
                f"{'entry of the input' if wrt == 'input' else 'entry of parameters(), frozen ones too'}."
            )
        return found

    @contextmanager
    def _holding(self, tensors: tuple[Tensor, ...]) -> Iterator[None]:
        """The module is as it was, with these tensors."""
        module, kind = self.module, type(self.module)
        index = {id(p): j for j, p in enumerate(module.parameters())}
        dicts = [child._parameters for child in module.modules()]
        places = [(own, name, p) for own in dicts for name, p in own.items() if p is not None]
        flags = [p.requires_grad for p, _ in self.parameters]
        try:
            for own, name, p in places:
                j = index[id(p)]
                # The parameter itself where it can be, because `jacobian` may ask for products of a child.
                own[name] = self.parameters[j][0] if _same(tensors[j], self.parameters[j][0]) else tensors[j]
            _set_flags(self.parameters)
            module.__class__ = self.kind
            yield
        finally:
            module.__class__ = kind
            for own, name, p in places:
                own[name] = p
            _set_flags((p, flag) for (p, _), flag in zip(self.parameters, flags, strict=True))


def _set_flags(parameters: Iterable[tuple[nn.Parameter, bool]]) -> None:
    for p, flag in parameters:
        if p.requires_grad != flag:  # torch.func allows no call that changes nothing, either
            p.requires_grad_(flag)


class _Value(Function):
    """The output of a module, whose derivatives are products with its own Jacobian."""

    @staticmethod
    def forward(own: _Own, x: Tensor, *parameters: Tensor) -> Tensor:
        value = own.value(x, *parameters)
        return value.clone() if value is x else value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.own = inputs[0]
        ctx.save_for_backward(*inputs[1:], output)
        ctx.save_for_forward(*inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, *parameters, value = ctx.saved_tensors
        flat = g.reshape(len(x), 1, -1)
        found: list[Tensor | None] = [None] * (2 + len(parameters))
        if ctx.needs_input_grad[1]:
            found[1] = (flat @ _Jacobian.apply(ctx.own, "input", x, value, *parameters)).reshape(x.shape)
        if any(ctx.needs_input_grad[2:]):
            total = (flat @ _Jacobian.apply(ctx.own, "weight", x, value, *parameters)).sum((0, 1))
            pieces = total.split([p.numel() for p in parameters])
            found[2:] = [piece.reshape(p.shape) for piece, p in zip(pieces, parameters, strict=True)]
        return tuple(found)

    @staticmethod
    def jvp(ctx: Any, _: None, along: Tensor | None, *tangents: Tensor | None) -> Tensor:
        x, *parameters, value = ctx.saved_tensors
        total = torch.zeros_like(value).reshape(len(x), -1, 1)
        if along is not None:
            total = total + _Jacobian.apply(ctx.own, "input", x, value, *parameters) @ along.reshape(len(x), -1, 1)
        if any(t is not None for t in tangents):
            v = torch.cat([t.reshape(-1) for t in _or_zeros(tangents, parameters)])
            total = total + _Jacobian.apply(ctx.own, "weight", x, value, *parameters) @ v[:, None]
        return total.reshape(value.shape)

    @staticmethod
    def vmap(info: Any, dims: tuple, own: _Own, x: Tensor, *parameters: Tensor) -> tuple[Tensor, int]:
        return _fold(partial(_Value.apply, own), info.batch_size, (x,), parameters, dims[1:]), 0


class _Jacobian(Function):
    """A module's own Jacobian, whose code sees plain tensors (b, ...) whatever torch.func is doing.

    Its derivatives are those of that code.
    """

    @staticmethod
    def forward(own: _Own, wrt: str, *tensors: Tensor) -> Tensor:
        return own.jacobian(wrt, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.run = partial(inputs[0].jacobian, inputs[1])
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return None, None, *torch.func.vjp(ctx.run, *ctx.saved_tensors)[1](g)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> Tensor:
        return torch.func.jvp(ctx.run, ctx.saved_tensors, tuple(_or_zeros(tangents, ctx.saved_tensors)))[1]

    @staticmethod
    def vmap(info: Any, dims: tuple, own: _Own, wrt: str, *tensors: Tensor) -> tuple[Tensor, int]:
        run = partial(_Jacobian.apply, own, wrt)
        return _fold(run, info.batch_size, tensors[:2], tensors[2:], dims[2:]), 0


def _fold(
    run: Callable[..., Tensor], size: int, data: tuple[Tensor, ...], parameters: tuple[Tensor, ...], dims: tuple
) -> Tensor:
    """(size, b, ...): the axis of a vmap as further examples; one by one where the parameters have it, too."""
    front = [
        t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip((*data, *parameters), dims, strict=True)
    ]
    if all(dim is None for dim in dims[len(data) :]):
        b = front[0].shape[1]
        return run(*(t.flatten(0, 1) for t in front[: len(data)]), *parameters).unflatten(0, (size, b))
    return torch.stack([run(*(t[j] for t in front)) for j in range(size)])


def _same(tensor: Tensor, parameter: nn.Parameter) -> bool:
    """Whether a tensor is a parameter, or a view of all of it; False for those that torch.func has wrapped."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    same_place = tensor.device == parameter.device and tensor.data_ptr() == parameter.data_ptr()
    return same_place and tensor.shape == parameter.shape and tensor.stride() == parameter.stride()


def _or_zeros(tangents: Any, like: Any) -> Iterator[Tensor]:
    return (torch.zeros_like(x) if t is None else t for t, x in zip(tangents, like, strict=True))
