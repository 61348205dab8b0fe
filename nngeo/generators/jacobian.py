"""The only data sweep of the library: examples in, per-layer records out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from nngeo.generators.base import Generator, device_of, dtype_is_one
from nngeo.generators.batches import MASK_KEYS, Batch, Function, Target
from nngeo.generators.columns import columns_pay, record_by_columns
from nngeo.generators.kept import KeptJacobian, LinearizedGenerator, require_second_derivatives
from nngeo.generators.linearized import Linearizer, ReverseGraph
from nngeo.generators.outputs import check_mode, check_outputs, random_like
from nngeo.generators.padding import Padding, Pulled
from nngeo.generators.plans import Planner
from nngeo.generators.products import LayerwiseProducts, Point, WholeModelProducts
from nngeo.generators.record import BatchRecord
from nngeo.generators.recording import Recording
from nngeo.generators.sizing import Measure, OfRecords, Sizing, joined, load
from nngeo.generators.sweeps import Sweeps
from nngeo.generators.unused import Unused
from nngeo.layers.collection import LayerCollection
from nngeo.layers.turn import TURN
from nngeo.linalg.arguments import callback, count, flag
from nngeo.linalg.contraction import add_inner
from nngeo.variants import Cotangents, Estimator


class JacobianGenerator(Generator):
    """Runs a model on mini-batches and pulls cotangents back to its layers.

    Args:
        function: replaces `model(batch[0])`, or `model(**batch)` for dict batches; it is called as `function(*batch)`,
            or `function(batch)` with a dict.
        mask: which positions count, as a function of the batch or a key of a dict batch. By default, with token
            outputs, the "attention_mask" of a dict batch, unless the model is an encoder and decoder.
        target: the target of a batch: a function of it, its index or its key; by default what `Batch.targets` says.
        n_output: the number of outputs to expect.
        check: whether the first examples are looked at: whether the rules agree with autograd (see `accounting`), and
            whether examples influence each other.
    """

    def __init__(
        self,
        model: nn.Module,
        estimator: Estimator,
        function: Function | None = None,
        *,
        device: torch.device | str | None = None,
        mask: Callable[[Any], Tensor] | str | None = None,
        target: Target | None = None,
        n_output: int | None = None,
        check: bool = True,
        verbose: bool = False,
    ):
        if n_output is not None:
            count("n_output", n_output)
        flag("check", check)
        flag("verbose", verbose)
        callback("function", function, "of a batch", optional=True)
        if not isinstance(target, int | str):
            callback("target", target, "of the batch; or an index, or a key", optional=True)
        if not isinstance(mask, str):
            callback("mask", mask, "of the batch; or a key", optional=True)
        self.model, self.estimator, self.function = model, estimator, function
        self.mask, self.target, self.n_output, self.check, self.verbose = mask, target, n_output, check, verbose
        device_of(model, device)
        self._sweeps, self._unused = Sweeps(), Unused()
        self._linearizers: dict[LayerCollection, Linearizer | None] = {}

    @property
    def described(self) -> str:
        """The variant, and how its metric is estimated."""
        return f"{self.estimator.variant.name}, {type(self.estimator).__name__}"

    def records(self, examples: Any, layer_collection: LayerCollection, factors: bool = True) -> Iterator[BatchRecord]:
        """Records of mini-batches: small ones together; large ones in parts and, if need be, in chunks of cotangents.

        Costs a forward for each mini-batch and a backward for each cotangent, both without gradients by weights; where
        no `factors` are asked for and parameters are fewer than cotangents, two backwards for each parameter instead.
        """
        found = self._records(examples, layer_collection, factors)
        while True:
            with TURN:
                batch = next(found, None)
            if batch is None:
                return
            yield batch
            del batch  # before the next forward

    def _records(self, examples: Any, layer_collection: LayerCollection, factors: bool) -> Iterator[BatchRecord]:
        dtype_is_one(self.model, layer_collection)
        planner = Planner(self.model, self.function, layer_collection, self.check)
        estimator = self.estimator.begun()
        for group in self._groups(OfRecords(planner, self.estimator, self._targets), examples):
            recording = planner.record(Batch.joined(group))
            self._unused.warn(recording.plan.unused)
            c = self._cotangents_of(recording.outputs, group, estimator)
            if not factors and (columns := self._by_columns(group, c, recording.like, layer_collection)) is not None:
                del recording
                yield columns
                continue
            step = ceil(c.count / ceil(min(c.count, max(1, c.count * load(recording)))))
            padding = None
            if masks := self._masks(recording.outputs, group):
                padding = Padding(masks, cache(partial(_mixture, recording, c)) if step < c.count else None)
            for start in range(0, c.count, step):
                stop, more = min(start + step, c.count), start + step < c.count
                yield recording.records(
                    c.chunk(start, stop), first=start == 0, retain=more, count=c.count, padding=padding
                )
            del recording, padding  # before the next forward

    def _by_columns(
        self, group: list[Batch], c: Cotangents, like: Tensor, layers: LayerCollection
    ) -> BatchRecord | None:
        """The gradients column by column, if that is cheaper, and the model can be differentiated so."""
        if not columns_pay(layers, c) or (whole := self._linearizer(layers)) is None:
            return None
        try:
            return record_by_columns(whole, Batch.joined(group), c, like)
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._linearizers[layers] = None  # as for products with vectors
            return None

    def mv(self, v: Tensor, examples: Any, layer_collection: LayerCollection) -> Tensor:
        """F v, like v (..., P): for each mini-batch J v, the metric at the outputs, and the pull-back.

        About two gradients for one vector; a forward and a backward that all share, and two backwards for each, for
        many.
        """
        total, n = self._product("mv", v.reshape(-1, v.shape[-1]), examples, layer_collection)
        return total.div_(n).reshape(v.shape)

    def vTMv(self, v: Tensor, examples: Any, layer_collection: LayerCollection) -> Tensor:
        """v' F v (...) for v (..., P): the metric of J v, for one vector by a forward alone."""
        total, n = self._product("vTMv", v.reshape(-1, v.shape[-1]), examples, layer_collection)
        return total.div_(n).reshape(v.shape[:-1])

    def jvp(self, v: Tensor, examples: Any, layer_collection: LayerCollection) -> Tensor:
        """J v (..., k, n) for v (..., P): derivatives along v of the outputs' products with the cotangents."""
        found = self._product("jvp", v.reshape(-1, v.shape[-1]), examples, layer_collection)
        return found.reshape(*v.shape[:-1], *found.shape[1:])

    def vjp(self, u: Tensor, examples: Any, layer_collection: LayerCollection) -> Tensor:
        """J' u (..., P), summed over the k cotangents and n examples of u (..., k, n)."""
        found = self._product("vjp", u.reshape(-1, *u.shape[-2:]), examples, layer_collection)
        return found.reshape(*u.shape[:-2], found.shape[-1])

    @TURN
    def linearize(self, examples: Any, layer_collection: LayerCollection) -> LinearizedGenerator:
        """The same products from the graphs of all mini-batches, which are recorded here and kept."""
        whole = self._linearizer(layer_collection)
        if whole is None:
            raise NotImplementedError(
                "The graph can't be kept, because an operation of the model has no second derivative. Use the matrix "
                "without linearize()."
            )
        parts: list[tuple[ReverseGraph, Cotangents]] = []
        setting, estimator = whole.setting(), self.estimator.begun()
        for group in self._groups(whole, examples):
            batch = Batch.joined(group)
            graph = whole.graph(batch, setting)
            self._unused.warn(whole.facts.unused)
            parts.append((graph, self._cotangents_of(graph.outputs, group, estimator)))
            if len(parts) == 1:
                require_second_derivatives(graph, whole)
                graph.elements()  # here, not in the first product
        return LinearizedGenerator(self, KeptJacobian(whole, parts, layer_collection), layer_collection)

    def _linearizer(self, layers: LayerCollection) -> Linearizer | None:
        if layers not in self._linearizers:
            dtype_is_one(self.model, layers)
            self._linearizers[layers] = Linearizer(self.model, self.function, layers, self.check)
        return self._linearizers[layers]

    def _product(self, name: str, x: Tensor, examples: Any, layers: LayerCollection) -> Any:
        with TURN:
            whole = self._linearizer(layers)
            if whole is not None:
                try:
                    points = partial(self._points, whole, examples, pulls=name != "vTMv")
                    return getattr(WholeModelProducts(points, layers), name)(x)
                except (NotImplementedError, RuntimeError) as error:
                    if isinstance(error, torch.OutOfMemoryError):
                        raise
                    self._linearizers[layers] = None  # an operation has no second derivative, or not in this way
        return getattr(LayerwiseProducts(partial(self.records, examples, layers), layers), name)(x)

    def _points(self, whole: Linearizer, examples: Any, rows: Tensor | None, pulls: bool = True) -> Iterator[Point]:
        setting, estimator = whole.setting(), self.estimator.begun()
        for group in self._groups(whole, examples):
            batch = Batch.joined(group)
            at = whole.at(batch, rows, setting, pulls)
            self._unused.warn(whole.facts.unused)
            yield Point(at, self._cotangents_of(at.outputs, group, estimator), batch.size)

    def dense(self, examples: Any, layer_collection: LayerCollection) -> tuple[Tensor, int]:
        """F (P, P), and the number of examples."""
        size = layer_collection.numel()
        total, n = torch.zeros(size, size, dtype=self.dtype, device=self.device), 0
        for batch in self.records(examples, layer_collection, factors=False):
            rows = torch.cat([record.jacobian() for record in batch.layers.values()], -1).flatten(0, 1).mT
            add_inner(total, rows, rows)
            n += batch.n_examples if batch.first else 0
        return total.div_(n), n

    def diagonal_blocks(self, examples: Any, layer_collection: LayerCollection) -> tuple[dict[str, Tensor], int]:
        """The diagonal blocks (p, p) of F by layer, and the number of examples."""
        sums: dict[str, Tensor] = {}
        n = 0
        for batch in self.records(examples, layer_collection, factors=False):
            for name, record in batch.layers.items():
                rows = record.jacobian().flatten(0, 1)
                sums[name] = sums.get(name, 0) + rows.mT @ rows
            n += batch.n_examples if batch.first else 0
        return {name: total / n for name, total in sums.items()}, n

    def _cotangents_of(self, outputs: Tensor, group: list[Batch], estimator: Estimator) -> Cotangents:
        """Join the cotangents of several mini-batches."""
        sizes = [batch.size for batch in group]
        if outputs.ndim == 0 or len(outputs) != sum(sizes):
            check_outputs(outputs, Batch.joined(group), self.model, self.function)  # which raises
        parts = zip(outputs.detach().split(sizes), group, strict=True)
        return joined([self._cotangents(*part, estimator) for part in parts], sizes)

    def _cotangents(self, outputs: Tensor, batch: Batch, estimator: Estimator) -> Cotangents:
        check_outputs(outputs, batch, self.model, self.function)
        if self.n_output is not None and self.n_output != (found := self.estimator.variant.n_output(outputs)):
            raise ValueError(f"n_output={self.n_output}, but the model has {found} (outputs {tuple(outputs.shape)}).")
        c = estimator(outputs, self._targets(batch), self._mask(batch))
        return c if c.count else Cotangents.from_tensor(torch.zeros_like(outputs)[None])

    def _mask(self, batch: Batch) -> Tensor | None:
        """Which positions of the outputs count."""
        if self.mask is not None:
            return batch.mask(self.mask)
        # Of an encoder-decoder model it is the mask of the other side.
        decoder = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        padded = self.estimator.variant.padded and isinstance(batch.named.get("attention_mask"), Tensor)
        return self.estimator.variant.attended(batch.mask("attention_mask")) if padded and not decoder else None

    def _masks(self, outputs: Tensor, group: list[Batch]) -> list[Tensor]:
        """(b, *positions), True for what the mask and those of the attention leave out; of mini-batches as one."""
        parts = zip(outputs.detach().split([batch.size for batch in group]), group, strict=True)
        by_batch = [
            [
                *([] if self.mask is None else [self.estimator.variant.left_out(part, batch.mask(self.mask))]),
                *(~batch.mask(key) for key in MASK_KEYS if _is_mask(batch.named.get(key), batch.size)),
            ]
            for part, batch in parts
        ]
        masks = [torch.cat(same) for same in zip(*by_batch, strict=True)]
        return [mask for mask in masks if bool(mask.any())]

    def _targets(self, batch: Batch) -> tuple:
        if self.function is not None and self.target is None and self.estimator.reads_targets:
            if batch.several_targets():
                warnings.warn(
                    f"With `function=`, the last of the {len(batch.content)} entries of a batch is taken for the "
                    "target, and another one could be it as well. Say which by `target=`: target=1, or a function of "
                    "the batch.",
                    stacklevel=2,
                )
        return batch.targets(self.function, self.target)

    def _groups(self, measure: Measure, examples: Any) -> Iterator[list[Batch]]:
        """The mini-batches that are run as one, or parts of them."""
        check_mode(self.model)
        splits = self.estimator.by_example and not callable(self.mask)
        sizing = Sizing(measure, splits, joins=self.estimator.variant.by_example)
        return sizing.groups(self._sweeps.batches(examples, self.device, self.verbose))


def _mixture(recording: Recording, c: Cotangents) -> Pulled:
    """The gradients of a random mixture of all cotangents: zero where all of theirs are."""
    return recording.pull(c.metric(random_like(recording.outputs))[None], retain=True)


def _is_mask(entry: Any, b: int) -> bool:
    return isinstance(entry, Tensor) and entry.ndim == 2 and len(entry) == b
