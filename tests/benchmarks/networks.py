"""The networks that are measured, with their data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass
class Problem:
    """What a job runs on: a model in eval mode, batches (inputs, classes), and the variant of its Fisher."""

    network: str
    model: nn.Module
    batches: list[Batch]
    outputs: int
    variant: str = "classif_logits"

    def copy(self) -> Problem:
        """The same with a model and data of its own: some libraries leave marks on both."""
        batches = [(x.clone(), y.clone()) for x, y in self.batches]
        return Problem(self.network, copy.deepcopy(self.model), batches, self.outputs, self.variant)

    def to(self, device: str) -> Problem:
        """Itself, on a device."""
        self.model.to(device)
        self.batches = [(x.to(device), y.to(device)) for x, y in self.batches]
        return self

    @property
    def n_examples(self) -> int:
        """That of all batches."""
        return sum(len(x) for x, _ in self.batches)

    @property
    def device(self) -> torch.device:
        """The model's."""
        return next(self.model.parameters()).device

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy over examples and positions, 0-d."""
        return F.cross_entropy(self.model(x).reshape(-1, self.outputs), y.reshape(-1))

    def sweep(self) -> None:
        """The unit of all figures: forward and backward of the mean loss, batch by batch."""
        self.model.zero_grad()
        for x, y in self.batches:
            self.loss(x, y).backward()

    @property
    def linear_maps(self) -> list[str]:
        """Names of the Linear and Conv2d modules: the layers that have Kronecker factors in every library."""
        return [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]

    @property
    def has_other_layers(self) -> bool:
        """Whether some parameters belong to layers that are no linear maps."""
        owned = {id(p) for name in self.linear_maps for p in self.model.get_submodule(name).parameters()}
        return any(id(p) not in owned for p in self.model.parameters())


def classification(
    network: str, model: nn.Module, shape: Sequence[int], batches: int, size: int, outputs: int = 10
) -> Problem:
    """Normal inputs of a shape and uniform classes."""
    data = [(torch.randn(size, *shape), torch.randint(outputs, (size,))) for _ in range(batches)]
    return Problem(network, model.eval(), data, outputs)


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for i, o in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def mlp(quick: bool = False) -> Problem:
    """784-512-512-10; 4 batches of 32."""
    widths = (20, 16, 16, 10) if quick else (784, 512, 512, 10)
    return classification("mlp", perceptron(widths), widths[:1], *((2, 4) if quick else (4, 32)))


def cnn(quick: bool = False) -> Problem:
    """Three convolutions 3-32-64-64 with pooling on 32x32 and a Linear; 2 batches of 32."""
    (a, b), side = ((4, 6), 8) if quick else ((32, 64), 32)
    model = nn.Sequential(
        *(nn.Conv2d(3, a, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(b, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(b * (side // 8) ** 2, 10)),
    )
    return classification("cnn", model, (3, side, side), 2, 4 if quick else 32)


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut (He et al., 2016)."""

    def __init__(self, i: int, o: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.norm2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.shortcut: nn.Module | None = None
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        if stride > 1 or i != o:
            self.shortcut = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(y + (x if self.shortcut is None else self.shortcut(x)))


def resnet18(quick: bool = False) -> Problem:
    """ResNet-18 for 32x32 images (a 3x3 convolution first, no pooling after it), BatchNorm in eval mode; 2 x 16."""
    widths, side, depth = ((4, 6), 8, 1) if quick else ((64, 128, 256, 512), 32, 2)
    blocks: list[nn.Module] = []
    i = widths[0]
    for stage, o in enumerate(widths):
        for k in range(depth):
            blocks.append(ResidualBlock(i, o, 2 if stage and not k else 1))
            i = o
    first = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
    model = nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    return classification("resnet18", model, (3, side, side), 2, 4 if quick else 16)


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.inward, self.outward = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.inward(x).reshape(b, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.outward(y.transpose(1, 2).reshape(b, t, width))


class TransformerBlock(nn.Module):
    """Attention and a perceptron of four times the width, each normalised first and added."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.inner, self.outer = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.outer(F.gelu(self.inner(self.norm2(x))))


class LanguageModel(nn.Module):
    """Logits (b, t, words) of the next word at every position."""

    def __init__(self, words: int, tokens: int, width: int, depth: int, heads: int):
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*[TransformerBlock(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        positions = torch.arange(words.shape[1], device=words.device).expand_as(words)
        return self.head(self.norm(self.blocks(self.words(words) + self.positions(positions))))


def transformer(quick: bool = False) -> Problem:
    """A language model of 6 layers, width 256, 128 tokens, 1000 words; 2 batches of 4 texts."""
    words, tokens, width, depth, heads, size = (12, 5, 8, 2, 2, 3) if quick else (1000, 128, 256, 6, 8, 4)
    data = [(torch.randint(words, (size, tokens)), torch.randint(words, (size, tokens))) for _ in range(2)]
    model = LanguageModel(words, tokens, width, depth, heads).eval()
    return Problem("transformer", model, data, words, "token_logits")


NETWORKS: dict[str, Callable[[bool], Problem]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet18": resnet18,
    "transformer": transformer,
}


def problem(network: str, quick: bool = False, device: str = "cpu") -> Problem:
    """The network with its data, from seed 0, on a device; `quick`: a small one of the same kind."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NETWORKS[network](quick).to(device)
