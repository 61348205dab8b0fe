"""A module of `modules.py` with one thing to differentiate by: its reference Jacobian, and metrics for either side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.testing import assert_close

from nngeo.layers import LayerCollection
from nngeo.products import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Factor,
    Kronecker,
    LowRankPlusDiagonal,
    Softmax,
    jmjTp,
    jTmjp,
)
from tests import reference_products as reference
from tests.modules import MODULES, Module, Wrt

exact = partial(assert_close, rtol=1e-8, atol=1e-10)


@dataclass(frozen=True, eq=False)
class Setting:
    """Three examples of a module, and J (b, o, n) with respect to one thing; made once for all tests."""

    module: Module
    wrt: Wrt

    @property
    def id(self) -> str:
        return f"{self.module.id}-{self.wrt if isinstance(self.wrt, str) else '+'.join(self.wrt)}"

    @cached_property
    def model(self) -> nn.Module:
        return self.module.build()

    @property
    def x(self) -> Any:
        return self.module.inputs()

    @property
    def x2(self) -> Any:
        """Three other examples."""
        return self.module.inputs(seed=1)

    @cached_property
    def J(self) -> Tensor:
        return reference.jacobian(self.model, self.x, self.wrt)

    @cached_property
    def J2(self) -> Tensor:
        return reference.jacobian(self.model, self.x2, self.wrt)

    @cached_property
    def outputs(self) -> tuple[int, ...]:
        """The shape of one example's outputs."""
        with torch.no_grad():
            known = reference._cut(self.x, 0)
            y = self.model(**known) if isinstance(known, dict) else self.model(*reference._tuple(known))
        return tuple(y.shape[1:])

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The blocks of n coordinates: layers, or arguments."""
        if self.wrt == "weight":
            return {name: layer.numel() for name, layer in LayerCollection.from_model(self.model).layers.items()}
        known = reference.arguments(self.model, self.x)
        return {name: known[name][0].numel() for name in reference.wanted(self.model, self.x, self.wrt)}

    @property
    def results(self) -> tuple[str, ...]:
        """What J' M J can be reported as; a module that does not name its argument has no input blocks."""
        named = all(not name.isdigit() for name in self.sizes)
        return ("dense", "diag", "factor", "trace", *(["blocks"] if named else []))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


@cache
def setting(id: str, wrt: Wrt) -> Setting:
    (module,) = [module for module in MODULES if module.id == id]
    return Setting(module, wrt)


@cache
def settings(*ids: str) -> list[Setting]:
    """Every module (or those of the ids) by everything it can be differentiated by."""
    chosen = [module for module in MODULES if not ids or module.id in ids]
    return [setting(module.id, wrt) for module in chosen for wrt in module.wrts]


def seen(found: Any, result: str) -> Any:
    """A result as `reference.result` has it: of a factor F, the product F F'."""
    return found @ found.mT if result == "factor" else found


# ------------------------------------------------------------------------------------------ metrics


@dataclass(frozen=True)
class MetricKind:
    """How a metric of some kind is made, for a space with coordinates in blocks: the object, and (b, m, m) dense."""

    id: str
    make: Callable[[dict[str, int], tuple[int, ...]], tuple[Any, Tensor]]  # (sizes of blocks, shape of an example)
    factor: bool = True  # positive semidefinite


def _identity(sizes: dict[str, int], shape: tuple[int, ...]) -> tuple[Any, Tensor]:
    return None, torch.eye(sum(sizes.values()), dtype=torch.float64)


def _diagonal(sizes: dict[str, int], shape: tuple[int, ...]) -> tuple[Any, Tensor]:
    d = draw(3, sum(sizes.values())).square()
    return Diagonal(d), d.diag_embed()


def _dense(sizes: dict[str, int], shape: tuple[int, ...]) -> tuple[Any, Tensor]:
    m = sum(sizes.values())
    root = draw(3, m, m) / m**0.5
    return Dense(root @ root.mT), root @ root.mT


def _tensor(sizes: dict[str, int], shape: tuple[int, ...]) -> tuple[Any, Tensor]:
    """Neither symmetric nor definite, and shared by the examples."""
    m = sum(sizes.values())
    matrix = draw(m, m) / m**0.5
    return matrix, matrix


