"""Products with the Hessian of a loss, by double backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nngeo.generators.base import Generator, device_of, dtype_is_one
from nngeo.generators.batches import Batch, Examples
from nngeo.generators.independence import check_repeatable
from nngeo.generators.linearized import split_by_parameter
from nngeo.generators.outputs import check_mode, tensor_of
from nngeo.generators.record import BatchRecord
from nngeo.generators.sweeps import Sweeps
from nngeo.generators.untouched import untouched
from nngeo.layers.collection import LayerCollection
from nngeo.layers.kernels import plain_kernels


class HessianGenerator(Generator):
    """The Hessian of `function(prediction, target)`, summed over batches, by products with vectors.

    Args:
        function: loss of a batch, `function(prediction, *targets) -> scalar`.
        reduction: "sum" adds the batches' losses as they are; "mean" divides their sum by the number of examples.
    """

    function = None

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        *,
        device: torch.device | str | None = None,
        reduction: str = "sum",
        verbose: bool = False,
    ):
        if reduction not in ("sum", "mean"):
            raise ValueError(f"Unknown reduction {reduction!r}; known are 'sum', 'mean'.")
        self.model, self.loss, self.reduction, self.verbose = model, loss, reduction, verbose
        device_of(model, device)
        self._sweeps = Sweeps()

    def mv(self, v: Tensor, examples: Any, layer_collection: LayerCollection) -> Tensor:
        """H v (P,); two gradients for each mini-batch."""
        return self.products(v[None], examples, layer_collection)[0][0]

    def dense(self, examples: Any, layer_collection: LayerCollection) -> tuple[Tensor, int]:
        """H (P, P), and the number of examples; P products with unit vectors."""
        size = layer_collection.numel()
        eye = torch.eye(size, dtype=self.dtype, device=self.device)
        matrix, n = self.products(eye, examples, layer_collection)
        return (matrix + matrix.mT) / 2, n

    def diagonal_blocks(self, examples: Any, layer_collection: LayerCollection) -> tuple[dict[str, Tensor], int]:
        """The diagonal blocks (p, p) of H by layer, and the number of examples."""
        blocks, n, examples = {}, 0, Examples.kept(examples)
        for name, layer in layer_collection.layers.items():
            blocks[name], n = self.dense(examples, LayerCollection([layer]))
        return blocks, n

    def records(self, examples: Any, layer_collection: LayerCollection) -> Iterator[BatchRecord]:
        """Not for a Hessian: it is indefinite, so no mean of outer products of gradients."""
        raise NotImplementedError(
            "A Hessian is no mean of outer products of gradients, which this representation is made of. "
            "Use PMatDense, PMatBlockDiag, PMatDiag or PMatImplicit; or GGN, its positive semidefinite part."
        )

    def products(self, rows: Tensor, examples: Any, layer_collection: LayerCollection) -> tuple[Tensor, int]:
        """H applied to each row of (m, P), and the number of examples; all rows share a mini-batch's graph."""
        dtype_is_one(self.model, layer_collection)
        total, n = torch.zeros_like(rows), 0
        for batch in self._batches(examples):
            if not n:
                check_repeatable(self.model, None, batch)
            with untouched(self.model), torch.enable_grad(), plain_kernels(self.model):
                parameters = [p.requires_grad_() for p in layer_collection.parameters(self.model)]
                loss = self._loss(batch)
                grads = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
                live = [j for j, g in enumerate(grads) if g is not None and g.requires_grad]
                for j, row in enumerate(rows if live else ()):
                    pieces = split_by_parameter(layer_collection, row.to(loss))
                    found = torch.autograd.grad(
                        [grads[i] for i in live],
                        parameters,
                        [pieces[i] for i in live],
                        retain_graph=True,
                        allow_unused=True,
                    )
                    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
                    total[j] += torch.cat([part.flatten() for part in parts]).to(total)
            n += batch.size
        return (total / n if self.reduction == "mean" else total), n

    def _loss(self, batch: Batch) -> Tensor:
        prediction = batch.run(self.model, None)
        loss = self.loss(tensor_of(prediction), *batch.targets(None))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"`function(prediction, target)` should return one number; it returned {found}.")
        if not torch.isfinite(loss):
            raise ValueError(f"The loss of a batch is {loss.item()}.")
        return loss.reshape(())

    def _batches(self, examples: Any) -> Iterator[Batch]:
        check_mode(self.model)
        return self._sweeps.batches(examples, self.device, self.verbose)
