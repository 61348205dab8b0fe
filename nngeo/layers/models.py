"""Which models can be served: what wraps, shards, scripts or has not yet made their parameters is recognised here."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def check_structure(model: nn.Module) -> None:
    """Raise unless the parameters of a model are there, whole, where its layers can be watched.

    Raises:
        ValueError: a lazy module that has not been run.
        NotImplementedError: a scripted module with parameters, or parameters that are shards (FSDP, DTensor).
    """
    check_whole(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and next(module.parameters(), None) is not None:
            raise NotImplementedError(
                f"{_named(name, module)} is a scripted module (TorchScript), of which the inputs of the layers are not "
                "seen: derivatives by weights need the module before torch.jit."
            )


def check_whole(model: nn.Module) -> None:
    """Raise where parameters are not there yet, or only a shard of them is."""
    sharded = _known("torch.distributed.fsdp", "FullyShardedDataParallel", "FSDPModule")
    shards = _known("torch.distributed.tensor", "DTensor")
    for name, module in model.named_modules():
        if isinstance(module, sharded):
            raise NotImplementedError(
                f"{_named(name, module)} is sharded by FSDP: this process holds a part of the parameters only, and "
                "nngeo would take it for all. Give it the model before it was sharded, with the full state dict."
            )
        for local, p in module._parameters.items():
            if is_lazy(p):
                raise ValueError(
                    f"Parameter {local!r} of {_named(name, module)} has no shape yet: run the model once, "
                    "model(example), before its layers are counted."
                )
            if isinstance(p, shards):
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
    check_whole(model)
    for name, p in model.named_parameters():
        if p.device.type == "meta":
            raise ValueError(
                f"Parameter {name!r} is on the meta device, where tensors have no values: call "
                "model.to_empty(device=...) and load the weights first."
            )
    for name, module in model.named_modules():
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
    shard = isinstance(p, _known("torch.distributed.tensor", "DTensor")) or getattr(p, "_fsdp_flattened", False)
    return not shard and not is_lazy(p)


def check_no_shard(name: str, tensor: Tensor) -> None:
    """Raise for a parameter of which this process holds a part only."""
    if not is_whole(tensor):
        kind = "a DTensor" if type(tensor).__name__ == "DTensor" else "a parameter sharded by FSDP"
        raise NotImplementedError(
            f"{name} is {kind}, of which this process holds a part only, and nngeo would take it for all. Give whole "
            "parameters, of the model before it was sharded."
        )


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
