"""Networks with data, in float64: what every representation is tested on.

`CASES` is the list; tests select from it by the fields and tags of a case. Tags that are not plain words:
"stopped", autograd is told to stop a gradient that the function has (detach, padding_idx); "unused", a layer without
influence; "hidden", a weight is used outside of its layer's forward; "reused", a module is called several times;
"no_batch_axis", the input of a layer has none; "layout", a layer's first axis is not that of the examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tests import networks

Draw = Callable[[int, Generator], Tensor]  # (examples, generator) -> a tensor with that many rows
Batch = Any  # (*inputs, target), or a dict with the target under "labels"


@dataclass(frozen=True)
class Case:
    """A network, how its outputs are scored, and a few examples."""

    id: str
    build: Callable[[], nn.Module]
    variant: str
    data: tuple[Draw, ...] | dict[str, Draw]
    n: int = 6
    kronecker: bool = False  # every layer is a linear map, none tied to another: KFAC is defined
    positions: bool = False  # some layer sees weight-sharing positions
    apply: Callable[..., Tensor] | None = None  # (model, *batch) -> outputs, for model(batch[0])
    tags: frozenset[str] = frozenset()

    def make(self) -> nn.Module:
        """The model in eval mode, the same at every call; nothing in it has a special value (1, 0, ...)."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(7)
            model = self.build().double().eval()
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_(0.0, 0.5)
                if name.endswith("running_var"):
                    buffer.uniform_(0.5, 2.0)
        return model

    def batch(self, seed: int = 0) -> Batch:
        """All n examples, drawn from the seed: (*inputs, target), or a dict with the target under "labels"."""
        generator = Generator().manual_seed(seed)
        if isinstance(self.data, dict):
            return {name: draw(self.n, generator) for name, draw in self.data.items()}
        return tuple(draw(self.n, generator) for draw in self.data)

    def batches(self, seed: int = 0) -> list[Batch]:
        """The examples of `batch` in three unequal batches, one of which holds a single example."""
        sizes, batch = [self.n - 3, 1, 2], self.batch(seed)
        if isinstance(batch, dict):
            parts = zip(*(tensor.split(sizes) for tensor in batch.values()), strict=True)
            return [dict(zip(batch, part, strict=True)) for part in parts]
        return list(zip(*(tensor.split(sizes) for tensor in batch), strict=True))

    def function(self, model: nn.Module) -> Callable[..., Tensor] | None:
        """What to call with a batch, `function(*batch)`; None where the default does."""
        return None if self.apply is None else partial(self.apply, model)


# ------------------------------------------------------------------------------------------ data


def reals(*shape: int) -> Draw:
    return lambda n, generator: torch.randn(n, *shape, generator=generator, dtype=torch.float64)


def classes(count: int, *shape: int) -> Draw:
    return lambda n, generator: torch.randint(count, (n, *shape), generator=generator)


def counts(maximum: int, *shape: int) -> Draw:
    return lambda n, generator: torch.randint(maximum + 1, (n, *shape), generator=generator).double()


def ignoring(draw: Draw) -> Draw:
    """Targets of which some are -100, and all of the last example."""

    def drawn(n: int, generator: Generator) -> Tensor:
        target = draw(n, generator)
        ignored = torch.rand(target.shape, generator=generator) < 0.3
        ignored[-1] = True
        return target.masked_fill(ignored, -100)

    return drawn


def lengths_mask(t: int) -> Draw:
    """(n, t) ones, then zeros after t, t - 1, t, t - 1, ... tokens."""
    return lambda n, generator: (torch.arange(t) < t - torch.arange(n)[:, None] % 2).long()


def shorter_targets(count: int, t: int) -> Draw:
    """Targets with -100 where `lengths_mask` is zero, and in the first position."""

    def drawn(n: int, generator: Generator) -> Tensor:
        target = torch.randint(count, (n, t), generator=generator)
        target[lengths_mask(t)(n, generator) == 0] = -100
        target[:, 0] = -100
        return target

    return drawn


# ------------------------------------------------------------------------------------------ the list

