"""Tensors that carry their derivatives along some columns through whatever operations a model consists of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.overrides import enable_reentrant_dispatch
from torch.utils._pytree import tree_flatten, tree_unflatten

from nngeo.layers.replace import replaced
from nngeo.layers.rewrites import REWRITES
from nngeo.products.operations import Untracked, rule_of
from nngeo.products.secondorder import Call

aten = torch.ops.aten
_no_dispatch = torch._C._DisableTorchDispatch


class Tracked(Tensor):
    """A tensor with the tangents (r + 1, *shape) of `Call`, or None for a constant; it has no data of its own."""

    value: Tensor
    tangents: Tensor | None
    tracker: Tracker
    shared: bool  # whether another one is, or was, a view of the same data

    @staticmethod
    def __new__(cls, tracker: Tracker, value: Tensor, tangents: Tensor | None, shared: bool = False) -> Tracked:
        self = Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=value.device
        )
        self.tracker, self.value, self.shared = tracker, value, shared
        self.tangents = None if tangents is None else laid_out(tangents, value)
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Tracked({tuple(self.shape)}, {'constant' if self.tangents is None else 'varies'})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves = tree_flatten((args, kwargs))[0]
        return next(leaf for leaf in leaves if isinstance(leaf, Tracked)).tracker.carry(func, args, kwargs or {})


class Tracker:
    """Carries tangents through operations on `Tracked` tensors; raises `Untracked` where it can't.

    It works below autograd, on the operations that torch's composite ones consist of. What autograd would differentiate
    in another way than operation by operation (custom functions, torch.no_grad) is refused; detached tensors are
    constants, as for autograd.

    Args:
        signs: (r,), of the columns' terms in the trace; None: all are 1.
        create_graph: whether values and tangents are differentiable.
    """

    def __init__(self, signs: Tensor | None, create_graph: bool):
        self.signs, self.create_graph = signs, create_graph

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Parameters of the model are constants of this pass, so that autograd sees nothing but values and tangents."""
        names = {id(p): name for name, p in model.named_parameters()}
        constants = {name: Tracked(self, model.get_parameter(name), None) for name in names.values()}
        flat = [(m, vars(m)["_flat_weights"]) for m in model.modules() if isinstance(m, nn.RNNBase)]
        try:
            # A recurrent layer keeps a list of its parameters, which it runs on.
            for module, weights in flat:
                vars(module)["_flat_weights"] = [constants[names[id(w)]] if id(w) in names else w for w in weights]
            # Hooks of the model on what autograd saves would be met here, and run the model from within an operation.
            why = "activation checkpointing, or other hooks on saved tensors"
            with torch.enable_grad(), disable_saved_tensors_hooks(why), replaced(model, constants):
                yield
        finally:
            for module, weights in flat:
                vars(module)["_flat_weights"] = weights

    def carry(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The results of an operation."""
        leaves, spec = tree_flatten((args, kwargs))
        varying = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tracked) and leaf.tangents is not None]
        name = func.overloadpacket.__name__
        if varying and not (name == "detach" or _returns_no_tensor(func)):
            self._check(func, [leaves[i] for i in varying])
            if name in REWRITES:
                with enable_reentrant_dispatch(), torch.enable_grad():
                    return REWRITES[name](*args, **kwargs)
        # Above autograd again, so that what happens here is recorded; on plain tensors, of which modes need not know.
        with enable_reentrant_dispatch(), _no_dispatch(), torch.set_grad_enabled(self.create_graph):
            if _written(func):
                return self._write(func, name, leaves, spec, varying)
            if not varying or name == "detach" or _returns_no_tensor(func):
                args, kwargs = tree_unflatten([_value(leaf) for leaf in leaves], spec)
                results, tangents = func(*args, **kwargs), None
                results = results.detach() if name == "detach" else results
            else:
                results, tangents = self._derivatives(func, name, leaves, spec, varying)
            views = any(r.alias_info is not None for r in func._schema.returns)
            if views:
                for leaf in leaves:
                    if isinstance(leaf, Tracked):
                        leaf.shared = True
            return self._tracked(results, tangents, views)

    def _check(self, func: Any, varying: Sequence[Tracked]) -> None:
        if not torch.is_grad_enabled():
            raise Untracked(f"{func} runs without gradients, in torch.no_grad() or a custom autograd.Function")
        if any(x.requires_grad for x in varying):
            raise Untracked(
                f"{func} runs on what the model itself differentiates, or on parameters that are not its own"
            )
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Untracked(f"{func} draws random numbers")

    def _derivatives(self, func: Any, name: str, leaves: list, spec: Any, varying: list[int]) -> tuple[Any, Any]:
        plain = [_value(leaf) for leaf in leaves]

        def function(*tensors: Tensor) -> Any:
            filled = list(plain)
            for i, tensor in zip(varying, tensors, strict=True):
                filled[i] = tensor
            args, kwargs = tree_unflatten(filled, spec)
            return func(*args, **kwargs)

        values, tangents = (tuple(getattr(leaves[i], what) for i in varying) for what in ("value", "tangents"))
        given = tree_unflatten(plain, spec)
        call = Call(function, tuple(varying), values, tangents, self.signs, self.create_graph, *given)
        return rule_of(func, name, call, any(map(_is_complex, plain)))(call)

    def _write(self, func: Any, name: str, leaves: list, spec: Any, varying: list[int]) -> Any:
        """An operation that writes to its first argument, as the one that does not, and a replacement."""
        target = leaves[0]
        if not varying:
            args, kwargs = tree_unflatten([_value(leaf) for leaf in leaves], spec)
            results = func(*args, **kwargs)
            return target if name.endswith("_") else self._tracked(results, None, shared=True)
        if torch.Tag.inplace_view in func.tags and isinstance(target, Tracked):
            return self._turn(func, name, leaves, spec, varying)
        functional = getattr(getattr(aten, name.rstrip("_"), None), func._overloadname, None)
        if not name.endswith("_") or not isinstance(target, Tracked) or (functional is None and name != "copy_"):
            raise Untracked(f"{func} writes into {target if isinstance(target, Tracked) else 'a tensor'}")
        if name in ("copy_", "fill_", "zero_"):
            source = leaves[1] if name == "copy_" else 0.0 if name == "zero_" else _value(leaves[1])
            tangents = source.tangents if isinstance(source, Tracked) else None
            results = torch.as_tensor(_value(source), dtype=target.dtype, device=target.device).expand(target.shape)
            if tangents is not None:
                lead = [1] * (target.ndim - tangents.ndim + 1)
                tangents = tangents.reshape(len(tangents), *lead, *tangents.shape[1:]).expand(-1, *target.shape)
        else:
            if target.shared and self.create_graph:  # the graph must not keep what is overwritten below
                kept = None if target.tangents is None else target.tangents.clone()
                leaves = [Tracked(self, target.value.clone(), kept), *leaves[1:]]
            results, tangents = self._derivatives(functional, name.rstrip("_"), leaves, spec, varying)
        if results.dtype != target.dtype or results.shape != target.shape:
            raise Untracked(f"{func} changes dtype or shape in place")
        if not target.shared:
            target.value = results.clone()
            target.tangents = None if tangents is None else laid_out(tangents.clone(), target.value)
        elif target.tangents is None:
            raise Untracked(f"{func} writes what varies into a view of a constant")
        else:
            target.value.copy_(results)
            target.tangents.copy_(target.tangents.new_zeros(()) if tangents is None else tangents)
        return target

    def _turn(self, func: Any, name: str, leaves: list, spec: Any, varying: list[int]) -> Tracked:
        """A tensor that becomes a view of itself."""
        target = leaves[0]
        packet = getattr(aten, name.rstrip("_"))
        functional = getattr(packet, func._overloadname, None) or packet.int  # that of transpose_ has another name
        target.value, target.tangents = self._derivatives(functional, name.rstrip("_"), leaves, spec, varying)
        args, kwargs = tree_unflatten(leaves, spec)
        with _no_dispatch():  # shape and strides of the tensor itself
            func(*args, **kwargs)
        return target

    def _tracked(self, results: Any, tangents: Any, shared: bool) -> Any:
        """Real and complex results, each with its tangents; the others as they are."""
        values, spec = tree_flatten(results)
        found = [None] * len(values) if tangents is None else list(_leaves(tangents))

        def one(v: Any, t: Tensor | None) -> Any:
            if not (isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex())):
                return v
            return Tracked(self, v, None if t is None else t.to(v.dtype), shared)

        return tree_unflatten([one(v, t) for v, t in zip(values, found, strict=True)], spec)


def laid_out(tangents: Tensor, value: Tensor) -> Tensor:
    """Tangents with the strides of the value behind their first axis, so that its views are views of theirs, too."""
    pairs = zip(value.shape, value.stride(), tangents.stride()[1:], strict=True)
    if all(n == 1 or v == t for n, v, t in pairs):
        return tangents
    order = sorted(range(value.ndim), key=value.stride, reverse=True)
    back = [order.index(d) + 1 for d in range(value.ndim)]
    return tangents.permute(0, *(d + 1 for d in order)).contiguous().permute(0, *back)


def _is_complex(leaf: Any) -> bool:
    return leaf.is_complex() if isinstance(leaf, Tensor) else isinstance(leaf, complex)


def _value(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, Tracked) else leaf


def _leaves(tangents: Any) -> list:
    return [tangents] if isinstance(tangents, Tensor) else list(tangents)


def _written(func: Any) -> bool:
    return any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)


def _returns_no_tensor(func: Any) -> bool:
    """Whether only numbers come back, which are constants for autograd, too."""
    return not any("Tensor" in str(r.type) for r in func._schema.returns)
