"""What each call of a module saw and returned, noted by forward hooks, and where its examples are."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Layout:
    """Where the examples are in a tensor: along one axis, of size b m if each example has m entries there.

    The m entries of an example follow each other, or, `position_major`, each of the m positions holds all examples.
    `axis` None: the tensor is the same for all examples.
    """

    axis: int | None
    position_major: bool = False
    added: bool = False  # the axis was put in front by the sweep; one example does not have it
    entries: int = 1  # m, in the batch in which the layout was found
    squeezed: int = 0  # the number of axes, where that of a single example is missing: `.squeeze()` has removed it

    def whole(self, shape: torch.Size) -> torch.Size:
        """The shape, with the axis of a single example where it is missing."""
        return torch.Size((1, *shape)) if len(shape) < self.squeezed else shape

    def split(self, tensor: Tensor, b: int, lead: int = 0) -> Tensor:
        """(b, *what one example has), m entries on the axis; after `lead` axes of another kind."""
        if self.axis is None:
            return tensor.expand(b, *tensor.shape)
        if self.added:
            return tensor
        if tensor.ndim - lead < self.squeezed:
            tensor = tensor.unsqueeze(lead)
        axis = self.axis + lead
        m = tensor.shape[axis] // b
        if m == 1 and self.axis == 0:
            return tensor.unsqueeze(axis + 1)
        return tensor.unflatten(axis, (m, b) if self.position_major else (b, m)).movedim(
            axis + self.position_major, lead
        )

    @classmethod
    def between(cls, one: torch.Size, few: torch.Size, b: int) -> Layout | None:
        """From the shapes of the same tensor with one and with b examples; None where they fit no layout."""
        if len(one) != len(few):
            return cls(0, squeezed=len(few)) if few == (b, *one) else None
        axes = [axis for axis, (s, t) in enumerate(zip(one, few, strict=True)) if s != t]
        if any(few[axis] != b * one[axis] for axis in axes):
            return None
        return cls(axes[0], entries=one[axes[0]]) if axes else cls(None)


class LayoutChanged(Exception):
    """A module saw tensors that are not laid out as in the batch for which the plan was made."""

    def __init__(self, host: str):
        super().__init__(host)
        self.host = host


@dataclass
class Call:
    """One call of a module: the leaves of its arguments and, for each leaf of its output, the gradient edge."""

    arguments: list[Any]
    structure: TreeSpec | None  # None: positional tensors only
    outputs: list[GradientEdge | None]
    shapes: list[torch.Size | None]  # of the outputs, as the rest of the model sees them
    returned: list[torch.Size | None]  # the same, as the module returned them
    versions: list[int]

    def argument_shapes(self) -> list[torch.Size | None]:
        """The shapes of its arguments, None for what is no tensor."""
        return _shapes(self.arguments)

    def tensors(self) -> list[int]:
        """Which arguments are tensors."""
        return [j for j, leaf in enumerate(self.arguments) if isinstance(leaf, Tensor)]

    def rebuilt(self, replaced: dict[int, Tensor]) -> tuple[tuple, dict]:
        """Positional and keyword arguments, some tensors replaced."""
        leaves = [replaced.get(j, leaf) for j, leaf in enumerate(self.arguments)]
        return (tuple(leaves), {}) if self.structure is None else tree_unflatten(leaves, self.structure)

    def check_unchanged(self, name: str) -> None:
        """Raise if an argument was changed in place after the call."""
        for j, version in zip(self.tensors(), self.versions, strict=True):
            if self.arguments[j]._version != version:
                raise NotImplementedError(
                    f"The input of layer {name!r} is changed in place after the layer has used it, so its gradients "
                    "can't be computed. Replace the in-place operation (`x += y`, `relu_`) by `x = x + y`."
                )


@dataclass
class Watch:
    """Calls by module name, in the order in which they happened."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    inside: set[str] = field(default_factory=set)  # modules that the model calls under a transform of torch.func
    open: bool = True


@contextmanager
def watch(model: nn.Module, names: Collection[str], b: int, added: Collection[str] = ()) -> Iterator[Watch]:
    """Note every call of the named modules while the body runs.

    Outputs of the modules in `added`, which are the same for all examples, get an axis of b examples in front.
    """
    seen = Watch({name: [] for name in names})
    handles, thread = [], threading.get_ident()
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if isinstance(modules[name], torch.jit.ScriptModule):  # of which nothing is seen; it has no parameters
            continue

        def note(module: nn.Module, args: tuple, kwargs: dict, out: Any, name: str = name) -> Any:
            # Activation checkpointing runs the module again in the backward pass; other threads may run it, too.
            if not seen.open or threading.get_ident() != thread:
                return None
            if torch._C._are_functorch_transforms_active():  # what is seen there has no meaning outside
                seen.inside.add(name)
                return None
            leaves, structure = _flat(args, kwargs)
            leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            versions = [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]
            results, spec = ([out], None) if isinstance(out, Tensor) else tree_flatten(out)
            returned = _shapes(results)
            edges: list[GradientEdge | None] = []
            replaced = False
            for j, result in enumerate(results):
                if not (isinstance(result, Tensor) and result.is_floating_point()):
                    edges.append(None)
                    continue
                if name in added:
                    result = _with_examples(result, b)
                    results[j], replaced = result, True
                if not result.requires_grad:
                    # Nothing in or before the module requires a gradient. The leaf must not be changed in place.
                    leaf = result.detach().requires_grad_()
                    edges.append(get_gradient_edge(leaf))
                    results[j], replaced = leaf.clone(), True
                else:
                    # The edge is taken here, before an in-place activation can move the tensor past it.
                    edges.append(get_gradient_edge(result))
            seen.calls[name].append(Call(leaves, structure, edges, _shapes(results), returned, versions))
            if not replaced:
                return None
            return results[0] if spec is None else tree_unflatten(results, spec)

        handles.append(modules[name].register_forward_hook(note, with_kwargs=True))
    try:
        yield seen
    finally:
        seen.open = False
        for handle in handles:
            handle.remove()


def _flat(args: tuple, kwargs: dict) -> tuple[list[Any], TreeSpec | None]:
    if not kwargs and all(isinstance(argument, Tensor) for argument in args):
        return list(args), None
    return tree_flatten((args, kwargs))


def _shapes(leaves: list[Any]) -> list[torch.Size | None]:
    return [leaf.shape if isinstance(leaf, Tensor) else None for leaf in leaves]


def _with_examples(out: Tensor, b: int) -> Tensor:
    """(1, ...) -> (b, ...), anything else -> (b, *shape): every example has its own copy, so its own gradient."""
    return out.expand(b, *out.shape[1:]) if out.ndim and len(out) == 1 else out.expand(b, *out.shape)


def added_layout(shape: torch.Size) -> Layout:
    """The layout of an output of this shape (as the module returned it) after `_with_examples`."""
    return Layout(0) if len(shape) and shape[0] == 1 else Layout(0, added=True)
