"""Small networks, one for each thing that a sweep over layers can get wrong.

Every function returns a freshly initialised module; `cases.py` seeds, perturbs and pairs it with data.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

with warnings.catch_warnings():  # torch warns of the uneven padding once in a process: here, where nobody minds
    warnings.simplefilter("ignore", UserWarning)
    F.conv1d(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), padding="same")


class Net(nn.Module):
    """Named parts (modules or parameters) and a forward pass `run(net, *inputs)`."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module | nn.Parameter):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.run(self, *args, **kwargs)


def pooled(features: int, outputs: int) -> list[nn.Module]:
    """Mean over positions of (b, features, *positions), then a Linear."""
    return [nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(features, outputs)]


# ------------------------------------------------------------------------------------------ Linear


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(), nn.Linear(4, 3))


def deep_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3, bias=False), nn.Linear(3, 2))


def linear_mean(positions: tuple[int, ...]) -> nn.Module:
    """Linear layers on (b, *positions, 3), averaged over the positions before the last one."""
    body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.GELU())
    return Net(lambda net, x: net.head(net.body(x).mean(positions)), body=body, head=nn.Linear(4, 3))


def log_softmax() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.LogSoftmax(-1))


def scalar() -> nn.Module:
    """Outputs (b,)."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))


def perceptron(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))


class CosineLinear(nn.Linear):
    """A subclass of Linear that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


def subclassed_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), CosineLinear(4, 3))


# ------------------------------------------------------------------------------------------ convolutions


def conv1d() -> nn.Module:
    first = nn.Conv1d(2, 4, 3, stride=2, padding=2, dilation=2, groups=2)
    return nn.Sequential(first, nn.Tanh(), nn.Conv1d(4, 2, 2, padding="valid", bias=False), nn.GELU(), *pooled(2, 3))


def conv1d_same() -> nn.Module:
    """'same' with an even kernel, whose padding is uneven, dilated and not."""
    first = nn.Conv1d(2, 3, 2, padding="same")
    return nn.Sequential(first, nn.Tanh(), nn.Conv1d(3, 2, 4, padding="same", dilation=2), nn.GELU(), *pooled(2, 3))


def conv1d_same_circular() -> nn.Module:
    first = nn.Conv1d(2, 4, 4, padding="same", padding_mode="circular", groups=2)
    return nn.Sequential(first, nn.Tanh(), *pooled(4, 3))


def conv2d(mode: str) -> nn.Module:
    """Both kinds of padding in the given mode; the second layer strided and dilated too."""
    first = nn.Conv2d(1, 2, (3, 2), padding="same", padding_mode=mode)
    second = nn.Conv2d(2, 3, 2, stride=(2, 1), padding=(2, 1), dilation=(1, 2), padding_mode=mode)
    return nn.Sequential(first, nn.Tanh(), second, nn.GELU(), *pooled(3, 3))


def conv2d_valid() -> nn.Module:
    first = nn.Conv2d(2, 3, 2, padding="valid", bias=False)
    return nn.Sequential(first, nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Tanh(), *pooled(2, 3))


def conv2d_groups() -> nn.Module:
    """Two groups, then depthwise with two filters for each channel."""
    first = nn.Conv2d(4, 4, 2, groups=2, padding=1)
    second = nn.Conv2d(4, 8, 2, groups=4, stride=2)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), *pooled(8, 3))


def conv3d() -> nn.Module:
    first = nn.Conv3d(1, 2, 2, stride=(1, 2, 1), padding=(1, 0, 1))
    second = nn.Conv3d(2, 2, (1, 2, 2), padding="same", groups=2, bias=False, padding_mode="replicate")
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), *pooled(2, 3))


def conv3d_reflect() -> nn.Module:
    first = nn.Conv3d(1, 2, (3, 2, 1), padding=(1, 1, 0), padding_mode="reflect")
    return nn.Sequential(first, nn.Tanh(), *pooled(2, 3))


