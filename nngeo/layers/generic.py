"""The rule for any module at all: run it again, example by example, and differentiate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

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
        parameters = {name: self.module.get_parameter(name).detach() for name in self.names}
        compute = self._vectorized if self.vectorized else self._looped
        with plain_kernels(self.module), warnings.catch_warnings():
            # Where torch has no batching rule, it loops. As an error, what it says would keep tensors alive for good.
            warnings.filterwarnings("ignore", message=".*performance drop", category=UserWarning)
            return compute(parameters, list(inputs), list(grads))

    def _vectorized(self, parameters, inputs, grads):
        used = [j for j, g in enumerate(grads) if g is not None]

        def one(inputs: list[Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
            def run(parameters: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
                outputs = self.forward(parameters, inputs)
                return tuple(outputs[j] for j in used)  # type: ignore[misc]

            pull: Any = vjp(run, parameters)[1]
            return vmap(lambda *g: pull(g)[0])(*grads)

        found = vmap(one, in_dims=(0, 1))(inputs, [grads[j] for j in used])
        return {name: grad.detach().transpose(0, 1) for name, grad in found.items()}

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
