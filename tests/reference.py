"""What every matrix is, by plain loops of autograd: slow and obvious, one example at a time.

Axes: b example, k output or cotangent, t position, o, i features, P all parameters. Coordinates are those of the
trainable `model.named_parameters()`. A batch is (*inputs, target), or a dict with the target under "labels".
`function(*batch)`, or `function(batch)` of a dict, replaces the default call of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

Function = Callable[..., Tensor] | None
Loss = Callable[[Tensor, Tensor], Tensor]  # (outputs, target) -> scalar

# ------------------------------------------------------------------------------------------ batches


def outputs(model: nn.Module, batch: Any, function: Function = None) -> Tensor:
    """(b, ...), what the model says about a batch."""
    if isinstance(batch, dict):
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        result = model(**inputs) if function is None else function(batch)
        return getattr(result, "logits", result)
    return model(batch[0]) if function is None else function(*batch)


def target(batch: Any) -> Tensor:
    return batch["labels"] if isinstance(batch, dict) else batch[-1]


def examples(batch: Any) -> list[Any]:
    """Batches of one example each."""
    return [
        {name: tensor[b : b + 1] for name, tensor in batch.items()}
        if isinstance(batch, dict)
        else tuple(tensor[b : b + 1] for tensor in batch)
        for b in range(len(target(batch)))
    ]


# ------------------------------------------------------------------------------------------ derivatives


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that span the coordinates; one that has several names counts once."""
    return [parameter for _, parameter in model.named_parameters() if parameter.requires_grad]


def gradient(value: Tensor, parameters: list[Any], create_graph: bool = False) -> Tensor:
    """(P,), of a scalar; zero for parameters that it does not depend on."""
    grads: Any = [None] * len(parameters)
    if value.requires_grad:
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, create_graph=create_graph)
    pairs = zip(grads, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if grad is None else grad).flatten() for grad, p in pairs])


def jacobian(
    model: nn.Module, batch: Any, function: Function = None, parameters: list[nn.Parameter] | None = None
) -> Tensor:
    """(k, n, P), of all outputs of an example, flattened."""
    parameters = trainable(model) if parameters is None else parameters
    rows = [
        torch.stack([gradient(output, parameters) for output in outputs(model, example, function).flatten()])
        for example in examples(batch)
    ]
    return torch.stack(rows, 1)


def hessian(model: nn.Module, batch: Any, loss: Loss, function: Function = None) -> Tensor:
    """(P, P), of loss(outputs, target) of the whole batch, by double backward."""
    parameters = trainable(model)
    with plain_attention():
        value = loss(outputs(model, batch, function), target(batch))
        first = gradient(value, parameters, create_graph=True)
        return torch.stack([gradient(entry, parameters) for entry in first])


def hessian_by_differences(
    model: nn.Module, batch: Any, loss: Loss, function: Function = None, step: float = 1e-5
) -> Tensor:
    """(P, P), the same by central differences of gradients: right to about step^2."""
    parameters = trainable(model)

    def gradient_at(offset: Tensor) -> Tensor:
        with moved(parameters, offset):
            return gradient(loss(outputs(model, batch, function), target(batch)), parameters)

    steps = step * torch.eye(sum(p.numel() for p in parameters), dtype=parameters[0].dtype)
    return torch.stack([(gradient_at(offset) - gradient_at(-offset)) / (2 * step) for offset in steps])