def conv_transpose1d() -> nn.Module:
    first = nn.ConvTranspose1d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
    return nn.Sequential(
        first, nn.Tanh(), nn.ConvTranspose1d(4, 2, 2, dilation=2, bias=False), nn.GELU(), *pooled(2, 3)
    )


def conv_transpose2d() -> nn.Module:
    first = nn.ConvTranspose2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0), groups=2)
    second = nn.ConvTranspose2d(4, 4, 2, dilation=(1, 2), groups=4)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), *pooled(4, 3))


def conv_transpose3d() -> nn.Module:
    first = nn.ConvTranspose3d(1, 2, 2, stride=(2, 1, 1), padding=(0, 1, 0), output_padding=(1, 0, 0))
    return nn.Sequential(first, nn.Tanh(), *pooled(2, 3))


def segmentation() -> nn.Module:
    """(b, 1, h, w) to (b, 3, h, w)."""
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 1))


def segmentation1d() -> nn.Module:
    """(b, 2, t) to (b, 3, t)."""
    return nn.Sequential(nn.Conv1d(2, 3, 3, padding=1, bias=False), nn.GELU(), nn.Conv1d(3, 3, 2, padding="same"))


# ------------------------------------------------------------------------------------------ embeddings and tokens


def embedding() -> nn.Module:
    """(b, t) token ids, 0 for padding, to (b, 3)."""
    parts = {"embed": nn.Embedding(5, 3, padding_idx=0), "head": nn.Linear(3, 3)}
    return Net(lambda net, ids: net.head(net.embed(ids).tanh().mean(1)), **parts)


def embedding_single() -> nn.Module:
    """(b,) ids to (b, 3): one row for each example."""
    return nn.Sequential(nn.Embedding(4, 3), nn.Tanh(), nn.Linear(3, 3))


def token_mlp() -> nn.Module:
    """(b, t) token ids to (b, t, 5)."""
    return nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))


def integer_input() -> nn.Module:
    """An integer input that no embedding takes."""
    return Net(lambda net, x: net.body(x.to(net.body[0].weight.dtype) / 4), body=perceptron(3))


def position_embedding() -> nn.Module:
    """The input of `pos` has no batch axis: its output is broadcast to all examples."""

    def run(net: Net, ids: Tensor) -> Tensor:
        return net.head((net.embed(ids) + net.pos(torch.arange(ids.shape[1]))).tanh())

    return Net(run, embed=nn.Embedding(5, 3), pos=nn.Embedding(4, 3), head=nn.Linear(3, 5))


def position_mlp() -> nn.Module:
    """Linear layers on coordinates alone, (t, 1), that weigh the positions of every example alike."""

    def run(net: Net, x: Tensor) -> Tensor:
        weights = net.weigh(torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)[:, None])
        return net.head((net.body(x) * weights).sum(1))

    return Net(run, weigh=perceptron_1d(), body=nn.Linear(3, 2), head=nn.Linear(2, 3))


def perceptron_1d() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 2))


def sequence_first() -> nn.Module:
    """Tokens (b, t) to (b, t, 5), with layers that see (t, b, d)."""
    body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))
    return Net(lambda net, ids: net.body(net.embed(ids.T)).transpose(0, 1), embed=nn.Embedding(5, 3), body=body)


def folded(order: str) -> nn.Module:
    """(b, t, 3) to (b, 3), Linear layers on (b t, d) ("examples") or (t b, d) ("positions")."""

    def run(net: Net, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        if order == "examples":
            return net.head(net.body(x.reshape(b * t, -1)).reshape(b, t, -1).mean(1))
        return net.head(net.body(x.transpose(0, 1).reshape(t * b, -1)).reshape(t, b, -1).mean(0))

    return Net(run, body=nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()), head=nn.Linear(4, 3))


def folded_conv() -> nn.Module:
    """(b, t, 1, h, w) to (b, 3): the same small image network on every frame."""
    body = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), *pooled(2, 3), nn.Tanh())

    def run(net: Net, x: Tensor) -> Tensor:
        return net.head(net.body(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1))

    return Net(run, body=body, head=nn.Linear(3, 3))


