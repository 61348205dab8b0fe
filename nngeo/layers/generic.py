"""The rule for any module at all: run it again, example by example, and differentiate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from nngeo.layers.kernels import plain_kernels

Forward = Callable[..., list[Tensor | None]]  # (parameters, *inputs of one example) -> outputs, as in the record


class AnyLayerRule:
    """Gradients by chosen parameters of any module, from its inputs and output gradients.

    The specification of every fast rule, and the fallback for layers that have none. Costs a forward and a backward
    for every example and cotangent: vectorised over both by torch.func, or, for modules that it can't vectorise
    (recurrent layers; control flow that depends on data), in a loop.
    """

    def __init__(self, module: nn.Module, forward: Forward, names: Sequence[str], vectorized: bool = True):
        self.module, self.forward, self.names, self.vectorized = module, forward, list(names), vectorized

    def gradients(self, inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """{parameter: (k, b, *shape)} from inputs (b, ...), or None for shared ones, and grads (k, b, ...).

        `inputs` are those that have an example axis; `forward` knows the others.
        """
        compute = self._vectorized if self.vectorized else self._looped
        with plain_kernels(self.module), warnings.catch_warnings():
            # Where torch has no batching rule, it loops. As an error, what it says would keep tensors alive for good.
            warnings.filterwarnings("ignore", message=".*performance drop", category=UserWarning)
            parameters = {name: self.module.get_parameter(name).detach() for name in self.names}
            return compute(parameters, list(inputs), list(grads))

    def _vectorized(self, parameters, inputs, grads):
        used = [j for j, g in enumerate(grads) if g is not None]
        b = grads[used[0]].shape[1]
        # Each example has its own parameters, so that one backward pass serves all of them.
        leaves = {name: p.expand(b, *p.shape).requires_grad_() for name, p in parameters.items()}

        def one(parameters: Mapping[str, Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
            outputs = self.forward(parameters, inputs)
            return tuple(outputs[j] for j in used)  # type: ignore[misc]

        padded = any(getattr(module, "padding_idx", None) is not None for module in self.module.modules())
        with torch.enable_grad(), _Padding() if padded else nullcontext():
            outputs = vmap(one)(leaves, inputs)
        live = [(out, grads[j]) for out, j in zip(outputs, used, strict=True) if out.requires_grad]
        reached: list[str] = []

        def pull(*g: Tensor) -> list[Tensor]:
            found = torch.autograd.grad(
                [out for out, _ in live], list(leaves.values()), g, retain_graph=True, allow_unused=True
            )
            reached[:] = [name for name, grad in zip(leaves, found, strict=True) if grad is not None]
            return [grad for grad in found if grad is not None]

        rows = vmap(pull)(*[g for _, g in live]) if live else []
        found = dict(zip(reached, rows, strict=True))
        k = len(grads[used[0]])
        return {n: found[n].detach() if n in found else p.new_zeros(k, *p.shape) for n, p in leaves.items()}

    def _looped(self, parameters, inputs, grads):
        used = [j for j, g in enumerate(grads) if g is not None]
        k, b = grads[used[0]].shape[:2]
        found = {name: p.new_zeros(k, b, *p.shape) for name, p in parameters.items()}
        for e in range(b):
            leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
            with torch.enable_grad():
                outputs = self.forward(leaves, [x[e] for x in inputs])
            live = [(out, grads[j]) for j in used if (out := outputs[j]) is not None and out.requires_grad]
            ends = [out for out, _ in live]
            for c in range(k if live else 0):
                along = [g[c, e] for _, g in live]
                row = torch.autograd.grad(ends, list(leaves.values()), along, retain_graph=True, allow_unused=True)
                for name, grad in zip(leaves, row, strict=True):
                    if grad is not None:
                        found[name][c, e] = grad
        return found


class _Padding(TorchFunctionMode):
    """Embeddings stop the gradient at `padding_idx` by themselves: vmap's, of many weights, take it for another row."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not F.embedding:
            return func(*args, **(kwargs or {}))
        return self._embedded(*args, **(kwargs or {}))

    def _embedded(
        self, index: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        out = F.embedding(index, weight, None, *args, **kwargs)
        if padding_idx is None:
            return out
        return torch.where((index == padding_idx % len(weight)).unsqueeze(-1), out.detach(), out)
