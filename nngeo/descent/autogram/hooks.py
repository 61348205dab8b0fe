"""What the modules see in the user's own forward pass, kept by the graph that it builds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves
from torch.utils.hooks import RemovableHandle

from nngeo.generators.watch import Call


class Entry(NamedTuple):
    """At a node of the graph: that its output `number` is leaf `leaf` of what a call of a module returned."""

    module: str
    call: Call
    leaf: int
    number: int


@dataclass(eq=False)
class Watcher:
    """The key under which nodes of the graph hold the entries of one engine.

    Calls belong to the nodes of their outputs, and hold no node themselves: they live as long as the graph does.
    """

    kinds: set[type] = field(default_factory=set)  # of the nodes that may have entries
    paused: int | None = None  # the thread whose calls are not noted

    def install(self, modules: Iterable[tuple[str, nn.Module]]) -> list[RemovableHandle]:
        """Hooks that note every call of these modules."""
        return [module.register_forward_hook(Hook(self, name), with_kwargs=True) for name, module in modules]

    def entries(self, node: Any) -> Sequence[Entry]:
        """Those of a node of the graph."""
        return node.metadata.get(self, ()) if type(node) in self.kinds else ()

    def forget(self, nodes: Iterable[Any]) -> None:
        """Drop the calls at these nodes."""
        for node in nodes:
            if type(node) in self.kinds:
                node.metadata.pop(self, None)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Inside, calls by this thread are not noted."""
        self.paused = threading.get_ident()
        try:
            yield
        finally:
            self.paused = None


class Hook:
    """A forward hook. Copies and pickles of a hooked model carry one that does nothing."""

    def __init__(self, watcher: Watcher, name: str):
        self.watcher, self.name = watcher, name

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        watcher = self.watcher
        if watcher.paused == threading.get_ident() or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        results = [out] if isinstance(out, Tensor) else tree_leaves(out)
        call: Call | None = None
        for leaf, result in enumerate(results):
            if isinstance(result, Tensor) and result.grad_fn is not None:
                call = call or _call(args, kwargs, results)
                whole = _whole(result)
                node: Any = whole.grad_fn
                watcher.kinds.add(type(node))
                node.metadata.setdefault(watcher, []).append(Entry(self.name, call, leaf, whole.output_nr))

    def __reduce__(self) -> tuple[Callable[[], Any], tuple]:
        return _inert, ()


class Unknown:
    """Stands for an argument that is neither a tensor nor a plain value, and might hold parts of the graph."""


_ONE_TENSOR = tree_flatten(((0,), {}))[1]
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)


def _call(args: tuple, kwargs: dict[str, Any], results: list[Any]) -> Call:
    leaves, structure = (args, _ONE_TENSOR) if len(args) == 1 and not kwargs else tree_flatten((args, kwargs))
    if structure is _ONE_TENSOR and not isinstance(args[0], Tensor):
        leaves, structure = tree_flatten((args, kwargs))
    kept = [_kept(leaf) for leaf in leaves]
    shapes = [result.shape if isinstance(result, Tensor) else None for result in results]
    return Call(kept, structure, [], shapes, shapes, [leaf._version for leaf in kept if isinstance(leaf, Tensor)])


def _kept(leaf: Any) -> Any:
    # A tensor with its graph, or a cache that holds such tensors, could be above the node that holds the call.
    return leaf.detach() if isinstance(leaf, Tensor) else leaf if isinstance(leaf, _PLAIN) else Unknown()


def _whole(result: Tensor) -> Tensor:
    """The tensor that the result is a reshape of, as in a Linear on sequences.

    What follows may overwrite the result in place: autograd then gives a view, but not its base, another history.
    """
    base = result._base if result._is_view() else None
    if base is None or base.grad_fn is None or base.numel() != result.numel():
        return result
    return base if base.is_contiguous() and result.is_contiguous() else result


def _nothing(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
    """The hook of a copy."""


def _inert() -> Any:
    return _nothing
