"""Traces of second derivatives by the inputs, `trace(A H)`, in one forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nngeo.generators.batches import Function
from nngeo.generators.differentiable import differentiable
from nngeo.generators.independence import FEW, explained
from nngeo.generators.outputs import check_outputs, outputs_of, random_like
from nngeo.layers.collection import LayerCollection
from nngeo.linalg.arguments import choice, count, flag
from nngeo.linalg.precision import full_precision
from nngeo.products.evaluation import Evaluation, Place, Wrt, of_weights
from nngeo.products.facts import facts_of
from nngeo.products.graph import gradients
from nngeo.products.manyderivatives import many_derivatives
from nngeo.products.metrics import Dense
from nngeo.products.operations import Untracked
from nngeo.products.space import Space, inputs_space
from nngeo.products.structured import as_metric
from nngeo.products.tracking import Tracked, Tracker

METHODS = ("auto", "forward", "backward")


@dataclass(frozen=True)
class Laplacian:
    """What one pass finds at each of b examples, for A = V diag(signs) V' with r columns."""

    value: Tensor  # (b, o), the outputs
    columns: Tensor  # (b, o, r), J V; the Jacobian, where A is the identity
    laplacian: Tensor  # (b, o), trace(A H) for the Hessian H of each output
    method: str  # "forward" or "backward": how it was found


@full_precision
def forward_laplacian(
    model: nn.Module,
    x: Any,
    metric: Any = None,
    wrt: Wrt = "input",
    *,
    method: str = "auto",
    function: Function | None = None,
    create_graph: bool = False,
    chunk: int | None = None,
) -> Laplacian:
    """The outputs, their derivatives along the columns of V, and `trace(A H)` (b, o), with A = V V' at the inputs.

    Values, derivatives and traces go through every operation together (Li et al., 2024, "Forward Laplacian"): a forward
    pass for r columns and one more, where Hessian-vector products would take o r backward passes. A model that does
    something for which there is no rule takes those instead: right, but slower, and a warning names the operation. So
    does one for which a few examples, the first time, show other derivatives than double backward does. Complex numbers
    between inputs and outputs are carried; inputs and outputs are real.

    Args:
        metric: A, n x n and symmetric, of the kinds that all products take (of another matrix the symmetric part
            counts); None: the identity, the Laplacian. It may be indefinite. It is a constant for `create_graph`.
        method: "forward" raises instead of changing over; "backward" goes by Hessian-vector products.
        create_graph: whether the results can be differentiated in x and in the parameters, as PINNs need.
        chunk: columns carried at once, all if None; each chunk is a pass.

    >>> import torch
    >>> f = torch.nn.Bilinear(2, 2, 1)  # x' W x + b has the Laplacian 2 trace(W)
    >>> found = forward_laplacian(f, torch.ones(3, 2), function=lambda x: f(x, x))
    >>> torch.allclose(found.laplacian, 2 * f.weight[0].trace())
    True
    """
    choice("method", method, METHODS)
    flag("create_graph", create_graph)
    if chunk is not None:
        count("chunk", chunk)
    evaluation = Evaluation.of(model, x, function)
    if of_weights(wrt):
        raise ValueError(f'wrt={wrt!r} has no forward Laplacian; it is by the inputs: "input", or names of arguments.')
    run = _Run(evaluation, evaluation.inputs(wrt), create_graph)
    with explained(evaluation.run, evaluation.batch), run.opened():
        facts = facts_of(evaluation, LayerCollection(), tuple(run.places))
        v, signs = columns_of(metric, run.space)
        try:
            if method == "backward":
                return run.backward(v, signs)
            if not facts.laplacian or facts.reads:
                _Run(evaluation.examples(slice(0, FEW)), run.places, False).compare()
                facts.laplacian = True
            parts = list(range(0, len(v), chunk or max(1, len(v)))) or [0]
            found = [run.forward(v[i : i + (chunk or len(v))], signs[i : i + (chunk or len(v))]) for i in parts]
        except (RuntimeError, TypeError) as error:
            if method != "auto":
                raise
            evaluation.run(evaluation.batch)  # which raises where the model does not run on these inputs
            warnings.warn(
                f"No forward pass carries the Laplacian of this model: {error}. Hessian-vector products instead, one "
                'for each output and column, which are slower; method="backward" asks for them.',
                stacklevel=2,
            )
            return run.backward(v, signs)
    value, along, traces = (list(each) for each in zip(*found, strict=True))
    return Laplacian(value[0], torch.cat(along, -1), torch.stack(traces).sum(0), "forward")


def columns_of(metric: Any, space: Space) -> tuple[Tensor, Tensor]:
    """Columns V (r, b, n) and their signs (r,), with A = V diag(signs) V'; those that are zero everywhere are left out.

    Raises:
        TypeError, ValueError: not a metric of the space.
    """
    m = as_metric(metric)
    m.check(space)
    if not m.symmetric:
        rows = m.apply(torch.eye(space.d).to(space.like)[:, None].expand(-1, space.b, -1), space).transpose(0, 1)
        m = Dense((rows + rows.mT) / 2)
    terms = [(term.sign, term.cotangents.all()) for term in m.factors(space)]
    v = torch.cat([rows for _, rows in terms])
    signs = torch.cat([rows.new_full((len(rows),), sign) for sign, rows in terms])
    kept = v.flatten(1).abs().amax(1) > 0
    return v[kept], signs[kept]


