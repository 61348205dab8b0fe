"""How a layer's inputs x and output gradients g become gradients by parameter, one family of layers at a time.

x and g come example by example: x (b, ...) and g (k, b, ...), where `...` is what the module sees, or returns, when it
is called on one example, its batch axis included. That axis has size 1, or m where a model folds m positions of an
example into the batch, as in `x.reshape(b * m, d)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nngeo.layers.collection import Layer
from nngeo.linalg.arguments import instance, shown
from nngeo.linalg.matrixview import MatrixView
from nngeo.linalg.outer import OuterProducts
from nngeo.linalg.selected import SelectedProducts

Names = Mapping[str, str]  # parameter name in the called module -> parameter name in the layer


class Gradients(ABC):
    """Gradients (k, b, p) by the parameters of one layer, from one call of one module."""

    @abstractmethod
    def dense(self) -> Tensor:
        """(k, b, p)."""

    @abstractmethod
    def one(self, k: int, b: int) -> Tensor:
        """(p,), of one cotangent and one example."""

    @abstractmethod
    def combined(self, w: Tensor) -> Tensor:
        """(m, p), sums over k and b with weights w (m, k, b)."""


@dataclass(frozen=True)
class Factored(Gradients):
    """Gradients of a linear map, as factors; the view says which matrix the parameters are."""

    view: MatrixView
    products: OuterProducts | SelectedProducts

    def dense(self) -> Tensor:
        return self.view.to_flat(self.products.dense())

    def one(self, k: int, b: int) -> Tensor:
        return self.view.to_flat(self.products.one(k, b).dense())[0, 0]

    def combined(self, w: Tensor) -> Tensor:
        return self.view.to_flat(self.products.combine(w))


@dataclass(frozen=True)
class Computed(Gradients):
    """Gradients that are computed when asked for."""

    compute: Callable[[], Tensor]

    def dense(self) -> Tensor:
        return self.compute()

    def one(self, k: int, b: int) -> Tensor:
        return self.compute()[k, b]

    def combined(self, w: Tensor) -> Tensor:
        return torch.einsum("kbp,mkb->mp", self.compute(), w)


class LayerRule(ABC):
    """Parameter gradients of one kind of layer."""

    parameters: tuple[str, ...] = ("weight", "bias")

    def serves(self, module: Any) -> bool:
        """Whether the module's parameters are those that the rule knows, and really are parameters."""
        own = [name for name, p in module._parameters.items() if p is not None]
        return all(name in self.parameters for name in own) and "weight" in own

    @abstractmethod
    def gradients(self, module: Any, x: Tensor, g: Tensor, layer: Layer, names: Names) -> Gradients:
        """Gradients by the layer's parameters from one call, x (b, ...) and g (k, b, ...)."""


