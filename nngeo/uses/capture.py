"""What a training pass itself leaves at the layers: inputs and output gradients, without a second forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor, nn

from nngeo.generators import BatchRecord, Generator, LayerRecord
from nngeo.generators.sources import full_precision
from nngeo.layers import LayerCollection
from nngeo.layers.rule import LinearMapRule, rule_for


class Captured(Generator):
    """The generator of a matrix that is made of one training pass: it has its record, whatever the examples."""

    def __init__(self, model: nn.Module, record: BatchRecord):
        self.model, self.function, self.record = model, None, record

    def records(self, examples: Any, layer_collection: LayerCollection, factors: bool = True) -> Iterator[BatchRecord]:
        return iter([self.record])

    def dense(self, examples: Any, layer_collection: LayerCollection) -> tuple[Tensor, int]:
        rows = layer_collection.join({name: record.jacobian()[0] for name, record in self.record.layers.items()})
        return rows.mT @ rows / len(rows), len(rows)

    def mv(self, v: Tensor, examples: Any, layer_collection: LayerCollection) -> NoReturn:
        raise NotImplementedError("What a training pass leaves is not kept for products: take another representation.")

    def diagonal_blocks(self, examples: Any, layer_collection: LayerCollection) -> NoReturn:
        raise NotImplementedError("What a training pass leaves are records of the layers.")


class Capture:
    """Inputs and output gradients of the linear maps of a model, while it is trained within `watching()`.

    The first axis of both is that of the examples, and gradients are those of a loss averaged over them; the first
    time, their sum is compared with the gradients that autograd leaves.
    """

    def __init__(self, model: nn.Module, layers: LayerCollection):
        self.model, self.layers = model, layers
        self.modules = layers.get_layerid_module_map(model)
        for name, module in self.modules.items():
            if not isinstance(rule_for(module), LinearMapRule):
                kind = layers[name].kind
                raise NotImplementedError(
                    f"Layer {name!r} ({kind}) is not a linear map, of which a training pass leaves Kronecker factors: "
                    "leave it out by `layer_collection`, or use `update(batch)`."
                )
        self._checked = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the calls of the layers, and the gradients at their outputs."""
        self.calls: dict[str, list[list[Tensor]]] = {name: [] for name in self.layers}
        handles = [module.register_forward_hook(self._hook(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple, output: Tensor) -> None:
            if not output.requires_grad:
                return
            call = [args[0].detach()]
            self.calls[name].append(call)

            output.register_hook(lambda g: call.append(g.detach()))

        return note

    def record(self, scale: float | None, before: dict[str, bool]) -> BatchRecord:
        """The record of the pass just watched: one cotangent for each example, the gradient of its own loss.

        Args:
            scale: what the loss was divided by; the number of examples if None.
            before: for each parameter, whether it had a gradient before.
        """
        sizes = {len(x) for calls in self.calls.values() for call in calls for x in call}
        if not sizes or not any(len(call) == 2 for calls in self.calls.values() for call in calls):
            raise ValueError(
                "Nothing was captured: run the forward and the backward pass within `with opt.capture():`."
            )
        if len(sizes) > 1:
            raise ValueError(f"The first axis of the layers' inputs is not that of the examples everywhere: {sizes}.")
        (b,) = sizes
        like = full_precision(next(self.layers.parameters(self.model)).detach())
        records = {name: self._of(name, b, like, b if scale is None else scale) for name in self.layers}
        if not self._checked:
            self._check(records, before, b if scale is None else scale)
        return BatchRecord(records, b, True, 1)

    def _of(self, name: str, b: int, like: Tensor, scale: float) -> LayerRecord:
        module, layer = self.modules[name], self.layers[name]
        rule = rule_for(module)
        assert isinstance(rule, LinearMapRule)
        names = {local: local for local in layer.shapes}
        parts: list[Any] = [
            rule.gradients(module, call[0][:, None].to(like), scale * call[1][None, :, None].to(like), layer, names)
            for call in self.calls[name]
            if len(call) == 2
        ]
        return LayerRecord(layer, parts or [rule.nothing(module, layer, 1, b, like)], b, 1, True, like)

    def _check(self, records: dict[str, LayerRecord], before: dict[str, bool], scale: float) -> None:
        """Raise unless the gradients of the examples add up to those that the pass left."""
        for name, record in records.items():
            layer, view = self.layers[name], record.view
            assert view is not None
            ones = record.like.new_ones(1, record.n_examples)
            found = self.layers.split_layer(name, view.to_flat(record.factors().combine(ones)) / scale)
            for local, parameter in ((x, self.modules[name].get_parameter(x)) for x in layer.shapes):
                if parameter.grad is None or before[layer.full_name(local)]:
                    continue
                error = (found[local] - parameter.grad.to(record.like)).norm()
                if error > 1e-2 * parameter.grad.norm().to(record.like) + 1e-30:
                    raise ValueError(
                        f"What was captured at layer {name!r} does not add up to the gradient of {local!r}: it is used "
                        "elsewhere, too, or its first axis is not that of the examples. Use `update(batch)`."
                    )
        self._checked = True
