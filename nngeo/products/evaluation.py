"""A model and the arguments it is called with: which of them can be differentiated, by which name."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nngeo.generators.batches import Batch, Function
from nngeo.generators.mappings import as_dicts
from nngeo.generators.untouched import untouched
from nngeo.layers.models import check_usable
from nngeo.linalg.arguments import callback

Wrt = str | Sequence[str]
Place = int | str  # of an argument: its position, or its key


def of_weights(wrt: Wrt) -> bool:
    """Whether `wrt` means the weights, not inputs."""
    names = [wrt] if isinstance(wrt, str) else wrt
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f'`wrt` is {wrt!r}; it should be "input", "weight", or the name of an argument, or several.')
    return isinstance(wrt, str) and wrt in ("weight", "weights")


class Runner:
    """Calls a model with all that a batch holds.

    It refers to the model weakly, so that it can be remembered for it.
    """

    def __init__(self, model: nn.Module, keywords: bool):
        self._model, self.keywords = weakref.ref(model), keywords

    def __call__(self, *content: Any) -> Any:
        model: Any = self._model()
        return model(**content[0]) if self.keywords else model(*content)


_RUNNERS: weakref.WeakKeyDictionary[nn.Module, dict[bool, Runner]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Evaluation:
    """A function of a batch that runs a model: the model's own call, or one that the user gives."""

    model: nn.Module
    function: Function
    batch: Batch
    by_user: bool  # whether the function is the user's

    @classmethod
    def of(cls, model: nn.Module, x: Any, function: Function | None, *, detached: bool = False) -> Evaluation:
        """From what the public functions take; raises for what is no model, or no arguments.

        Args:
            detached: whether the tensors are to be taken without their graphs.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` is a {type(model).__name__}; it should be a torch.nn.Module.")
        check_usable(model)
        callback("function", function, "of the arguments", optional=True)
        if isinstance(x, Tensor):
            content: Any = (x,)
        elif isinstance(x, Mapping):
            content = as_dicts(dict(x))
        elif isinstance(x, tuple | list):
            content = tuple(as_dicts(list(x)))
        else:
            raise TypeError(
                f"`x` is a {type(x).__name__}; it should be a tensor, a tuple of positional arguments, or a dict of "
                "keyword arguments."
            )
        with torch.inference_mode(False):
            batch = Batch(tree_map(partial(_usable, detached=detached), content))
        if not batch.tensors():
            raise ValueError("`x` holds no tensors.")
        if any(tensor.is_meta for tensor in batch.tensors()):
            raise ValueError("`x` is on the device 'meta', where tensors have no entries: give one with data.")
        if batch.size == 0:
            raise ValueError("`x` holds no examples: its first tensor has length 0.")
        keywords = isinstance(content, dict)
        own = _RUNNERS.setdefault(model, {})
        run = function or own.setdefault(keywords, Runner(model, keywords))
        return cls(model, run, batch, function is not None)

    def run(self, batch: Batch) -> Any:
        """What the function returns for a batch."""
        with untouched(self.model), torch.enable_grad():
            return batch.run(self.model, self.function)

    def arguments(self) -> dict[Place, Any]:
        """The arguments by their places."""
        content: Any = self.batch.content
        return dict(content) if isinstance(content, dict) else dict(enumerate(content))

    def replaced(self, tensors: Mapping[Place, Tensor]) -> Batch:
        """The batch with other tensors at some places."""
        arguments: Any = {**self.arguments(), **tensors}
        return Batch(arguments if isinstance(self.batch.content, dict) else tuple(arguments.values()))

    def examples(self, rows: slice) -> Evaluation:
        """The same function of some of the examples."""
        index = torch.arange(self.batch.size, device="cpu")[rows]
        return Evaluation(self.model, self.function, self.batch.examples(index), self.by_user)

    def inputs(self, wrt: Wrt) -> dict[str, Place]:
        """Names and places of the tensors that `wrt` means.

        Raises:
            ValueError: no argument has that name, or "input" could mean several; with the names there are.
            TypeError: an argument that can't be differentiated.
        """
        of_weights(wrt)
        names = self._names()
        floating = [name for name in names if self._reason(name, names[name]) is None]
        if isinstance(wrt, str) and wrt in ("input", "inputs") and (wrt not in floating or len(floating) == 1):
            if len(floating) == 1:
                return {floating[0]: names[floating[0]]}
            if floating:
                raise ValueError(
                    f'wrt={wrt!r} could mean {_listed(floating)}: name one, wrt="{floating[0]}", or several, '
                    f"wrt={tuple(floating)}, whose derivatives are concatenated in that order."
                )
            raise TypeError(
                f"No argument can be differentiated: {'; '.join(self._reason(n, p) or '' for n, p in names.items())}. "
                'Give a model of token ids its embeddings (x={"inputs_embeds": ...}, wrt="inputs_embeds"), or the '
                "model behind the integers."
            )
        asked = [wrt] if isinstance(wrt, str) else list(wrt)
        if not asked or any(name not in names for name in asked) or len(set(asked)) < len(asked):
            raise ValueError(f'Unknown wrt {wrt!r}; known are "input", "weight", and the arguments {_listed(names)}.')
        for name in asked:
            if (reason := self._reason(name, names[name])) is not None:
                raise TypeError(
                    f"wrt={name!r} can't be differentiated: {reason}. Give floating point tensors (of token ids their "
                    'embeddings: x={"inputs_embeds": ...}, wrt="inputs_embeds").'
                )
        return {name: names[name] for name in asked}

    def _reason(self, name: str, place: Place) -> str | None:
        """Why an argument can't be differentiated; None if it can."""
        argument = self.arguments()[place]
        if not isinstance(argument, Tensor):
            return f"argument {name!r} is a {type(argument).__name__}"
        if not argument.is_floating_point():
            return f"argument {name!r} has dtype {argument.dtype}"
        if argument.ndim == 0 or len(argument) != self.batch.size:
            return f"argument {name!r} of shape {tuple(argument.shape)} has no axis of {self.batch.size} examples"
        return None

    def _names(self) -> dict[str, Place]:
        if isinstance(self.batch.content, dict):
            return {str(key): key for key in self.batch.content}
        count = len(self.batch.content)
        names = _positional(self.function if self.by_user else self.model.forward, count)
        return {name: j for j, name in enumerate(names)}


def _usable(leaf: Any, detached: bool) -> Any:
    """A tensor made in inference mode is copied, because autograd can't use it."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.clone() if leaf.is_inference() else leaf.detach() if detached else leaf


def _positional(function: Any, count: int) -> list[str]:
    """Names of the first arguments of a function, their numbers where it does not name them."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of a builtin
        parameters = []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in kinds][:count]
    return names + [str(j) for j in range(len(names), count)]


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)