class LinearMapRule(LayerRule):
    """Layers that apply one matrix at every position: `out[b, t] = W in[b, t] + bias`.

    A subclass brings inputs and gradients to that form. Everything Kronecker follows from it.
    """

    transposed = False

    @abstractmethod
    def inputs(self, module: Any, x: Tensor) -> Tensor:
        """Inputs (n, b, t, i), without the column of ones."""

    @abstractmethod
    def outgrads(self, module: Any, g: Tensor) -> Tensor:
        """Output gradients (n, k, b, t, o)."""

    def with_room(self, module: Any, x: Tensor, bias: bool, by_example: bool = False) -> Tensor:
        """The inputs as a new tensor; if there is a `bias`, with a last column for it, whatever that holds.

        In memory, all examples of a feature may come together, or, `by_example`, all features of an example.
        """
        a = self.inputs(module, x)
        return F.pad(a, (0, 1)) if bias else a.clone()

    def groups(self, module: Any) -> int:
        """The number n of maps side by side."""
        return 1

    def kernel(self, module: Any) -> int:
        """For transposed weights, stored (i / kernel, o, kernel)."""
        return 1

    def view(self, module: Any, layer: Layer) -> MatrixView:
        """How the layer's parameters are a matrix."""
        n, size, shape = self.groups(module), self.kernel(module), module.weight.shape
        rows, columns = (shape[1], shape[0] // n * size) if self.transposed else (shape[0] // n, shape[1:].numel())
        owned = columns if "weight" in layer.shapes else 0
        return MatrixView(n, rows, owned, "bias" in layer.shapes, self.transposed, size)

    def gradients(self, module: Any, x: Tensor, g: Tensor, layer: Layer, names: Names) -> Gradients:
        view, owned, version = self.view(module, layer), {names[name] for name in names}, x._version

        def inputs(examples: slice, by_example: bool) -> Tensor:
            if x._version != version:
                raise ValueError(
                    f"The input of layer {layer.name!r} was changed in place after the layer had used it. Does the "
                    "loader fill the same tensors again? Let it give new ones."
                )
            a = self.with_room(module, x[examples], view.bias, by_example)
            a = a if view.columns else a[..., a.shape[-1] - view.bias :]
            if "weight" not in owned:
                a[..., : view.columns] = 0
            if view.bias:
                # The bias is the weight of a constant input: 1, or 0 where this call's bias is another layer's.
                a[..., -1] = float("bias" in owned)
            return a

        return Factored(view, OuterProducts(inputs, self.outgrads(module, g), view.shape[2]))

    def nothing(self, module: Any, layer: Layer, k: int, b: int, like: Tensor) -> Factored:
        """Zero gradients, for a layer that is not called."""
        view = self.view(module, layer)
        n, o, i = view.shape
        return Factored(view, OuterProducts(like.new_zeros(n, b, 1, i), like.new_zeros(n, k, b, 1, o)))


class ScaleRule(LayerRule):
    """Layers that scale a normalized input: `out = weight * normalized(x) + bias`."""

    @abstractmethod
    def normalized(self, module: Any, x: Tensor) -> Tensor:
        """The layer without weight and bias, on a batch (b, ...)."""

    @abstractmethod
    def positions(self, module: Any, tensor: Tensor) -> Tensor:
        """(k, b, m, *output of the layer) -> (k, b, t, entries of the weight)."""

    def gradients(self, module: Any, x: Tensor, g: Tensor, layer: Layer, names: Names) -> Gradients:
        def compute() -> Tensor:
            scaled = self.normalized(module, x.flatten(0, 1)).unflatten(0, x.shape[:2])
            parts = {"weight": g * scaled, "bias": g}
            sums = {names[name]: self.positions(module, parts[name]).sum(-2) for name in names}
            return assemble(layer, sums, g.shape[:2], g)

        return Computed(compute)


def assemble(layer: Layer, parts: Mapping[str, Tensor], lead: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
    """{parameter: (*lead, ...)} -> (*lead, p) in the layer's order, zero for parameters that are not there."""
    pieces = [
        parts[local].reshape(*lead, size) if local in parts else like.new_zeros(*lead, size)
        for local, size in zip(layer.shapes, layer.sizes(), strict=True)
    ]
    return torch.cat(pieces, -1)


_RULES: dict[type[nn.Module], LayerRule] = {}
_RULES_BY_NAME: dict[str, LayerRule] = {}


def register_rule(*module_types: type[nn.Module] | str) -> Callable[[type[LayerRule]], type[LayerRule]]:
    """Let a rule serve these module types, given as classes or, where importing them costs, as "package.module.Class".

    The rule is used for subclasses, too, as long as they keep `forward`. Every fast rule is compared with autograd on
    the first examples of a sweep, so a rule that does not fit a layer is found out and passed over.
    """

    for kind in module_types:
        if not isinstance(kind, str) and not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"register_rule takes types of modules, or their full names; got {shown(kind)}.")

    def register(rule: type[LayerRule]) -> type[LayerRule]:
        for kind in module_types:
            if isinstance(kind, str):
                _RULES_BY_NAME[kind] = rule()
            else:
                _RULES[kind] = rule()
        return rule

    return register


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule of the module's type, or of a parent type whose `forward` it has not replaced; None without one."""
    instance("module", module, nn.Module)
    for kind in type(module).__mro__:
        rule = _RULES.get(kind) or _RULES_BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")
        if rule is not None and type(module).forward is getattr(kind, "forward", None) and rule.serves(module):
            return rule
    return None
