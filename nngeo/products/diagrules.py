"""How a diagonal metric passes a module when only its diagonal is kept, one kind of module at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nngeo.linalg.arguments import shown

Visit = Callable[[nn.Module, Tensor], "Passage"]  # run a child of a container


@dataclass
class Passage:
    """One call of a module with x (b, ...), which gave y (b, ...); of a container with those of its children.

    What a rule keeps of the call is in `kept`.
    """

    module: Any
    rule: DiagRule
    x: Tensor
    y: Tensor
    children: list[Passage] = field(default_factory=list)
    kept: Any = None

    def wanted(self, collected: Collected) -> bool:
        """Whether the diagonal at some of its parameters is asked for."""
        return any(collected.wants(p) for p in self.module.parameters())


class Collected:
    """Diagonals at parameters: those to be found (`add`), or those that are given (`of`)."""

    def __init__(self, wanted: dict[int, Tensor | None]):
        self._found = wanted  # by id of the parameter

    def wants(self, p: Tensor | None) -> bool:
        """Whether a diagonal is asked for, or given, at a parameter."""
        return p is not None and id(p) in self._found

    def add(self, p: Tensor, h: Tensor) -> None:
        """Add the diagonal h (b, entries of p) that one use of the parameter leaves."""
        before = self._found[id(p)]
        self._found[id(p)] = h if before is None else before + h

    def of(self, p: Tensor | None) -> Tensor | None:
        """(b or 1, entries of p), or None where nothing is known."""
        return self._found.get(id(p))


class DiagRule(ABC):
    """Diagonals through one kind of module: m (b, ...) at its output, s (b, ...) at its input.

    `pull` is exact for a diagonal m, and loses what the module puts off the diagonal; so is `push`.
    """

    def serves(self, module: Any) -> bool:
        """Whether the rule holds for this module, of a type for which it is registered."""
        return True

    def forward(self, module: Any, x: Tensor, visit: Visit) -> Passage:
        """Run the module. A container runs its children by `visit`, and keeps what that returns."""
        return Passage(module, self, x, module(x.clone()))  # which it may change in place

    @abstractmethod
    def pull(self, call: Passage, m: Tensor, found: Collected, below: bool) -> Tensor | None:
        """diag(J' diag(m) J) at the input, which is needed if `below`; that at wanted parameters goes to `found`."""

    @abstractmethod
    def push(self, call: Passage, s: Tensor | None, given: Collected) -> Tensor | None:
        """diag(J diag(s) J') at the output, and what the parameters add to it; None is zero."""


_RULES: dict[type[nn.Module], DiagRule] = {}


def register_diag_rule(*module_types: type[nn.Module]) -> Callable[[type[DiagRule]], type[DiagRule]]:
    """Let a rule serve these module types in `method="diag_backprop"`, and subclasses that keep their `forward`.

    Modules without a rule are one layer each, whatever they contain: the exact diagonal is taken there.
    """

    for kind in module_types:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"`module_types` should be classes of torch.nn.Module; got {shown(kind)}.")

    def register(rule: type[DiagRule]) -> type[DiagRule]:
        if not (isinstance(rule, type) and issubclass(rule, DiagRule)):
            raise TypeError(f"`rule` should be a class that inherits from DiagRule; got {shown(rule)}.")
        for kind in module_types:
            _RULES[kind] = rule()
        return rule

    return register


def diag_rule_for(module: nn.Module) -> DiagRule | None:
    """The rule of the module's type, or of a parent type whose `forward` it keeps; None without one, or with hooks."""
    if isinstance(module, torch.jit.ScriptModule) or module._forward_hooks or module._forward_pre_hooks:
        return None
    for kind in type(module).__mro__:
        rule = _RULES.get(kind)
        same = type(module).forward is getattr(kind, "forward", None)
        if rule is not None and same and rule.serves(module):
            return rule
    return None


def add(s: Tensor | None, t: Tensor | None) -> Tensor | None:
    """The sum, where None is zero."""
    return t if s is None else s if t is None else s + t


@register_diag_rule(nn.Sequential)
class SequentialRule(DiagRule):
    """One child after the other."""

    def forward(self, module: Any, x: Tensor, visit: Visit) -> Passage:
        children: list[Passage] = []
        y = x
        for child in module:
            children.append(visit(child, y))
            y = children[-1].y
        return Passage(module, self, x, y, children)

    def pull(self, call: Passage, m: Tensor, found: Collected, below: bool) -> Tensor | None:
        needed = [below]
        for child in call.children:
            needed.append(needed[-1] or child.wanted(found))
        result: Tensor | None = m
        for child, ahead, this in reversed(list(zip(call.children, needed, needed[1:], strict=False))):
            if result is None or not this:
                return None
            result = child.rule.pull(child, result, found, ahead)
        return result

    def push(self, call: Passage, s: Tensor | None, given: Collected) -> Tensor | None:
        for child in call.children:
            s = child.rule.push(child, s, given)
        return s


ELEMENTWISE: tuple[type[nn.Module], ...] = (
    *(nn.Tanh, nn.ReLU, nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU, nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU, nn.ReLU6),
    *(nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Mish, nn.LogSigmoid, nn.Softsign, nn.Tanhshrink, nn.Softshrink),
    *(nn.Hardshrink, nn.Threshold),
)


class _Differentiated(DiagRule):
    """Rules that keep the graph of the call."""

    def forward(self, module: Any, x: Tensor, visit: Visit) -> Passage:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = module(leaf.clone() if getattr(module, "inplace", False) else leaf)
        return Passage(module, self, x, y.detach(), kept=(leaf, y))


@register_diag_rule(*ELEMENTWISE)
class ElementwiseRule(_Differentiated):
    """`a'(x)^2 m`: a diagonal stays one."""

    def pull(self, call: Passage, m: Tensor, found: Collected, below: bool) -> Tensor | None:
        return self._slope(call).square().mul_(m) if below else None

    def push(self, call: Passage, s: Tensor | None, given: Collected) -> Tensor | None:
        return None if s is None else self._slope(call).square().mul_(s)

    def _slope(self, call: Passage) -> Tensor:
        leaf, y = call.kept
        return torch.autograd.grad(y, leaf, torch.ones_like(y), retain_graph=True)[0]


SELECTIONS: tuple[type[nn.Module], ...] = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),  # in eval mode
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    *(nn.Upsample, nn.UpsamplingNearest2d),
)


@register_diag_rule(*SELECTIONS)
class SelectionRule(_Differentiated):
    """Every output is one of the inputs, or constant: J holds zeros and ones, so squaring changes nothing."""

    def serves(self, module: Any) -> bool:
        return not (
            isinstance(module, nn.Upsample) and "nearest" not in module.mode or getattr(module, "return_indices", False)
        )

    def pull(self, call: Passage, m: Tensor, found: Collected, below: bool) -> Tensor | None:
        leaf, y = call.kept
        return torch.autograd.grad(y, leaf, m, retain_graph=True)[0] if below else None

    def push(self, call: Passage, s: Tensor | None, given: Collected) -> Tensor | None:
        return None if s is None else torch.func.jvp(call.module, (call.x.clone(),), (s,))[1]
