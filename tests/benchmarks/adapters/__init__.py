"""One file for each library: how it does the jobs.

An adapter gives its library's `VERSION`; `JOBS`: for each job a function that prepares it on a Problem, untimed, and
returns what is timed; and `FLAT`: for some jobs how to compare the result with another library's, as one flat tensor.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tests.benchmarks.networks import Problem

Prepare = Callable[[Problem], Callable[[], Any]]
PEERS = ("nngeometry", "backpack", "curvlinops")


@dataclass(frozen=True)
class Adapter:
    """How a library does the jobs it knows."""

    name: str
    version: str
    jobs: dict[str, Prepare]
    flat: dict[str, Callable[[Any, Problem], Tensor]]


def adapter(name: str) -> Adapter | None:
    """The adapter "ours" or of a peer, or None where the peer is not installed."""
    try:
        module = importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith("tests."):
            raise
        return None
    return Adapter(name, module.VERSION, module.JOBS, module.FLAT)
