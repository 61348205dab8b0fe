"""Kinds of modules with inputs, in float64: what every Jacobian product is tested on.

`MODULES` is the list; each is small enough for its Jacobian to be taken row by row. Tags: "sequential", a chain of
modules that are called once each, with one input; "kinks", second derivatives vanish almost everywhere;
"double", a network in which second derivatives are easily wrong; "frozen", some parameters are not trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from tests import networks
from tests.cases import Case, Draw, classes, reals
from tests.networks import Net

Wrt = str | tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Module:
    """A module, what goes into it, and with respect to what its outputs have a derivative."""

    id: str
    network: Callable[[], nn.Module]
    data: tuple[Draw, ...] | dict[str, Draw]
    inputs_wrt: tuple[Wrt, ...] = ("input",)
    tags: frozenset[str] = frozenset()

    def build(self) -> nn.Module:
        """The module in eval mode, the same at every call; nothing in it has a special value (1, 0, ...)."""
        return Case(self.id, self.network, "", ()).make()

    def inputs(self, b: int = 3, seed: int = 0) -> Any:
        """b examples: a tensor, a tuple of arguments, or a dict of them."""
        generator = Generator().manual_seed(seed)
        if isinstance(self.data, dict):
            return {name: draw(b, generator) for name, draw in self.data.items()}
        drawn = tuple(draw(b, generator) for draw in self.data)
        return drawn if len(drawn) > 1 else drawn[0]

    @property
    def wrts(self) -> tuple[Wrt, ...]:
        """All that the outputs can be differentiated by."""
        trained = any(parameter.requires_grad for parameter in self.build().parameters())
        return (*self.inputs_wrt, "weight") if trained else self.inputs_wrt


# ------------------------------------------------------------------------------------------ forward passes


class TwoInputs(nn.Module):
    """(b, 3) and (b, 2, 2) to (b, 2), with an option in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, left: Tensor, scale: float, right: Tensor) -> Tensor:
        return self.head((self.first(left) * self.second(right).sum(1) * scale).tanh())


class Options(nn.Module):
    """One tensor among arguments of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)

    def forward(self, x: Tensor, power: int, activation: str, mask: Tensor | None = None) -> Tensor:
        h = getattr(torch, activation)(self.body(x)) ** power
        return h if mask is None else h * mask


class Labelled(nn.Module):
    """A floating-point input and an integer one, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.label, self.body, self.head = nn.Embedding(4, 3), nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, features: Tensor, label: Tensor) -> Tensor:
        return self.head((self.body(features) + self.label(label)).tanh())


class Difference(nn.Module):
    """Two floating-point inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = networks.perceptron(2)

    def forward(self, features: Tensor, offset: Tensor) -> Tensor:
        return self.body(features - offset.exp())


def skip(join: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return Net(lambda net, x: join(x, net.body(x)), body=body)


def bilinear() -> nn.Module:
    return Net(lambda net, x: net.pair(x[:, :2], x[:, 2:]), pair=nn.Bilinear(2, 3, 2))


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2))


def recurrent(layer: nn.Module) -> nn.Module:
    """(b, t, i) to the layer's outputs (b, t, o)."""
    return Net(lambda net, x: net.layer(x)[0], layer=layer)


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, dim_feedforward=3, dropout=0.0, activation="gelu", batch_first=True)


def activation_twice() -> nn.Module:
    tanh = nn.Tanh()
    return nn.Sequential(nn.Linear(3, 4), tanh, nn.Linear(4, 3), tanh, nn.Linear(3, 2))


def lenet() -> nn.Module:
    body = [nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 2), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3))


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Module:
    pairs = list(zip(widths, widths[1:], strict=False))
    layers = [part for i, o in pairs for part in (nn.Linear(i, o), activation())]
    return nn.Sequential(*layers[:-1])


def nested() -> nn.Module:
    inner = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Sigmoid(), nn.Linear(3, 3)))
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), inner, nn.SiLU(), nn.Linear(3, 2))


# ------------------------------------------------------------------------------------------ the list

X, LINE, IMAGE, MAPS, VOLUME = reals(3), reals(2, 5), reals(1, 4, 4), reals(2, 4, 4), reals(1, 2, 3, 3)
TOKENS = reals(3, 4)
LINEAR, CONV = partial(nn.Linear, 3, 4), partial(nn.Conv2d, 1, 2, 2)


def kind(id: str, network: Callable[[], nn.Module], data: Draw, *tags: str) -> Module:
    return Module(id, network, (data,), tags=frozenset(tags))


def chain(id: str, *parts: Callable[[], nn.Module], data: Draw = X, tags: Sequence[str] = ()) -> Module:
    """A Sequential of freshly made parts, or the only one."""

    def network() -> nn.Module:
        made = [part() for part in parts]
        return nn.Sequential(*made) if len(made) > 1 else made[0]

    return Module(id, network, (data,), tags=frozenset(tags) | {"sequential"})


