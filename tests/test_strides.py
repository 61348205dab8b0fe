"""How a tensor lies in memory changes no derivative; of one example torch's own may be wrong (2.13, CPU)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo.nn
from nngeo import FIM, NTK, Jacobian, PMatDense, PMatDiag, PMatImplicit, products


class Scale(nn.Module):
    """A factor for each channel; its outputs lie as its inputs do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(-1, *[1] * (x.ndim - 2))


class ChannelsLast(nn.Module):
    """Positions, then channels: gradients of one example come back as images of cameras lie."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.squeeze(0).movedim(0, -1).contiguous()[None] if len(x) == 1 else x.movedim(1, -1)).flatten(1)


class Written(nn.Module):
    """A norm layer by its formula."""

    def __init__(self, norm: Any):
        super().__init__()
        self.weight, self.bias, self.fixed = norm.weight, norm.bias, (norm.running_mean, norm.running_var)

    def forward(self, x: Tensor) -> Tensor:
        axes, shape = tuple(range(2, x.ndim)), (-1, *[1] * (x.ndim - 2))
        if self.fixed[0] is None:
            mean, variance = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
        else:
            mean, variance = (value.view(shape) for value in self.fixed)
        y = (x - mean) / (variance + 1e-5).sqrt()
        return y if self.weight is None else y * self.weight.view(shape) + self.bias.view(shape)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "BatchNorm3d": lambda: nn.BatchNorm3d(4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True),
    "tracked InstanceNorm2d": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
}
ENDS: dict[str, Callable[[], nn.Module]] = {"channels first": nn.Flatten, "channels last": ChannelsLast}


def network(norm: nn.Module, end: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    if (variance := getattr(norm, "running_var", None)) is not None:
        nn.init.uniform_(variance, 0.5, 2)
    return nn.Sequential(Scale(), norm, end, nn.LazyLinear(1)).double().eval()


def vector(model: nn.Module) -> nngeo.PVector:
    return nngeo.random_pvector(
        nngeo.LayerCollection.from_model(model), dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "diagonal": lambda model, x: FIM(model, (x,), PMatDiag, "regression").get_diag(),
    "dense": lambda model, x: FIM(model, (x,), PMatDense, "regression").to_torch(),
    "implicit": lambda model, x: FIM(model, (x,), PMatImplicit, "regression").mv(vector(model)).to_torch(),
    "linearized": lambda model, x: (
        FIM(model, (x,), PMatImplicit, "regression").linearize().mv(vector(model)).to_torch()
    ),
    "kernel": lambda model, x: NTK(model, (x,)).to_torch(),
    "Jacobian": lambda model, x: Jacobian(model, (x,)).to_torch(),
    "by weights": lambda model, x: products.jacobian(model, x, wrt="weight"),
    "by inputs": lambda model, x: products.jacobian(model, x),
    "forward": lambda model, x: products.jvp(model, x, torch.ones_like(x)),
    "nngeo.nn": lambda model, x: nngeo.nn.convert_to_nnj(model).jacobian(x, wrt="input"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_an_image_of_a_camera_has_the_derivatives_of_the_formula(norm, end, call):
    """Its axes are (height, width, channels) before it is permuted, and there is one."""
    layer = norm()
    size = (5, 3, 6) if isinstance(layer, nn.BatchNorm3d) else (5, 6)
    image = torch.randn(*size, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = image.movedim(-1, 0)[None]
    model = network(layer, end())
    model(x)  # which fills the last layer
    found = call(model, x)
    model[1] = Written(layer)
    assert_close(found, call(model, x.contiguous()))
