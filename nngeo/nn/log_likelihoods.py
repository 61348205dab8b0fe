"""Log likelihoods of a model's outputs, with their derivatives by weights or inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nngeo import products
from nngeo.generators.independence import explained
from nngeo.generators.outputs import check_outputs, outputs_of
from nngeo.linalg.arguments import choice, instance, tensor
from nngeo.linalg.precision import full_precision
from nngeo.nn.blocks import Blocks, branches, pulled_blocks
from nngeo.nn.flags import is_weight
from nngeo.nn.own import own_derivatives
from nngeo.products import Diagonal, Softmax
from nngeo.products.evaluation import Evaluation

_REDUCE = {"return all": None, None: None, "sum": "sum", "average": "mean"}
_METHODS = {"exact": "exact", "approx": "diag_backprop"}


class LogLikelihood(ABC):
    """The log likelihood of targets under a model, its gradient, and its Gauss-Newton matrix.

    The signs are the log likelihood's: gradients ascend, and the Gauss-Newton matrix is negative semidefinite. A model
    is any module.

    Args:
        aggregate_batch: "return all" (or None) gives a result for each example; "sum" and "average" run over the batch,
            inside, without a (b, P) array for the Gauss-Newton matrix.
        metric_shape: of the Gauss-Newton matrix: "diag", or "full", for weights of a container a list of blocks.
        metric_backprop: "exact", or "approx", which keeps only diagonals between layers ("diag" only).
    """

    def __init__(
        self, aggregate_batch: str | None = "return all", metric_shape: str = "diag", metric_backprop: str = "exact"
    ):
        choice("aggregate_batch", aggregate_batch, _REDUCE)
        choice("metric_shape", metric_shape, ("diag", "full"))
        choice("metric_backprop", metric_backprop, _METHODS)
        if (metric_shape, metric_backprop) == ("full", "approx"):
            raise ValueError(
                'metric_backprop="approx" keeps only diagonals between layers, so there is no metric_shape="full": use '
                '"exact", or metric_shape="diag".'
            )
        self.aggregate_batch, self.metric_shape, self.metric_backprop = aggregate_batch, metric_shape, metric_backprop

    def forward(self, x: Any, model: nn.Module, target: Tensor | None = None) -> Tensor:
        """The log likelihood of each example (b,), or its sum or mean."""
        val = _outputs(model, x)
        found = self.log_density(val, self._target(target, val)).reshape(len(val), -1).sum(-1)
        return self._aggregated(found)

    __call__ = forward

    @full_precision
    def gradient(self, x: Any, model: nn.Module, target: Tensor | None = None, wrt: str = "weight") -> Tensor | None:
        """The gradient of each example's log likelihood (b, n), or their sum or mean (n,); None without weights."""
        if _nothing(model, wrt):
            return None
        with own_derivatives(model):
            val = _outputs(model, x)
            residual = self.residual(val, self._target(target, val))
            return self._aggregated(products.vjp(model, x, residual.reshape(len(val), -1), wrt))

    @full_precision
    def ggn(
        self, x: Any, model: nn.Module, target: Tensor | None = None, wrt: str = "weight"
    ) -> Tensor | list[Blocks] | None:
        """`J' H J` for the second derivative H of the log likelihood by the outputs, which no target enters.

        (b, n) for "diag"; (b, n, n), or the list of blocks, for "full"; without b where the batch is aggregated.
        """
        if _nothing(model, wrt):
            return None
        options: dict[str, Any] = {"method": _METHODS[self.metric_backprop], "reduce": _REDUCE[self.aggregate_batch]}
        with own_derivatives(model):
            metric = self.metric(_outputs(model, x))
            if self.metric_shape == "diag":
                return _negative(products.jTmjp(model, x, metric, wrt, result="diag", **options))
            if is_weight(wrt) and branches(model) is not None:
                return _negative(pulled_blocks(model, x, metric, options))
            return _negative(products.jTmjp(model, x, metric, wrt, **options))

    @abstractmethod
    def log_density(self, val: Tensor, target: Tensor) -> Tensor:
        """Terms (b, ...) whose sum is the log likelihood of an example."""

    @abstractmethod
    def residual(self, val: Tensor, target: Tensor) -> Tensor:
        """The derivative (b, ...) of the log likelihood by the outputs."""

    @abstractmethod
    def metric(self, val: Tensor) -> Any:
        """Minus the second derivative by the outputs, as a metric of `nngeo.products`."""

    def _target(self, target: Tensor | None, val: Tensor) -> Tensor:
        if target is None:
            raise ValueError(f"`target` is missing: {type(self).__name__} needs it, but in `ggn`.")
        if tensor("target", target, "like the outputs", real=False).shape != val.shape:
            raise ValueError(f"`target` has shape {tuple(target.shape)}, the model's outputs {tuple(val.shape)}.")
        return target.to(val.dtype)

    def _aggregated(self, found: Tensor) -> Tensor:
        reduce = _REDUCE[self.aggregate_batch]
        return found if reduce is None else found.sum(0) if reduce == "sum" else found.mean(0)