def _factor(sizes: dict[str, int], shape: tuple[int, ...]) -> tuple[Any, Tensor]:
    v = draw(3, sum(sizes.values()), 2)
    return Factor(v), v @ v.mT


def _low_rank_plus_diagonal(sizes: dict[str, int], shape: tuple[int, ...]) -> tuple[Any, Tensor]:
    """Shared by the examples."""
    v, d = draw(sum(sizes.values()), 2), draw(sum(sizes.values()), seed=1).square()
    return LowRankPlusDiagonal(v, d), v @ v.mT + d.diag()


def _kronecker(sizes: dict[str, int], shape: tuple[int, ...]) -> tuple[Any, Tensor]:
    """One side shared by the examples."""
    m = sum(sizes.values())
    left = next((i for i in range(2, m) if m % i == 0), 1)
    a, b = draw(3, left, left + 1), draw(m // left, m // left + 1, seed=1)
    a, b = a @ a.mT, b @ b.mT
    return Kronecker(a, b), torch.stack([torch.kron(each, b) for each in a])


def _blocks(sizes: dict[str, int], shape: tuple[int, ...]) -> tuple[Any, Tensor]:
    """The first block shared by the examples, the others not."""
    batches = [(), *[(3,)] * (len(sizes) - 1)]
    roots = [draw(*b, p, p, seed=p) / p**0.5 for b, p in zip(batches, sizes.values(), strict=True)]
    blocks = [root @ root.mT for root in roots]
    dense = torch.stack([torch.block_diag(*[m if m.ndim == 2 else m[i] for m in blocks]) for i in range(3)])
    return BlockDiagonal(dict(zip(sizes, blocks, strict=True))), dense


def _softmax(sizes: dict[str, int], shape: tuple[int, ...]) -> tuple[Any, Tensor]:
    """diag(p) - p p' at every position, classes on the last axis."""
    logits = 3 * draw(3, *(shape or (1,)))
    p = logits.softmax(-1).reshape(3, -1, logits.shape[-1])
    blocks = p.diag_embed() - p[..., None] * p[..., None, :]
    return Softmax(logits), torch.stack([torch.block_diag(*example) for example in blocks])


ANYWHERE = [
    MetricKind("identity", _identity),
    MetricKind("diagonal", _diagonal),
    MetricKind("dense", _dense),
    MetricKind("tensor", _tensor, factor=False),
    MetricKind("factor", _factor),
    MetricKind("low_rank_plus_diagonal", _low_rank_plus_diagonal),
    MetricKind("kronecker", _kronecker),
]
OUTPUT_METRICS = [*ANYWHERE, MetricKind("softmax", _softmax)]
INPUT_METRICS = [*ANYWHERE, MetricKind("blocks", _blocks)]


# ------------------------------------------------------------------------------------------ both sides of an equation


def output_metric(at: Setting, kind: MetricKind) -> tuple[Any, Tensor]:
    """The object, and (b, o, o)."""
    return kind.make({"": at.J.shape[1]}, at.outputs)


def input_metric(at: Setting, kind: MetricKind) -> tuple[Any, Tensor]:
    """The object, and (b, n, n)."""
    return kind.make(at.sizes, (at.J.shape[2],))


def defined(results: Sequence[str], kind: MetricKind) -> list[str]:
    """A factor F F' exists of what is positive semidefinite."""
    return [result for result in results if kind.factor or result != "factor"]


def backward(at: Setting, metric: Any, results: Sequence[str], **options: Any) -> dict[str, Any]:
    return {r: seen(jTmjp(at.model, at.x, metric, at.wrt, result=r, **options), r) for r in results}


def forward(at: Setting, metric: Any, results: Sequence[str], **options: Any) -> dict[str, Any]:
    return {r: seen(jmjTp(at.model, at.x, metric, at.wrt, result=r, **options), r) for r in results}


def expected(matrix: Tensor, results: Sequence[str], at: Setting) -> dict[str, Any]:
    return {r: reference.result(matrix, r, at.sizes) for r in results}
