"""What else would fit, where a matrix does not; and copies that do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nngeo.layers.collection import Layer, LayerCollection
from nngeo.layers.rule import LinearMapRule, rule_for
from nngeo.linalg import memory
from nngeo.linalg.memory import require_memory

if TYPE_CHECKING:
    from nngeo.generators import Generator


def copied(what: str, data: Tensor) -> Tensor:
    """A copy, if it fits; see `require_memory`."""
    require_memory(what, data.numel(), data.dtype, data.device, "Use `data`, the tensor itself.")
    return data.clone()


def what_fits(
    layers: LayerCollection, dtype: torch.dtype, device: torch.device, generator: Generator | None = None
) -> str:
    """A sentence that names the representations of these parameters that would fit, and take the generator's model."""
    blocks = {name: layer.numel() ** 2 for name, layer in layers.layers.items()}
    entries = {"PMatBlockDiag": sum(blocks.values())}
    if generator is None or generator.sums_squares:
        factors = {} if generator is None else _factors(layers, generator.model)
        if factors.keys() == blocks.keys():
            entries["PMatKFAC or PMatEKFAC"] = sum(factors.values())
        elif factors:
            entries["PMatEKFACBlockDiag"] = sum((blocks | factors).values())
        entries["PMatQuasiDiag"] = 2 * layers.numel()
    entries["PMatDiag"] = layers.numel()
    free = memory.available_bytes(device)
    fitting = [name for name, numel in entries.items() if free is None or numel * dtype.itemsize <= free]
    return f"What would fit: {', '.join([*fitting, 'PMatImplicit'])}."


def _factors(layers: LayerCollection, model: nn.Module) -> dict[str, int]:
    """{layer: entries of its Kronecker factors}, of layers that are linear maps by their type.

    Nothing for a model with weights that several modules share: whether these have factors is seen in a sweep alone.
    """
    if len(list(model.named_parameters(remove_duplicate=False))) > len(list(model.parameters())):
        return {}
    found = {}
    for name, module in layers.get_layerid_module_map(model).items():
        rule, layer = rule_for(module), layers[name]
        if isinstance(rule, LinearMapRule) and _own_weight(module, layer):
            n, o, i = rule.view(module, layer).shape
            found[name] = n * (o**2 + i**2)
    return found


def _own_weight(module: nn.Module, layer: Layer) -> bool:
    """Whether the layer's parameters are the module's, and not those of its parametrizations."""
    return all(local in module._parameters for local in layer.shapes)
