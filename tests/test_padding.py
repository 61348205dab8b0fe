"""What stands in positions that a mask leaves out changes nothing, and cutting them off gives the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo
from nngeo import FIM, FIM_MonteCarlo, PMatKFAC

LENGTHS = [5, 2, 3]  # of the examples, of which the first fills the batch
WORDS, WIDTH, CLASSES = 7, 6, 4

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{name: (getattr(nngeo, f"PMat{name}"), {}) for name in ("Dense", "Diag", "BlockDiag", "QuasiDiag", "LowRank")},
    "KFAC": (PMatKFAC, {}),
    "KFAC reduce": (PMatKFAC, {"weight_sharing": "reduce"}),
    "EKFAC": (nngeo.PMatEKFAC, {}),
    # A of few examples has no unique eigenvectors, along which scalings could be compared.
    "EKFAC reduce of one pass": (nngeo.PMatEKFAC, {"weight_sharing": "reduce", "update_diag": False}),
}
each_kind = pytest.mark.parametrize(("kind", "options"), KINDS.values(), ids=KINDS)
kronecker = pytest.mark.parametrize(
    ("kind", "options"), [KINDS[name] for name in KINDS if "FAC" in name], ids=[name for name in KINDS if "FAC" in name]
)


class Reader(nn.Module):
    """Embeddings, attention that knows the mask, a grouped convolution, and a layer that is called twice."""

    def __init__(self, pooled: bool = False):
        super().__init__()
        self.embed, self.shared = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.keys, self.values = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv, self.head = nn.Conv1d(WIDTH, WIDTH, 1, groups=2), nn.Linear(WIDTH, CLASSES)
        self.pooled = pooled

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.shared(torch.tanh(self.shared(self.embed(input_ids))))
        scores = (x @ self.keys(x).mT).masked_fill(attention_mask[:, None] == 0, torch.finfo(x.dtype).min)
        x = torch.tanh(x + scores.softmax(-1) @ self.values(x))
        x = torch.tanh(self.conv(x.mT)).mT
        if self.pooled:
            x = (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return self.head(x)


def words(lengths: list[int] = LENGTHS, *, left: bool = False) -> dict[str, Tensor]:
    """A batch of examples of these lengths."""
    generator = torch.Generator().manual_seed(0)
    b, t = len(lengths), max(lengths)
    mask = torch.arange(t) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if left else mask
    ids, labels = (torch.randint(n, (b, t), generator=generator) for n in (WORDS, CLASSES))
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels.masked_fill(~mask, -100)}


def refilled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """With other words in the padding."""
    ids, mask = batch["input_ids"], batch["attention_mask"] == 1
    return batch | {"input_ids": torch.where(mask, ids, (ids + 3) % WORDS)}


def cut(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The examples one by one, without their padding."""
    masks = batch["attention_mask"] == 1
    return [
        {key: x[e : e + 1, mask] if x.ndim > 1 else x[e : e + 1] for key, x in batch.items()}
        for e, mask in enumerate(masks)
    ]


