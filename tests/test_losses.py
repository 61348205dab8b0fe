"""GGN of every loss of torch: the mean over examples of J' H J, or a refusal where the batch weighs its examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo import GGN, PMatDense, PMatDiag, PMatImplicit, PMatKFAC
from nngeo.variants.margins import multi_margin_loss, multilabel_margin_loss

D = torch.double
N, C = 7, 3
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def draws() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(N, C, generator=generator, dtype=D)
    return {
        "reals": normal,
        "classes": torch.arange(N) % C,
        "signs": normal.sign(),
        "shares": normal.softmax(1),
        "bits": (normal > 0).to(D),
        "labels": torch.tensor([[0, 2, -1], [1, -1, 0], [2, 1, 0], [-1, 0, 1], [0, 1, 2], [1, 2, -1], [2, -1, -1]]),
    }


WEIGHT = torch.tensor([1.0, 5.0, 0.2], dtype=D)
LOSSES: dict[str, tuple[Any, str, nn.Module | None]] = {
    "L1": (nn.L1Loss, "reals", None),
    "MSE": (nn.MSELoss, "reals", None),
    "SmoothL1": (nn.SmoothL1Loss, "reals", None),
    "Huber": (nn.HuberLoss, "reals", None),
    "CrossEntropy": (nn.CrossEntropyLoss, "classes", None),
    "CrossEntropy, smooth": (lambda **o: nn.CrossEntropyLoss(label_smoothing=0.1, **o), "classes", None),
    "CrossEntropy of shares": (lambda **o: nn.CrossEntropyLoss(weight=WEIGHT, **o), "shares", None),
    "NLL": (nn.NLLLoss, "classes", nn.LogSoftmax(1)),
    "PoissonNLL": (nn.PoissonNLLLoss, "shares", None),
    "KLDiv": (lambda reduction: nn.KLDivLoss(reduction="batchmean"), "shares", nn.LogSoftmax(1)),
    "BCE": (nn.BCELoss, "bits", nn.Sigmoid()),
    "BCEWithLogits": (lambda **o: nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT, **o), "bits", None),
    "SoftMargin": (nn.SoftMarginLoss, "signs", None),
    "HingeEmbedding": (nn.HingeEmbeddingLoss, "signs", None),
    "MultiMargin": (nn.MultiMarginLoss, "classes", None),
    "MultiMargin, squared": (lambda **o: nn.MultiMarginLoss(p=2, weight=WEIGHT, **o), "classes", None),
    "MultiLabelMargin": (nn.MultiLabelMarginLoss, "labels", None),
    "MultiLabelSoftMargin": (lambda **o: nn.MultiLabelSoftMarginLoss(weight=WEIGHT, **o), "bits", None),
}
each_loss = pytest.mark.parametrize(("make", "target", "last"), LOSSES.values(), ids=LOSSES)
each_reduction = pytest.mark.parametrize("reduction", ["sum", "mean"])


def net(last: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, C), *([] if last is None else [last])).to(D)


def inputs() -> Tensor:
    return torch.randn(N, 4, generator=torch.Generator().manual_seed(2), dtype=D)


def by_differences(model: nn.Module, loss: Any, x: Tensor, y: Tensor) -> Tensor:
    """The mean over examples of J' H J, with H by central differences of the gradient."""

    def hessian(f: Tensor, t: Tensor, h: float = 1e-6) -> Tensor:
        def gradient(z: Tensor) -> Tensor:
            z = z.requires_grad_()
            return torch.autograd.grad(loss(z, t), z)[0][0]

        steps = h * torch.eye(C, dtype=D)[:, None]
        return torch.stack([(gradient(f + step) - gradient(f - step)) / (2 * h) for step in steps])

    def term(e: slice) -> Tensor:
        f = model(x[e])
        rows = [torch.autograd.grad(v, list(model.parameters()), retain_graph=True) for v in f[0]]
        jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        return jacobian.T @ hessian(f.detach(), y[e]) @ jacobian

    return torch.stack([term(slice(e, e + 1)) for e in range(N)]).mean(0)


@each_reduction
@each_loss
def test_the_ggn_of_a_loss_is_that_of_its_examples(make, target, last, reduction):
    model, x, y, loss = net(last), inputs(), draws()[target], make(reduction=reduction)
    want = by_differences(model, loss, x, y)
    found = GGN(model, (x, y), PMatDense, loss).to_torch()
    assert_close(found, want, rtol=1e-6, atol=1e-7 * float(want.abs().max()) + 1e-8)
    v = torch.randn(2, len(found), dtype=D)
    assert_close(GGN(model, (x, y), PMatImplicit, loss).mv(v), v @ found, **EXACT)
    assert_close(GGN(model, (x, y), PMatDiag, loss).get_diag(), found.diagonal(), **EXACT)
    assert GGN(model, (x, y), PMatKFAC, loss).to_torch().isfinite().all()


