"""Every public call with a bad argument raises in nngeo's own words; a new one needs a line in `public_calls.py`."""

from __future__ import annotations

import copy
import inspect
import linecache
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from inspect import Parameter
from pathlib import Path
from typing import Any

import pytest
import torch

import nngeo
from nngeo import PMat, variants
from tests.public_calls import CALLS, METHODS, MODULES, PMAT, fisher

# Bases of classes, and what the sweep makes. Blocks are checked where a matrix takes them (test_files.py).
NO_CALLS = {"Aggregator", "WeightedAggregator", "GramianWeightedAggregator", "Weighting", "GramianWeighting", "Memory"}
NO_CALLS |= {"RowWeighting", "LayerwisePMat", "Cotangents", "ConvergenceWarning", "Matrix", "PSDMatrix"}
NO_CALLS |= {name for name in nngeo.representations.__all__ if name.endswith("Block")}
# Methods that nngeo calls itself, with what it has checked.
HOOKS = {"forward", "block_type", "block_type_for", "project", "regularized", "full_name", "weights", "count"}
HOOKS |= {"remember", "recall", "set_extra_state"}


class Nonsense:
    """What no argument may be."""


BAD: dict[str, Any] = {
    "an object": Nonsense(),
    "a number in words": "1e-3",
    "nan": math.nan,
    "two numbers": torch.ones(2),
    "a negative number": -1,
    "a list": [1.0],
    "a flag": True,
    "a class": dict,
    "nothing": None,
}


def public() -> Iterator[tuple[str, Any]]:
    """What can be called of each module, each thing once, as "module:name"."""
    seen: set[int] = set()
    for module in MODULES:
        for name in module.__all__:
            thing = getattr(module, name)
            called = callable(thing) and not inspect.ismodule(thing) and not inspect.isabstract(thing)
            if called and name not in NO_CALLS and id(thing) not in seen:
                seen.add(id(thing))
                yield f"{module.__name__}:{name}", thing


THINGS = dict(public())


def methods(kind: type) -> Iterator[str]:
    """Public methods that take arguments and are nngeo's own; those of variants are for the sweep."""
    for method in [] if issubclass(kind, variants.Variant) else dir(kind):
        static = inspect.getattr_static(kind, method)
        function = getattr(static, "__func__", static)
        if not inspect.isfunction(function) or method.startswith("_") or method in HOOKS:
            continue
        takes = len(inspect.signature(function).parameters) - (not isinstance(static, staticmethod))
        if takes and inspect.unwrap(function).__module__.startswith("nngeo."):
            yield method


# "module:function", "module:Class" for its constructor, and "module:Class.method".
NAMES = [*THINGS, *(f"{name}.{m}" for name, thing in THINGS.items() if inspect.isclass(thing) for m in methods(thing))]


def split(name: str) -> tuple[str, str]:
    """ "module:Class.method" -> "module:Class", "method"."""
    module, _, path = name.partition(":")
    owner, _, method = path.partition(".")
    return f"{module}:{owner}", method


def given(name: str) -> dict[str, Any]:
    """The arguments of a call that works, by name."""
    owner, method = split(name)
    module, _, local = owner.partition(":")
    if not method:
        return CALLS[next(known for known in MODULES if known.__name__ == module)][local]()
    return PMAT[method](local) if local.startswith("PMat") else METHODS[local][method]()


def called(name: str) -> Callable[..., Any]:
    """The function, class or method; a method is that of an object made for it."""
    owner, method = split(name)
    thing = THINGS[owner]
    if not method:
        return thing
    if isinstance(inspect.getattr_static(thing, method), classmethod | staticmethod):
        return getattr(thing, method)
    made = copy.copy(fisher(thing.__name__)) if issubclass(thing, PMat) else call(thing, given(owner))
    return getattr(made, method)


def call(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call by name, but for arguments that have a place only; what is lazy is run."""
    kinds = {p.name: p.kind for p in inspect.signature(function).parameters.values()}
    placed = [
        x for x in arguments if kinds.get(x) in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    ]
    found = function(*map(arguments.get, placed), **{x: y for x, y in arguments.items() if x not in placed})
    with found if isinstance(found, AbstractContextManager) else nullcontext():
        return list(found) if isinstance(found, Iterator) else found


def parameters(name: str) -> list[str]:
    """Of the signature, and what the table has beside (options)."""
    starred = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    named = [p.name for p in inspect.signature(called(name)).parameters.values() if p.kind not in starred]
    return list(dict.fromkeys([*named, *given(name)]))


def fault(name: str, parameter: str, bad: Any) -> str | None:
    """What is wrong with how a call takes a bad argument; None where it raises in nngeo's words, or serves it."""
    try:
        call(called(name), given(name) | {parameter: bad})
    except Exception as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        assert trace is not None
        place, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        ours = Path(place).is_relative_to(Path(nngeo.__file__).parent)
        meant = linecache.getline(place, line).strip().startswith("raise ") or isinstance(error, OSError)
        return None if ours and meant else f"{Path(place).name}:{line} {error!r:.80}"
    return "silent" if isinstance(bad, Nonsense) else None


@pytest.mark.parametrize("name", NAMES)
def test_every_public_call_is_in_the_table(name):
    assert isinstance(given(name), dict)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_argument_is_refused_in_own_words(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    faults = {(p, what): fault(name, p, bad) for p in parameters(name) for what, bad in BAD.items()}
    assert {key: found for key, found in faults.items() if found is not None} == {}
