"""Whatever holds the examples (a loader, an iterable, one batch, a dict) as a sequence of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import SUPPORTED_NODES, tree_flatten, tree_map, tree_unflatten

from nngeo.generators.mappings import as_dicts, as_given
from nngeo.linalg.arguments import shown

Function = Callable[..., Any]
Target = int | str | Callable[[Any], Any]  # of a batch: an index, a key, or a function of it
TARGET_KEYS = ("labels", "label", "target", "targets")
MASK_KEYS = ("attention_mask", "decoder_attention_mask")
INPUT_KEYS = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")


@dataclass(frozen=True)
class Batch:
    """One mini-batch: what the model is called with, and the targets.

    A tuple or list holds the model's input first and targets after it; where a function takes the whole of it, the
    target comes last. A dict, or any other mapping, holds the model's keyword arguments, and the target under "labels"
    (or "label", "target", "targets").
    """

    content: tuple | dict[str, Any]

    @classmethod
    def of(cls, content: Any) -> Batch:
        """From a tensor, a tuple or list, or a dict-like object."""
        if isinstance(content, Tensor):
            return cls((content,))
        if isinstance(content, tuple | list) and content:
            plain = all(isinstance(entry, Tensor) for entry in content)
            return cls(tuple(content) if plain else tuple(as_dicts(list(content))))
        if isinstance(content, Mapping):
            return cls(as_dicts(dict(content) if type(content) in SUPPORTED_NODES else content))
        raise TypeError(
            f"A batch is a {type(content).__name__}; it should be a tensor, a tuple (inputs, targets), "
            "or a dict of the model's keyword arguments."
        )

    def targets(self, function: Function | None, target: Target | None = None) -> tuple:
        """What follows the input or, where a function takes all, the last entry; `target` says another one."""
        if target is not None:
            return (target(self.given) if callable(target) else self._entry(target),)
        if isinstance(self.content, dict):
            return tuple(self.content[key] for key in TARGET_KEYS if key in self.content)[:1]
        return self.content[1:] if function is None or len(self.content) < 2 else self.content[-1:]

    def _entry(self, target: int | str) -> Any:
        try:
            return self.content[target]  # type: ignore[index]
        except (IndexError, KeyError, TypeError) as error:
            here = isinstance(self.content, dict)
            found = f"the keys {', '.join(map(repr, self.content))}" if here else f"{len(self.content)} entries"
            raise ValueError(
                f"target={target!r} is no entry of the batch, which has {found}; give one, or a function of the batch."
            ) from error

    def several_targets(self) -> bool:
        """Whether the last entry, a function's target, is a number of each example beside another: (x, y, index)."""
        if isinstance(self.content, dict) or len(self.content) < 3:
            return False
        *others, last = self.content[1:]
        number = isinstance(last, Tensor) and last.ndim == 1 and not last.is_floating_point()
        return number and any(isinstance(x, Tensor) and x.shape == last.shape for x in others)

    @property
    def given(self) -> Any:
        """The content as the user's functions take it: mappings are of the types that they came as."""
        return as_given(self.content)

    @property
    def named(self) -> dict[str, Any]:
        """The entries of a dict, or of the dict that a tuple begins with."""
        first = self.content[0] if isinstance(self.content, tuple) else self.content
        return first if isinstance(first, dict) else {}

    @property
    def inputs(self) -> tuple | dict[str, Any]:
        """What the default function gives to the model."""
        if isinstance(self.content, dict):
            return {key: value for key, value in self.content.items() if key not in TARGET_KEYS}
        return self.content[:1]

    @cached_property
    def size(self) -> int:
        """The number of examples: the length of the first tensor; in a dict, of an input as it is usually called."""
        named = self.named
        usual = [named[key] for key in (*INPUT_KEYS, *TARGET_KEYS) if isinstance(named.get(key), Tensor)]
        for tensor in [*usual, *self.tensors()]:
            if tensor.ndim:
                return len(tensor)
        raise ValueError("A batch holds no tensor with an example axis; its examples can't be counted.")

    @cached_property
    def leaves(self) -> list[Any]:
        """What it holds: tensors, and whatever else."""
        if isinstance(self.content, tuple) and all(isinstance(entry, Tensor) for entry in self.content):
            return list(self.content)
        return tree_flatten(self.content)[0]

    @cached_property
    def kind(self) -> tuple:
        """What batches have in common that differ in sizes only; hashable."""
        kinds = tuple((leaf.ndim, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf) for leaf in self.leaves)
        plain = isinstance(self.content, tuple) and len(self.content) == len(self.leaves)
        return kinds, None if plain else str(tree_flatten(self.content)[1])

    def tensors(self) -> list[Tensor]:
        """All tensors in it."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def shapes(self) -> list[torch.Size]:
        """The shapes of its tensors, without their first axis."""
        return [tensor.shape[1:] for tensor in self.tensors()]

    def to(self, device: torch.device) -> Batch:
        """All tensors on a device; those made in inference mode are copied, because autograd can't use them."""

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            moved = leaf.to(device)
            return moved.clone() if moved.is_inference() else moved

        if all(leaf.device == device and not leaf.is_inference() for leaf in self.tensors()):
            return self
        with torch.inference_mode(False):
            return Batch(tree_map(move, self.content))

    def apart(self) -> list[bool]:
        """Which of the leaves look as if they held one entry for each example."""
        return [isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == self.size for leaf in self.leaves]

    def examples(self, index: Tensor | slice, apart: Sequence[bool] | None = None) -> Batch:
        """The batch that holds these examples only; of leaves that are not `apart`, where that is known, the whole."""
        here = self.apart() if apart is None else [x and y for x, y in zip(self.apart(), apart, strict=True)]
        leaves, structure = tree_flatten(self.content)
        with torch.inference_mode(False):
            for j, leaf in enumerate(leaves):
                if here[j]:
                    leaves[j] = leaf[index if isinstance(index, slice) else index.to(leaf.device)]
        return Batch(tree_unflatten(leaves, structure))

    @classmethod
    def joined(cls, batches: list[Batch]) -> Batch:
        """The batch of all examples of batches that hold the same."""
        if len(batches) == 1:
            return batches[0]
        with torch.inference_mode(False):
            return cls(tree_map(lambda *leaves: torch.cat(leaves), *[batch.content for batch in batches]))

    def copied(self) -> Batch:
        """The same, with tensors of its own."""
        with torch.inference_mode(False):
            return Batch(tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.content))

    def equals(self, other: Batch) -> bool:
        """Whether it holds the same as another one of its kind."""
        pairs = zip(self.leaves, other.leaves, strict=False)
        plain = all(x.layout == torch.strided for x in self.tensors())
        return (
            plain
            and self.kind == other.kind
            and all(torch.equal(x, y) if isinstance(x, Tensor) else x is y for x, y in pairs)
        )

    def parts(self, most: int, apart: Sequence[bool] | None = None) -> list[Batch]:
        """Batches of at most so many of its examples, as equal in size as they can be; views of its tensors."""
        size, count = self.size, -(-self.size // most)
        if count == 1:
            return [self]
        bounds = [size * j // count for j in range(count + 1)]
        return [self.examples(slice(start, stop), apart) for start, stop in pairwise(bounds)]

    def run(self, model: nn.Module, function: Function | None) -> Any:
        """`function(*batch)`, or the model on the inputs; on copies, which it may change in place."""
        own = self.copied()
        if function is not None:
            return function(*own.given) if isinstance(own.content, tuple) else function(own.given)
        inputs = as_given(own.inputs)
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)

    def mask(self, mask: Callable[[Any], Tensor] | str) -> Tensor:
        """Which positions count: by a function of the batch, or by its key."""
        if callable(mask):
            try:
                found = mask(self.given)
            except TypeError as error:
                raise TypeError(
                    f"`mask` is called with one argument, the whole batch ({shown(self.given)}), and failed: {error}. "
                    "Give a function of the batch, lambda batch: batch[1] != 0."
                ) from error
            if not isinstance(found, Tensor):
                raise TypeError(f"`mask` should return booleans (b, *positions), a tensor; it returned {shown(found)}.")
            return found.bool()
        if not (named := self.named):
            raise TypeError(f"mask={mask!r} is a key, but the batches are tuples; give a function of the batch.")
        if mask not in named:
            raise ValueError(f"mask={mask!r} is no key of the batch; it has {', '.join(map(repr, named))}.")
        return named[mask].bool()


class NoBatches(ValueError):
    """A source of examples is empty."""


class Examples:
    """Batches that can be iterated again, with the number of examples if it is known beforehand.

    Args:
        source: a DataLoader or any iterable of batches, or one batch: a tensor, a dict or other mapping, or a tuple of
            which one entry at least is a tensor. A list is one, too, where its entries can't be several batches.
    """

    source: Any
    single: bool  # whether the source is one batch

    def __init__(self, source: Any):
        if isinstance(source, Examples):
            self.source, self.single = source.source, source.single
            return
        self.source = source
        self.single = _is_batch(source)
        if not self.single and not isinstance(source, Iterable):
            raise TypeError(
                f"`loader` is a {type(source).__name__}; give a DataLoader, any iterable of batches, "
                "or one batch: a tensor, a tuple of tensors, or a dict."
            )

    @classmethod
    def kept(cls, source: Any) -> Examples:
        """Those of a source, which can be iterated again: the batches of a one-shot iterator are kept as a list."""
        examples = cls(source)
        if isinstance(examples.source, Iterator):
            examples.source = list(examples.source)
        return examples

    def total(self) -> int | None:
        """The number of examples, where the source can tell without being iterated (an upper bound)."""
        if self.single:
            return Batch.of(self.source).size
        if type(self.source) in (list, tuple):
            return sum(Batch.of(content).size for content in self.source)
        batches = getattr(self.source, "batch_sampler", None)
        # A sampler may draw few of the examples of a dataset.
        drawn = getattr(self.source, "dataset", None) if batches is None else getattr(batches, "sampler", None)
        try:
            return len(drawn)  # type: ignore[arg-type]
        except TypeError:
            return None

    def __iter__(self) -> Iterator[Batch]:
        empty = True
        for content in [self.source] if self.single else self.source:
            empty = False
            batch = Batch.of(content)
            if batch.size == 0:
                raise ValueError("A batch holds no examples (its first tensor has length 0); leave it out.")
            yield batch
        if empty:
            raise NoBatches("`loader` gave no batches: it is empty, or an iterator that was used up before.")


def _is_batch(source: Any) -> bool:
    """Whether this is one batch; raises for a list of tensors that could be one or several."""
    if isinstance(source, Tensor | Mapping):
        return True
    if not isinstance(source, tuple | list) or not any(isinstance(entry, Tensor) for entry in source):
        return False
    if isinstance(source, tuple) or not all(isinstance(entry, Tensor) for entry in source):
        return True
    # A DataLoader makes a list of inputs and targets. Several batches of inputs are alike but for their sizes.
    kinds, sizes = {(x.ndim, x.dtype) for x in source}, {x.shape[:1] for x in source}
    if len(source) > 1 and (len(kinds) == 1 or len(sizes) > 1):
        raise ValueError(
            "`loader` is a list of tensors, which could be one batch or several. Give a tuple for one batch, "
            "tuple(batch); or a list of tuples, [(x,) for x in batches]."
        )
    return len(source) > 1
