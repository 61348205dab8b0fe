"""Products on an accelerator, where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nngeo.products import Diagonal, LowRankPlusDiagonal, jacobian, jmjTp, jTmjp, jvp, vjp
from tests import reference_products as reference
from tests.product_settings import Setting, draw, settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
every = pytest.mark.parametrize("at", settings(), ids=lambda at: at.id)


def moved(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: moved(value) for name, value in x.items()}
    if isinstance(x, tuple):
        return tuple(map(moved, x))
    return x.cuda() if isinstance(x, Tensor) else x


def products(at: Setting, to: Any) -> dict[str, Tensor]:
    o, n = at.J.shape[1:]
    model, x = at.module.build().to(to(draw(1)).device), to(at.x)
    v, w, d = (to(draw(3, size)) for size in (n, o, o))
    low = LowRankPlusDiagonal(to(draw(n, 2)), to(draw(n).square()))
    return {
        "jvp": jvp(model, x, v, at.wrt),
        "vjp": vjp(model, x, w, at.wrt),
        "jacobian": jacobian(model, x, at.wrt),
        "jTmjp": jTmjp(model, x, Diagonal(d), at.wrt),
        "diag": jTmjp(model, x, Diagonal(d), at.wrt, result="diag", reduce="sum"),
        "jmjTp": jmjTp(model, x, low, at.wrt),
        "graph": jTmjp(model, x, None, at.wrt, create_graph=True).detach(),
    }


@every
def test_products_on_a_device_are_those_of_the_definitions(at):
    v, w, d = draw(3, at.J.shape[2]), draw(3, at.J.shape[1]), draw(3, at.J.shape[1])
    low = draw(at.J.shape[2], 2)
    pulled = reference.backward(at.J, d.diag_embed())
    expected = {
        "jvp": (at.J @ v[..., None])[..., 0],
        "vjp": (w[:, None] @ at.J)[:, 0],
        "jacobian": at.J,
        "jTmjp": pulled,
        "diag": pulled.sum(0).diag(),
        "jmjTp": reference.forward(at.J, low @ low.mT + draw(at.J.shape[2]).square().diag()),
        "graph": at.J.mT @ at.J,
    }
    found = products(at, moved)
    assert all(tensor.is_cuda for tensor in found.values())
    torch.testing.assert_close({name: t.cpu() for name, t in found.items()}, expected, rtol=1e-7, atol=1e-9)
