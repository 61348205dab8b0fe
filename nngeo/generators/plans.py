"""Plans of sweeps, remembered for the structure of a model, and made anew where a batch does not fit them."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from nngeo.generators.accounting import Accounting
from nngeo.generators.batches import Batch, Function
from nngeo.generators.recording import Plan, Recording
from nngeo.generators.routing import check_rows
from nngeo.generators.untouched import Snapshot
from nngeo.generators.watch import LayoutChanged
from nngeo.layers.collection import LayerCollection

_PLANS: weakref.WeakKeyDictionary[nn.Module, dict[Any, Plan]] = weakref.WeakKeyDictionary()


class Planner:
    """Records mini-batches of one model and function by a plan.

    A plan holds as long as the modules, their plain attributes, hooks and parameters stay what they are. What else a
    function refers to, a flag in its closure say, is taken to stay the same as well.
    """

    def __init__(self, model: nn.Module, function: Function | None, layers: LayerCollection, check: bool):
        self.model, self.function, self.layers, self.check = model, function, layers, check
        self._own: dict[Any, Plan] = {}  # of a function that can't be a key of the plans remembered for all
        self._signature, self._before = signature(model, layers), Snapshot(model)

    def plan(self, batch: Batch) -> Plan:
        """The plan for a batch.

        Raises:
            ValueError: the examples of a batch influence each other, or the model draws random numbers.
            NotImplementedError: gradients of a layer can't be computed; the layer is named.
        """
        known, key = self._place(batch)
        if key not in known:
            known[key] = self._account(batch)
        return known[key]

    def record(self, batch: Batch) -> Recording:
        """A batch's outputs and calls. Where modules see other tensors than planned, the plan is made anew.

        If that happens with inputs of the shape it was made for, it is the data that decide which rows a module sees
        (as the experts of a mixture do), and its layers are served by a module around it. Layers that no example has
        reached so far are looked at anew when one does.
        """
        plan, banned = self.plan(batch), set[str]()
        known, key = self._place(batch)
        while True:
            try:
                recording = Recording(self.model, self.function, self.layers, plan, batch, self._before)
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
            known[key] = plan

    def _account(self, batch: Batch, **options: Any) -> Plan:
        return Accounting(self.model, self.function, self.layers, batch, **options).plan(self.check)

    def _place(self, batch: Batch) -> tuple[dict[Any, Plan], Any]:
        """The dictionary that remembers the plan, and its key there."""
        key = (self.check, self._signature, batch.kind)
        if self.function is None:
            return _PLANS.setdefault(self.model, {}), (*key, None)
        try:
            known, function = _PLANS.setdefault(self.model, {}), weakref.ref(self.function)
            for old in [old for old in known if old[-1] is not None and old[-1]() is None]:
                del known[old]  # of a function that is gone
            hash(function)
        except TypeError:  # no weak references, or no hash
            return self._own, key
        return known, (*key, function)


def signature(model: nn.Module, layers: LayerCollection) -> tuple:
    """What a plan depends on; equal for equal structures."""
    ids = {id(p): name for name, p in model.named_parameters()}
    modules, seen = [], dict[int, Any]()
    for name, module in model.named_modules():
        values = tuple((k, plain(v, seen)) for k, v in vars(module).items() if k not in _OF_MODULES)
        hooks = (*module._forward_hooks, *module._forward_pre_hooks)
        own = tuple((k, ids[id(p)], p.shape, p.requires_grad) for k, p in module._parameters.items() if p is not None)
        modules.append((name, type(module), values, hooks, own))
    return layers, tuple(modules)


_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}


def plain(value: Any, seen: dict[int, Any] | None = None, depth: int = 4) -> Any:
    """Something hashable that changes where a setting does: with plain values, in containers and plain objects, too."""
    if value is None or isinstance(value, bool | int | float | str):
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
