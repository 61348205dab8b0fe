"""Mappings of any kind within a batch, as BatchEncoding or UserDict: dicts inside, and what they came as outside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from torch.utils._pytree import SUPPORTED_NODES, register_pytree_node, tree_map


class Keyed(dict[Any, Any]):
    """The entries of a mapping as a dict, whose leaves torch's trees see; `kind` is the type that it came as."""

    kind: type

    def __init__(self, kind: type, entries: Mapping[Any, Any]):
        super().__init__(entries)
        self.kind = kind

    def given(self) -> Any:
        """A mapping of the type that came, with the entries of this one."""
        return self.kind({key: as_given(value) for key, value in self.items()})


def as_dicts(content: Any) -> Any:
    """The same, with every mapping that torch's trees take for a leaf as a dict."""

    def entries(leaf: Any) -> Any:
        if not isinstance(leaf, Mapping):
            return leaf
        kind = type(leaf) if _holds_entries(type(leaf)) else dict
        return Keyed(kind, {key: as_dicts(value) for key, value in leaf.items()})

    return tree_map(entries, content)


def as_given(content: Any) -> Any:
    """The inverse of `as_dicts`: what the user's functions are called with."""
    return tree_map(
        lambda leaf: leaf.given() if isinstance(leaf, Keyed) else leaf,
        content,
        is_leaf=lambda node: isinstance(node, Keyed),
    )


@cache
def _holds_entries(kind: type) -> bool:
    """Whether a mapping of this type can be made of a dict; else a function is called with a dict."""
    try:
        return dict(kind({"key": 0})) == {"key": 0}
    except Exception:  # a constructor raises anything at all
        return False


def _flatten(mapping: Keyed) -> tuple[list[Any], tuple[type, tuple]]:
    return list(mapping.values()), (mapping.kind, tuple(mapping))


def _unflatten(values: Iterable[Any], form: tuple[type, tuple]) -> Keyed:
    kind, keys = form
    return Keyed(kind, dict(zip(keys, values, strict=True)))


if Keyed not in SUPPORTED_NODES:
    register_pytree_node(Keyed, _flatten, _unflatten)
