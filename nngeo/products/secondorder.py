"""How operations carry values, columns J V and traces of second derivatives: one rule for a family of operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap


@dataclass(frozen=True)
class Call:
    """An operation as a function of those of its arguments that vary.

    The tangents (r + 1, *shape) of an argument u(x) hold the derivatives `Du[v_k]` along the r columns of V, then the
    trace `sum_k s_k D^2 u[v_k, v_k]`. Both obey the chain rule for a function g of u:

        D(g u)[v] = Dg Du[v],    D^2(g u)[v, v] = Dg D^2 u[v, v] + D^2 g[Du[v], Du[v]],

    so a rule pushes all r + 1 tangents through Dg, and adds `sum_k s_k D^2 g` along the columns to the last.
    """

    function: Callable[..., Any]
    arguments: tuple[int, ...]  # which ones of the operation's flat arguments vary
    values: tuple[Tensor, ...]
    tangents: tuple[Tensor, ...]
    signs: Tensor | None  # (r,); None: all are 1
    create_graph: bool
    args: tuple  # the operation's own, with plain tensors
    kwargs: Mapping[str, Any]

    def over_columns(self, products: Tensor) -> Tensor:
        """The sum of products (r, ...) over the columns, each with its sign."""
        return products.sum(0) if self.signs is None else torch.tensordot(self.signs.to(products.dtype), products, 1)


# The results of an operation, and their tangents in the same structure; what has none is a constant.
Rule = Callable[[Call], tuple[Any, Any]]


def linear(call: Call) -> tuple[Any, Any]:
    """An operation that is linear in its only varying argument."""
    return call.function(*call.values), vmap(call.function)(*call.tangents)


def affine(call: Call) -> tuple[Any, Any]:
    """An operation without a second derivative in the arguments that vary, jointly."""

    def along(*tangents: Tensor) -> Any:
        return jvp(call.function, call.values, tangents)

    carried: Any = vmap(along, out_dims=(None, 0))  # type: ignore[arg-type]
    return carried(*call.tangents)


def copied(call: Call) -> tuple[Tensor, Tensor]:
    """A copy, of another dtype or memory format perhaps."""
    value, (t,) = call.function(*call.values), call.tangents
    return value, t.to(value, copy=True)


def addition(sign: int) -> Rule:
    """The sum of two arguments, or their difference, with `alpha` before the second."""

    def rule(call: Call) -> tuple[Any, Any]:
        value, factors = call.function(*call.values), (1, sign * call.kwargs.get("alpha", 1))
        terms = [factors[i] * aligned(value)(t) for i, t in zip(call.arguments, call.tangents, strict=True)]
        tangents = _sum(terms)
        return value, tangents.expand(-1, *value.shape)

    return rule


def addmm(call: Call) -> tuple[Tensor, Tensor]:
    """`beta bias + alpha x W` where only x varies."""
    if call.arguments != (1,):
        return affine(call)
    tangents = call.tangents[0] @ call.args[2]
    return call.function(*call.values), tangents * call.kwargs.get("alpha", 1)


def convolution(call: Call) -> tuple[Tensor, Tensor]:
    """Where only the input varies: without its bias it is linear."""
    _, weight, _, *options = call.args
    return call.function(*call.values), vmap(lambda t: torch.ops.aten.convolution(t, weight, None, *options))(
        call.tangents[0]
    )


def division(call: Call) -> tuple[Any, Any]:
    """By what does not vary."""
    return pointwise(call) if call.kwargs.get("rounding_mode") else linear(call)


def fresh(call: Call) -> tuple[Tensor, Tensor]:
    """A new tensor, without derivatives."""
    value = call.function(*call.values)
    return value, value.new_zeros(len(call.tangents[0]), *value.shape)


def pointwise(call: Call) -> tuple[Any, Any]:
    """An elementwise operation of any number of arguments, by its partial derivatives at every element."""
    value, firsts, seconds = partials(call)
    pairs = [(t, first) for t, first in zip(map(aligned(value), call.tangents), firsts, strict=True)]
    tangents = _sum([first * t for t, first in pairs if first is not None])
    if tangents is None:
        return value, None
    if seconds:
        columns = [t[:-1] for t, _ in pairs]
        terms = [second * call.over_columns(columns[i] * columns[j]) for (i, j), second in seconds.items()]
        tangents = added(tangents, _sum(terms))
    return value, tangents


def product(call: Call) -> tuple[Any, Any]:
    """The elementwise product of two arguments that vary."""
    (a, b), (s, t) = call.values, call.tangents
    value = call.function(a, b)
    s, t = aligned(value)(s), aligned(value)(t)
    return value, added(s * b + a * t, 2 * call.over_columns(s[:-1] * t[:-1]))


def contraction(equation: str) -> Rule:
    """A matrix product of two arguments that vary: einsum, with an axis k for the columns that is summed over."""

    def rule(call: Call) -> tuple[Any, Any]:
        value, tangents = affine(call)
        left, right = (t[:-1] for t in call.tangents)
        if call.signs is not None:
            left = left * call.signs.reshape(-1, *[1] * (left.ndim - 1))
        return value, added(tangents, 2 * torch.einsum(equation, left, right))

    return rule


def softmax(call: Call) -> tuple[Tensor, Tensor]:
    """`y_i = exp(u_i) / sum_j exp(u_j)`: `D^2 y[u', u'] = y (c^2 - <y, c^2>)` with `c = u' - <y, u'>`."""
    y, (t,), dim = call.function(*call.values), call.tangents, call.args[1]
    t = t - _mean(y, t, dim)
    squares = call.over_columns(t[:-1] ** 2)
    return y, added(y * t, y * (squares - _mean(y, squares, dim)))


def log_softmax(call: Call) -> tuple[Tensor, Tensor]:
    """`z = log softmax(u)`: `D^2 z[u', u'] = -<y, c^2>` with y and c of `softmax`."""
    z, (t,), dim = call.function(*call.values), call.tangents, call.args[1]
    y = z.exp()
    t = t - _mean(y, t, dim)
    return z, added(t, -_mean(y, call.over_columns(t[:-1] ** 2), dim))


def general(call: Call) -> tuple[Any, Any]:
    """Any smooth operation, by the derivative along a column of the derivative along that column."""
    value, tangents = affine(call)

    def curvature(*column: Tensor) -> Any:
        return jvp(lambda *values: jvp(call.function, values, column)[1], call.values, column)[1]

    curvatures = vmap(curvature)(*(t[:-1] for t in call.tangents))
    if isinstance(value, Tensor):
        return value, added(tangents, call.over_columns(curvatures))
    seconds = [call.over_columns(each) for each in curvatures]
    return value, [added(t, second) for t, second in zip(tangents, seconds, strict=True)]


def partials(call: Call) -> tuple[Tensor, list[Tensor | None], dict[tuple[int, int], Tensor]]:
    """An elementwise operation, its derivatives by each argument, and those by each pair; zeros are left out.

    By double backward of the sum over the elements, whose derivatives are those of the elements.
    """
    shape, keep = torch.broadcast_shapes(*(v.shape for v in call.values)), call.create_graph
    with torch.enable_grad():
        # Every argument is a tensor of its own, also where one tensor is given twice.
        given = [v if keep else v.detach() for v in call.values]
        leaves = [v.expand(shape) if v.requires_grad else v.detach().expand(shape).requires_grad_() for v in given]
        value = call.function(*leaves)
        if not (value.is_floating_point() and value.requires_grad):
            return value.detach(), [None] * len(leaves), {}
        firsts = _expanded(value, leaves)
        seconds = {}
        for i, first in enumerate(firsts):
            if first is None or not first.requires_grad:
                continue
            for j, second in enumerate(_expanded(first, leaves)):
                if second is not None:
                    seconds[i, j] = second
    if keep:
        return value, firsts, seconds
    found = [None if first is None else first.detach() for first in firsts]
    return value.detach(), found, {pair: second.detach() for pair, second in seconds.items()}


def added(tangents: Tensor, second: Tensor) -> Tensor:
    """The tangents with a term added to the trace; in place where no graph keeps them."""
    if tangents.requires_grad or second.requires_grad:
        return torch.cat([tangents[:-1], tangents[-1:] + second])
    tangents[-1].add_(second)
    return tangents


def aligned(value: Tensor) -> Callable[[Tensor], Tensor]:
    """Tangents (r + 1, *shape) with axes of length 1 before those of a shape that is broadcast to the value's."""
    return lambda t: t.reshape(len(t), *[1] * (value.ndim - t.ndim + 1), *t.shape[1:])


def _expanded(value: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(value.sum(), leaves, create_graph=True, allow_unused=True))


def _mean(weights: Tensor, t: Tensor, dim: int) -> Tensor:
    return (weights * t).sum(dim % weights.ndim - weights.ndim, keepdim=True)


def _sum(terms: list[Tensor]) -> Any:
    return sum(terms[1:], terms[0]) if terms else None
