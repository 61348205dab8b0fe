"""What every Jacobian product is: per-example Jacobians row by row by autograd, then plain matrix algebra.

Axes: b example, o output, n input or parameter (P parameters), c column or row of a matrix; all flat, row-major.
Every example is run alone, as a batch of one. x is a tensor, a tuple of arguments, or a dict of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[..., Tensor] | None
Matrices = Tensor  # (b, rows, columns)


# ------------------------------------------------------------------------------------------ Jacobians


def arguments(model: nn.Module, x: Any) -> dict[str, Any]:
    """x by the names of the arguments of forward; by position where they have none."""
    if isinstance(x, dict):
        return x
    given = x if isinstance(x, tuple) else (x,)
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] or range(len(given))
    return {str(name): value for name, value in zip(names, given, strict=False)}


def wanted(model: nn.Module, x: Any, wrt: str | Sequence[str]) -> list[str]:
    """The arguments that `wrt` means."""
    known = arguments(model, x)
    if wrt in ("input", "inputs"):
        return [name for name, value in known.items() if isinstance(value, Tensor) and value.is_floating_point()]
    return [wrt] if isinstance(wrt, str) else list(wrt)


def jacobian(
    model: nn.Module,
    x: Any,
    wrt: str | Sequence[str] = "input",
    parameters: list[nn.Parameter] | None = None,
    function: Function = None,
) -> Matrices:
    """(b, o, n) by inputs, or (b, o, P) by `parameters`, by default those that are trained, tied ones once."""
    known = arguments(model, x)
    b = next(len(value) for value in known.values() if isinstance(value, Tensor))
    return torch.stack([_example(model, _cut(x, i), wrt, parameters, function) for i in range(b)])


def _example(model: nn.Module, x: Any, wrt: Any, parameters: list[nn.Parameter] | None, function: Function) -> Tensor:
    """(o, n) of a batch of one."""
    leaves: list[Tensor]
    if wrt in ("weight", "weights"):
        leaves = [p for p in model.parameters() if p.requires_grad] if parameters is None else list(parameters)
    else:
        names = wanted(model, x, wrt)
        known = {name: v.clone().requires_grad_() if name in names else v for name, v in arguments(model, x).items()}
        leaves = [known[name] for name in names]
        # What the module gets is no leaf: it may change its input in place.
        given = {name: value.clone() if name in names else value for name, value in known.items()}
        x = given if isinstance(x, dict) else tuple(given.values())
    outputs = (function or model)(**x) if isinstance(x, dict) else (function or model)(*_tuple(x))
    return torch.stack([_gradient(output, leaves) for output in outputs.flatten()])


def _gradient(output: Tensor, leaves: list[Tensor]) -> Tensor:
    """(n,), of a scalar; zero where it does not depend on a leaf."""
    grads: Any = [None] * len(leaves)
    if output.requires_grad:
        grads = torch.autograd.grad(output, leaves, retain_graph=True, allow_unused=True)
    pairs = zip(grads, leaves, strict=True)
    return torch.cat([(torch.zeros_like(p) if grad is None else grad).flatten() for grad, p in pairs])


def _cut(x: Any, i: int) -> Any:
    """Example i alone."""
    if isinstance(x, dict):
        return {name: _cut(value, i) for name, value in x.items()}
    if isinstance(x, tuple):
        return tuple(_cut(value, i) for value in x)
    return x[i : i + 1].clone() if isinstance(x, Tensor) else x


def _tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


# ------------------------------------------------------------------------------------------ algebra


def forward(jacobian: Matrices, metric: Tensor, second: Matrices | None = None) -> Matrices:
    """J1 M J2' (b, o, o), M (b, n, n) or (n, n)."""
    return jacobian @ metric @ (jacobian if second is None else second).mT


def backward(jacobian: Matrices, metric: Tensor, second: Matrices | None = None) -> Matrices:
    """J1' M J2 (b, n, n), M (b, o, o) or (o, o)."""
    return jacobian.mT @ metric @ (jacobian if second is None else second)


def result(matrix: Tensor, kind: str, sizes: Mapping[str, int] | None = None) -> Any:
    """What a square matrix (..., m, m) is reported as; "factor": as the product F F'; "blocks": by sizes."""
    if kind == "diag":
        return matrix.diagonal(dim1=-2, dim2=-1)
    if kind == "trace":
        return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    if kind == "blocks":
        assert sizes is not None
        ends = torch.tensor(list(sizes.values())).cumsum(0).tolist()
        return {name: matrix[..., e - p : e, e - p : e] for (name, p), e in zip(sizes.items(), ends, strict=True)}
    assert kind in ("dense", "factor")
    return matrix


# ------------------------------------------------------------------------------------------ diagonals between layers


def layers(model: nn.Module) -> list[nn.Module]:
    """The modules of nested Sequentials, in the order in which they run."""
    if not isinstance(model, nn.Sequential):
        return [model]
    return [layer for child in model for layer in layers(child)]


def features(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What every layer gets."""
    found = [x]
    for layer in layers(model)[:-1]:
        found.append(layer(found[-1].clone()).detach())
    return found


def diagonals_backward(model: nn.Module, x: Tensor, metric: Tensor, wrt: str) -> Tensor:
    """(b, n) or (b, P): m <- diag(J_x' diag(m) J_x) from the last layer on, and h = diag(J_w' diag(m) J_w) at each."""
    m, found = metric, []
    for layer, h in reversed(list(zip(layers(model), features(model, x), strict=True))):
        if any(p.requires_grad for p in layer.parameters()):
            found.append((jacobian(layer, h, "weight").square() * m[..., None]).sum(1))
        m = (jacobian(layer, h, "input").square() * m[..., None]).sum(1)
    return torch.cat(found[::-1], -1) if wrt == "weight" else m


def diagonals_forward(model: nn.Module, x: Tensor, metric: Tensor, wrt: str) -> Tensor:
    """(b, o): s <- diag(J_x diag(s) J_x') + diag(J_w diag(M) J_w') from the first layer on; metric (b, n) or (b, P)."""
    s = metric if wrt == "input" else torch.zeros_like(x.flatten(1))
    rest = metric
    for layer, h in zip(layers(model), features(model, x), strict=True):
        s = (jacobian(layer, h, "input").square() * s[:, None]).sum(-1)
        if wrt == "weight" and any(p.requires_grad for p in layer.parameters()):
            by_weight = jacobian(layer, h, "weight").square()
            here, rest = rest.split([by_weight.shape[-1], rest.shape[-1] - by_weight.shape[-1]], -1)
            s = s + (by_weight * here[:, None]).sum(-1)
    return s
