"""What UPGrad and DualProj share: a preference vector and a projector onto the dual cone."""

from __future__ import annotations

from torch import Tensor

from nngeo.descent.aggregation.base import GramianWeighting
from nngeo.descent.aggregation.options import Delegated, Option, vector
from nngeo.descent.aggregation.projectors import DualConeProjector, PivotingProjector
from nngeo.linalg.arguments import instance


def _projector(name: str, value: DualConeProjector | None) -> DualConeProjector:
    return PivotingProjector() if value is None else instance(name, value, DualConeProjector)


class DualConeWeighting(GramianWeighting):
    """A weighting by projections onto the dual cone.

    Args:
        pref_vector: u (m,); 1/m if None.
        projector: a `PivotingProjector` with the three arguments that follow if None; a projector that is passed has
            its own.
    """

    pref_vector = vector()
    projector = Option(_projector)
    norm_eps = Delegated("norm_eps")
    reg_eps = Delegated("reg_eps")
    strict = Delegated("strict")

    def __init__(
        self,
        pref_vector: Tensor | None = None,
        projector: DualConeProjector | None = None,
        *,
        norm_eps: float = 0.0,
        reg_eps: float = 1e-4,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self.pref_vector = pref_vector
        self.projector = projector
        if projector is None:
            self.projector = PivotingProjector(norm_eps=norm_eps, reg_eps=reg_eps, strict=strict)
        if projector is not None and (norm_eps, reg_eps, strict) != (0, 1e-4, False):
            raise ValueError("norm_eps, reg_eps and strict belong to the default projector: give them to yours.")

    @property
    def with_options(self) -> DualConeProjector:
        return self.projector