def model(pooled: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Reader(pooled).to(dtype)


def close(found: Tensor, want: Tensor) -> None:
    assert_close(found, want, rtol=1e-8, atol=1e-10 * float(want.abs().max()))


@pytest.fixture(params=[None, 1], ids=["whole", "chunked"])
def chunks(request, monkeypatch):
    """All cotangents of a mini-batch at once, or each on its own."""
    if request.param is not None:
        monkeypatch.setattr("nngeo.generators.sizing.BUDGET", request.param)


@each_kind
def test_padding_of_tokens_changes_nothing(kind, options, chunks):
    net, batch = model(), words()
    want = FIM(net, batch, kind, "token_logits", **options).to_torch()
    close(FIM(net, refilled(batch), kind, "token_logits", **options).to_torch(), want)
    close(FIM(net, cut(batch), kind, "token_logits", **options).to_torch(), want)


@kronecker
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padding_changes_no_factors_of_an_empirical_fisher(kind, options, left):
    net, batch = model(), words(left=left)
    want = FIM(net, batch, kind, "token_logits", empirical=True, **options).to_torch()
    close(FIM(net, cut(batch), kind, "token_logits", empirical=True, **options).to_torch(), want)


@kronecker
def test_padding_changes_no_factors_of_a_monte_carlo_fisher(kind, options):
    net, batch = model(), words()
    found, want = (
        FIM_MonteCarlo(net, at, kind, "token_logits", 2, generator=torch.Generator().manual_seed(1), **options)
        for at in (refilled(batch), batch)
    )
    close(found.to_torch(), want.to_torch())


@each_kind
def test_padding_of_a_classifier_changes_nothing(kind, options):
    """The outputs have no positions, and the mask of the attention says which the layers inside have."""
    net, batch = model(pooled=True), words()
    batch["labels"] = torch.tensor([0, 2, 1])
    want = FIM(net, batch, kind, **options).to_torch()
    close(FIM(net, refilled(batch), kind, **options).to_torch(), want)
    close(FIM(net, cut(batch), kind, **options).to_torch(), want)


@kronecker
def test_padding_in_joined_mini_batches_changes_nothing(kind, options):
    net, batch = model(), words()
    batches = [{key: x[e : e + 1] for key, x in batch.items()} for e in range(len(LENGTHS))]
    close(
        FIM(net, batches, kind, "token_logits", **options).to_torch(),
        FIM(net, cut(batch), kind, "token_logits", **options).to_torch(),
    )


@kronecker
def test_padding_in_mini_batches_that_are_split_changes_nothing(kind, options, monkeypatch):
    batch = words(LENGTHS * 7)
    want = FIM(model(), cut(batch), kind, "token_logits", **options).to_torch()
    monkeypatch.setattr("nngeo.generators.sizing.BUDGET", 400)
    close(FIM(model(), batch, kind, "token_logits", **options).to_torch(), want)


@kronecker
def test_a_dict_beside_its_target_says_the_same(kind, options):
    net, batch = model(), words()
    given = ({key: batch[key] for key in ("input_ids", "attention_mask")}, batch["labels"])
    found = FIM(net, [given], kind, "token_logits", function=lambda b, y: net(**b), **options)
    close(found.to_torch(), FIM(net, batch, kind, "token_logits", **options).to_torch())


@kronecker
def test_factors_in_float32_do_without_the_padding(kind, options):
    net, batch = model(dtype=torch.float32), words()
    found, want = (FIM(net, at, kind, "token_logits", **options).to_torch() for at in (refilled(batch), batch))
    assert_close(found, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_factors_are_means_over_the_positions_that_count():
    """A is a sum over them, and G has the mean over those of each example."""
    torch.manual_seed(0)
    net, x = nn.Linear(3, 2, bias=False).double(), torch.randn(3, 5, 3, dtype=torch.float64)
    mask = words()["attention_mask"] == 1
    F = FIM(net, (x,), PMatKFAC, "regression", mask=lambda batch: mask)
    a = torch.einsum("bti,btj,bt->ij", x, x, mask.double()) / 3
    assert_close(F.data[""].a[0], a)
    assert_close(F.data[""].g[0], torch.eye(2).double())


@kronecker
def test_an_example_that_is_all_padding_enters_the_count_only(kind, options):
    net, batch = model(), words([5, 2])
    more = words([5, 2, 5])
    more["attention_mask"][2] = torch.tensor([1, 0, 0, 0, 0])
    mask = more["attention_mask"].bool().clone()
    mask[2] = False
    found = FIM(net, more, kind, "token_logits", mask=lambda b: mask, **options)
    more["input_ids"][2] = 0
    close(FIM(net, more, kind, "token_logits", mask=lambda b: mask, **options).to_torch(), found.to_torch())
    assert found.n_examples == 3 and batch["input_ids"].shape == (2, 5)


# ------------------------------------------------------------------------------------------ several axes


class Pixels(nn.Module):
    """A network of pixels, each on its own; rows first."""

    def __init__(self, spread: int = 1):
        super().__init__()
        self.rows, self.mix = nn.Linear(2, 3), nn.Conv2d(3, 4, spread, padding=spread // 2)
        self.head = nn.Conv2d(4, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.rows(x.movedim(1, -1))).movedim(-1, 1)
        return self.head(torch.tanh(self.mix(x)))


def pixels(spread: int = 1) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    mask = torch.ones(2, 4, 3, dtype=torch.bool)
    mask[:, :, 2], mask[1, 3] = False, False
    return Pixels(spread).double(), torch.randn(2, 2, 4, 3, dtype=torch.float64), mask


@each_kind
def test_masked_pixels_change_nothing(kind, options):
    net, x, mask = pixels()
    other = torch.where(mask[:, None], x, 5 * x + 1)
    fisher = [FIM(net, (at,), kind, "segmentation_logits", mask=lambda b: mask, **options) for at in (x, other)]
    close(fisher[1].to_torch(), fisher[0].to_torch())
    ends = [(x[:1, :, :, :2],), (x[1:, :, :3, :2],)]
    close(FIM(net, ends, kind, "segmentation_logits", **options).to_torch(), fisher[0].to_torch())


@kronecker
def test_masked_columns_change_nothing(kind, options):
    """A mask over the first axis of positions only."""
    net, x, mask = pixels()
    mask[1] = True
    first = torch.tensor([[True] * 3 + [False], [True] * 4])
    other = torch.where(first[:, None, :, None], x, 5 * x + 1)
    fisher = [FIM(net, (at,), kind, "segmentation_logits", mask=lambda b: first, **options) for at in (x, other)]
    close(fisher[1].to_torch(), fisher[0].to_torch())
    ends = [(x[:1, :, :3],), (x[1:],)]
    close(FIM(net, ends, kind, "segmentation_logits", **options).to_torch(), fisher[0].to_torch())


def test_masked_pixels_that_act_on_others_are_kept():
    """The input of a convolution at a masked pixel reaches its neighbours; what no neighbour sees is left out."""
    net, x, _ = pixels(spread=3)
    mask = torch.zeros(2, 4, 3, dtype=torch.bool)
    mask[:, 0] = True
    F = FIM(net, (x,), PMatKFAC, "segmentation_logits", mask=lambda b: mask)
    seen = torch.cat([x.movedim(1, -1)[:, :2], torch.ones(2, 2, 3, 1).double()], -1)  # rows 0 and 1, and the bias
    assert_close(F.data["rows"].a[0], torch.einsum("bhwi,bhwj->ij", seen, seen) / 2)


def test_tokens_without_a_label_are_kept():
    """They act through attention: `ignore_index` is no mask."""
    net, batch = model(), words([4, 4])
    batch["labels"][:, 2:] = -100
    F = FIM(net, batch, PMatKFAC, "token_logits")
    assert_close(F.data["embed"].a.sum(), torch.tensor(4.0).double())


def test_a_layer_with_other_positions_keeps_them():
    """As many by chance as the tokens: here the features, over which a layer runs."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turned, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            keep = attention_mask[..., None]
            return self.head(keep * torch.tanh(self.turned((x * keep).mT).mT))

    torch.manual_seed(0)
    net, x = Turned().double(), torch.randn(2, 4, 4).double()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    F = FIM(net, {"x": x, "attention_mask": mask}, PMatKFAC, "token_logits")
    rows = torch.cat([(x * mask[..., None]).mT, torch.ones(2, 4, 1).double()], -1)
    assert_close(F.data["turned"].a[0], torch.einsum("bti,btj->ij", rows, rows) / 2)
