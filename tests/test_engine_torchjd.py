"""Where torchjd's engine is right, ours says the same; where it is not, ours is right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo.descent.autogram import Engine
from tests import networks, reference
from tests.engines import EXACT, jacobian, mlp, scores

autogram = pytest.importorskip("torchjd.autogram", reason="needs torchjd")

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(3, 4, 2), (3,)),
    "sequence": (lambda: networks.linear_mean((1,)), (4, 3)),
    "convolutions": (networks.conv2d_groups, (4, 3, 3)),
    "norm": (networks.layer_norm, (4, 3)),
    "attention": (lambda: networks.attention(True), (3, 4)),
    "prelu": (networks.prelu, (3,)),
}


def gramians(model: nn.Module, make: Callable[[], Tensor], batch_dim: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Ours, theirs and the dense one, of the losses that `make` makes."""
    with Engine(model, batch_dim=batch_dim) as ours:
        found = make()
        gramian = ours.compute_gramian(found)
    rows = jacobian(found, reference.trainable(model))
    theirs = autogram.Engine(model, batch_dim=batch_dim)
    return gramian, theirs.compute_gramian(make()), rows @ rows.T


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("batch_dim", [0, None])
def test_gramians_are_those_of_torchjd(name, k, batch_dim):
    build, shape = NETWORKS[name]
    model, x = build().double().eval(), torch.randn(5, *shape, dtype=torch.float64)
    ours, theirs, dense = gramians(model, lambda: scores(model(x), k), batch_dim)
    assert_close(ours, theirs, **EXACT)
    assert_close(ours, dense, **EXACT)


@pytest.mark.parametrize("build", [networks.tied_linears, networks.parent_uses_child], ids=["tied", "parent"])
def test_what_torchjd_gets_silently_wrong_is_right(build):
    model, x = build().double().eval(), torch.randn(5, 3, dtype=torch.float64)
    ours, theirs, dense = gramians(model, lambda: scores(model(x))[:, 0], 0)
    assert_close(ours, dense, **EXACT)
    assert (theirs - dense).norm() > 0.01 * dense.norm()
