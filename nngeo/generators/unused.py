"""A warning of parameters that nothing depends on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable


class Unused:
    """Warns of each parameter once."""

    def __init__(self) -> None:
        self._named: set[str] = set()

    def warn(self, names: Iterable[str], of: str = "The outputs") -> None:
        """Say that the gradients by these parameters are zero."""
        new = [name for name in names if name not in self._named]
        self._named.update(new)
        if new:
            warnings.warn(
                f"{of} do not depend on {', '.join(new)}: their gradients are zero. "
                "Leave them out by `layer_collection=LayerCollection.from_model(model, layers=...)`.",
                stacklevel=3,
            )
