"""Products with the Hessian of a loss, by double backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nngeo.generators.base import Generator, device_of, dtype_is_one
from nngeo.generators.batches import Batch, Examples
from nngeo.generators.differentiable import Backward, Footprint, differentiable, joined, split_by_parameter
from nngeo.generators.independence import check_repeatable
from nngeo.generators.kept import Kept, LinearizedGenerator
from nngeo.generators.outputs import check_mode, outputs_of
from nngeo.generators.record import BatchRecord
from nngeo.generators.sweeps import Sweeps
from nngeo.generators.unused import Unused
from nngeo.layers.collection import LayerCollection
from nngeo.layers.plainnorms import PlainNorms
from nngeo.layers.turn import TURN
from nngeo.linalg.arguments import callback, choice, flag


class HessianGenerator(Generator):
    """The Hessian of `function(prediction, target)`, summed over batches, by products with vectors.

    Args:
        function: loss of a batch, `function(prediction, *targets) -> scalar`.
        reduction: "sum" adds the batches' losses as they are; "mean" divides their sum by the number of examples.
    """

    function = None
    sums_squares = False

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        *,
        device: torch.device | str | None = None,
        reduction: str = "sum",
        verbose: bool = False,
    ):
        choice("reduction", reduction, ("sum", "mean"))
        callback("function", loss, "(prediction, target)")
        flag("verbose", verbose)
        self.model, self.loss, self.reduction, self.verbose = model, loss, reduction, verbose
        device_of(model, device)
        self._sweeps, self._unused = Sweeps(), Unused()
        self.backward, self.footprint = Backward(), Footprint()

    @property
    def described(self) -> str:
        """The loss, and how it is summed."""
        return f"Hessian of {getattr(self.loss, '__name__', type(self.loss).__name__)}, {self.reduction}"

    def mv(self, v: Tensor, examples: Any, layer_collection: LayerCollection) -> Tensor:
        """H v, like v (..., P): for each mini-batch a gradient that all share, and about one more for each vector."""
        return self.products(v.reshape(-1, v.shape[-1]), examples, layer_collection)[0].reshape(v.shape)

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

    def records(self, examples: Any, layer_collection: LayerCollection, factors: bool = True) -> Iterator[BatchRecord]:
        """Not for a Hessian: it is indefinite, so no mean of outer products of gradients."""
        raise NotImplementedError(
            "A Hessian is no mean of outer products of gradients, which this representation is made of. "
            "Use PMatDense, PMatBlockDiag, PMatDiag or PMatImplicit; or GGN, its positive semidefinite part."
        )

    @TURN
    def products(self, rows: Tensor, examples: Any, layer_collection: LayerCollection) -> tuple[Tensor, int]:
        """H applied to each row of (m, P), and the number of examples; all rows share a mini-batch's graph."""
        total, n = torch.zeros_like(rows), 0
        for graph in self._graphs(examples, layer_collection):
            total += graph.products(rows)
            n += graph.size
        return (total / n if self.reduction == "mean" else total), n

    @TURN
    def linearize(self, examples: Any, layer_collection: LayerCollection) -> LinearizedGenerator:
        """The same products from the graphs of all mini-batches, which are recorded here and kept."""
        graphs = list(self._graphs(examples, layer_collection))
        graphs[0].elements()  # here, not in the first product
        return LinearizedGenerator(self, KeptHessian(graphs, self.reduction), layer_collection)

    def _graphs(self, examples: Any, layers: LayerCollection) -> Iterator[HessianGraph]:
        dtype_is_one(self.model, layers)
        names = [name for name, _ in layers.named_parameters(self.model)]
        unused = set(names)
        for j, batch in enumerate(self._batches(examples)):
            if j == 0:
                check_repeatable(self.model, None, batch)
            graph = HessianGraph(self, batch, layers)
            unused -= {name for name, used in zip(names, graph.used, strict=True) if used}
            yield graph
        of = "The outputs" if len(unused) < len(names) else "The loss and its gradients"
        self._unused.warn([name for name in names if name in unused], of)

    def run(self, batch: Batch) -> Tensor:
        """The outputs (b, ...), with their graph."""
        return outputs_of(batch, self.model, None)

    def loss_of(self, batch: Batch) -> Tensor:
        """The loss of a batch, 0-d, with its graph."""
        loss = self.loss(self.run(batch), *batch.targets(None))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"`function(prediction, target)` should return one number; it returned {found}.")
        if not torch.isfinite(loss):
            raise ValueError(f"The loss of a batch is {loss.item()}.")
        return loss.reshape(())

    def _batches(self, examples: Any) -> Iterator[Batch]:
        check_mode(self.model)
        return self._sweeps.batches(examples, self.device, self.verbose)


class HessianGraph:
    """The graph of the gradient of the loss of a mini-batch; its derivative along v is H v, at about one gradient."""

    def __init__(self, generator: HessianGenerator, batch: Batch, layers: LayerCollection):
        self._by, self._batch, self._layers, self.size = generator, batch, layers, batch.size
        with differentiable(generator.model, layers), PlainNorms():  # the model may differentiate itself
            self._parameters = list(layers.parameters(generator.model))
            self._grads: list[Tensor | None] = [None] * len(self._parameters)
            loss = generator.loss_of(batch)
            if loss.requires_grad:
                self._grads = list(torch.autograd.grad(loss, self._parameters, create_graph=True, allow_unused=True))

    @property
    def used(self) -> list[bool]:
        """Which parameters the loss depends on."""
        return [g is not None for g in self._grads]

    def products(self, rows: Tensor) -> Tensor:
        """H v (m, P) for the rows v of (m, P)."""
        found: list[Tensor | None] = [None] * len(self._parameters)
        pieces = split_by_parameter(self._layers, rows.to(self._parameters[0]))
        pairs = [(g, t) for g, t in zip(self._grads, pieces, strict=True) if g is not None and g.requires_grad]
        if pairs:
            with differentiable(self._by.model, self._layers):
                elements = self.elements() if len(rows) > 1 else 1
                found = self._by.backward([g for g, _ in pairs], self._parameters, [t for _, t in pairs], elements)
        return joined(found, self._parameters, len(rows)).detach().to(rows)

    def elements(self) -> int:
        """What one of many vectors may hold at a time; the first time, it costs a forward of two examples."""
        with differentiable(self._by.model, self._layers):
            kept = self._by.footprint.of(self._batch, self._by.model, self._by.run)
        # The graph of the gradient holds the forward's tensors, and gradients and tangents at each of them.
        return self._layers.numel() + 3 * kept


class KeptHessian(Kept):
    """The Hessian from the graph of every mini-batch."""

    def __init__(self, graphs: list[HessianGraph], reduction: str):
        self.graphs, self.reduction = graphs, reduction

    def mv(self, rows: Tensor) -> Tensor:
        total = torch.zeros_like(rows)
        for graph in self.graphs:
            total += graph.products(rows)
        return total / sum(graph.size for graph in self.graphs) if self.reduction == "mean" else total
