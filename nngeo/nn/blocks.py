"""Weight metrics of containers: lists of one block for each child that has weights, nested as the containers are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Union

import torch
from torch import Tensor, nn

from nngeo import products
from nngeo.layers.collection import LayerCollection
from nngeo.products import BlockDiagonal, Diagonal

Blocks = Union[Tensor, "list[Blocks]"]
Tree = Union[LayerCollection, "list[Tree]"]  # the parameters of one block, or the tree of each child


class Branch:
    """Containers that are no nn.Sequential, but hold the children of `_F`."""


def branches(model: nn.Module) -> dict[str, nn.Module] | None:
    """{name: child} of a container, where each child is a block or a container; None for any other module."""
    if isinstance(model, nn.Sequential):
        return {name: child for name, child in model._modules.items() if child is not None}
    if isinstance(model, Branch):
        inner = {f"_F.{name}": child for name, child in model.get_submodule("_F").named_children()}
        return inner | {name: child for name, child in model.named_children() if name != "_F"}
    return None


def pulled_blocks(model: nn.Module, x: Any, metric: Any, options: dict[str, Any]) -> Blocks:
    """The diagonal blocks (b, p, p) of J' M J for the children of a container.

    A child of several layers has one block, with its cross-layer parts.
    """
    tree, layers, options = _tree_of(model, options)
    found: dict[str, Tensor] = {}
    if single := [layers[next(iter(leaf))] for leaf in _leaves(tree) if len(leaf) == 1]:
        several = options | {"result": "blocks", "layer_collection": LayerCollection(single)}
        found.update(products.jTmjp(model, x, metric, "weight", **several))

    def block(leaf: LayerCollection) -> Tensor:
        if len(leaf) == 1:
            return found[next(iter(leaf))]
        return products.jTmjp(model, x, metric, "weight", **(options | {"layer_collection": leaf}))

    return _map(block, tree)


def pushed_blocks(model: nn.Module, x: Any, blocks: Any, wrt: str, from_diag: bool, options: dict[str, Any]) -> Tensor:
    """J M J' for the block-diagonal M of a list as `pulled_blocks` returns it, or of diagonals (b, p).

    Without the axis b, all examples share a block.
    """
    if wrt not in ("weight", "weights"):
        raise ValueError(f"A list of blocks is a metric on weights; it can't be one for wrt={wrt!r}.")
    tree, layers, options = _tree_of(model, options)
    pairs = list(_paired(tree if isinstance(tree, list) else [tree], blocks, from_diag))
    if from_diag:
        b = max(len(d) for _, d in pairs)
        by_layer: dict[str, Tensor] = {}
        for leaf, d in pairs:
            by_layer.update(leaf.split(d.expand(b, -1)))
        d = layers.join(by_layer)
        metric = Diagonal(d if b > 1 else d[0])
        return products.jmjTp(model, x, metric, wrt, **(options | {"layer_collection": layers}))
    if (method := options.get("method", "exact")) != "exact":
        raise ValueError(f"method={method!r} does not take a list of blocks: pass a metric of nngeo.products.")
    parts = []
    pairs = [(leaf, block if len(block) > 1 else block[0]) for leaf, block in pairs]
    if single := {next(iter(leaf)): block for leaf, block in pairs if len(leaf) == 1}:
        own = LayerCollection([layers[name] for name in single])
        parts.append(products.jmjTp(model, x, BlockDiagonal(single), wrt, **(options | {"layer_collection": own})))
    for leaf, block in pairs:
        if len(leaf) > 1:
            parts.append(products.jmjTp(model, x, block, wrt, **(options | {"layer_collection": leaf})))
    return torch.stack(parts).sum(0)


def _tree_of(model: nn.Module, options: dict[str, Any]) -> tuple[Tree, LayerCollection, dict[str, Any]]:
    layers = options.get("layer_collection") or LayerCollection.from_model(model)
    tree = _tree(model, "", layers)
    if tree is None:
        raise ValueError("None of the container's children has a parameter in `layer_collection`.")
    return tree, layers, {name: value for name, value in options.items() if name != "layer_collection"}


def _tree(module: nn.Module, prefix: str, layers: LayerCollection) -> Tree | None:
    children = branches(module)
    if children is None:
        names = [name for name in layers if name == prefix or name.startswith(f"{prefix}." if prefix else "")]
        return LayerCollection([layers[name] for name in names]) if names else None
    own = [LayerCollection([layers[prefix]])] if prefix in layers else []
    inner = [_tree(child, f"{prefix}.{name}" if prefix else name, layers) for name, child in children.items()]
    return [*own, *(tree for tree in inner if tree is not None)] or None


def _leaves(tree: Tree) -> Iterator[LayerCollection]:
    if isinstance(tree, LayerCollection):
        yield tree
    else:
        for branch in tree:
            yield from _leaves(branch)


def _map(function: Callable[[LayerCollection], Tensor], tree: Tree) -> Blocks:
    return function(tree) if isinstance(tree, LayerCollection) else [_map(function, branch) for branch in tree]


def _paired(tree: Tree, blocks: Any, from_diag: bool) -> Iterator[tuple[LayerCollection, Tensor]]:
    if isinstance(tree, list):
        if not isinstance(blocks, list | tuple) or len(blocks) != len(tree):
            found = f"{len(blocks)} entries" if isinstance(blocks, list | tuple) else type(blocks).__name__
            raise ValueError(f"The list of blocks does not fit the container: {found} for {len(tree)} children.")
        for branch, part in zip(tree, blocks, strict=True):
            yield from _paired(branch, part, from_diag)
        return
    p = tree.numel()
    shape = (p,) if from_diag else (p, p)
    if not isinstance(blocks, Tensor) or shape not in (blocks.shape, blocks.shape[1:]):
        found = f"shape {tuple(blocks.shape)}" if isinstance(blocks, Tensor) else type(blocks).__name__
        wanted = ", ".join(map(str, ("b", *shape)))
        raise ValueError(
            f"The block of {', '.join(map(repr, tree))} should be ({wanted}), or without b: found {found}."
        )
    yield tree, blocks if blocks.ndim > len(shape) else blocks[None]