# ------------------------------------------------------------------------------------------ normalisation


def batch_norm1d() -> nn.Module:
    """On (b, c) and on (b, c, t)."""

    def run(net: Net, x: Tensor) -> Tensor:
        return net.head(net.flat(net.lift(net.positions(x).tanh().mean(2))).tanh())

    parts = {"positions": nn.BatchNorm1d(3), "lift": nn.Linear(3, 4), "flat": nn.BatchNorm1d(4)}
    return Net(run, **parts, head=nn.Linear(4, 3))


def batch_norm2d() -> nn.Module:
    """A convolution, batch normalisation and a ReLU in place; then one without affine parameters."""
    body = [nn.Conv2d(1, 3, 2, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.BatchNorm2d(3, affine=False)]
    return nn.Sequential(*body, *pooled(3, 3))


def batch_norm3d() -> nn.Module:
    return nn.Sequential(nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.Tanh(), *pooled(2, 3))


def instance_norm(track_running_stats: bool) -> nn.Module:
    norm1d = nn.InstanceNorm1d(4, affine=True, track_running_stats=track_running_stats)
    norm2d = nn.InstanceNorm2d(2, affine=True, track_running_stats=track_running_stats)
    body = [nn.Conv2d(1, 2, 2), norm2d, nn.Tanh(), nn.Flatten(2), nn.Conv1d(2, 4, 1), norm1d, nn.Tanh()]
    return nn.Sequential(*body, *pooled(4, 3))


def instance_norm3d() -> nn.Module:
    body = [nn.InstanceNorm3d(1), nn.Conv3d(1, 2, 2), nn.InstanceNorm3d(2, affine=True), nn.GELU()]
    return nn.Sequential(*body, *pooled(2, 3))


def layer_norm() -> nn.Module:
    """On (b, t, d): over the last axis, without a bias, without parameters, and over the last two axes."""
    body = [nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.LayerNorm(4, bias=False), nn.Linear(4, 3)]
    body += [nn.LayerNorm(3, elementwise_affine=False), nn.Tanh(), nn.LayerNorm((4, 3))]
    return Net(lambda net, x: net.head(net.body(x).square().mean(1)), body=nn.Sequential(*body), head=nn.Linear(3, 3))


def rms_norm() -> nn.Module:
    body = [nn.Linear(3, 4), nn.RMSNorm(4), nn.Tanh(), nn.RMSNorm(4, elementwise_affine=False), nn.Linear(4, 3)]
    return nn.Sequential(*body)


def group_norm() -> nn.Module:
    """On images, on (b, c, t) and on (b, c)."""
    body = [nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.GroupNorm(2, 4, affine=False), nn.Flatten(2)]
    body += [nn.GroupNorm(4, 4), nn.Tanh(), *pooled(4, 4), nn.GroupNorm(2, 4)]
    return nn.Sequential(*body, nn.Linear(4, 3))


# ------------------------------------------------------------------------------------------ attention and recurrence


class Attention(nn.Module):
    """Self-attention on (b, t, d), by torch's module in either layout."""

    def __init__(self, batch_first: bool, need_weights: bool):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.attend.batch_first else x.transpose(0, 1)
        h, _ = self.attend(x, x, x, need_weights=self.need_weights)
        return h if self.attend.batch_first else h.transpose(0, 1)


def attention(batch_first: bool) -> nn.Module:
    """(b, t, 4) to tokens (b, t, 3)."""
    return nn.Sequential(Attention(batch_first, need_weights=batch_first), nn.Linear(4, 3))


def cross_attention() -> nn.Module:
    """Queries (b, t, 4) from the first input; keys and values (b, s, 3) from the second, by matrices of their own."""
    attend = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True, add_bias_kv=True)
    return Net(lambda net, x, y: net.head(net.attend(x, y, y)[0].mean(1)), attend=attend, head=nn.Linear(4, 3))


def encoder_layer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, activation="gelu", batch_first=True)
    return Net(lambda net, x: net.head(net.layer(x).mean(1)), layer=layer, head=nn.Linear(4, 3))


