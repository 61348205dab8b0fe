"""An implicit matrix that keeps the graphs of its mini-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nngeo.generators.kept import LinearizedGenerator
from nngeo.representations.implicit import PMatImplicit

if TYPE_CHECKING:
    from typing_extensions import Self


class PMatLinearized(PMatImplicit):
    """What `PMatImplicit.linearize()` returns: products run no forward of the model (but what it checkpoints).

    `release()`, or leaving a `with` block, frees the graphs, also those of multiples and damped forms of this matrix.
    `get_diag`, `trace` and `to_torch` run the model as before. It can't be pickled with its graphs.
    """

    generator: LinearizedGenerator | None

    def release(self) -> None:
        """Free the graphs. Products are refused from then on."""
        if self.generator is not None:
            self.generator.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
