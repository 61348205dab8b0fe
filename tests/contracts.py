"""What every representation must equal on every case, and how to build it.

A `Setting` is a case with its model made once; a `Representation` says for which cases it is made, how, and which
dense matrix it stands for. The definitions are those of `reference.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nngeo
from nngeo import FIM, LayerCollection, PVector
from tests import reference
from tests.cases import CASES, Case

BY_ID = {case.id: case for case in CASES}

# The cases with unused layers warn, which a test of its own expects.
unused_is_known = pytest.mark.filterwarnings("ignore:The outputs do not depend on")

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
each_seed = pytest.mark.parametrize("seed", [0, 1, 2])


def cases_with(*tags: str) -> list[Case]:
    """The cases that have one of the tags."""
    return [case for case in CASES if case.tags & set(tags)]


def cases_of(*ids: str) -> list[Case]:
    return [BY_ID[id] for id in ids]


def each_of(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


class Setting:
    """A case with its model, its examples, and the reference's answers, each made once."""

    def __init__(self, case: Case):
        self.case, self.model = case, case.make()
        self.batch, self.batches = case.batch(), case.batches()
        self.function = case.function(self.model)
        self.layers = LayerCollection.from_model(self.model)
        self.slices = reference.layer_slices(self.model)
        self.size = sum(p.numel() for p in reference.trainable(self.model))

    @cached_property
    def jacobian(self) -> Tensor:
        """(k, n, P)."""
        return reference.jacobian(self.model, self.batch, self.function)

    @cached_property
    def fisher(self) -> Tensor:
        """(P, P)."""
        metrics = reference.metrics(self.model, self.batch, self.case.variant, self.function)
        return reference.pulled_back(self.jacobian, metrics)

    @cached_property
    def block_fisher(self) -> Tensor:
        """(P, P), zero between layers."""
        return reference.block_diagonal(self.fisher, self.slices)

    def module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def kfac_block(self, name: str, sharing: str = "expand") -> Tensor:
        """(p, p)."""
        return reference.kfac_block(self.model, self.batch, name, self.case.variant, self.function, sharing=sharing)

    def vector(self, seed: int = 0) -> Tensor:
        """(P,)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.size, generator=generator, dtype=torch.float64)

    def fim(self, representation: type, examples: Any = None, **options: Any) -> Any:
        """The Fisher of the case, by default from three unequal batches."""
        examples = self.batches if examples is None else examples
        return FIM(self.model, examples, representation, self.case.variant, function=self.function, **options)


@cache
def _setting(id: str) -> Setting:
    return Setting(BY_ID[id])


def setting(case: Case) -> Setting:
    """The same for all tests that leave the model as it is."""
    return _setting(case.id)


# ------------------------------------------------------------------------------------------ definitions


def block_diagonal(at: Setting, block: Callable[[str], Tensor]) -> Tensor:
    """(P, P), with block(layer name) (p, p)."""
    matrix = torch.zeros(at.size, at.size, dtype=torch.float64)
    for name, s in at.slices.items():
        matrix[s, s] = block(name)
    return matrix


def diagonal(at: Setting) -> Tensor:
    return at.fisher.diagonal().diag()


def kfac(sharing: str) -> Callable[[Setting], Tensor]:
    return lambda at: block_diagonal(at, lambda name: at.kfac_block(name, sharing))


def ekfac_or_dense(at: Setting) -> Tensor:
    """KFAC where the layer is a linear map, the exact block where it is a normalization."""

    def block(name: str) -> Tensor:
        linear = at.case.kronecker or isinstance(at.module(name), nn.Linear | nn.modules.conv._ConvNd)
        return at.kfac_block(name) if linear else at.fisher[at.slices[name], at.slices[name]]

    return block_diagonal(at, block)


def first_layer_dense(at: Setting) -> Tensor:
    """The exact block of the first layer, the diagonal of the others."""
    first = next(iter(at.slices.values()))
    matrix = diagonal(at)
    matrix[first, first] = at.fisher[first, first]
    return matrix


def quasi_diagonal(at: Setting) -> Tensor:
    """The diagonal, and the entries between each weight and the bias of its row."""
    matrix = diagonal(at)
    for name, s in at.slices.items():
        if getattr(at.module(name), "bias", None) is None:
            continue
        for index in reference.weight_matrices(at.module(name)):
            weight, bias = index[:, :-1] + s.start, index[:, -1:] + s.start
            matrix[weight, bias] = matrix[bias, weight] = at.fisher[weight, bias]
    return matrix


# ------------------------------------------------------------------------------------------ representations


def any_case(case: Case) -> bool:
    return True


def is_kronecker(case: Case) -> bool:
    return case.kronecker


def is_kronecker_or_norm(case: Case) -> bool:
    """Layers are linear maps or normalizations."""
    return case.kronecker or ("norm" in case.tags and "attention" not in case.tags)


def no_options(at: Setting) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Representation:
    """A PMat with options, and the dense matrix (P, P) that it is, where `defined`.

    It can be made for the cases that it `serves`, and is defined by the reference for those.
    """

    id: str
    kind: type[nngeo.PMat]
    expected: Callable[[Setting], Tensor]
    serves: Callable[[Case], bool] = any_case
    options: Callable[[Setting], dict[str, Any]] = no_options
    solve_options: dict[str, Any] = field(default_factory=dict)
    adds: bool = True  # whether there is a sum of two
    scales_negative: bool = True
    stores: bool = True  # whether there are data to save

    def build(self, at: Setting, examples: Any = None, **options: Any) -> Any:
        return at.fim(self.kind, examples, **(self.options(at) | options))


def mixed_options(at: Setting) -> dict[str, Any]:
    first = next(iter(at.layers))
    return {"default_representation": nngeo.PMatDiag, "map_layers_to": {first: nngeo.PMatBlockDiag}}


def reduced(at: Setting) -> dict[str, Any]:
    return {"weight_sharing": "reduce"}


def one_pass(at: Setting) -> dict[str, Any]:
    return {"update_diag": False}


def reduced_in_one_pass(at: Setting) -> dict[str, Any]:
    return reduced(at) | one_pass(at)


PMATS = [
    Representation("dense", nngeo.PMatDense, lambda at: at.fisher),
    Representation("diag", nngeo.PMatDiag, diagonal),
    Representation("block_diag", nngeo.PMatBlockDiag, lambda at: at.block_fisher),
    Representation("quasi_diag", nngeo.PMatQuasiDiag, quasi_diagonal, is_kronecker),
    Representation("low_rank", nngeo.PMatLowRank, lambda at: at.fisher, scales_negative=False),
    Representation(
        "implicit",
        nngeo.PMatImplicit,
        lambda at: at.fisher,
        solve_options={"rtol": 1e-12},
        adds=False,
        stores=False,
    ),
    Representation("kfac", nngeo.PMatKFAC, kfac("expand"), is_kronecker, adds=False),
    Representation("kfac_reduce", nngeo.PMatKFAC, kfac("reduce"), is_kronecker, reduced, adds=False),
    Representation("ekfac", nngeo.PMatEKFAC, kfac("expand"), is_kronecker, one_pass, adds=False),
    Representation("ekfac_reduce", nngeo.PMatEKFAC, kfac("reduce"), is_kronecker, reduced_in_one_pass, adds=False),
    Representation(
        "ekfac_block_diag", nngeo.PMatEKFACBlockDiag, ekfac_or_dense, is_kronecker_or_norm, one_pass, adds=False
    ),
    Representation("mixed", nngeo.PMatMixed, first_layer_dense, options=mixed_options),
]
WITH_EIGENBASIS = [pmat for pmat in PMATS if pmat.kind in (nngeo.PMatEKFAC, nngeo.PMatEKFACBlockDiag)]


def pairs(cases: list[Case], pmats: list[Representation] = PMATS) -> list[Any]:
    """All cases with all representations that serve them, as parameters `pmat, case`."""
    return [
        pytest.param(pmat, case, id=f"{pmat.id}-{case.id}") for case in cases for pmat in pmats if pmat.serves(case)
    ]


def each_pair(cases: list[Case], pmats: list[Representation] = PMATS) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("pmat, case", pairs(cases, pmats))


def each_pmat(pmats: list[Representation] = PMATS) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("pmat", pmats, ids=lambda pmat: pmat.id)


@cache
def _matrix(pmat_id: str, case_id: str) -> Any:
    (pmat,) = (pmat for pmat in PMATS if pmat.id == pmat_id)
    at = _setting(case_id)
    return pmat.build(at, at.batch)


def matrix(pmat: Representation, case: Case) -> Any:
    """The same for all tests that leave it as it is; from one batch."""
    return _matrix(pmat.id, case.id)


@cache
def _dense(pmat_id: str, case_id: str) -> Tensor:
    return _matrix(pmat_id, case_id).to_torch()


def dense(pmat: Representation, case: Case) -> Tensor:
    """(P, P), `matrix(pmat, case).to_torch()`."""
    return _dense(pmat.id, case.id)


def pvector(at: Setting, flat: Tensor) -> PVector:
    return PVector(at.layers, vector_repr=flat)


# ------------------------------------------------------------------------------------------ data


class Stream(torch.utils.data.IterableDataset):
    """A data set without a length."""

    def __init__(self, *tensors: Tensor):
        self.tensors = tensors

    def __iter__(self):
        return zip(*self.tensors, strict=True)


def loader(case: Case, *, shuffle: bool = False, batch_size: int = 4, seed: int = 0, **options: Any) -> Any:
    """A DataLoader of the case's examples, 4 at a time."""
    data = torch.utils.data.TensorDataset(*case.batch())
    generator = torch.Generator().manual_seed(seed)
    return torch.utils.data.DataLoader(data, batch_size, shuffle=shuffle, generator=generator, **options)


def converted(batch: Any, dtype: torch.dtype) -> Any:
    """A batch with its floating point tensors in another dtype."""
    if isinstance(batch, dict):
        return {name: converted(tensor, dtype) for name, tensor in batch.items()}
    if isinstance(batch, tuple):
        return tuple(converted(tensor, dtype) for tensor in batch)
    return batch.to(dtype) if batch.is_floating_point() else batch