def attention_tokens() -> nn.Module:
    """Token ids (b, t) to (b, t, 4): attention before a loss of tokens, from linear maps only."""

    def run(net: Net, ids: Tensor) -> Tensor:
        q, k, v = net.qkv(net.embed(ids)).chunk(3, -1)
        return net.head((q @ k.mT).softmax(-1) @ v)

    return Net(run, embed=nn.Embedding(4, 3), qkv=nn.Linear(3, 9), head=nn.Linear(3, 4, bias=False))


def recurrent(layer: nn.Module) -> nn.Module:
    """(b, t, 2) to (b, 3), from the mean output of an LSTM, GRU or RNN in either layout."""

    def run(net: Net, x: Tensor) -> Tensor:
        if net.layer.batch_first:
            return net.head(net.layer(x)[0].mean(1))
        return net.head(net.layer(x.transpose(0, 1))[0].mean(0))

    return Net(run, layer=layer, head=nn.Linear(layer.hidden_size * (1 + layer.bidirectional), 3))


class VisionTransformer(nn.Module):
    """A class token and positions on the model itself, beside children: (b, 1, 4, 4) to (b, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, 5, 4))
        self.patches = nn.Conv2d(1, 4, 2, stride=2)
        self.norm = nn.LayerNorm(4)
        self.attend = Attention(batch_first=True, need_weights=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).mT
        x = torch.cat([self.class_token.expand(len(x), -1, -1), patches], 1) + self.positions
        x = x + self.attend(self.norm(x))
        return self.head(x[:, 0])


class TransposedBlock(nn.Module):
    """A block as GPT-2's, with the transposed `Conv1D` of transformers: (b, t) ids to (b, t, 5)."""

    def __init__(self) -> None:
        super().__init__()
        conv1d = pytest.importorskip("transformers.pytorch_utils", reason="needs transformers").Conv1D
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.attn, self.proj = conv1d(12, 4), conv1d(4, 4)
        self.up, self.down = conv1d(5, 4), conv1d(4, 5)
        self.head = nn.Linear(4, 5, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (h.unflatten(-1, (2, 2)).transpose(1, 2) for h in self.attn(self.norm(x)).split(4, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(x + self.down(F.gelu(self.up(x))))


def transposed_mlp() -> nn.Module:
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="needs transformers").Conv1D
    return nn.Sequential(conv1d(4, 3), nn.Tanh(), conv1d(3, 4))


def gpt2() -> nn.Module:
    """The language model of transformers, from a configuration; its head is tied to its embedding."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"vocab_size": 6, "n_positions": 4, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_inner": 5}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ids))


# ------------------------------------------------------------------------------------------ other modules


def bilinear() -> nn.Module:
    parts = {"pair": nn.Bilinear(3, 2, 3), "head": nn.Linear(3, 3)}
    return Net(lambda net, x, y: net.head(net.pair(x, y).tanh()), **parts)


def prelu() -> nn.Module:
    """A slope for each channel, and one for all."""
    return nn.Sequential(nn.PReLU(3), nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 3))


def weight_norm() -> nn.Module:
    conv, linear = nn.Conv1d(2, 3, 2), nn.Linear(3, 3)
    conv, linear = parametrizations.weight_norm(conv), parametrizations.weight_norm(linear)
    return nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), linear)


def weight_norm_old() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        conv, linear = nn.utils.weight_norm(nn.Conv1d(2, 3, 2)), nn.utils.weight_norm(nn.Linear(3, 3))
    return nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), linear)


class Affine(nn.Module):
    """Bare parameters: out = (x * scale + shift) mix."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(inputs))
        self.shift = nn.Parameter(torch.randn(()))
        self.mix = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale + self.shift) @ self.mix


def bare_parameters() -> nn.Module:
    return nn.Sequential(Affine(3, 4), nn.Tanh(), nn.Linear(4, 3))


def parameter_list() -> nn.Module:
    """A container that owns parameters and is never called."""

    def run(net: Net, x: Tensor) -> Tensor:
        return net.head(sum((x * weight).tanh() for weight in net.weights))

    weights = nn.ParameterList([torch.randn(3), torch.randn(3)])
    return Net(run, weights=weights, head=nn.Linear(3, 3))


# ------------------------------------------------------------------------------------------ structure


def called_twice() -> nn.Module:
    parts = {"shared": nn.Linear(3, 3), "head": nn.Linear(3, 3)}
    return Net(lambda net, x: net.head(net.shared(net.shared(x).tanh()).tanh()), **parts)


def registered_twice() -> nn.Module:
    """The same module under two names."""
    shared = nn.Linear(3, 3)
    return nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(3, 3))


