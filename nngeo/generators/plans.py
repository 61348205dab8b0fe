"""Plans of sweeps, remembered for the structure of a model, and made anew where a batch does not fit them."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from nngeo.generators.accounting import Accounting
from nngeo.generators.batches import Batch, Function
from nngeo.generators.independence import check_alone
from nngeo.generators.recording import Forward, Plan, Recording
from nngeo.generators.routing import check_rows
from nngeo.generators.untouched import Snapshot
from nngeo.generators.watch import LayoutChanged
from nngeo.layers.collection import LayerCollection

_PLANS: weakref.WeakKeyDictionary[nn.Module, dict[Any, dict[Any, Plan]]] = weakref.WeakKeyDictionary()


class Planner:
    """Records mini-batches of one model and function by a plan.

    A plan holds as long as the modules, their plain attributes, hooks and parameters stay what they are. What else a
    function refers to, a flag in its closure say, is taken to stay the same as well.
    """

    def __init__(self, model: nn.Module, function: Function | None, layers: LayerCollection, check: bool):
        self.model, self.function, self.layers, self.check = model, function, layers, check
        self._before = Snapshot(model)
        self._known, self._function = self._place()

    def plan(self, batch: Batch) -> Plan:
        """The plan for a batch.

        Raises:
            ValueError: the examples of a batch influence each other, or the model draws random numbers.
            NotImplementedError: gradients of a layer can't be computed; the layer is named.
        """
        plan = self._known.get(key := (batch.kind, self._function))
        if plan is None:
            plan = self._known[key] = self._account(batch)
        return plan

    def record(self, batch: Batch) -> Recording:
        """A batch's outputs and calls. Where modules see other tensors than planned, the plan is made anew.

        If that happens with inputs of the shape it was made for, it is the data that decide which rows a module sees
        (as the experts of a mixture do), and its layers are served by a module around it. Layers that no example has
        reached so far are looked at anew when one does.
        """
        plan, banned = self.plan(batch), set[str]()
        while True:
            try:
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
            self._known[batch.kind, self._function] = plan

    def _account(self, batch: Batch, **options: Any) -> Plan:
        return Accounting(self.model, self.function, self.layers, batch, **options).plan(self.check)

    def _place(self) -> tuple[dict[Any, Plan], Any]:
        """The plans remembered for this structure, by kinds of batches and functions; and the function's key."""
        by_structure = _PLANS.setdefault(self.model, {})
        for structure, plans in [*by_structure.items()]:
            for key in [key for key in plans if key[1] is not None and key[1]() is None]:
                del plans[key]  # of a function that is gone
            if not plans:
                del by_structure[structure]
        known = by_structure.setdefault((self.check, signature(self.model, self.layers)), {})
        if self.function is None:
            return known, None
        try:
            function = weakref.ref(self.function)
            hash(function)
        except TypeError:  # no weak references, or no hash
            return {}, None
        return known, function


def signature(model: nn.Module, layers: LayerCollection) -> tuple:
    """What a plan depends on; equal for equal structures."""
    modules, names, seen = [], dict[int, Any](), dict[int, Any]()
    for name, module in model.named_modules():
        values = tuple([(k, plain(v, seen)) for k, v in vars(module).items() if k not in _OF_MODULES])
        hooks = (*module._forward_hooks, *module._forward_pre_hooks)
        parameters = [(k, p) for k, p in module._parameters.items() if p is not None]
        own = tuple([(k, names.setdefault(id(p), (name, k)), p.shape, p.requires_grad) for k, p in parameters])
        modules.append((name, type(module), values, hooks, own))
    return layers, tuple(modules)


_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
_VALUES = (type(None), bool, int, float, str)


def plain(value: Any, seen: dict[int, Any] | None = None, depth: int = 4) -> Any:
    """Something hashable that changes where a setting does: with plain values, in containers and plain objects, too."""
    if isinstance(value, _VALUES):
        return value
    if callable(value):
        return id(value)
    if depth == 0 or isinstance(value, Tensor):
        return type(value)
    seen = {} if seen is None else seen
    if id(value) not in seen:
        seen[id(value)] = type(value)  # of what contains itself
        parts = value.items() if isinstance(value, dict) else getattr(value, "__dict__", {}).items()
        items = enumerate(value) if isinstance(value, list | tuple) else parts
        found = tuple((k if isinstance(k, str | int) else type(k), plain(v, seen, depth - 1)) for k, v in items)
        seen[id(value)] = (type(value), found)
    return seen[id(value)]