class _Run:
    """A model as a function of some of its inputs."""

    def __init__(self, evaluation: Evaluation, places: dict[str, Place], create_graph: bool):
        self.evaluation, self.places, self.create_graph = evaluation, places, create_graph
        given = [evaluation.arguments()[place] for place in places.values()]
        self.inputs = given if create_graph else [x.detach() for x in given]
        self.space = inputs_space(places, self.inputs)

    @contextmanager
    def opened(self) -> Iterator[None]:
        model = self.evaluation.model
        if not self.create_graph:
            with differentiable(model, LayerCollection()):
                yield
            return
        with many_derivatives(model), torch.enable_grad():
            yield

    def forward(self, v: Tensor, signs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs (b, o), the columns (b, o, r) and the trace (b, o)."""
        tracker = Tracker(None if bool((signs > 0).all()) else signs, self.create_graph)
        parts = self._parts(torch.cat([v, v.new_zeros(1, self.space.b, self.space.d)]))
        tracked = [Tracked(tracker, x, t) for x, t in zip(self.inputs, parts, strict=True)]
        with tracker.running(self.evaluation.model):
            outputs = self._call(tracked)
        value = outputs.value if isinstance(outputs, Tracked) else outputs
        tangents = outputs.tangents if isinstance(outputs, Tracked) else None
        self._check(value)
        if tangents is None:
            tangents = value.new_zeros(len(v) + 1, *value.shape)
        tangents = tangents.reshape(len(v) + 1, len(value), -1)
        return value.reshape(len(value), -1), tangents[:-1].permute(1, 2, 0), tangents[-1]

    def backward(self, v: Tensor, signs: Tensor) -> Laplacian:
        """The same by the derivative of the gradient of each output along each column."""
        leaves = [x if x.requires_grad else x.detach().requires_grad_() for x in self.inputs]
        outputs = self._call(leaves)
        self._check(outputs)
        value, columns, traces = outputs.reshape(len(outputs), -1), [], []
        for j in range(value.shape[1]):
            grads = gradients(value[:, j], leaves, torch.ones_like(value[:, j]))
            along, trace = [], torch.zeros_like(value[:, j])
            for sign, parts in zip(signs, zip(*self._parts(v), strict=True), strict=True):
                slope = _inner(grads, parts)
                along.append(slope)
                trace = trace + sign * _inner(gradients(slope, leaves, torch.ones_like(slope)), parts)
            columns.append(torch.stack(along, -1) if along else value.new_zeros(len(value), 0))
            traces.append(trace)
        found = value, torch.stack(columns, 1), torch.stack(traces, 1)
        value, along_all, trace_all = found if self.create_graph else (t.detach() for t in found)
        return Laplacian(value, along_all, trace_all, "backward")

    def compare(self) -> None:
        """Raise unless derivatives along a random column are those of one vjp and one Hessian-vector product."""
        v = random_like(self.inputs[0].new_empty(1, self.space.b, self.space.d))
        value, columns, trace = self.forward(v, v.new_ones(1))
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        parts = [part[0] for part in self._parts(v)]
        try:
            outputs = self._call(leaves).reshape(value.shape)
            w = random_like(outputs)
            along = _inner(gradients((outputs * w).sum(), leaves, outputs.new_ones(())), parts)
            second = _inner(gradients(along, leaves, torch.ones_like(along)), parts)
        except (RuntimeError, NotImplementedError):
            return  # there is no double backward to compare with
        pairs = {"derivatives": (columns[..., 0] * w, along), "second derivatives": (trace * w, second)}
        for what, (found, expected) in pairs.items():
            tolerance = 10 * torch.finfo(w.dtype).eps ** 0.5 * float(found.detach().norm() + expected.detach().norm())
            if not float((found.sum(1) - expected).detach().norm()) <= tolerance:
                raise Untracked(f"its {what} along a column are not those of double backward")

    def _call(self, inputs: Sequence[Tensor]) -> Tensor:
        batch = self.evaluation.replaced(dict(zip(self.places.values(), inputs, strict=True)))
        return outputs_of(batch, self.evaluation.model, self.evaluation.function)

    def _check(self, outputs: Tensor) -> None:
        check_outputs(outputs.detach(), self.evaluation.batch, self.evaluation.model, self.evaluation.function)

    def _parts(self, v: Tensor) -> list[Tensor]:
        """(r, *shape) of every input, from (r, b, n)."""
        parts = v.split(list(self.space.sizes.values()), -1)
        return [part.reshape(len(v), *x.shape) for part, x in zip(parts, self.inputs, strict=True)]


def _inner(grads: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """(b,), inner products summed over the inputs."""
    terms = [(g * part).flatten(1).sum(1) for g, part in zip(grads, parts, strict=True)]
    return torch.stack(terms).sum(0)
