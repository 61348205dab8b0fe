"""Whether a model treats each example of a batch by itself, and always in the same way."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nngeo.generators.batches import Batch, Function
from nngeo.generators.outputs import check_outputs, outputs_of
from nngeo.generators.reads import Reads
from nngeo.generators.untouched import Snapshot
from nngeo.layers.caches import find
from nngeo.layers.turn import TURN

FEW = 6  # examples on which a model is looked at before a sweep
ALONE = 8  # examples of each batch that are run alone, where Python reads values

_DRAWS = random.Random(0)

Look = Callable[[Batch], Tensor]  # the outputs (b, ...), with their graph


@dataclass(frozen=True)
class FirstExamples:
    """A few examples of a batch, and the first and the last of them alone. Where there is only one, it is all."""

    whole: Batch
    one: Batch
    few: Batch
    last: Batch
    fewest: Batch  # of the few as many as there have to be

    @classmethod
    def of(cls, batch: Batch, front: Sequence[int] = ()) -> FirstExamples:
        """The first ones of a batch, those in `front` before them."""
        order = [*front, *(e for e in range(min(batch.size, FEW)) if e not in front)][:FEW]
        # More than there are cotangents: no axis is mistaken for another.
        few = torch.tensor((order * 3)[: max(3, len(order))], device="cpu")
        return cls(batch, *(batch.examples(index) for index in (few[:1], few, few[-1:], few[:3])))


class FirstLook(NamedTuple):
    """The outputs of a few examples, with their graph, and what was done on the way."""

    outputs: Tensor
    reads: bool  # whether Python read values of tensors
    routed: bool  # whether rows were picked by tensors


def run(model: nn.Module, function: Function | None, batch: Batch, before: Snapshot | None = None) -> Tensor:
    """The outputs (b, ...), with their graph; the model comes back as it was, or as it was `before`."""
    with (before or Snapshot(model)).restored(), torch.enable_grad():
        try:
            return outputs_of(batch, model, function)
        except RuntimeError as error:
            own, given = _dtypes(model.parameters()), _dtypes(batch.tensors())
            if "dtype" not in str(error) or own == given:
                raise
            raise ValueError(f"The model's parameters are {own}, the batches {given}: {error}.") from error


def check_independence(
    model: nn.Module, function: Function | None, examples: FirstExamples, look: Look | None = None
) -> FirstLook:
    """Raise unless the outputs of an example are the same when it is alone and among a few.

    Args:
        look: runs the model in place of `run`.

    Raises:
        ValueError: the first axis of the outputs is not the batch; examples influence each other; the model draws
            random numbers; outputs are not finite.
    """

    def alone(batch: Batch) -> Tensor:
        return _run_alone(model, function, examples.whole, batch, look)

    reads = Reads()

    def noted(batch: Batch) -> Tensor:
        with reads:
            return look(batch) if look else run(model, function, batch)

    few = check_repeatable(model, function, examples.few, noted)
    one = alone(examples.one)
    if few.ndim == 0 or len(few) != examples.few.size or one.ndim == 0 or len(one) != 1:
        raise ValueError(
            f"Outputs have shape {tuple(few.shape)} for {examples.few.size} examples and {tuple(one.shape)} for one: "
            "the first axis should be the batch. Bring it there by `function=`, for example "
            "function=lambda x, y: model(x).transpose(0, 1)."
        )
    for batch, outputs in ((examples.one, one), (examples.few, few)):
        check_outputs(outputs, batch, model, function)
    # The last one, too: the first may be the one that all others depend on (a cumulative sum, a reference).
    for name, found, together in (("first", one, few[:1]), ("last", alone(examples.last), few[-1:])):
        _check_same(name, found, together)
    return FirstLook(few, reads.found, reads.picks)


def check_alone(
    model: nn.Module, function: Function | None, batch: Batch, outputs: Tensor, apart: Sequence[bool] | None = None
) -> None:
    """Raise unless examples of a batch, run alone, have their rows of its outputs; all of them, or some at random.

    For models of which Python reads values: what is run may depend on all examples, for this batch if not for others.
    """
    if batch.size == 1 or outputs.ndim == 0 or len(outputs) != batch.size:  # which `check_outputs` refuses
        return
    for e in sorted(_DRAWS.sample(range(batch.size), min(ALONE, batch.size))):
        one = batch.examples(slice(e, e + 1), apart)
        found = _run_alone(model, function, batch, one)
        _check_same(f"{e + 1}. of {batch.size}", found, outputs[e : e + 1])


@TURN
def check_repeatable(model: nn.Module, function: Function | None, batch: Batch, look: Look | None = None) -> Tensor:
    """Raise if the model draws random numbers; the outputs of the batch, with their graph."""

    def plain(batch: Batch) -> Tensor:
        return run(model, function, batch)

    before = _random_states()
    try:
        find(model, lambda: outputs_of(batch, model, function), lambda: Snapshot(model).restored())
        with explained(plain, batch):
            outputs = (look or plain)(batch)
        draws = any(not torch.equal(s, t) for s, t in zip(before, _random_states(), strict=True))
        if draws and any(not torch.equal(outputs, plain(batch)) for _ in range(3)):
            raise ValueError(
                "The outputs depend on random numbers (functional dropout? sampling?), so their gradients are not "
                "defined. Call model.eval(), or make `function=` deterministic."
            )
    finally:
        torch.set_rng_state(before[0])
        if len(before) > 1:
            torch.cuda.set_rng_state_all(before[1:])
    return outputs


@contextmanager
def explained(plain: Look, batch: Batch) -> Iterator[None]:
    """Name the shapes of the batch in an error of torch's (inputs of a wrong width), if zeros of them raise it, too.

    Raises:
        ValueError: the model does not run on these inputs.
    """
    try:
        yield
    except (RuntimeError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError | NotImplementedError):
            raise
        try:
            plain(Batch(tree_map(_zeros, batch.content)))
        except type(error) as again:
            raise ValueError(f"The model does not run on a batch of {_shapes(batch)}: {again}.") from again
        raise  # what failed is how it was looked at, or these values


def _zeros(leaf: Any) -> Any:
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _shapes(batch: Batch) -> str:
    """The shapes of its tensors, with b for the number of examples."""
    return "tensors " + ", ".join(f"({', '.join(['b', *map(str, shape)])})" for shape in batch.shapes())


def _check_same(name: str, alone: Tensor, together: Tensor) -> None:
    alone, together = alone.detach(), together.detach()
    tolerance = min(10 * torch.finfo(together.dtype).eps ** 0.5, 0.1)
    same = alone.shape == together.shape and bool(
        (alone - together).norm() <= tolerance * together.norm() + tolerance**2
    )
    if not same:
        raise ValueError(
            f"The examples of a batch influence each other: the outputs of the {name} one are others when it is "
            "alone (normalization over the batch?), so gradients of single examples are not defined."
        )


def _random_states() -> list[Tensor]:
    """Of the CPU, and of the GPUs if they are used."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _dtypes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype) for tensor in tensors if tensor.is_floating_point()})) or "integers"


def _run_alone(
    model: nn.Module, function: Function | None, whole: Batch, batch: Batch, look: Look | None = None
) -> Tensor:
    try:
        return look(batch) if look else run(model, function, batch)
    except Exception as error:
        plain = partial(run, model, function)
        with explained(plain, whole):
            plain(whole)  # if this raises, too, the reason is not the number of examples
        raise ValueError(
            f"The model runs on a batch of {whole.size} examples, but not on {batch.size} of them alone (normalization "
            "over the batch? a tensor of the batch that is as long as it, but not by example? one example without a "
            f"batch axis, for which x[None] is a batch of one?) of {_shapes(whole)}: gradients of single examples are "
            f"not defined. It says: {error}"
        ) from error
