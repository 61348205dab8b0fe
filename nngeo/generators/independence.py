"""Whether a model treats each example of a batch by itself, and always in the same way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nngeo.generators.batches import Batch, Function
from nngeo.generators.outputs import check_outputs, outputs_of
from nngeo.generators.untouched import untouched

FEW = 6  # examples on which a model is looked at before a sweep


@dataclass(frozen=True)
class FirstExamples:
    """One example of a batch, and a few, that one first (it alone, twice, where there is only one)."""

    whole: Batch
    one: Batch
    few: Batch

    @classmethod
    def of(cls, batch: Batch, front: Sequence[int] = ()) -> FirstExamples:
        """The first ones of a batch, those in `front` before them."""
        order = [*front, *(e for e in range(min(batch.size, FEW)) if e not in front)][:FEW]
        # Not one, and not as many as there are cotangents: no axis is mistaken for another.
        few = torch.tensor(order + order[:1] if len(order) in (1, 3) else order, device="cpu")
        return cls(batch, batch.examples(few[:1]), batch.examples(few))


def run(model: nn.Module, function: Function | None, batch: Batch) -> Tensor:
    """The outputs (b, ...), with their graph; the model comes back as it was."""
    with untouched(model), torch.enable_grad():
        try:
            return outputs_of(batch, model, function)
        except RuntimeError as error:
            own, given = _dtypes(model.parameters()), _dtypes(batch.tensors())
            if "dtype" not in str(error) or own == given:
                raise
            raise ValueError(f"The model's parameters are {own}, the batches {given}: {error}.") from error


def check_independence(model: nn.Module, function: Function | None, examples: FirstExamples) -> Tensor:
    """Raise unless the outputs of an example are the same when it is alone and among a few; the outputs of the few.

    Raises:
        ValueError: the first axis of the outputs is not the batch; examples influence each other; the model draws
            random numbers; outputs are not finite.
    """
    check_repeatable(model, function, examples.few)
    one, few = (_run_alone(model, function, examples.whole, batch) for batch in (examples.one, examples.few))
    if few.ndim == 0 or len(few) != examples.few.size or one.ndim == 0 or len(one) != 1:
        raise ValueError(
            f"Outputs have shape {tuple(few.shape)} for {examples.few.size} examples and {tuple(one.shape)} for one: "
            "the first axis should be the batch. Bring it there by `function=`, for example "
            "function=lambda x, y: model(x).transpose(0, 1)."
        )
    for batch, outputs in ((examples.one, one), (examples.few, few)):
        check_outputs(outputs, batch, model, function)
    # The last one, too: the first may be the one that all others depend on (a cumulative sum, a reference).
    end = examples.few.examples(torch.tensor([examples.few.size - 1], device="cpu"))
    last = _run_alone(model, function, examples.whole, end)
    for name, alone, together in (("first", one, few[:1]), ("last", last, few[-1:])):
        if not _is_close(alone.detach(), together.detach()):
            raise ValueError(
                f"The examples of a batch influence each other: the outputs of the {name} one are others when it is "
                "alone (normalization over the batch?), so gradients of single examples are not defined."
            )
    return few


def _is_close(apart: Tensor, together: Tensor) -> bool:
    tolerance = min(10 * torch.finfo(together.dtype).eps ** 0.5, 0.1)
    return apart.shape == together.shape and bool(
        (apart - together).norm() <= tolerance * together.norm() + tolerance**2
    )


def check_repeatable(model: nn.Module, function: Function | None, batch: Batch) -> None:
    """Raise if the model draws random numbers, or changes its input."""
    before, versions = _random_states(), [x._version for x in batch.tensors()]
    try:
        with torch.no_grad():
            outputs = run(model, function, batch)
            after = _random_states()
            draws = any(not torch.equal(s, t) for s, t in zip(before, after, strict=True))
            if draws and any(not torch.equal(outputs, run(model, function, batch)) for _ in range(3)):
                raise ValueError(
                    "The outputs depend on random numbers (functional dropout? sampling?), so their gradients are not "
                    "defined. Call model.eval(), or make `function=` deterministic."
                )
        if versions != [x._version for x in batch.tensors()]:
            raise NotImplementedError(
                "The model changes its input in place, so it can't be run again on the same data. Replace the in-place "
                "operation (`x.div_(2)`, `x += y`) by `x = x / 2`."
            )
    finally:
        torch.set_rng_state(before[0])
        if len(before) > 1:
            torch.cuda.set_rng_state_all(before[1:])


def _random_states() -> list[Tensor]:
    """Of the CPU, and of the GPUs if they are used."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _dtypes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(sorted({str(tensor.dtype) for tensor in tensors if tensor.is_floating_point()})) or "integers"


def _run_alone(model: nn.Module, function: Function | None, whole: Batch, batch: Batch) -> Tensor:
    try:
        return run(model, function, batch)
    except Exception as error:
        run(model, function, whole)  # if this raises, too, the reason is not the number of examples
        raise ValueError(
            f"The model runs on a batch of {whole.size} examples, but not on {batch.size} of them alone (normalization "
            "over the batch? a tensor of the batch that is as long as it, but not by example?): gradients of single "
            f"examples are not defined. It says: {error}"
        ) from error