@contextmanager
def moved(parameters: list[nn.Parameter], offset: Tensor) -> Iterator[None]:
    """The parameters at theta + offset, offset (P,), and back at exactly theta."""
    before = [parameter.detach().clone() for parameter in parameters]
    parts = offset.split([parameter.numel() for parameter in parameters])
    with torch.no_grad():
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.add_(part.view_as(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention by plain matrix products: the fused kernels have no second derivative."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


# ------------------------------------------------------------------------------------------ likelihoods
# Of one example: outputs and target come without a batch axis. Positions are independent and add up.


def class_rows(variant: str, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (positions, classes) and targets (positions,)."""
    rows = output.movedim(0, -1) if variant == "segmentation_logits" else output
    rows = rows.reshape(-1, rows.shape[-1])
    return (rows if variant == "classif_logsoftmax" else rows.log_softmax(-1)), target.reshape(-1)


CATEGORICAL = ("classif_logits", "classif_logsoftmax", "segmentation_logits", "token_logits")


def negative_log_likelihood(
    variant: str, output: Tensor, target: Tensor, *, covariance: float = 1.0, ignore_index: int = -100
) -> Tensor:
    """Scalar, without terms that do not depend on the outputs."""
    if variant in CATEGORICAL:
        rows, labels = class_rows(variant, output, target)
        return -sum((row[y] for row, y in zip(rows, labels, strict=True) if y != ignore_index), 0.0 * output.sum())
    if variant == "regression":
        return ((output - target) ** 2).sum() / (2 * covariance)
    if variant == "classif_binary_logits":
        return (F.softplus(output) - target * output).sum()
    if variant == "poisson_log_rate":
        return (output.exp() - target * output).sum()
    raise ValueError(f"No reference for variant {variant!r}.")


def possible_targets(
    variant: str, output: Tensor, target: Tensor, *, ignore_index: int = -100
) -> Iterator[tuple[Tensor, Tensor]]:
    """(probability, negative log probability) of every value that the target may take, position by position."""
    if variant == "classif_binary_logits":
        for logit in output.flatten():
            for sign in (1.0, -1.0):
                yield torch.sigmoid(sign * logit), -F.logsigmoid(sign * logit)
    else:
        rows, labels = class_rows(variant, output, target)
        for row, label in zip(rows, labels, strict=True):
            if label != ignore_index:
                for log_probability in row:
                    yield log_probability.exp(), -log_probability


def output_metric(variant: str, output: Tensor, target: Tensor, **options: Any) -> Tensor:
    """(o, o), the expected negative Hessian of the log-likelihood of one example in its flattened outputs.

    The target says only which positions are ignored.

    Where targets can be enumerated it is the expected outer product of the score instead, which is the same, and is
    meant by "classif_logsoftmax" too: there the likelihood is linear in the outputs. Elsewhere no target changes the
    Hessian.
    """
    f = output.detach().flatten().requires_grad_()
    output = f.view(output.shape)
    if variant in ("regression", "poisson_log_rate"):
        value = negative_log_likelihood(variant, output, torch.zeros_like(output), **options)
        return torch.stack([gradient(entry, [f]) for entry in gradient(value, [f], create_graph=True)])
    metric = torch.zeros(f.numel(), f.numel(), dtype=f.dtype)
    for probability, negative_log in possible_targets(variant, output, target, **options):
        score = gradient(negative_log, [f])
        metric += probability.detach() * torch.outer(score, score)
    return metric


# ------------------------------------------------------------------------------------------ matrices


def metrics(model: nn.Module, batch: Any, variant: str, function: Function = None, **options: Any) -> list[Tensor]:
    """The output metric (o, o) of each example."""
    return [
        output_metric(variant, outputs(model, example, function)[0], target(example)[0], **options)
        for example in examples(batch)
    ]


def pulled_back(rows: Tensor, at_outputs: list[Tensor]) -> Tensor:
    """(P, P): 1/n sum_b J_b' M_b J_b, for the jacobian (k, n, P) and a metric (k, k) for each example."""
    return sum(rows[:, b].T @ metric @ rows[:, b] for b, metric in enumerate(at_outputs)) / len(at_outputs)


def fisher(model: nn.Module, batch: Any, variant: str, function: Function = None, **options: Any) -> Tensor:
    """(P, P): 1/n sum_b J_b' M_b J_b. Options: covariance of "regression", ignore_index of class targets."""
    return pulled_back(jacobian(model, batch, function), metrics(model, batch, variant, function, **options))


def example_gradients(model: nn.Module, batch: Any, variant: str, function: Function = None, **options: Any) -> Tensor:
    """(n, P), of the negative log-likelihood of each example at its target."""
    rows = []
    for example in examples(batch):
        output = outputs(model, example, function)[0]
        value = negative_log_likelihood(variant, output, target(example)[0], **options)
        rows.append(gradient(value, trainable(model)))
    return torch.stack(rows)


def empirical_fisher(model: nn.Module, batch: Any, variant: str, function: Function = None, **options: Any) -> Tensor:
    """(P, P): 1/n sum_b g_b g_b', from the gradients at the targets."""
    g = example_gradients(model, batch, variant, function, **options)
    return g.T @ g / len(g)


def ggn(model: nn.Module, batch: Any, loss: Loss, function: Function = None) -> Tensor:
    """(P, P): 1/n sum_b J_b' H_b J_b, where H_b is the Hessian of loss(outputs, target) of a batch of one."""
    hessians = []
    for example in examples(batch):
        output = outputs(model, example, function).detach()
        f = output.flatten().requires_grad_()
        first = gradient(loss(f.view_as(output), target(example)), [f], create_graph=True)
        hessians.append(torch.stack([gradient(entry, [f]) for entry in first]))
    return pulled_back(jacobian(model, batch, function), hessians)


def ntk(model: nn.Module, batch: Any, other: Any = None, function: Function = None) -> Tensor:
    """(k, n, k, m), inner products of the gradients of outputs; of a batch with itself if there is no other."""
    left = jacobian(model, batch, function)
    right = left if other is None else jacobian(model, other, function)
    return torch.einsum("kbp,lcp->kblc", left, right)


# ------------------------------------------------------------------------------------------ layers


def layer_slices(model: nn.Module) -> dict[str, slice]:
    """{module name: coordinates}, for modules that own trainable parameters; a parametrized one owns its originals."""
    slices: dict[str, slice] = {}
    start = 0
    for full_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = full_name.rpartition(".")[0]
            owner, _, _ = name.partition("parametrizations")
            if parametrize.is_parametrized(model.get_submodule(owner.rstrip("."))):
                name = owner.rstrip(".")
            stop = start + parameter.numel()
            slices[name] = slice(slices[name].start if name in slices else start, stop)
            start = stop
    return slices


def block_diagonal(matrix: Tensor, slices: dict[str, slice]) -> Tensor:
    """(P, P), the matrix with zeros between layers."""
    blocks = torch.zeros_like(matrix)
    for s in slices.values():
        blocks[s, s] = matrix[s, s]
    return blocks


# ------------------------------------------------------------------------------------------ Kronecker factors


def weight_matrices(module: nn.Module) -> list[Tensor]:
    """For each group, the layer's coordinates [weight.flatten(), bias] laid out as a matrix (o, i), bias last."""
    weight, bias, groups = module.weight, getattr(module, "bias", None), getattr(module, "groups", 1)
    index = torch.arange(weight.numel()).view(weight.shape)
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        matrices = [part.flatten(1) for part in index.chunk(groups)]
    else:  # the input features come first: transposed convolutions, Embedding, Conv1D of transformers
        matrices = [part.transpose(0, 1).flatten(1) for part in index.chunk(groups)]
    if bias is not None:
        columns = (weight.numel() + torch.arange(bias.numel())).chunk(groups)
        matrices = [torch.cat([m, column[:, None]], 1) for m, column in zip(matrices, columns, strict=True)]
    return matrices


def feature_rows(module: nn.Module, out: Tensor) -> Tensor:
    """(t, o), a layer's output for one example: all that is not the axis of features is a position."""
    convolution = isinstance(module, torch.nn.modules.conv._ConvNd)
    return out.movedim(1 if convolution else -1, -1).reshape(-1, out.shape[1 if convolution else -1])


def layer_calls(model: nn.Module, module: nn.Module, example: Any, function: Function) -> tuple[Tensor, list[Any]]:
    """The model's outputs, and the (input, output) of each call of one of its modules."""
    calls: list[Any] = []

    def note(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor:
        calls.append(((*args, *kwargs.values())[0].detach(), out))
        return out.clone()  # what follows may overwrite it in place

    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        result = outputs(model, example, function)
        return result, list(calls)  # a copy: checkpointing calls the module again, during backward
    finally:
        handle.remove()


def kronecker_statistics(
    model: nn.Module, name: str, example: Any, cotangents: Callable[[Tensor], Tensor], function: Function
) -> tuple[Tensor, Tensor]:
    """For one example: a (n, t, i) and g (k, n, t, o), over all calls of the layer; n are its groups.

    A linear map is out[t, o] = sum_i W[o, i] a[t, i], thus a[t] is the derivative of out[t, o] by the row W[o].
    """
    module = model.get_submodule(name)
    matrices, parameters = weight_matrices(module), list(module.parameters(recurse=False))
    result, calls = layer_calls(model, module, example, function)
    c = cotangents(result[0])  # (k, o)
    outs = [out for _, out in calls]
    grads = [
        torch.autograd.grad(result, outs, row.view_as(result), retain_graph=True, allow_unused=True) if outs else []
        for row in c
    ]
    a, g = [], []
    for call, (x, out) in enumerate(calls):
        rows = feature_rows(module, module.forward(x))  # forward alone: without the hooks
        size = rows.shape[1] // len(matrices)
        a.append(
            torch.stack(
                [
                    torch.stack([gradient(row[n * size], parameters)[matrix[0]] for row in rows])
                    for n, matrix in enumerate(matrices)
                ]
            )
        )
        per_cotangent = [torch.zeros_like(out) if grad[call] is None else grad[call] for grad in grads]
        g.append(torch.stack([_by_group(feature_rows(module, grad), len(matrices)) for grad in per_cotangent]))
    if not calls:
        groups, (o, i) = len(matrices), matrices[0].shape
        return c.new_zeros(groups, 0, i), c.new_zeros(len(c), groups, 0, o)
    return torch.cat(a, 1), torch.cat(g, 2)


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """(t, n o) to (n, t, o)."""
    return rows.unflatten(1, (groups, -1)).transpose(0, 1)


def kfac_factors(
    model: nn.Module,
    batch: Any,
    name: str,
    variant: str,
    function: Function = None,
    *,
    sharing: str = "expand",
    empirical: bool = False,
    **options: Any,
) -> list[tuple[Tensor, Tensor]]:
    """For each group of the layer, A (i, i) and G (o, o).

    "expand": A = 1/n sum_bt a a' and G = 1/(n T) sum_kbt g g'. "reduce": a averaged and g summed over positions, and
    A = 1/n sum_b a a', G = 1/n sum_kb g g'. Cotangents k: all that make up the output metric, or the gradient at the
    target.
    """
    inputs, outgrads = 0.0, 0.0
    for example in examples(batch):
        y = target(example)[0]

        def cotangents(output: Tensor, y: Tensor = y) -> Tensor:
            if empirical:
                f = output.detach().requires_grad_()
                return gradient(negative_log_likelihood(variant, f, y, **options), [f])[None]
            values, vectors = torch.linalg.eigh(output_metric(variant, output, y, **options))
            return (vectors * values.clamp(min=0).sqrt()).T

        a, g = kronecker_statistics(model, name, example, cotangents, function)
        positions = a.shape[1]
        if sharing == "reduce" and positions:
            a, g, positions = a.mean(1, keepdim=True), g.sum(2, keepdim=True), 1
        inputs = inputs + torch.stack([sum_of_outer_products(rows) for rows in a])
        grads = [sum_of_outer_products(g[:, n].flatten(0, 1)) for n in range(len(a))]
        outgrads = outgrads + torch.stack(grads) / max(positions, 1)
    n = len(target(batch))
    return list(zip(inputs / n, outgrads / n, strict=True))


def sum_of_outer_products(rows: Tensor) -> Tensor:
    total = rows.new_zeros(rows.shape[1], rows.shape[1])
    for row in rows:
        total += torch.outer(row, row)
    return total


def kfac_block(
    model: nn.Module, batch: Any, name: str, variant: str, function: Function = None, **options: Any
) -> Tensor:
    """(p, p), the Kronecker-factored block of a layer ordered as [weight.flatten(), bias]; options of kfac_factors."""
    factors = kfac_factors(model, batch, name, variant, function, **options)
    matrices = weight_matrices(model.get_submodule(name))
    size = sum(matrix.numel() for matrix in matrices)
    block = torch.zeros(size, size, dtype=factors[0][0].dtype)
    for matrix, (a, g) in zip(matrices, factors, strict=True):
        index = matrix.flatten()
        block[index[:, None], index] = torch.kron(g, a)
    return block