class LogGaussian(LogLikelihood):
    """Normal targets of variance 1 around the outputs, without the constant: `-0.5 |val - target|^2`.

    >>> LogGaussian("sum").forward(torch.ones(2, 3), nn.Identity(), torch.zeros(2, 3))
    tensor(-3.)
    """

    def log_density(self, val: Tensor, target: Tensor) -> Tensor:
        return -0.5 * (val - target) ** 2

    def residual(self, val: Tensor, target: Tensor) -> Tensor:
        return target - val

    def metric(self, val: Tensor) -> None:
        return None


class LogBinaryBernoulli(LogLikelihood):
    """Targets in [0, 1] with a logit for each.

    >>> LogBinaryBernoulli().gradient(torch.tensor([[1000.0, -1000.0]]), nn.Identity(), torch.zeros(1, 2), wrt="input")
    tensor([[-1., 0.]])
    """

    def log_density(self, val: Tensor, target: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(val, target, reduction="none")

    def residual(self, val: Tensor, target: Tensor) -> Tensor:
        # Without the difference of two numbers that are almost one.
        return target * torch.sigmoid(-val) - (1 - target) * torch.sigmoid(val)

    def metric(self, val: Tensor) -> Diagonal:
        return Diagonal((torch.sigmoid(val) * torch.sigmoid(-val)).reshape(len(val), -1))


class LogBernoulli(LogLikelihood):
    """Classes from logits (b, ..., C), at every position: targets are one-hot, or integers (b, ...).

    The Gauss-Newton matrix takes the targets of a position to sum to one. "approx" starts from the diagonal p (1 - p).

    >>> LogBernoulli("average").forward(torch.zeros(2, 4), nn.Identity(), torch.tensor([1, 3])).exp()
    tensor(0.2500)
    """

    def log_density(self, val: Tensor, target: Tensor) -> Tensor:
        return target * val.log_softmax(-1)

    def residual(self, val: Tensor, target: Tensor) -> Tensor:
        return target - target.sum(-1, keepdim=True) * val.softmax(-1)

    def metric(self, val: Tensor) -> Any:
        if self.metric_backprop == "exact":
            return Softmax(val)
        log_p = val.log_softmax(-1)
        return Diagonal((log_p.exp() * -torch.expm1(log_p)).reshape(len(val), -1))

    def _target(self, target: Tensor | None, val: Tensor) -> Tensor:
        if isinstance(target, Tensor) and target.shape == val.shape[:-1] and not target.is_floating_point():
            target = F.one_hot(target.long(), val.shape[-1])
        return super()._target(target, val)


def _outputs(model: nn.Module, x: Any) -> Tensor:
    """Without a graph, of a model that may differentiate inside."""
    evaluation = Evaluation.of(model, x, None)
    with explained(evaluation.run, evaluation.batch), torch.enable_grad():
        found = outputs_of(evaluation.batch, model, evaluation.function).detach()
    check_outputs(found, evaluation.batch, model, evaluation.function)
    return found


def _nothing(model: nn.Module, wrt: str) -> bool:
    instance("model", model, nn.Module)
    return is_weight(wrt) and not any(p.requires_grad for p in model.parameters())


def _negative(blocks: Any) -> Any:
    return [_negative(block) for block in blocks] if isinstance(blocks, list) else -blocks