@pytest.mark.parametrize("dtype", [D, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", [PMatDense, PMatImplicit, PMatKFAC])
def test_the_ggn_of_a_piecewise_linear_loss_is_zero(kind, dtype):
    model, x, y = net().to(dtype), inputs().to(dtype), draws()["reals"].to(dtype)
    found = GGN(model, (x, y), kind, nn.L1Loss())
    assert not found.to_torch().any()
    v = torch.ones(15, dtype=dtype)
    assert_close(found.solve(v, regul=0.5), 2 * v)


@each_reduction
@pytest.mark.parametrize("single", [False, True], ids=["batch", "one example"])
@pytest.mark.parametrize("p", [1, 2])
def test_margin_losses_written_out_are_those_of_torch(reduction, single, p):
    y, labels, x = draws()["classes"], draws()["labels"], draws()["reals"]
    x, y, labels = (x[3], y[3], labels[3]) if single else (x, y, labels)
    options = {"p": p, "margin": 0.7, "weight": WEIGHT, "reduction": reduction}
    assert_close(multi_margin_loss(x, y, **options), F.multi_margin_loss(x, y, **options))
    assert_close(
        multilabel_margin_loss(x, labels, reduction=reduction),
        F.multilabel_margin_loss(x, labels, reduction=reduction),
    )


def test_a_loss_without_a_second_derivative_says_so():
    x, y = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=D), torch.ones(3, 2).long()

    def ctc(f: Tensor, t: Tensor) -> Tensor:
        lengths = torch.tensor([5]), torch.tensor([2])
        return F.ctc_loss(f.log_softmax(-1).transpose(0, 1), t, *lengths, reduction="sum")

    with pytest.raises(NotImplementedError, match="`loss_fn` has no second derivative"):
        GGN(nn.Linear(4, C).to(D), (x, y), PMatDense, ctc)


# ------------------------------------------------------------------------------------------ weights of a batch

WEIGHED = {
    "CrossEntropy": (nn.CrossEntropyLoss(weight=WEIGHT), None, "weight"),
    "CrossEntropy, smooth": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), None, "weight"),
    "NLL": (nn.NLLLoss(weight=WEIGHT), nn.LogSoftmax(1), "weight"),
    "CrossEntropy without a class": (nn.CrossEntropyLoss(ignore_index=1), None, "ignore_index=1"),
    "a function": (lambda f, t: F.cross_entropy(f, t, weight=WEIGHT), None, "weight"),
    "a function without a class": (lambda f, t: F.cross_entropy(f, t, ignore_index=1), None, "ignore_index"),
    "weights of the examples": (
        lambda f, t: F.binary_cross_entropy_with_logits(f[:, 0], t.clamp(max=1).to(f), torch.arange(float(N))),
        None,
        "weights",
    ),
    "weights of the outputs of all": (
        lambda f, t: F.binary_cross_entropy(f.sigmoid(), torch.ones_like(f), weight=torch.ones(N, 1)),
        None,
        "weights",
    ),
}


@pytest.mark.parametrize("kind", [PMatDense, PMatImplicit, PMatKFAC])
@pytest.mark.parametrize(("loss", "last", "words"), WEIGHED.values(), ids=WEIGHED)
def test_losses_in_which_a_batch_weighs_its_examples_are_refused(loss, last, words, kind):
    with pytest.raises(ValueError, match=words):
        GGN(net(last), (inputs(), draws()["classes"]), kind, loss).mv(torch.ones(15, dtype=D))


def test_class_weights_are_refused_where_one_example_is_alone():
    with pytest.raises(ValueError, match="reduction='sum'"):
        GGN(net(), [(inputs()[:1], draws()["classes"][:1])], PMatDense, nn.CrossEntropyLoss(weight=WEIGHT))


@pytest.mark.parametrize("kind", [PMatDense, PMatImplicit])
def test_class_weights_of_a_sum_are_weights_of_the_examples(kind):
    model, x, y = net(), inputs(), draws()["classes"]
    plain = nn.CrossEntropyLoss(reduction="sum")
    parts = [GGN(model, (x[y == c], y[y == c]), PMatDense, plain) for c in range(C)]
    want = sum(float(WEIGHT[c]) * part.to_torch() * part.n_examples / N for c, part in enumerate(parts))
    found = GGN(model, (x, y), kind, nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"))
    assert_close(found.to_torch(), want, **EXACT)


def test_positions_that_are_ignored_need_a_sum():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, C).to(D), torch.randn(3, 5, 4, dtype=D), torch.arange(15).reshape(3, 5) % C
    y[0, 3:], y[1, 1:] = -100, -100
    with pytest.raises(ValueError, match="ignore_index"):
        GGN(model, (x, y), PMatDense, lambda f, t: F.cross_entropy(f.mT, t))
    found = GGN(model, (x, y), PMatDense, lambda f, t: F.cross_entropy(f.mT, t, reduction="sum"))
    flat = GGN(model, (x[y >= 0], y[y >= 0]), PMatDense, nn.CrossEntropyLoss())
    assert_close(found.to_torch(), flat.to_torch() * int((y >= 0).sum()) / 3, **EXACT)
