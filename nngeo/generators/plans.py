"""Plans of sweeps, remembered for the structure of a model."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from nngeo.generators.accounting import Accounting
from nngeo.generators.batches import Batch, Function
from nngeo.generators.recording import Plan
from nngeo.layers.collection import LayerCollection

_PLANS: weakref.WeakKeyDictionary[nn.Module, dict[Any, Plan]] = weakref.WeakKeyDictionary()


def plan_for(
    model: nn.Module, function: Function | None, layers: LayerCollection, batch: Batch, check: bool = True
) -> Plan:
    """The plan of a sweep, remembered for the structure of the model.

    Raises:
        ValueError: the examples of a batch influence each other, or the model draws random numbers.
        NotImplementedError: gradients of a layer can't be computed; the layer is named.
    """
    known = _PLANS.setdefault(model, {})
    reference = None if function is None else weakref.ref(function)
    key = (check, _signature(model, layers, batch), reference)
    if key not in known:
        for old in [old for old in known if old[-1] is not None and old[-1]() is None]:
            del known[old]  # of a function that is gone
        known[key] = Accounting(model, function, layers, batch).plan(check)
    return known[key]


def _signature(model: nn.Module, layers: LayerCollection, batch: Batch) -> tuple:
    """What the plan depends on; equal for equal structures."""
    leaves, structure = tree_flatten(batch.content)
    shapes = tuple((leaf.ndim, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves)
    ids = {id(p): name for name, p in model.named_parameters()}
    modules = []
    for name, module in model.named_modules():
        simple = tuple((k, v) for k, v in vars(module).items() if isinstance(v, bool | int | float | str))
        called = (id(vars(module).get("forward")), *module._forward_hooks, *module._forward_pre_hooks)
        own = tuple((k, ids[id(p)], p.shape, p.requires_grad) for k, p in module._parameters.items() if p is not None)
        modules.append((name, type(module), simple, called, own))
    return layers, tuple(modules), str(structure), shapes
