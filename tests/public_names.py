"""What nngeo offers: every public name with its signature, a line each, as `tests/data/public_names.txt` holds them.

python -m tests.public_names > tests/data/public_names.txt
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator

from torch import Tensor

MODULES = (
    "nngeo",
    "nngeo.descent",
    "nngeo.descent.aggregation",
    "nngeo.descent.autogram",
    "nngeo.descent.autojac",
    "nngeo.descent.linalg",
    "nngeo.descent.scalarization",
    "nngeo.factories",
    "nngeo.generators",
    "nngeo.layers",
    "nngeo.nn",
    "nngeo.products",
    "nngeo.representations",
    "nngeo.uses",
    "nngeo.variants",
    "nngeo.vectors",
)


def lines() -> Iterator[str]:
    """`module.name(signature)`, and for classes the same for public attributes that no public base already has."""
    packages = [importlib.import_module(name) for name in MODULES]
    things = [getattr(package, name) for package in packages for name in package.__all__]
    public, seen = {thing for thing in things if inspect.isclass(thing)}, set[int]()
    for package in packages:
        for name in sorted(package.__all__):
            thing, path = getattr(package, name), f"{package.__name__}.{name}"
            yield path + ("" if id(thing) in seen else signature(thing))
            if inspect.isclass(thing) and id(thing) not in seen:
                yield from attributes(thing, path, public)
            seen.add(id(thing))


def attributes(thing: type, path: str, public: set[object]) -> Iterator[str]:
    for name in sorted(dir(thing)):
        owner = next((c for c in thing.__mro__ if name in vars(c)), object)
        if name.startswith("_") or not owner.__module__.startswith("nngeo") or (owner is not thing and owner in public):
            continue
        found = inspect.getattr_static(thing, name)
        yield f"{path}.{name}{signature(getattr(found, '__func__', found))}"


def signature(thing: object) -> str:
    """Names, kinds and defaults of arguments; nothing for what can't be called, is native, or follows torch."""
    native = inspect.isclass(thing) and issubclass(thing, Tensor | Warning)
    if native or not callable(thing) or getattr(thing, "__module__", "").startswith("nngeo.nn"):
        return ""
    parameters = inspect.signature(thing).parameters.values()
    return "(" + ", ".join(argument(p) for p in parameters) + ")"


def argument(p: inspect.Parameter) -> str:
    name = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
    name += ", /" if p.kind == p.POSITIONAL_ONLY else " (keyword)" if p.kind == p.KEYWORD_ONLY else ""
    return name if p.default is p.empty else f"{name}={getattr(p.default, '__qualname__', repr(p.default))}"


if __name__ == "__main__":
    print("\n".join(lines()))
