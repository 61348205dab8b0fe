"""The Hessian of any loss at the outputs, as a metric: what a generalised Gauss-Newton matrix pulls back."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from nngeo.linalg.arguments import callback
from nngeo.linalg.decompose import eigh
from nngeo.variants.base import Cotangents, Variant, keep, working
from nngeo.variants.margins import WrittenOut
from nngeo.variants.weighing import Weighing


class OutputHessian(Variant):
    """The metric of one example is the Hessian of `loss_fn(outputs[b : b + 1], targets[b : b + 1])` in its outputs.

    The mean over examples is taken later, so the loss is called on one example at a time. With reduction="sum" that is
    the loss of the example; with "mean" it is divided by whatever is averaged within an example: its outputs in
    MSELoss, its positions in CrossEntropyLoss on tokens. On logits (b, C), "sum" and "mean" are the same. Class weights
    and `ignore_index` cancel in the "mean" of one example, which is refused: use "sum".

    The cotangents need a convex loss and, for each example of o outputs, the eigendecomposition of an (o, o) matrix.
    `metric` needs neither. A mask removes rows and columns of the Hessian.

    >>> variant = OutputHessian(torch.nn.MSELoss(reduction="sum"))
    >>> variant.exact(torch.zeros(1, 2), (torch.ones(1, 2),)).metric(torch.ones(1, 2))
    tensor([[2., 2.]])
    """

    by_example = True
    name = "output_hessian"

    def __init__(self, loss_fn: Callable[..., Tensor]):
        self.loss_fn = callback("loss_fn", loss_fn, "of outputs and targets")
        self._constant = False  # whether a loss that does not depend on the outputs was seen

    def exact(self, outputs: Tensor, targets: tuple[Any, ...] = (), mask: Tensor | None = None) -> Cotangents:
        f, counted = working(outputs), self.counted(outputs, targets, mask)
        self._check(f, targets)

        def metric(v: Tensor) -> Tensor:
            product = self._products(f, targets, keep(counted, v.to(f.dtype))[None])[0]
            return keep(counted, product).to(v.dtype)

        @functools.cache
        def columns() -> Tensor:
            o = self.n_output(f)
            basis = torch.eye(o, dtype=f.dtype, device=f.device)[:, None].expand(o, len(f), o).reshape(o, *f.shape)
            hessian = keep(counted, self._products(f, targets, keep(counted, basis)))
            root = _square_root(hessian.reshape(o, len(f), o).transpose(0, 1)).movedim(-1, 0)
            return keep(counted, root.reshape(o, *f.shape)).to(outputs.dtype)

        return Cotangents(self.n_output(outputs), lambda start, stop: columns()[start:stop], metric)

    def gradient(self, outputs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """(b, *outputs), of the loss of each example."""
        f, targets = working(outputs), (target,)
        try:
            gradient = vmap(grad(self._loss), in_dims=(0, *_axes(targets, f)))(f, *targets)
        except RuntimeError:  # vmap does not know the loss
            gradient = torch.stack([_gradient(self._loss, f[b], _example(targets, b))[1] for b in range(len(f))])
        return keep(self.counted(outputs, (), mask), gradient.detach()).to(outputs.dtype)

    def _loss(self, output: Tensor, *targets: Any) -> Tensor:
        """The loss of one example, (), without its batch axis."""
        loss = self.loss_fn(output[None], *(t[None] if isinstance(t, Tensor) else t for t in targets))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"`loss_fn` must return one number for one example; found {found}: use reduction='sum' or 'mean'."
            )
        return loss.reshape(())

    def _products(self, outputs: Tensor, targets: tuple[Any, ...], v: Tensor) -> Tensor:
        """(m, b, *outputs): the Hessian of each example times the m vectors v (m, b, *outputs)."""

        def one(output: Tensor, v: Tensor, *targets: Any) -> Tensor:
            gradient = grad(lambda x: self._loss(x, *targets))
            pull = vjp(gradient, output)[1]
            return vmap(lambda x: pull(x)[0])(v)

        def products() -> Tensor:
            try:
                with warnings.catch_warnings():
                    # Where torch has no batching rule, it loops.
                    warnings.filterwarnings("ignore", message=".*performance drop", category=UserWarning)
                    axes = (0, 1, *_axes(targets, outputs))
                    return vmap(one, in_dims=axes, out_dims=1)(outputs, v, *targets).detach()
            except RuntimeError:  # vmap does not know the loss
                rows = [_double_backward(self._loss, x, _example(targets, b), v[:, b]) for b, x in enumerate(outputs)]
                return torch.stack(rows, 1)

        try:
            return products()
        except (NotImplementedError, RuntimeError) as error:
            if "derivative for" not in str(error):
                raise
        with WrittenOut():
            try:
                return products()
            except (NotImplementedError, RuntimeError) as error:
                raise NotImplementedError(
                    f"`loss_fn` has no second derivative in the outputs ({str(error).splitlines()[0]}). Write it in "
                    "operations that have one."
                ) from error

    def _check(self, outputs: Tensor, targets: tuple[Any, ...]) -> None:
        """Raise where the loss weighs the examples of a batch, warn where it is constant: by a call on the first."""
        if len(outputs):
            with torch.enable_grad(), Weighing() as weighing:
                loss = self._loss(outputs[0].detach().requires_grad_(), *_example(targets, 0))
            weighing.check(targets)
            if not (loss.requires_grad or self._constant):
                self._constant = True
                warnings.warn(
                    "The loss and its gradients do not depend on the outputs, nor on parameters: the matrix is zero.",
                    stacklevel=2,
                )


def _axes(targets: tuple[Any, ...], outputs: Tensor) -> list[int | None]:
    """The batch axis of each target: 0, or None for what is no tensor."""
    for target in targets:
        if isinstance(target, Tensor) and (target.ndim == 0 or len(target) != len(outputs)):
            raise ValueError(
                f"Outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(target.shape)} are not of the "
                "same examples: their first axes must agree."
            )
    return [0 if isinstance(target, Tensor) else None for target in targets]


def _example(targets: tuple[Any, ...], b: int) -> list[Any]:
    return [target[b] if isinstance(target, Tensor) else target for target in targets]


def _gradient(loss: Callable[..., Tensor], output: Tensor, targets: list[Any]) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = output.clone().requires_grad_()
        return leaf, torch.autograd.grad(loss(leaf, *targets), leaf, create_graph=True)[0]


def _double_backward(loss: Callable[..., Tensor], output: Tensor, targets: list[Any], v: Tensor) -> Tensor:
    """(m, *outputs): the Hessian of one example times the vectors v (m, *outputs)."""
    leaf, gradient = _gradient(loss, output, targets)
    if not gradient.requires_grad:  # the loss is linear
        return torch.zeros_like(v)
    rows = [torch.autograd.grad(gradient, leaf, x, retain_graph=True, materialize_grads=True)[0] for x in v]
    return torch.stack(rows)


def _square_root(hessian: Tensor) -> Tensor:
    """(b, o, o) whose columns c satisfy sum c c' = hessian; raises if an eigenvalue is negative beyond rounding."""
    evals, evecs = eigh((hessian + hessian.mT) / 2, "Hessian of the loss")
    eps = torch.finfo(evals.dtype).eps
    # The second term: a saturated softmax leaves nothing but the rounding errors of numbers of size one.
    tolerance = 100 * eps * evals.abs().max() + 4 * eps if evals.numel() else 0
    if bool((evals < -tolerance).any()):
        raise ValueError(
            f"The loss is not convex in the outputs: its Hessian there has the eigenvalue {evals.min().item():.3g} and "
            "no real square root. Use nngeo.Hessian, or PMatImplicit, which needs no root."
        )
    return evecs * evals.clamp(min=0).sqrt()[:, None, :]
