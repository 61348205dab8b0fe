"""Plans of sweeps, remembered for the structure of a model, and made anew where a batch does not fit them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nngeo.generators.accounting import Accounting
from nngeo.generators.batches import Batch, Function
from nngeo.generators.independence import check_alone, explained, run
from nngeo.generators.recording import Forward, Plan, Recording
from nngeo.generators.remembered import Remembered
from nngeo.generators.routing import check_rows
from nngeo.generators.untouched import Snapshot
from nngeo.generators.watch import LayoutChanged
from nngeo.layers.collection import LayerCollection
from nngeo.layers.turn import TURN

_PLANS: Remembered[Plan] = Remembered()


class Planner:
    """Records mini-batches of one model and function by a plan.

    A plan holds as long as the modules, their plain attributes, hooks and parameters stay what they are, and so do the
    code of the function and what it refers to (see `code_of`).
    """

    @TURN
    def __init__(self, model: nn.Module, function: Function | None, layers: LayerCollection, check: bool):
        self.model, self.function, self.layers, self.check = model, function, layers, check
        self._before = Snapshot(model)
        self._known = _PLANS.of(model, function, layers)
        self._kept: Recording | None = None

    @TURN
    def plan(self, batch: Batch) -> Plan:
        """The plan for a batch.

        Raises:
            ValueError: the examples of a batch influence each other, or the model draws random numbers.
            NotImplementedError: gradients of a layer can't be computed; the layer is named.
        """
        plan = self._known.get(key := (batch.kind, self.check))
        if plan is None or plan.failed:
            plan = self._known[key] = self._account(batch)
        return plan

    def record(self, batch: Batch) -> Recording:
        """A batch's outputs and calls. Where modules see other tensors than planned, the plan is made anew.

        If that happens with inputs of the shape it was made for, it is the data that decide which rows a module sees
        (as the experts of a mixture do), and its layers are served by a module around it. Layers that no example has
        reached so far are looked at anew when one does.
        """
        kept, self._kept = self._kept, None
        if kept is not None and kept.batch.equals(batch):
            return kept
        del kept  # before another graph is recorded
        plan, banned = self.plan(batch), set[str]()
        while True:
            try:
                with TURN, plan.followed():
                    with explained(self._run, batch):
                        forward = Forward.of(self.model, self.function, batch, plan.hosts(), plan.added(), self._before)
                    recording = Recording(self.model, self.function, self.layers, plan, forward)
                    if plan.reads:
                        check_alone(self.model, self.function, batch, recording.outputs, plan.apart)
                    if plan.routed:
                        check_rows(recording)
                    front, reached = recording.reaching(plan.undetermined, plan.rounding)
                    if not front:
                        return recording
                    plan = self._account(batch, front=front, banned=banned, before=plan)
                    # They have been compared on examples that reach them, and what can be told by rounding was.
                    plan.undetermined -= reached
            except LayoutChanged as change:
                if plan.shapes == batch.shapes():
                    banned.add(change.host)
                plan = self._account(batch, banned=banned)
            self._known[batch.kind, self.check] = plan

    def keep(self, recording: Recording) -> None:
        """Give a recording, of which nothing has been pulled, once more if its batch is the next one."""
        self._kept = recording

    def _run(self, batch: Batch) -> Tensor:
        return run(self.model, self.function, batch)

    def _account(self, batch: Batch, **options: Any) -> Plan:
        with explained(self._run, batch):
            return Accounting(self.model, self.function, self.layers, batch, **options).plan(self.check)