MODULES = [
    # linear maps
    chain("linear", LINEAR),
    chain("linear_no_bias", partial(nn.Linear, 3, 2, bias=False)),
    chain("linear_sequence", partial(nn.Linear, 4, 2), data=TOKENS),
    kind("bilinear", bilinear, reals(5), "double"),
    chain("conv1d", partial(nn.Conv1d, 2, 4, 2, stride=2, padding=2, dilation=2, groups=2), nn.Tanh, data=LINE),
    chain("conv1d_same", partial(nn.Conv1d, 2, 2, 2, padding="same"), data=LINE),
    chain("conv2d", partial(nn.Conv2d, 2, 2, (2, 3), stride=(1, 2), padding=(1, 2), dilation=(2, 1)), data=MAPS),
    chain("conv2d_wide_padding", partial(nn.Conv2d, 1, 2, 2, stride=3, padding=3), nn.Tanh, data=IMAGE),
    chain("conv2d_reflect", partial(nn.Conv2d, 1, 2, 3, padding=(1, 2), padding_mode="reflect"), data=IMAGE),
    chain("conv2d_replicate", partial(nn.Conv2d, 1, 2, 2, padding=1, padding_mode="replicate"), nn.Tanh, data=IMAGE),
    chain("conv2d_circular", partial(nn.Conv2d, 1, 2, 3, stride=2, padding=1, padding_mode="circular"), data=IMAGE),
    chain("conv2d_same", partial(nn.Conv2d, 1, 1, (2, 3), padding="same", padding_mode="reflect"), data=IMAGE),
    chain("conv2d_groups", partial(nn.Conv2d, 2, 4, 2, groups=2, bias=False), nn.Tanh, data=MAPS),
    chain("conv3d", partial(nn.Conv3d, 1, 2, 2, stride=(1, 2, 1), padding=(0, 1, 0)), nn.Tanh, data=VOLUME),
    chain("conv_transpose1d", partial(nn.ConvTranspose1d, 2, 2, 3, stride=2, output_padding=1), nn.Tanh, data=LINE),
    chain(
        "conv_transpose2d",
        *(CONV, nn.Tanh),
        partial(nn.ConvTranspose2d, 2, 2, 2, stride=2, padding=1, groups=2, dilation=(1, 2)),
        data=IMAGE,
    ),
    chain("conv_transpose3d", partial(nn.ConvTranspose3d, 1, 1, 2, padding=1, bias=False), nn.Tanh, data=VOLUME),
    # pools and resampling
    chain("max_pool1d", partial(nn.MaxPool1d, 3, stride=1, padding=1), data=LINE, tags=["kinks"]),
    chain("max_pool2d", CONV, nn.Tanh, partial(nn.MaxPool2d, 3, stride=1, padding=1), data=IMAGE),
    chain("max_pool2d_dilated", CONV, partial(nn.MaxPool2d, 2, stride=1, dilation=2), data=IMAGE, tags=["kinks"]),
    chain("max_pool3d", nn.Tanh, partial(nn.MaxPool3d, 2, stride=1, ceil_mode=True), data=VOLUME),
    chain(
        "avg_pool2d",
        *(CONV, nn.Tanh),
        partial(nn.AvgPool2d, 2, stride=1, padding=1, count_include_pad=False),
        data=IMAGE,
    ),
    chain("adaptive_avg_pool2d", CONV, nn.Tanh, partial(nn.AdaptiveAvgPool2d, 2), data=IMAGE),
    chain("adaptive_max_pool2d", CONV, nn.Tanh, partial(nn.AdaptiveMaxPool2d, (2, 1)), data=IMAGE),
    chain("lp_pool2d", CONV, nn.Softplus, partial(nn.LPPool2d, 3, 2, stride=1), data=IMAGE),
    chain("upsample_nearest", CONV, nn.Tanh, partial(nn.Upsample, scale_factor=2), data=reals(1, 2, 3)),
    chain(
        "upsample_bilinear",
        *(CONV, nn.Tanh),
        partial(nn.Upsample, scale_factor=2, mode="bilinear", align_corners=True),
        data=reals(1, 3, 3),
    ),
    chain("upsample_size", CONV, nn.Tanh, partial(nn.Upsample, size=(3, 4), mode="bicubic"), data=reals(1, 3, 3)),
    chain("upsample_fractional", nn.Tanh, partial(nn.Upsample, scale_factor=1.5, mode="linear"), data=LINE),
    chain(
        "pad_and_shuffle",
        partial(nn.Conv2d, 1, 4, 2),
        partial(nn.ReflectionPad2d, 1),
        nn.Tanh,
        partial(nn.PixelShuffle, 2),
        data=reals(1, 3, 3),
    ),
    # norms
    chain("batch_norm1d", LINEAR, partial(nn.BatchNorm1d, 4), nn.Tanh),
    chain("batch_norm2d", CONV, partial(nn.BatchNorm2d, 2), nn.Tanh, data=reals(1, 3, 3)),
    chain("layer_norm", LINEAR, partial(nn.LayerNorm, 4), nn.Tanh, partial(nn.Linear, 4, 2), tags=["double"]),
    chain(
        "norm_decoder",
        *(partial(nn.Linear, 2, 4), partial(nn.LayerNorm, 4), nn.Tanh, partial(nn.Linear, 4, 8)),
        data=reals(2),
        tags=["double"],
    ),
    chain("layer_norm_plain", partial(nn.LayerNorm, (3, 4), elementwise_affine=False), data=TOKENS, tags=["double"]),
    chain("group_norm", partial(nn.Conv2d, 1, 4, 2), partial(nn.GroupNorm, 2, 4), data=reals(1, 3, 2), tags=["double"]),
    chain("instance_norm", CONV, partial(nn.InstanceNorm2d, 2, affine=True), nn.Tanh, data=IMAGE, tags=["double"]),
    chain("rms_norm", LINEAR, partial(nn.RMSNorm, 4), nn.Tanh, tags=["double"]),
    # attention, recurrence, embeddings
    kind("attention", partial(networks.Attention, True, True), TOKENS, "double"),
    kind("attention_sequence_first", partial(networks.Attention, False, False), reals(2, 4), "double"),
    kind("encoder_layer", encoder_layer, reals(2, 4), "double"),
    kind("lstm", lambda: recurrent(nn.LSTM(2, 2, batch_first=True)), reals(3, 2), "double"),
    kind("gru", lambda: recurrent(nn.GRU(2, 2, batch_first=True, bidirectional=True)), reals(3, 2), "double"),
    kind("rnn", lambda: recurrent(nn.RNN(2, 2, batch_first=True, num_layers=2)), reals(3, 2), "double"),
    Module("embedding", embedding, (classes(5, 2),), inputs_wrt=()),
    # activations and shapes
    chain("gelu", LINEAR, nn.GELU, partial(nn.Linear, 4, 2)),
    chain("softplus_threshold", LINEAR, partial(nn.Softplus, beta=2.0, threshold=0.5)),
    chain("prelu", LINEAR, partial(nn.PReLU, 4), partial(nn.Linear, 4, 2)),
    chain("softmax", partial(nn.Softmax, dim=-1), data=reals(2, 3)),
    chain("log_softmax", LINEAR, partial(nn.LogSoftmax, dim=-1)),
    chain("glu", LINEAR, nn.GLU),
    chain("flatten2", partial(nn.Flatten, 2), data=reals(2, 2, 2), tags=["kinks"]),
    chain("relu_in_place", LINEAR, partial(nn.ReLU, inplace=True), partial(nn.Linear, 4, 2)),
    chain("in_place_first", partial(nn.ELU, inplace=True), partial(nn.Linear, 3, 3)),
    # structure
    kind("additive_skip", partial(skip, torch.add), X),
    kind("concatenating_skip", partial(skip, lambda x, h: torch.cat([x, h], 1)), X),
    kind("in_place_sum", networks.inplace, X),
    kind("activation_twice", activation_twice, X),
    kind("called_twice", networks.called_twice, X),
    kind("registered_twice", networks.registered_twice, X),
    kind("tied_linears", networks.tied_linears, X),
    kind("parent_uses_child", networks.parent_uses_child, X),
    kind("own_parameters", networks.bare_parameters, X),
    kind("vision_transformer", networks.VisionTransformer, IMAGE, "double"),
    kind("weight_norm", networks.weight_norm, reals(2, 4), "double"),
    kind("frozen_layers", networks.frozen_layers, X, "frozen"),
    kind("frozen_weights", networks.frozen_weights, X, "frozen"),
    kind("unused_layer", networks.unused_layer, X),
    kind("checkpointed", networks.checkpointed, X),
    kind("folded", partial(networks.folded, "examples"), reals(2, 3)),
    kind("sequence_outputs", lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), reals(3, 2)),
    kind("scalar_outputs", networks.scalar, X),
    chain("nested", nested),
    chain("lenet", lenet, data=reals(1, 6, 6)),
    chain("mlp", partial(mlp, 3, 4, 4, 2)),
    chain("decoder", partial(mlp, 2, 3, 5, 12), data=reals(2)),
    # arguments
    Module("two_inputs", TwoInputs, (X, lambda n, g: 0.7, reals(2, 2)), ("left", "right", ("right", "left"))),
    Module("options", Options, (X, lambda n, g: 2, lambda n, g: "tanh", lambda n, g: None), ("input", "x")),
    Module("dict", Difference, {"features": X, "offset": X}, ("offset", ("features", "offset"))),
    Module("dict_one_float", Labelled, {"label": classes(4), "features": reals(2)}),
]


def modules(*tags: str) -> list[Module]:
    """Those with all of the tags."""
    return [module for module in MODULES if module.tags.issuperset(tags)]


def named(*ids: str) -> list[Module]:
    """Those of the given ids."""
    return [module for module in MODULES if module.id in ids]
