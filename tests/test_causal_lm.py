"""Causal language models: logits of a position belong to the label of the next one."""

from __future__ import annotations

import doctest
import warnings
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo
from nngeo import FIM, FIM_MonteCarlo, PMatDense, PMatDiag, PMatImplicit, PMatKFAC

EXACT = {"rtol": 1e-9, "atol": 1e-12}
V = 5


class Words(nn.Module):
    """A language model in which each position sees those before it; what the mask leaves out is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(V, 4), nn.Linear(4, 4), nn.Linear(4, V)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return {"logits": self.head(torch.tanh(x + (mask[..., None] * self.mix(x)).cumsum(1)))}


class TinyForCausalLM(Words):
    """By its name one of transformers."""


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Words().to(dtype)


def batch(lengths: tuple[int, ...] = (6, 4, 2), left: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    mask = mask.flip(1) if left else mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def pairs(at: dict[str, Tensor], e: int) -> list[tuple[int, int]]:
    """The positions of example e whose logits count, with their labels."""
    labels, mask = at["labels"][e], at["attention_mask"][e]
    last = len(labels) - 1
    return [(t, int(labels[t + 1])) for t in range(last) if labels[t + 1] != -100 and mask[t] and mask[t + 1]]


def jacobians(net: nn.Module, at: dict[str, Tensor], e: int) -> list[Tensor]:
    """(V, P) at each position that counts."""
    logits = net(at["input_ids"][e : e + 1], at["attention_mask"][e : e + 1])["logits"][0]
    ps = list(net.parameters())
    return [
        torch.stack(
            [torch.cat([g.flatten() for g in torch.autograd.grad(v, ps, retain_graph=True)]) for v in logits[t]]
        )
        for t, _ in pairs(at, e)
    ]


def exact(net: nn.Module, at: dict[str, Tensor]) -> Tensor:
    total: Any = 0.0
    logits = net(at["input_ids"], at["attention_mask"])["logits"].detach()
    n = len(logits)
    for e in range(n):
        for (t, _), jacobian in zip(pairs(at, e), jacobians(net, at, e), strict=True):
            p = logits[e, t].softmax(-1)
            total = total + jacobian.T @ (p.diag() - p.outer(p)) @ jacobian
    return total / n


def empirical(net: nn.Module, at: dict[str, Tensor]) -> Tensor:
    """From the loss as Hugging Face has it, with labels outside of the mask left out."""

    def gradient(e: int) -> Tensor:
        logits = net(at["input_ids"][e : e + 1], at["attention_mask"][e : e + 1])["logits"][0]
        terms = [F.cross_entropy(logits[t], torch.tensor(y)) for t, y in pairs(at, e)]
        grads = torch.autograd.grad(torch.stack(terms).sum(), list(net.parameters()))
        return torch.cat([g.flatten() for g in grads])

    rows = torch.stack([gradient(e) for e in range(len(at["labels"]))])
    return rows.T @ rows / len(rows)


BATCHES = {
    "padded": batch(),
    "padded at the left": batch(left=True),
    "labels of the end only": batch() | {"labels": batch()["labels"].index_fill(1, torch.arange(3), -100)},
    "one example": batch((3,)),
    "two tokens": batch((2, 2)),
}
BATCHES["labels of the end only"]["labels"][2] = batch()["labels"][2]
each_batch = pytest.mark.parametrize("at", BATCHES.values(), ids=BATCHES)


@each_batch
def test_the_exact_fisher_is_that_of_the_next_tokens(at):
    net, want = model(), exact(model(), at)
    assert_close(FIM(net, at, PMatDense, "causal_lm").to_torch(), want, **EXACT)
    assert_close(FIM(net, at, PMatDiag, "causal_lm").get_diag(), want.diagonal(), **EXACT)
    v = torch.randn(2, len(want), dtype=torch.float64)
    assert_close(FIM(net, at, PMatImplicit, "causal_lm").mv(v), v @ want, **EXACT)


@each_batch
def test_the_empirical_fisher_is_that_of_the_shifted_loss(at):
    found = FIM(model(), at, PMatDense, "causal_lm", empirical=True)
    assert_close(found.to_torch(), empirical(model(), at), **EXACT)


def test_the_empirical_fisher_in_float32():
    at = batch()
    found = FIM(model(torch.float32), at, PMatDense, "causal_lm", empirical=True).to_torch()
    assert_close(found, empirical(model(), at).float(), rtol=1e-3, atol=1e-5)


@each_batch
def test_draws_are_unbiased(at):
    net, want = model(), exact(model(), at)
    found = FIM_MonteCarlo(net, at, PMatDense, "causal_lm", 3000, generator=torch.Generator().manual_seed(2))
    assert (found.to_torch() - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("kind", [UserDict, dict])
def test_batches_of_a_loader_come_as_they_are(kind):
    at = batch()
    batches = [kind({key: x[part] for key, x in at.items()}) for part in (slice(0, 2), slice(2, 3))]
    found = FIM(model(), batches, PMatDense, "causal_lm", empirical=True)
    assert_close(found.to_torch(), empirical(model(), at), **EXACT)


def test_a_token_alone_predicts_nothing():
    at = {"input_ids": torch.ones(2, 1).long(), "labels": torch.ones(2, 1).long()}
    assert not FIM(model(), at, PMatDense, "causal_lm", empirical=True).to_torch().any()


def test_without_labels_and_masks_all_next_tokens_count():
    at = batch((4, 4))
    found = FIM(model(), {"input_ids": at["input_ids"]}, PMatDense, "causal_lm")
    assert_close(found.to_torch(), exact(model(), at), **EXACT)


def test_a_mask_says_which_labels_count():
    """As those of an answer, of which the prompt predicts the first."""
    at, answer = batch((6, 6)), torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]]).bool()
    found = FIM(model(), at, PMatDense, "causal_lm", mask=lambda b: answer)
    want = exact(model(), at | {"labels": at["labels"].masked_fill(~answer, -100)})
    assert_close(found.to_torch(), want, **EXACT)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("options", [{}, {"mask": "attention_mask"}], ids=["by default", "by name"])
@pytest.mark.parametrize("kind", [PMatKFAC, nngeo.PMatEKFAC])
def test_padding_enters_no_factor(kind, options, left):
    net, at = model(), batch(left=left)
    ids, mask = at["input_ids"], at["attention_mask"].bool()
    other = at | {"input_ids": torch.where(mask, ids, (ids + 1) % V)}
    cut = [{key: x[e : e + 1, mask[e]] for key, x in at.items()} for e in range(3)]
    want = FIM(net, cut, kind, "causal_lm").to_torch()
    if not (left and options):  # whose first label is predicted by padding, as a mask of labels has it
        assert_close(FIM(net, at, kind, "causal_lm", **options).to_torch(), want, **EXACT)
        assert_close(FIM(net, other, kind, "causal_lm", **options).to_torch(), want, **EXACT)


def test_labels_of_another_length_are_refused():
    at = batch()
    at["labels"] = at["labels"][:, 1:]
    with pytest.raises(ValueError, match=r"labels of the shape \(3, 6\).*token_logits"):
        FIM(model(), at, PMatDense, "causal_lm", empirical=True)


def test_a_causal_model_with_token_logits_is_warned_about():
    torch.manual_seed(0)
    net, at = TinyForCausalLM().double(), batch()
    with pytest.warns(UserWarning, match="variant='causal_lm'"):
        FIM(net, at, PMatDiag, "token_logits")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FIM(net, at, PMatDiag, "causal_lm")
        FIM(net, at, PMatDiag, "token_logits", function=lambda b: net(b["input_ids"])["logits"])


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "none"])
def test_gpt2_is_served_as_its_own_loss_has_it(labelled):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 6, "vocab_size": V}
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    net = net.double().eval()
    at = transformers.BatchEncoding(batch((6, 4)))

    def gradient(e: int) -> Tensor:
        one = {key: x[e : e + 1] for key, x in at.items()}
        loss = net(**one).loss * (one["labels"][:, 1:] != -100).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])

    rows = torch.stack([gradient(e) for e in range(2)])
    if labelled:
        found = FIM(net, at, PMatDense, "causal_lm", empirical=True).to_torch()
        assert_close(found, rows.T @ rows / 2, rtol=1e-3, atol=1e-6)  # transformers has its losses in float32
    else:
        del at["labels"]
        assert FIM(net, at, PMatDiag, "causal_lm").trace() > 0


def test_the_recipes_of_the_page_run():
    page = Path(__file__).parent.parent / "docs" / "factories.rst"
    found = doctest.testfile(str(page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 15 and found.failed == 0