def called_on_two_shapes() -> nn.Module:
    """One layer on (b, t, d), then on (b, d)."""
    parts = {"shared": nn.Linear(3, 3), "head": nn.Linear(3, 3)}
    return Net(lambda net, x: net.head(net.shared(net.shared(x).tanh().mean(1)).tanh()), **parts)


def tied_linears() -> nn.Module:
    """One weight in two Linear layers, each with a bias of its own."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    return net


def tied_embedding() -> nn.Module:
    """(b, t) ids to (b, t, 5), by a head that is the embedding."""
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 5, bias=False))
    net[3].weight = net[0].weight
    return net


def parent_uses_child() -> nn.Module:
    """The child is called, and its weight is used by the parent too."""

    def run(net: Net, x: Tensor) -> Tensor:
        return net.head(F.linear(net.inner(x).tanh(), net.inner.weight).tanh())

    return Net(run, inner=nn.Linear(3, 3), head=nn.Linear(3, 3))


def parent_replaces_child() -> nn.Module:
    """The child is never called: the parent uses its parameters."""

    def run(net: Net, x: Tensor) -> Tensor:
        return net.head(F.linear(x, net.inner.weight, net.inner.bias).tanh())

    return Net(run, inner=nn.Linear(3, 4), head=nn.Linear(4, 3))


def hidden_use() -> nn.Module:
    """For a `function` that uses the weight of `inner` once more, behind the model's back."""
    return Net(lambda net, x: net.head(net.inner(x).tanh()), inner=nn.Linear(3, 3), head=nn.Linear(3, 3))


def unused_layer() -> nn.Module:
    parts = {"body": nn.Linear(3, 4), "unused": nn.Linear(2, 2), "head": nn.Linear(4, 3)}
    return Net(lambda net, x: net.head(net.body(x).tanh()), **parts)


def detached_branch() -> nn.Module:
    """A layer that is called, on whose outcome the outputs do not depend as far as autograd knows."""
    parts = {"body": nn.Linear(3, 4), "probe": nn.Linear(3, 4), "head": nn.Linear(4, 3)}
    return Net(lambda net, x: net.head(net.body(x).tanh() + net.probe(x).detach()), **parts)


def frozen_layers() -> nn.Module:
    """The first and a middle layer are frozen; the model begins with a part that needs no gradient."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3), nn.Linear(3, 3))
    net[0].requires_grad_(False)
    net[4].requires_grad_(False)
    return net


def frozen_weights() -> nn.Module:
    """Only the biases are trained, but for one layer whose bias is the frozen one."""
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    for frozen in (net[0].weight, net[1].weight, net[3].weight, net[5].bias):
        frozen.requires_grad_(False)
    return net


def inplace() -> nn.Module:
    """Activations and a residual sum that overwrite the outputs of layers."""

    def run(net: Net, x: Tensor) -> Tensor:
        h = net.body(x)
        h += x
        return net.head(h)

    body = [nn.Linear(3, 4), nn.ELU(inplace=True), nn.Linear(4, 4), nn.SiLU(inplace=True), nn.Linear(4, 3)]
    return Net(run, body=nn.Sequential(*body), head=nn.Linear(3, 3))


def checkpointed() -> nn.Module:
    """The layers of `body` run a second time during the backward pass."""
    body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
    return Net(lambda net, x: net.head(checkpoint(net.body, x, use_reentrant=False)), body=body, head=nn.Linear(4, 3))


def residual() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        h = x + net.first(x).tanh()
        return net.head(h + net.second(h).tanh())

    return Net(run, first=nn.Linear(3, 3), second=nn.Linear(3, 3), head=nn.Linear(3, 3))


def two_inputs() -> nn.Module:
    """A branch that depends on the second input only."""
    parts = {"left": nn.Linear(3, 3), "right": perceptron_1d(), "head": nn.Linear(5, 3)}
    return Net(lambda net, x, y: net.head(torch.cat([net.left(x).tanh(), net.right(y).tanh()], -1)), **parts)


def dead_layer() -> nn.Module:
    """The ReLU is off for every example: `2` sees zeros and `0` gets no gradient."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    nn.init.constant_(net[0].bias, -100.0)
    return net


