"""Weighted gradients of convolutions, without patches."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn

from nngeo.descent.autogram.choices import Choice
from nngeo.descent.autogram.graph import Graph
from nngeo.generators.sources import full_precision

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def place_of_convolution(choice: Choice, model: nn.Module, graph: Graph, b: int | None) -> int | None:
    """Which use of a module `weighted_convolution` serves, if it does; b examples, or None for losses of the batch."""
    places = [j for j, use in enumerate(graph.uses) if use.module in choice.source.hosts]
    if not choice.source.fast or len(choice.source.hosts) != 1 or len(places) != 1:
        return None
    use = graph.uses[places[0]]
    module: Any = model.get_submodule(use.module)
    if not isinstance(module, _CONVOLUTIONS) or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    shapes = [*use.call.argument_shapes(), *use.call.returned]
    batched = all(shape is not None and len(shape) == 2 + len(module.stride) for shape in shapes)
    apart = b is None or (choice.reading == "first" and all(shape is not None and shape[0] == b for shape in shapes))
    return places[0] if batched and apart and len(shapes) == 2 else None


def weighted_convolution(module: Any, x: Tensor, g: Tensor, w: Tensor, names: Container[str]) -> dict[str, Tensor]:
    """{parameter: (*shape)}, gradients from g (k, b, ...) summed with weights w (k, b), or (k, 1) for all examples."""
    x, g = full_precision(x), full_precision(g)
    d = torch.einsum("kb...,kb->b...", g, w.expand(g.shape[:2]))
    wanted = (False, "weight" in names, "bias" in names)
    geometry = (module.stride, module.padding, module.dilation, False, [0] * len(module.stride), module.groups)
    sizes = [module.out_channels]
    found = torch.ops.aten.convolution_backward(d, x, module.weight.detach().to(x), sizes, *geometry, wanted)
    return {name: grad for name, grad in zip(("weight", "bias"), found[1:], strict=True) if name in names}