VECTOR = (reals(3), classes(3))
IMAGE = (reals(1, 4, 4), classes(3))
TOKENS = (classes(5, 4), classes(5, 4))


def classifier(id: str, build: Callable[[], nn.Module], data: Any = VECTOR, *tags: str, **options: Any) -> Case:
    return Case(id, build, "classif_logits", data, tags=frozenset(tags), **options)


def tagged(*tags: str) -> frozenset[str]:
    return frozenset(tags)


def _both_inputs(model: nn.Module, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    return model(x, y)


def _hidden_use(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return F.linear(model(x).tanh(), model.inner.weight)


LINEAR: dict[str, Any] = {"kronecker": True}
SHARED: dict[str, Any] = {"kronecker": True, "positions": True}
PAIR: dict[str, Any] = {"apply": _both_inputs}

CASES = [
    # Linear, and every kind of output
    classifier("linear", networks.mlp, VECTOR, "linear", **LINEAR),
    classifier("linear_root", lambda: nn.Linear(3, 3), VECTOR, "linear", **LINEAR),
    Case("linear_deep", networks.deep_linear, "regression", (reals(3), reals(2)), **LINEAR, tags=tagged("linear_net")),
    classifier("linear_3d", lambda: networks.linear_mean((1,)), (reals(4, 3), classes(3)), "linear", **SHARED),
    classifier("linear_4d", lambda: networks.linear_mean((1, 2)), (reals(2, 3, 3), classes(3)), "linear", **SHARED),
    classifier("linear_subclass", networks.subclassed_linear, VECTOR, "linear"),
    Case("log_softmax", networks.log_softmax, "classif_logsoftmax", VECTOR, **LINEAR),
    Case("scalar", networks.scalar, "regression", (reals(3), reals()), n=5, **LINEAR),
    Case("binary", networks.scalar, "classif_binary_logits", (reals(3), counts(1)), **LINEAR),
    Case("binary_labels", partial(networks.perceptron, 3), "classif_binary_logits", (reals(3), counts(1, 3)), **LINEAR),
    Case("counts", partial(networks.perceptron, 2), "poisson_log_rate", (reals(3), counts(4, 2)), n=7, **LINEAR),
    Case("segmentation", networks.segmentation, "segmentation_logits", (reals(1, 3, 2), classes(3, 3, 2)), **SHARED),
    Case(
        "segmentation_ignore",
        networks.segmentation1d,
        "segmentation_logits",
        (reals(2, 5), ignoring(classes(3, 5))),
        **SHARED,
        tags=tagged("ignore"),
    ),
    Case("tokens", networks.token_mlp, "token_logits", TOKENS, **SHARED),
    Case(
        "tokens_ignore",
        networks.token_mlp,
        "token_logits",
        (classes(5, 4), ignoring(classes(5, 4))),
        **SHARED,
        tags=tagged("ignore"),
    ),
    Case(
        "tokens_regression",
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        "regression",
        (reals(4, 3), reals(4, 2)),
        n=4,
        **SHARED,
    ),
    # convolutions
    classifier("conv1d", networks.conv1d, (reals(2, 7), classes(3)), "conv", "groups", **SHARED),
    classifier("conv1d_same", networks.conv1d_same, (reals(2, 5), classes(3)), "conv", **SHARED),
    classifier("conv1d_circular", networks.conv1d_same_circular, (reals(2, 5), classes(3)), "conv", "groups", **SHARED),
    classifier("conv2d_zeros", partial(networks.conv2d, "zeros"), IMAGE, "conv", **SHARED),
    classifier("conv2d_reflect", partial(networks.conv2d, "reflect"), IMAGE, "conv", **SHARED),
    classifier("conv2d_replicate", partial(networks.conv2d, "replicate"), IMAGE, "conv", **SHARED),
    classifier("conv2d_circular", partial(networks.conv2d, "circular"), IMAGE, "conv", **SHARED),
    classifier("conv2d_valid", networks.conv2d_valid, (reals(2, 4, 3), classes(3)), "conv", **SHARED),
    classifier("conv2d_groups", networks.conv2d_groups, (reals(4, 3, 3), classes(3)), "conv", "groups", **SHARED),
    classifier("conv3d", networks.conv3d, (reals(1, 2, 4, 2), classes(3)), "conv", "groups", **SHARED),
    classifier("conv3d_reflect", networks.conv3d_reflect, (reals(1, 3, 2, 2), classes(3)), "conv", **SHARED),
    classifier("conv_transpose1d", networks.conv_transpose1d, (reals(2, 3), classes(3)), "conv", "groups", **SHARED),
    classifier("conv_transpose2d", networks.conv_transpose2d, (reals(2, 2, 3), classes(3)), "conv", "groups", **SHARED),
    classifier("conv_transpose3d", networks.conv_transpose3d, (reals(1, 2, 2, 2), classes(3)), "conv", **SHARED),
    # embeddings, positions, layouts
    classifier("embedding_padding", networks.embedding, (classes(5, 6), classes(3)), "integer", "stopped", **SHARED),
    classifier("embedding_single", networks.embedding_single, (classes(4), classes(3)), "integer", **LINEAR),
    classifier("integer_input", networks.integer_input, (classes(9, 3), classes(3)), "integer", **LINEAR),
    Case(
        "position_embedding",
        networks.position_embedding,
        "token_logits",
        TOKENS,
        **SHARED,
        tags=tagged("no_batch_axis"),
    ),
    classifier("position_mlp", networks.position_mlp, (reals(4, 3), classes(3)), "no_batch_axis", **SHARED),
    Case(
        "sequence_first",
        networks.sequence_first,
        "token_logits",
        (classes(5, 3), classes(5, 3)),
        **SHARED,
        tags=tagged("layout"),
    ),
    classifier("folded", partial(networks.folded, "examples"), (reals(3, 3), classes(3)), "layout", **SHARED),
    classifier("folded_first", partial(networks.folded, "positions"), (reals(3, 3), classes(3)), "layout", **SHARED),
    classifier("folded_conv", networks.folded_conv, (reals(2, 1, 3, 3), classes(3)), "layout", "conv", **SHARED),
    # normalisation
    classifier("batch_norm1d", networks.batch_norm1d, (reals(3, 4), classes(3)), "norm"),
    classifier("batch_norm2d", networks.batch_norm2d, IMAGE, "norm", "inplace"),
    classifier("batch_norm3d", networks.batch_norm3d, (reals(1, 3, 3, 2), classes(3)), "norm"),
    classifier("instance_norm", partial(networks.instance_norm, False), IMAGE, "norm"),
    classifier("instance_norm_tracked", partial(networks.instance_norm, True), IMAGE, "norm"),
    classifier("instance_norm3d", networks.instance_norm3d, (reals(1, 3, 3, 2), classes(3)), "norm"),
    classifier("layer_norm", networks.layer_norm, (reals(4, 3), classes(3)), "norm"),
    classifier("rms_norm", networks.rms_norm, VECTOR, "norm"),
    classifier("group_norm", networks.group_norm, IMAGE, "norm"),
    # attention, recurrence, language models
    Case(
        "attention",
        partial(networks.attention, True),
        "token_logits",
        (reals(3, 4), classes(3, 3)),
        tags=tagged("attention"),
    ),
    Case(
        "attention_first",
        partial(networks.attention, False),
        "token_logits",
        (reals(3, 4), ignoring(classes(3, 3))),
        tags=tagged("attention", "layout", "ignore"),
    ),
    classifier(
        "attention_cross", networks.cross_attention, (reals(2, 4), reals(3, 3), classes(3)), "attention", **PAIR
    ),
    Case("attention_tokens", networks.attention_tokens, "token_logits", (classes(4, 3), classes(4, 3)), **SHARED),
    classifier("encoder_layer", networks.encoder_layer, (reals(3, 4), classes(3)), "attention", "norm"),
    classifier("vision_transformer", networks.VisionTransformer, IMAGE, "attention", "own_parameters"),
    classifier("transposed_linear", networks.transposed_mlp, VECTOR, "transformers", **LINEAR),
    Case(
        "transposed_block",
        networks.TransposedBlock,
        "token_logits",
        (classes(5, 3), classes(5, 3)),
        n=4,
        tags=tagged("transformers", "attention"),
    ),
    Case(
        "gpt2",
        networks.gpt2,
        "token_logits",
        {"input_ids": classes(6, 4), "attention_mask": lengths_mask(4), "labels": shorter_targets(6, 4)},
        n=4,
        tags=tagged("transformers", "attention", "dict", "tied", "ignore"),
    ),
    classifier(
        "lstm", lambda: networks.recurrent(nn.LSTM(2, 2, batch_first=True)), (reals(3, 2), classes(3)), "recurrent"
    ),
    classifier(
        "gru_bidirectional",
        lambda: networks.recurrent(nn.GRU(2, 2, bidirectional=True)),
        (reals(3, 2), classes(3)),
        "recurrent",
        "layout",
    ),
    classifier(
        "rnn_two_layers",
        lambda: networks.recurrent(nn.RNN(2, 3, num_layers=2, batch_first=True)),
        (reals(3, 2), classes(3)),
        "recurrent",
    ),
    # other modules
    classifier("bilinear", networks.bilinear, (reals(3), reals(2), classes(3)), "generic", **PAIR),
    classifier("prelu", networks.prelu, VECTOR, "generic"),
    classifier("weight_norm", networks.weight_norm, (reals(2, 4), classes(3)), "generic", "parametrized"),
    classifier("weight_norm_old", networks.weight_norm_old, (reals(2, 4), classes(3)), "generic"),
    classifier("bare_parameters", networks.bare_parameters, VECTOR, "generic"),
    classifier("parameter_list", networks.parameter_list, VECTOR, "generic", "own_parameters"),
    # structure
    classifier("called_twice", networks.called_twice, VECTOR, "reused", **SHARED),
    classifier("registered_twice", networks.registered_twice, VECTOR, "reused", **SHARED),
    classifier("called_on_two_shapes", networks.called_on_two_shapes, (reals(3, 3), classes(3)), "reused", **SHARED),
    classifier("tied_linears", networks.tied_linears, VECTOR, "tied"),
    Case("tied_embedding", networks.tied_embedding, "token_logits", TOKENS, tags=tagged("tied")),
    classifier("parent_uses_child", networks.parent_uses_child, VECTOR, "hidden"),
    classifier("parent_replaces_child", networks.parent_replaces_child, VECTOR, "hidden"),
    classifier("hidden_use", networks.hidden_use, VECTOR, "hidden", apply=_hidden_use),
    classifier("unused_layer", networks.unused_layer, VECTOR, "unused", **LINEAR),
    classifier("detached_branch", networks.detached_branch, VECTOR, "unused", "stopped", **LINEAR),
    classifier("frozen_layers", networks.frozen_layers, VECTOR, "frozen", **LINEAR),
    classifier("frozen_weights", networks.frozen_weights, VECTOR, "frozen"),
    classifier("inplace", networks.inplace, VECTOR, "inplace", **LINEAR),
    classifier("checkpointed", networks.checkpointed, VECTOR, "checkpoint", **LINEAR),
    classifier("residual", networks.residual, VECTOR, **LINEAR),
    classifier("two_inputs", networks.two_inputs, (reals(3), reals(1), classes(3)), **LINEAR, **PAIR),
    classifier("dead_layer", networks.dead_layer, VECTOR, "dead", **LINEAR),
    classifier("keyword_call", networks.keyword_call, VECTOR, **LINEAR),
    classifier(
        "dict_batch",
        networks.keyword_model,
        {"features": reals(3), "offset": reals(3), "labels": classes(3)},
        "dict",
        **LINEAR,
    ),
    # derivatives inside
    classifier("mapped", networks.mapped, VECTOR, "generic"),
    classifier("force_field", networks.force_field, VECTOR, "differentiates"),
]
