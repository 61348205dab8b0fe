"""What a block of one's own has to have, and what it costs to damp one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from nngeo import FIM, LayerCollection, PMatKFAC, PMatMixed, PVector
from nngeo.representations.block import Block
from nngeo.representations.diag import DiagBlock
from nngeo.representations.sumblock import SumBlock


@dataclass(frozen=True, eq=False)
class Multiple(Block):
    """`factor` times the identity: the least that a block can be."""

    factor: torch.Tensor
    p: int

    statistic = from_means = zeros = None  # type: ignore[assignment]

    def mv(self, v):
        return self.factor * v

    def solve(self, v, regul):
        return v / (self.factor + regul)

    def diag(self):
        return self.factor.expand(self.p)

    def eigenvalues(self):
        return self.diag()

    def scaled(self, factor):
        return Multiple(factor * self.factor, self.p)

    def added(self, other):
        return Multiple(self.factor + other.factor, self.p)


class Written(TorchDispatchMode):
    """Counts the entries that operations write to new memory."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.entries += out.numel()
        return out


LAYERS = LayerCollection.from_model(nn.Linear(3, 1))


def test_a_block_without_a_damped_form_says_so():
    F = PMatMixed(LAYERS, data={"": Multiple(torch.tensor(2.0), 4)})
    with pytest.raises(NotImplementedError, match="Multiple has no damped form: give it a method `shifted`"):
        F + 1e-2
    v = torch.ones(4)
    assert_close(F.solve(v, regul=0.5), v / 2.5)
    assert_close(F.inv().to_torch(), torch.eye(4) / 2)


@pytest.mark.parametrize("damping", [0.3, PVector(LAYERS, torch.tensor([0.1, 0.2, 0.3, 0.4]))], ids=["0-d", "(P,)"])
def test_a_damped_sum_keeps_its_terms(damping):
    terms = DiagBlock(torch.arange(1.0, 5.0)), DiagBlock(torch.ones(4))
    F = PMatMixed(LAYERS, data={"": SumBlock(terms)})
    G = F + damping
    added = damping if isinstance(damping, float) else damping.to_torch()
    assert isinstance(G.data[""], SumBlock) and G.data[""].terms[:2] == terms
    assert_close(G.to_torch(), F.to_torch() + torch.eye(4) * added)
    assert_close(G.solve(torch.ones(4), regul=0.5), 1 / (torch.arange(1.0, 5.0) + 1.5 + added))


def test_damping_a_kfac_matrix_writes_its_scalings_only():
    model = nn.Sequential(nn.Linear(100, 40), nn.Tanh(), nn.Linear(40, 10))
    F = FIM(model, (torch.randn(8, 100),), PMatKFAC)
    F.solve(torch.ones(F.size(0)), 1.0)  # its eigenbases are there
    with Written() as written:
        F + 1.0
    assert written.entries <= 2.1 * F.size(0)
