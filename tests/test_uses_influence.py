"""Influence against plain definitions: `g_q' (F + damping)^-1 g_n` with dense matrices, and leaving examples out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo import (
    FIM,
    FIM_MonteCarlo,
    LayerCollection,
    PMat,
    PMatDense,
    PMatDiag,
    PMatEKFAC,
    PMatEKFACBlockDiag,
    PMatImplicit,
    PMatKFAC,
    PMatLowRank,
)
from nngeo.uses import influence, lds, self_influence

DAMPING = 0.1
cross_entropy = nn.CrossEntropyLoss(reduction="sum")


def half_squares(f: Tensor, y: Tensor) -> Tensor:
    return (f - y).square().sum() / 2


def of_tokens(f: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(f.flatten(0, 1), y.flatten())


@dataclass
class Net:
    """A network, examples, what they lose, and the variant of its Fisher matrix."""

    id: str
    build: Callable[[], nn.Module]
    x: Callable[[int], Tensor]
    y: Callable[[int], Tensor]
    loss: Callable[..., Tensor] = cross_entropy
    variant: str = "classif_logits"

    def make(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple, tuple]:
        torch.manual_seed(0)
        model = self.build().to(dtype).eval()
        x, y = self.x(9), self.y(9)
        x = x.to(dtype) if x.is_floating_point() else x
        return model, (x[:3], y[:3]), (x[3:], y[3:])


def classes(n: int) -> Tensor:
    return torch.randint(3, (n,))


def padded(n: int) -> Tensor:
    y = torch.randint(3, (n, 5))
    y[: n // 2, 3:] = -100
    return y


MLP = Net(
    "mlp", lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), lambda n: torch.randn(n, 4), classes
)
CONV = Net(
    "conv",
    lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)),
    lambda n: torch.randn(n, 2, 4, 4),
    classes,
)
NORM = Net(
    "norm",
    lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)),
    lambda n: torch.randn(n, 4),
    classes,
)
TOKENS = Net(
    "tokens",
    lambda: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
    lambda n: torch.randint(7, (n, 5)),
    padded,
    of_tokens,
    "token_logits",
)
each_net = pytest.mark.parametrize("net", [MLP, CONV, NORM, TOKENS], ids=lambda net: net.id)
each_linear_map = pytest.mark.parametrize("net", [MLP, CONV, TOKENS], ids=lambda net: net.id)


def gradients(model: nn.Module, batch: tuple, loss: Callable[..., Tensor]) -> Tensor:
    """(n, P), example by example."""
    rows = []
    for i in range(len(batch[0])):
        value = loss(model(batch[0][i : i + 1]), *[t[i : i + 1] for t in batch[1:]])
        grads = torch.autograd.grad(value, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def definition(F: PMat, q: Tensor, n: Tensor) -> Tensor:
    M = F.to_torch()
    return q @ torch.linalg.solve(M + DAMPING * torch.eye(len(M)).to(M), n.mT)


def of_net(net: Net, kind: type[PMat], dtype: torch.dtype = torch.float64) -> tuple:
    model, queries, train = net.make(dtype)
    return model, FIM(model, train, kind, net.variant), queries, train


# ------------------------------------------------------------------------------------------ the definition


@each_net
@pytest.mark.parametrize("kind", [PMatDense, PMatDiag, PMatEKFACBlockDiag, PMatLowRank])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_scores_are_their_definition(net, kind, dtype):
    model, F, queries, train = of_net(net, kind, dtype)
    found = influence(model, F, queries, [train], net.loss, damping=DAMPING, refine=0)
    expected = definition(F, gradients(model, queries, net.loss), gradients(model, train, net.loss))
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    assert_close(found, expected, **tolerance)


@each_net
@pytest.mark.parametrize("kind", [PMatDiag, PMatEKFACBlockDiag])
def test_refined_to_the_end_scores_are_those_of_the_exact_matrix(net, kind):
    model, F, queries, train = of_net(net, kind)
    found = influence(model, F, queries, train, net.loss, damping=DAMPING, refine=200)
    exact = FIM(model, train, PMatDense, net.variant)
    expected = definition(exact, gradients(model, queries, net.loss), gradients(model, train, net.loss))
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_few_steps_bring_ekfac_near_to_the_exact_matrix():
    model, F, queries, train = of_net(MLP, PMatEKFAC)
    F.update_diag(train)
    expected = definition(
        FIM(model, train, PMatDense), gradients(model, queries, MLP.loss), gradients(model, train, MLP.loss)
    )
    errors = [
        (influence(model, F, queries, train, MLP.loss, damping=DAMPING, refine=steps) - expected).norm()
        for steps in (0, 3, 6)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_of_linear_regression_they_are_leave_one_out_times_one_minus_the_leverage():
    torch.manual_seed(0)
    n, ridge = 12, 0.1
    x, y = torch.randn(n, 4).double(), torch.randn(n, 1).double()
    model, new = nn.Linear(4, 1).double(), torch.randn(5, 4).double()

    def fitted(rows: Tensor) -> Tensor:
        """Of mean loss over n and ridge / 2 times the squared weights, by the normal equations."""
        phi = nn.functional.pad(x, (0, 1), value=1.0)[rows]
        return torch.linalg.solve(phi.T @ phi / n + ridge * torch.eye(5).double(), phi.T @ y[rows] / n)

    def outputs(w: Tensor) -> Tensor:
        return nn.functional.pad(new, (0, 1), value=1.0) @ w

    w = fitted(torch.arange(n))
    with torch.no_grad():
        model.weight.copy_(w[:4].T)
        model.bias.copy_(w[4])
    F = FIM(model, (x,), PMatDense, "regression")
    scores = influence(model, F, (new,), (x, y), half_squares, damping=ridge, refine=0, measure=lambda f: f.sum())
    phi = nn.functional.pad(x, (0, 1), value=1.0)
    leverage = (phi @ torch.linalg.inv(phi.T @ phi / n + ridge * torch.eye(5).double()) * phi).sum(1) / n
    left_out = torch.cat([outputs(fitted(torch.arange(n) != i)) - outputs(w) for i in range(n)], 1)
    assert_close(scores / n / (1 - leverage), left_out, rtol=1e-12, atol=1e-12)


def test_a_positive_score_says_that_removing_the_example_raises_the_loss():
    model, F, _, train = of_net(MLP, PMatDense)
    own = influence(model, F, train, train, MLP.loss, damping=DAMPING, refine=0)
    assert (own.diagonal() > 0).all()


# ------------------------------------------------------------------------------------------ parts of the scores


@each_linear_map
def test_scores_of_layers_add_up(net):
    model, F, queries, train = of_net(net, PMatKFAC)
    whole = influence(model, F, queries, train, net.loss, damping=DAMPING, refine=0)
    by_layer = influence(model, F, queries, train, net.loss, damping=DAMPING, refine=0, by="layer")
    assert by_layer.shape == (3, 6, len(F.layer_collection))
    assert_close(by_layer.sum(-1), whole)


def test_scores_of_tokens_add_up_and_are_zero_where_none_is_lost():
    model, F, queries, train = of_net(TOKENS, PMatKFAC)
    whole = influence(model, F, queries, train, TOKENS.loss, damping=DAMPING)
    by_token = influence(model, F, queries, train, TOKENS.loss, damping=DAMPING, by="token")
    assert by_token.shape == (3, 6, 5)
    assert_close(by_token.sum(-1), whole)
    assert (by_token[:, train[1] == -100] == 0).all()


@pytest.mark.parametrize("net", [NORM, CONV], ids=lambda net: net.id)
def test_tokens_of_layers_without_common_positions_are_refused(net):
    model, F, queries, train = of_net(net, PMatEKFACBlockDiag)
    with pytest.raises(ValueError, match="by='token'"):
        influence(model, F, queries, train, net.loss, refine=0, by="token")


@each_linear_map
def test_a_low_rank_keeps_the_largest_singular_values_of_each_solution(net):
    model, F, queries, train = of_net(net, PMatKFAC)
    found = influence(model, F, queries, train, net.loss, damping=DAMPING, refine=0, rank=1)
    n, expected = gradients(model, train, net.loss), 0
    solved = F.solve(gradients(model, queries, net.loss), regul=DAMPING)
    parts = zip(
        F.data.values(), F.layer_collection.split(solved).values(), F.layer_collection.split(n).values(), strict=True
    )
    for block, v, g in parts:
        matrix = block.view.to_matrix(v)
        if block.a.ndim == 3:  # that of an embedding is as wide as its vocabulary, and is kept
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            matrix = u[..., :1] * s[..., None, :1] @ vh[..., :1, :]
        expected = expected + block.view.to_flat(matrix) @ g.mT
    assert_close(found, expected)


@each_linear_map
def test_a_rank_that_is_full_changes_nothing(net):
    model, F, queries, train = of_net(net, PMatKFAC)
    whole = influence(model, F, queries, train, net.loss, refine=0)
    assert_close(influence(model, F, queries, train, net.loss, refine=0, rank=100), whole)


@pytest.mark.parametrize("k", [1, 4, 100])
def test_the_largest_scores_come_with_their_places(k):
    model, F, queries, train = of_net(MLP, PMatKFAC)
    batches = [tuple(t[i : i + 2] for t in train) for i in range(0, 6, 2)]
    whole = influence(model, F, queries, train, MLP.loss)
    values, indices = influence(model, F, queries, batches, MLP.loss, top=k)
    expected = whole.topk(min(k, 6), 1)
    assert_close(values, expected.values)
    assert torch.equal(indices, expected.indices)


def test_only_the_layers_of_the_matrix_count():
    model, queries, train = MLP.make()
    F = FIM(model, train, PMatDense, layer_collection=LayerCollection.from_model(model, layers="2"))
    found = influence(model, F, queries, train, MLP.loss, damping=DAMPING)
    q, n = (gradients(model, batch, MLP.loss)[:, -21:] for batch in (queries, train))
    assert_close(found, definition(F, q, n), rtol=1e-5, atol=1e-7)


def test_dict_batches_with_a_function_are_as_tuples():
    model, queries, train = MLP.make()

    def function(batch: dict) -> Tensor:
        return model(batch["x"])

    named = [{"x": x, "labels": y} for x, y in (queries, train)]
    F = FIM(model, named[1], PMatKFAC, function=function)
    plain = influence(model, FIM(model, train, PMatKFAC), queries, train, MLP.loss)
    assert_close(influence(model, F, named[0], [named[1]], MLP.loss), plain)


def test_draws_are_refined_on_the_matrix_without_draws():
    model, queries, train = MLP.make()
    drawn = FIM_MonteCarlo(model, train, PMatKFAC, generator=torch.Generator().manual_seed(0))
    exact = FIM(model, train, PMatKFAC)
    found = [influence(model, F, queries, train, MLP.loss, damping=DAMPING, refine=100) for F in (drawn, exact)]
    assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_matrix_by_its_products_is_refined_on_itself():
    model, F, queries, train = of_net(MLP, PMatImplicit)
    expected = influence(model, FIM(model, train, PMatDense), queries, train, MLP.loss, damping=DAMPING, refine=0)
    assert_close(
        influence(model, F, queries, train, MLP.loss, damping=DAMPING, refine=100), expected, rtol=1e-4, atol=1e-5
    )


def test_a_matrix_from_a_file_is_refined_on_the_one_that_is_given():
    model, F, queries, train = of_net(MLP, PMatKFAC)
    loaded = PMat.from_state_dict(F.state_dict())
    with pytest.raises(ValueError, match="refine=0"):
        influence(model, loaded, queries, train, MLP.loss)
    found = influence(model, loaded, queries, train, MLP.loss, exact=FIM(model, train, PMatImplicit))
    assert_close(found, influence(model, F, queries, train, MLP.loss))


# ------------------------------------------------------------------------------------------ of an example on itself


@each_net
@pytest.mark.parametrize("kind", [PMatDense, PMatEKFACBlockDiag])
def test_self_influence_is_the_diagonal(net, kind):
    model, F, _, train = of_net(net, kind)
    found = self_influence(model, F, train, net.loss, damping=DAMPING)
    g = gradients(model, train, net.loss)
    assert_close(found, definition(F, g, g).diagonal())


# ------------------------------------------------------------------------------------------ files


@pytest.fixture
def many() -> tuple:
    """A model, its matrix, queries, and three batches that are a file each."""
    model, queries, _ = MLP.make()
    batches = [(torch.randn(1024, 4).double(), classes(1024)) for _ in range(3)]
    return model, FIM(model, batches, PMatKFAC), queries, batches


class Killed(Exception):
    pass


@pytest.mark.parametrize("top", [None, 2])
def test_a_call_that_was_killed_goes_on_where_it_was(many, tmp_path, top):
    model, F, queries, train = many
    whole = influence(*many, cross_entropy, refine=2, top=top)
    seen: list[int] = []

    def loss(f: Tensor, y: Tensor) -> Tensor:
        seen.append(len(y))
        return cross_entropy(f, y)

    def broken(f: Tensor, y: Tensor) -> Tensor:
        if sum(seen) >= 3 * 1024:  # two files: the first is seen twice, to find out whether the loss is a sum
            raise Killed
        return loss(f, y)

    arguments = {"refine": 2, "top": top, "store": tmp_path / "scores", "measure": cross_entropy}
    with pytest.raises(Killed):
        influence(model, F, queries, train, broken, **arguments)
    assert sorted(path.name for path in (tmp_path / "scores").iterdir())[:-1] == [
        "scores_000000.safetensors",
        "scores_000001.safetensors",
    ]
    seen.clear()
    found = influence(model, F, queries, train, loss, **arguments)
    assert sum(seen) <= 2 * 1024  # of the third file alone
    assert_close(tuple(found), tuple(whole))


def test_files_of_other_scores_are_refused(many, tmp_path):
    model, F, queries, train = many
    influence(model, F, queries, train, MLP.loss, refine=0, store=tmp_path)
    with pytest.raises(ValueError, match="shuffle"):
        influence(model, F, queries, train[::-1], MLP.loss, refine=0, store=tmp_path)
    with pytest.raises(ValueError, match="other queries, weights or settings"):
        influence(model, F, queries, train, MLP.loss, refine=0, store=tmp_path, damping=0.5)
    with pytest.raises(ValueError, match="other queries, weights or settings"):
        influence(model, F, train[0], train, MLP.loss, refine=0, store=tmp_path)


# ------------------------------------------------------------------------------------------ what can go wrong


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_dead_units_and_a_zero_column_are_finite(dtype):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)
    with torch.no_grad():
        model[0].bias[:3] = -100.0
    x, y = torch.randn(1, 4, dtype=dtype), torch.tensor([1])
    x[:, 0] = 0.0
    F = FIM(model, (x,), PMatKFAC)
    assert influence(model, F, (x, y), (x, y), cross_entropy).isfinite().all()
    assert self_influence(model, F, (x, y), cross_entropy).isfinite().all()


def test_a_loss_that_is_a_mean_is_refused():
    model, F, queries, train = of_net(MLP, PMatKFAC)
    with pytest.raises(ValueError, match="reduction='sum'"):
        influence(model, F, queries, train, nn.CrossEntropyLoss())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"by": "word"}, "Unknown by"),
        ({"by": "layer", "top": 2}, "`top`"),
        ({"loss": lambda f, y: f.sum(1)}, "one number"),
        ({"damping": -1.0}, "negative"),
    ],
)
def test_what_can_not_be_is_refused(change, match):
    model, F, queries, train = of_net(MLP, PMatKFAC)
    with pytest.raises(ValueError, match=match):
        influence(
            **{"model": model, "F": F, "queries": queries, "train": train, "loss": MLP.loss, "refine": 0} | change
        )


def test_a_tiny_gpt2_with_padding_and_tied_weights_works_as_it_comes():
    transformers = pytest.importorskip("transformers", reason="the model is built from its config")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    mask = torch.ones(5, 6, dtype=torch.long)
    mask[1, 4:] = mask[3, 2:] = 0
    ids = torch.randint(11, (5, 6)) * mask
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return of_tokens(logits[:, :-1], labels[:, 1:])

    F = FIM(model, batch, PMatEKFACBlockDiag, "token_logits")
    found = influence(model, F, batch, [batch], loss, damping=DAMPING, refine=0)
    rows = []
    for i in range(5):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        value = loss(model(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits, one["labels"])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]))
    g = torch.stack(rows)
    assert_close(found, g @ F.solve(g, regul=DAMPING).mT)


# ------------------------------------------------------------------------------------------ how good scores are


def test_the_linear_datamodeling_score_is_the_mean_rank_correlation():
    torch.manual_seed(0)
    scores, masks, losses = torch.randn(4, 10), torch.rand(8, 10) < 0.5, torch.randn(8, 4)
    losses[0] = losses[1]  # a tie
    foretold = -(masks.float() @ scores.T)
    expected = sum(spearmanr(foretold[:, q], losses[:, q]).statistic for q in range(4)) / 4
    assert_close(lds(scores, masks, losses).item(), expected)


def test_scores_that_foretell_the_losses_exactly_have_a_linear_datamodeling_score_of_one():
    torch.manual_seed(0)
    scores, masks = torch.rand(3, 10), torch.rand(8, 10) < 0.5
    assert_close(lds(scores, masks, torch.exp(-(masks.float() @ scores.T))).item(), 1.0)


@pytest.mark.parametrize(
    ("losses", "match"), [(torch.zeros(8, 3), "do not fit"), (torch.zeros(8, 4), "no rank correlation")]
)
def test_losses_without_a_rank_correlation_are_refused(losses, match):
    with pytest.raises(ValueError, match=match):
        lds(torch.randn(4, 10), torch.rand(8, 10) < 0.5, losses)
