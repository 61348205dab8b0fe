"""Which models can be served: what wraps, shards, scripts or has not yet made their parameters is recognised here."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

SHARDED = "torch.distributed.fsdp", "FullyShardedDataParallel", "FSDPModule"  # modules
SHARDS = "torch.distributed.tensor", "DTensor"


def check_structure(model: nn.Module) -> None:
    """Raise unless the parameters of a model are there, whole, where its layers can be watched.

    Raises:
        ValueError: a lazy module that has not been run.
        NotImplementedError: a scripted module with parameters, or parameters that are shards (FSDP, DTensor).
    """
    special = _special(model)
    _check_whole(special)
    for name, module in special:
        if isinstance(module, torch.jit.ScriptModule) and next(module.parameters(), None) is not None:
            raise NotImplementedError(
                f"{_named(name, module)} is a scripted module (TorchScript), of which the inputs of the layers are not "
                "seen: derivatives by weights need the module before torch.jit."
            )


def _check_whole(special: list[tuple[str, nn.Module]]) -> None:
    """Raise where parameters are not there yet, or only a shard of them is."""
    for name, module in special:
        if isinstance(module, _known(*SHARDED)):
            raise NotImplementedError(
                f"{_named(name, module)} is sharded by FSDP: this process holds a part of the parameters only, and "
                "nngeo would take it for all. Give it the model before it was sharded, with the full state dict."
            )
        for local, p in module._parameters.items():
            if p is not None and is_lazy(p):
                raise ValueError(
                    f"Parameter {local!r} of {_named(name, module)} has no shape yet: run the model once, "
                    "model(example), before its layers are counted."
                )
            if isinstance(p, _known(*SHARDS)):
                raise NotImplementedError(
                    f"Parameter {local!r} of {_named(name, module)} is a DTensor, of which this process holds a shard "
                    "only. Give the model with whole parameters (p.full_tensor())."
                )


def check_usable(model: nn.Module) -> None:
    """Raise unless a model can be run here, with all examples in this process.

    Raises:
        ValueError: parameters on the meta device.
        NotImplementedError: a model that is spread over several processes or devices.
    """
    special = _special(model)
    _check_whole(special)
    for name, p in model.named_parameters():
        if p.device.type == "meta":
            raise ValueError(
                f"Parameter {name!r} is on the meta device, where tensors have no values: call "
                "model.to_empty(device=...) and load the weights first."
            )
    for name, module in special:
        count = _processes(module)
        if count > 1:
            raise NotImplementedError(
                f"{_named(name, module)} spreads the examples over {count} processes or devices, of which each would "
                "give a matrix of its own examples. Give the module inside (model.module), and all examples; or add "
                "up the matrices of all processes."
            )


def as_written(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` wraps, or the module itself."""
    found: Any = module
    return found._orig_mod if isinstance(module, _known("torch._dynamo.eval_frame", "OptimizedModule")) else module


def is_whole(p: Tensor) -> bool:
    """Whether a parameter is there, and not a part of it only."""
    return _is_plain(type(p)) and not getattr(p, "_fsdp_flattened", False)


def check_no_shard(name: str, tensor: Tensor) -> None:
    """Raise for a parameter of which this process holds a part only."""
    if not is_whole(tensor):
        kind = "a DTensor" if type(tensor).__name__ == "DTensor" else "a parameter sharded by FSDP"
        raise NotImplementedError(
            f"{name} is {kind}, of which this process holds a part only, and nngeo would take it for all. Give whole "
            "parameters, of the model before it was sharded."
        )


def _special(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of which the class, or that of a parameter, says more than what is computed; mostly none."""
    waiting, seen = [model], set[int]()
    for module in waiting:  # several times as fast as `named_modules()`
        if not _are_plain(module):
            break
        new = [m for m in module._modules.values() if m is not None and id(m) not in seen]
        seen.update(map(id, new))
        waiting.extend(new)
    else:
        return []
    return [(name, module) for name, module in model.named_modules() if not _are_plain(module)]


def _are_plain(module: nn.Module) -> bool:
    return _is_plain(type(module)) and all(map(_is_plain, map(type, module._parameters.values())))


_PLAIN: dict[type, bool] = {}


def _is_plain(kind: type) -> bool:
    """Whether modules or parameters of a class are there, in this process, as Python wrote them."""
    if kind not in _PLAIN:
        spread = torch.jit.ScriptModule, nn.parallel.DataParallel, nn.parallel.DistributedDataParallel
        lazy = UninitializedParameter, UninitializedBuffer
        _PLAIN[kind] = not issubclass(kind, (*lazy, *spread, *_known(*SHARDED), *_known(*SHARDS)))
    return _PLAIN[kind]


def _processes(module: nn.Module) -> int:
    """Over how many processes or devices a wrapper spreads a batch; 1 for any other module."""
    if isinstance(module, nn.parallel.DataParallel):
        return len(module.device_ids)
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return module.process_group.size()
    return 1


def _named(name: str, module: nn.Module) -> str:
    return f"{type(module).__name__} {name!r}" if name else type(module).__name__


def _known(place: str, *names: str) -> tuple[Any, ...]:
    """Classes of a module of torch, if it has been imported: else nothing is one of them."""
    found = vars(sys.modules[place]) if place in sys.modules else {}
    return tuple(found[name] for name in names if name in found)
