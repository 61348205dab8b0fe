"""Products that can be differentiated again, by x and by the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo.products import Diagonal, jacobian, jmjTp, jmp, jTmjp, jvp, mjp, vjp
from tests import reference_products as reference
from tests.product_settings import Setting, draw, exact, setting, settings

STEP = 3e-6


def weights(J: Tensor) -> Tensor:
    return draw(J.shape[1]).square()


def scales(J: Tensor) -> Tensor:
    return draw(J.shape[2]).square()


def by_jvp(at: Setting, model: nn.Module, x: Any) -> Tensor:
    return jvp(model, x, draw(at.J.shape[2]), at.wrt, create_graph=True)


def by_vjp(at: Setting, model: nn.Module, x: Any) -> Tensor:
    return vjp(model, x, draw(at.J.shape[1]), at.wrt, create_graph=True)


def by_jmp(at: Setting, model: nn.Module, x: Any) -> Tensor:
    return jmp(model, x, None, at.wrt, create_graph=True)


def by_columns(at: Setting, model: nn.Module, x: Any) -> Tensor:
    return jmp(model, x, draw(at.J.shape[2], 1), at.wrt, create_graph=True)


def by_mjp(at: Setting, model: nn.Module, x: Any) -> Tensor:
    return mjp(model, x, None, at.wrt, create_graph=True)


def by_jacobian(at: Setting, model: nn.Module, x: Any) -> Tensor:
    return jacobian(model, x, at.wrt, create_graph=True)


def backward(result: str, **options: Any) -> Callable[[Setting, nn.Module, Any], Tensor]:
    def product(at: Setting, model: nn.Module, x: Any) -> Tensor:
        metric = Diagonal(weights(at.J))
        return jTmjp(model, x, metric, at.wrt, result=result, create_graph=True, **options)

    return product


def forward(result: str) -> Callable[[Setting, nn.Module, Any], Tensor]:
    def product(at: Setting, model: nn.Module, x: Any) -> Tensor:
        return jmjTp(model, x, Diagonal(scales(at.J)), at.wrt, result=result, create_graph=True)

    return product


def pulled(J: Tensor) -> Tensor:
    return reference.backward(J, weights(J).diag())


def pushed(J: Tensor) -> Tensor:
    return reference.forward(J, scales(J).diag())


def diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=1, dim2=2)


CASES: dict[str, tuple[Callable[[Setting, nn.Module, Any], Tensor], Callable[[Tensor], Tensor]]] = {
    "jvp": (by_jvp, lambda J: J @ draw(J.shape[2])),
    "vjp": (by_vjp, lambda J: draw(J.shape[1]) @ J),
    "jmp": (by_jmp, lambda J: J),
    "jmp_one_column": (by_columns, lambda J: J @ draw(J.shape[2], 1)),
    "mjp": (by_mjp, lambda J: J),
    "jacobian": (by_jacobian, lambda J: J),
    "jTmjp": (backward("dense"), pulled),
    "jTmjp_diag": (backward("diag"), lambda J: diagonal(pulled(J))),
    "jTmjp_trace": (backward("trace"), lambda J: diagonal(pulled(J)).sum(1)),
    "jTmjp_diag_sum": (backward("diag", reduce="sum"), lambda J: diagonal(pulled(J)).sum(0)),
    "jmjTp": (forward("dense"), pushed),
    "jmjTp_diag": (forward("diag"), lambda J: diagonal(pushed(J))),
}


# ------------------------------------------------------------------------------------------ by differences


def moved(x: Any, step: float) -> Any:
    """Every floating-point tensor moved by a step in a random direction."""
    if isinstance(x, dict):
        return {name: moved(value, step) for name, value in x.items()}
    if isinstance(x, tuple):
        return tuple(moved(value, step) for value in x)
    return x + step * draw(*x.shape, seed=5) if isinstance(x, Tensor) and x.is_floating_point() else x


@contextmanager
def moved_parameters(model: nn.Module, step: float) -> Iterator[None]:
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(step * draw(*parameter.shape, seed=6 + i))
    yield
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)


@cache
def nearby(at: Setting) -> list[Tensor]:
    """J one step behind and one ahead, along one direction of x and of all parameters together."""
    model, found = at.module.build(), []
    for step in (-STEP, STEP):
        with moved_parameters(model, step):
            found.append(reference.jacobian(model, moved(at.x, step), at.wrt))
    return found


def slope(at: Setting, value: Callable[[Tensor], Tensor]) -> Tensor:
    """The derivative of a random combination of what J becomes, right to STEP^2."""
    behind, ahead = ((value(J) * draw(*value(J).shape, seed=9)).sum() for J in nearby(at))
    return (ahead - behind) / (2 * STEP)


def leaves(x: Any) -> Any:
    """Copies that require a gradient, where a tensor can."""
    if isinstance(x, dict):
        return {name: leaves(value) for name, value in x.items()}
    if isinstance(x, tuple):
        return tuple(map(leaves, x))
    return x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


def tensors(x: Any) -> list[Tensor]:
    values = x.values() if isinstance(x, dict) else x if isinstance(x, tuple) else [x]
    return [value for value in values if isinstance(value, Tensor) and value.requires_grad]


def check(at: Setting, product: str) -> None:
    found, value = CASES[product]
    # By inputs, frozen parameters are parameters like all others.
    model, x = at.module.build().requires_grad_(), leaves(at.x)
    result = found(at, model, x)
    exact(result, value(at.J))
    along = [(t, draw(*t.shape, seed=5)) for t in tensors(x)]
    along += [(p, draw(*p.shape, seed=6 + i)) for i, p in enumerate(model.parameters())]
    scalar = (result * draw(*result.shape, seed=9)).sum()
    grads: Any = [None] * len(along)
    if scalar.requires_grad:  # what has a constant Jacobian may come without a graph
        grads = torch.autograd.grad(scalar, [t for t, _ in along], allow_unused=True)
    terms = [(grad * v).sum() for grad, (_, v) in zip(grads, along, strict=True) if grad is not None]
    assert_close(torch.stack([torch.zeros_like(scalar), *terms]).sum(), slope(at, value), rtol=1e-6, atol=1e-7)


WHOLE = [at for at in settings() if "frozen" not in at.module.tags or at.wrt != "weight"]
DOUBLE = [at for at in WHOLE if "double" in at.module.tags]


@pytest.mark.parametrize("product", ["jvp", "vjp", "jTmjp", "jmjTp"])
@pytest.mark.parametrize("at", WHOLE, ids=lambda at: at.id)
def test_a_product_has_the_derivatives_of_its_definition(at, product):
    check(at, product)


@pytest.mark.parametrize("product", [name for name in CASES if name not in ("jvp", "vjp", "jTmjp", "jmjTp")])
@pytest.mark.parametrize("at", DOUBLE, ids=lambda at: at.id)
def test_every_product_has_the_derivatives_of_its_definition(at, product):
    check(at, product)


@pytest.mark.parametrize("wrt", ["input", "weight"])
@pytest.mark.parametrize("product", CASES)
def test_no_graph_is_kept_unless_asked_for(product, wrt):
    at = setting("layer_norm", wrt)
    names = {"jTmjp": jTmjp, "jmjTp": jmjTp, "jvp": jvp, "vjp": vjp, "jmp": jmp, "mjp": mjp, "jacobian": jacobian}
    name = product.split("_")[0]
    vector: tuple[Tensor, ...] = {"jvp": (draw(at.J.shape[2]),), "vjp": (draw(at.J.shape[1]),)}.get(name, ())
    x = at.x.clone().requires_grad_()
    assert not names[name](at.model, x, *vector, wrt=wrt).requires_grad
    assert x.grad is None and all(parameter.grad is None for parameter in at.model.parameters())


def test_the_volume_of_a_decoder_can_be_descended():
    at = setting("decoder", "input")
    model, z = at.module.build(), at.x.clone().requires_grad_()
    jTmjp(model, z, None, create_graph=True).det().sqrt().sum().backward()
    ahead, behind = (
        reference.backward(reference.jacobian(model, at.x + step * draw(3, 2)), torch.eye(12, dtype=at.x.dtype))
        .det()
        .sqrt()
        .sum()
        for step in (1e-5, -1e-5)
    )
    assert z.grad is not None and model[0].weight.grad is not None
    assert_close((z.grad * draw(3, 2)).sum(), (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-8)
