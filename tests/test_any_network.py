"""Every operation of every representation, on random networks with data as people have them, in both precisions.

What comes back is what the definition says, to what rounding allows, or nngeo's own error says why there is nothing.
The definition of an operation is that of the matrix in float64, whose estimate other tests hold against `reference.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, nn

import nngeo
from nngeo import FIM, PMat, PVector
from nngeo.linalg.operator import Estimated

HERE = Path(nngeo.__file__).parent
KINDS = [
    *(nngeo.PMatDense, nngeo.PMatBlockDiag, nngeo.PMatDiag, nngeo.PMatQuasiDiag, nngeo.PMatKFAC, nngeo.PMatEKFAC),
    *(nngeo.PMatLowRank, nngeo.PMatImplicit),
]
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "none": nn.Identity}


@dataclass(frozen=True)
class Network:
    """A perceptron and its examples: what can be odd about either is a field."""

    widths: tuple[int, ...]
    activation: str
    bias: bool
    examples: int
    repeated: bool
    zero_columns: bool
    dead_units: bool
    scale: float
    seed: int

    def make(self) -> tuple[nn.Module, Tensor]:
        """The model and its inputs (n, i), in float64, with entries that float32 has."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            layers: list[nn.Module] = []
            for i, o in zip(self.widths, self.widths[1:], strict=False):
                layers += [nn.Linear(i, o, bias=self.bias), ACTIVATIONS[self.activation]()]
            model = nn.Sequential(*layers[:-1])
            x = torch.randn(self.examples, self.widths[0]) * self.scale
        if self.repeated:
            x = x[:1].expand_as(x).clone()
        if self.zero_columns:
            x[:, ::2] = 0
        if self.dead_units:
            with torch.no_grad():
                for p in model[0].parameters():
                    p[: (len(p) + 1) // 2] = 0
        return model.double(), x.double()


# What can be odd about data and networks, in all combinations.
networks = st.builds(
    Network,
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    examples=st.sampled_from([1, 2, 7]),
    repeated=st.booleans(),
    zero_columns=st.booleans(),
    dead_units=st.booleans(),
    scale=st.sampled_from([1e-20, 1e-5, 1.0, 1e5, 1e20]),
    seed=st.integers(0, 2**16),
)


# ------------------------------------------------------------------ operations, and their definition on a dense matrix

Operation = Callable[[PMat, PVector, float], Tensor | PVector | PMat]
Definition = Callable[[Tensor, Tensor, float], Tensor]


def eye(m: Tensor) -> Tensor:
    return torch.eye(len(m), dtype=m.dtype)


OPERATIONS: dict[str, tuple[Operation, Definition]] = {
    "mv": (lambda F, v, r: F.mv(v), lambda m, v, r: m @ v),
    "vTMv": (lambda F, v, r: F.vTMv(v), lambda m, v, r: v @ m @ v),
    "trace": (lambda F, v, r: F.trace(), lambda m, v, r: m.trace()),
    "get_diag": (lambda F, v, r: F.get_diag(), lambda m, v, r: m.diagonal()),
    "norm": (lambda F, v, r: F.norm(), lambda m, v, r: m.norm()),
    "solve": (lambda F, v, r: F.solve(v, regul=r), lambda m, v, r: torch.linalg.solve(m + r * eye(m), v)),
    "inv": (lambda F, v, r: (F + r).inv().mv(v), lambda m, v, r: torch.linalg.solve(m + r * eye(m), v)),
    "logdet": (lambda F, v, r: (F + r).logdet(), lambda m, v, r: torch.linalg.slogdet(m + r * eye(m))[1]),
    "twice": (lambda F, v, r: (2 * F).mv(v), lambda m, v, r: 2 * m @ v),
}


def flat(found: Tensor | PVector) -> Tensor:
    return (found if isinstance(found, Tensor) else found.to_torch()).detach().double().flatten()


def is_own(error: BaseException) -> bool:
    """Whether nngeo raised it, and not what it calls."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and HERE in Path(trace.tb_frame.f_code.co_filename).parents


def answer(call: Callable[[], Any]) -> tuple[Tensor, float] | None:
    """The result (...,) with its standard error, or nothing where nngeo says that there is none."""
    try:
        found = call()
        return (flat(found.value), float(found.error)) if isinstance(found, Estimated) else (flat(found), 0.0)
    except (ValueError, NotImplementedError) as error:
        assert is_own(error), f"{type(error).__name__}: {error}"
        return None


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,  # every run is the same
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(network=networks, operation=st.sampled_from(sorted(OPERATIONS)), direction=st.integers(0, 2**16))
def test_an_operation_is_its_definition_or_says_why_not(kind, dtype, network, operation, direction):
    model, x = network.make()
    torch.manual_seed(direction)  # of random estimates
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of dead units: other tests expect them
        exact = FIM(model, (x,), kind, variant="regression").to_torch()
        regul = float(exact.trace()) / len(exact) / 100 or 1.0
        v = torch.randn(len(exact), generator=torch.Generator().manual_seed(direction)).double()
        call, definition = OPERATIONS[operation]
        want = definition(exact, v, regul).flatten()

        def compute() -> Any:
            F = FIM(model.to(dtype), (x.to(dtype),), kind, variant="regression")
            return call(F, PVector(F.layer_collection, vector_repr=v.to(dtype)), regul)

        answered = answer(compute)
    if answered is None:
        # A quasi-diagonal matrix of few examples has negative eigenvalues, so that its determinant has no logarithm.
        indefinite = float(torch.linalg.eigvalsh(exact + regul * eye(exact))[0]) <= 0
        assert dtype == torch.float32 or indefinite, "float64 has room for every one of these numbers"
        return
    found, spread = answered
    size, room = float(want.abs().max()), torch.finfo(dtype)
    if max(size, float(exact.abs().max())) > room.max / 1e3 or regul < room.tiny:
        return  # float32 has no such sums: what overflows is not finite, and so not taken for an answer
    assert found.isfinite().all()
    # The condition number of what is solved is at most a hundred times the number of parameters.
    rounding = size * room.eps * (1e4 if dtype == torch.float32 else 1e5)
    torch.testing.assert_close(found, want, rtol=0, atol=max(rounding, room.tiny * len(exact)) + 6 * spread)