def keyword_call() -> nn.Module:
    """A layer whose input arrives by keyword."""
    parts = {"body": nn.Linear(3, 4), "head": nn.Linear(4, 3)}
    return Net(lambda net, x: net.head(input=net.body(input=x).tanh()), **parts)


def keyword_model() -> nn.Module:
    """forward(features=, offset=), as a dict batch has it."""
    body = perceptron(3)
    return Net(lambda net, features, offset: net.body(features - offset), body=body)


# ------------------------------------------------------------------------------------------ derivatives inside


def tanh_net(outputs: int) -> dict[str, nn.Module]:
    return {"body": nn.Linear(3, 4), "head": nn.Linear(4, outputs)}


def _value(net: nn.Module, x: Tensor) -> Tensor:
    return net.head(net.body(x).tanh())


def mapped() -> nn.Module:
    """torch.vmap over examples, between plain layers."""
    inner = Net(lambda net, x: torch.vmap(lambda row: _value(net, row))(x), **tanh_net(3))
    return nn.Sequential(nn.Linear(3, 3), inner, nn.Tanh(), nn.Linear(3, 3))


def _force(net: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(_value(net, x).sum(), x, create_graph=True)[0]


def force_field() -> nn.Module:
    """The gradient of an energy, by torch.autograd.grad."""
    return Net(_force, **tanh_net(1))


def _pushed(net: nn.Module, x: Tensor) -> Tensor:
    outputs, tangents = torch.func.jvp(lambda z: _value(net, z), (x,), (x.flip(1),))
    return outputs + tangents


def _under_dual_numbers(net: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(_value(net, forward_ad.make_dual(x, torch.ones_like(x)))).tangent


# By name: a forward of (b, 3), and the outputs of the network that it differentiates.
DERIVATIVES_INSIDE: dict[str, tuple[Callable[..., Tensor], int]] = {
    "autograd.grad": (_force, 1),
    "func.grad": (lambda net, x: torch.func.grad(lambda z: _value(net, z).sum())(x), 1),
    "func.jvp": (_pushed, 2),
    "jacrev": (lambda net, x: torch.vmap(torch.func.jacrev(lambda z: _value(net, z)))(x).sum(1), 2),
    "jacfwd": (lambda net, x: torch.vmap(torch.func.jacfwd(lambda z: _value(net, z)))(x).sum(1), 2),
    "hessian": (
        lambda net, x: torch.vmap(lambda row: torch.func.hessian(lambda z: _value(net, z)[0])(row).diagonal())(x),
        1,
    ),
    "vmap of jvp of grad": (
        lambda net, x: torch.vmap(
            lambda row: torch.func.jvp(torch.func.grad(lambda z: _value(net, z)[0]), (row,), (row,))[1]
        )(x),
        1,
    ),
    "positions": (
        lambda net, x: torch.vmap(net.head, 1, 1)(torch.stack([net.body(x), x.repeat(1, 2)[:, :4]], 1)).sum(1),
        2,
    ),
    "dual numbers": (_under_dual_numbers, 2),
}


def differentiating(way: str) -> nn.Module:
    run, outputs = DERIVATIVES_INSIDE[way]
    return Net(run, **tanh_net(outputs))
