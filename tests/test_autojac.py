"""Jacobians by `nngeo.descent.autojac` against plain loops of autograd, and against torchjd where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from nngeo.descent import autojac
from nngeo.descent.aggregation.base import GramianWeightedAggregator, GramianWeighting
from nngeo.descent.aggregation.mean import Mean, MeanWeighting
from tests.cases import CASES, Case
from tests.reference import outputs

CHUNKS = [None, 1, 2, 4, 100]


class Ranked(GramianWeighting):
    """Weights that tell every entry of a Gramian apart: a softmax of G (1, 2, ..., m) / tr G."""

    def weights(self, gramian: Tensor) -> Tensor:
        return (gramian @ torch.arange(1.0, len(gramian) + 1).to(gramian) / gramian.trace()).softmax(0)


def rows(tensors: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """(m, *shape) by every input, row by row; the graph is kept."""
    scalars = [s for t in tensors for s in t.reshape(-1)]
    found = [
        torch.autograd.grad(s, inputs, retain_graph=True, allow_unused=True, materialize_grads=True) for s in scalars
    ]
    return [torch.stack([part.to_dense() for part in parts]) for parts in zip(*found, strict=True)]


def joined(jacobians: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten(1) for x in jacobians], 1)


class Doubled(torch.autograd.Function):
    """A function that vmap cannot enter: its backward reads numbers."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return torch.from_numpy(2 * gradient.numpy())


class Tied(nn.Module):
    """Weights used twice, a parent that uses its child's, an unused layer and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(2, 3)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return F.linear(torch.tanh(x), self.first.weight)[:, :2]


class Sparse(nn.Module):
    """An embedding whose gradients are sparse tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x[:, :2].abs() * 10).long() % 6).sin().sum(-1)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(Doubled.apply(self.linear(x)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(2, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.view(-1, 2, 2))[0][:, -1, :2]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)),
    "norms": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.PReLU(), nn.BatchNorm1d(6), nn.Linear(6, 2)),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)
    ),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.TransformerEncoderLayer(2, 1, 4, 0, batch_first=True), nn.Flatten(), nn.Linear(4, 2)
    ),
    "tied": Tied,
    "custom": Custom,
    "recurrent": Recurrent,
    "sparse": Sparse,
}


def network(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[name]().double()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def outputs_of(model: nn.Module, examples: int = 3) -> Tensor:
    return model(torch.linspace(-1, 1, 4 * examples, dtype=torch.float64).sin().view(examples, 4))


@pytest.fixture
def model() -> nn.Module:
    return network("mlp")


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", NETWORKS)
def test_jac_is_the_gradient_of_every_element(name, chunk):
    model = network(name)
    out, parameters = outputs_of(model), trainable(model)
    expected = rows([out], parameters)
    assert_close(autojac.jac(out, parameters, parallel_chunk_size=chunk), tuple(expected))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_rows_follow_the_tensors_and_then_their_elements(model, chunk):
    out = outputs_of(model)
    tensors = [out[:, 0].sum(), out.view(3, 1, 2), out.prod(1)[:0], (out**2).T]
    expected = rows(tensors, list(model.parameters()))
    assert_close(autojac.jac(tensors, model.parameters(), parallel_chunk_size=chunk), tuple(expected))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_network_is_differentiated_as_by_a_plain_loop(case: Case):
    model = case.make()
    part = outputs(model, case.batch(), case.function(model)).flatten()[:5]
    expected = rows([part], trainable(model))
    assert_close(autojac.jac(part, trainable(model)), tuple(expected), rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*performance drop")
@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_backward_fills_jac_as_torchjd_does(name, chunk):
    reference = pytest.importorskip("torchjd.autojac", reason="torchjd is in the extra 'test' only")
    chunk_of_reference = 1 if name in ("custom", "sparse") else chunk  # torchjd raises there with others
    model, other = network(name), network(name)
    autojac.backward([outputs_of(model)], parallel_chunk_size=chunk)
    reference.backward([outputs_of(other)], parallel_chunk_size=chunk_of_reference)
    found, expected = ([getattr(p, "jac", None) for p in net.parameters()] for net in (model, other))
    assert_close(found, [None if x is None else x.to_dense() for x in expected])


@pytest.mark.parametrize("chunk", CHUNKS)
def test_given_cotangents_are_the_chain_rule(model, chunk):
    out = outputs_of(model)
    tensors = [out, out.prod(1)]
    given = [torch.randn(5, 3, 2, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)]
    whole = rows(tensors, list(model.parameters()))
    expected = [torch.tensordot(joined(given), x, dims=1) for x in whole]
    found = autojac.jac(tensors, model.parameters(), jac_outputs=given, retain_graph=True, parallel_chunk_size=chunk)
    assert_close(list(found), expected)
    autojac.backward(tensors, jac_tensors=given, parallel_chunk_size=chunk)
    assert_close([p.jac for p in model.parameters()], expected)


def test_two_halves_of_a_network_make_the_whole():
    model = network("mlp")
    features = model[0](torch.ones(3, 4, dtype=torch.float64))
    out = model[1:](features)
    (expected,) = autojac.jac(out, model[0].weight, retain_graph=True)
    upper = autojac.jac(out, features, retain_graph=True)
    assert_close(autojac.jac(features, model[0].weight, jac_outputs=upper)[0], expected)


def test_repeated_inputs_are_repeated_and_share_no_memory(model):
    w = model[0].weight
    first, bias, again = autojac.jac(outputs_of(model), [w, model[0].bias, w])
    assert_close(first, again)
    first.zero_()
    assert again.abs().max() > 0


def test_jacobians_share_no_memory_with_each_other_or_with_what_was_given():
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    given = torch.eye(3)
    found = autojac.jac(a + b, [a, b], jac_outputs=given)
    found[0].add_(1)
    assert_close(found[1], torch.eye(3))
    assert_close(given, torch.eye(3))


def test_an_expanded_jacobian_can_be_written_to():
    w = torch.ones(4, requires_grad=True)
    (found,) = autojac.jac([w.sum(), 2 * w.sum()], w)
    assert_close(found.add_(1), torch.tensor([[2.0] * 4, [3.0] * 4]))


def test_jac_writes_to_no_field(model):
    h = model[0](torch.ones(3, 4, dtype=torch.float64))
    h.retain_grad()
    autojac.jac(model[1:](h), [h, *model.parameters()])
    assert h.grad is None
    assert not any(hasattr(t, "jac") or t.grad is not None for t in [h, *model.parameters()])


@pytest.mark.parametrize("name", ["mlp", "norms", "tied", "conv"])
def test_create_graph_makes_second_derivatives_right(name):
    model = network(name)
    parameters = trainable(model)
    options = {"allow_unused": True, "materialize_grads": True}
    norm = joined(autojac.jac(outputs_of(model), parameters, create_graph=True)).square().sum()
    found = torch.autograd.grad(norm, parameters, **options)
    out = outputs_of(model).flatten()
    plain = [torch.autograd.grad(o, parameters, create_graph=True, **options) for o in out]
    norm = sum(g.square().sum() for row in plain for g in row)
    assert_close(found, torch.autograd.grad(norm, parameters, **options))


def test_real_losses_of_complex_parameters_have_a_jacobian():
    w = torch.tensor([1 + 2j, 3 - 1j], requires_grad=True)
    losses = (w * torch.tensor([1j, 2.0])).abs()
    (expected,) = rows([losses], [w])
    assert_close(autojac.jac(losses, w)[0], expected)


# Fields


def test_backward_adds_to_jac():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    autojac.backward(w * w)
    first = w.jac
    autojac.backward(3 * w)
    assert_close(w.jac, torch.tensor([[5.0, 0.0], [0.0, 7.0]]))
    assert_close(first, torch.tensor([[2.0, 0.0], [0.0, 4.0]]))


def test_inputs_that_share_a_gradient_accumulate_apart():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    for _ in range(3):
        autojac.backward(a + b)
    assert_close(a.jac, 3 * torch.eye(2))
    assert_close(b.jac, 3 * torch.eye(2))


def test_backward_finds_the_leaves_that_have_influence():
    model = network("tied")
    autojac.backward(outputs_of(model))
    with_jac = {name for name, p in model.named_parameters() if hasattr(p, "jac")}
    assert with_jac == {"first.weight", "first.bias", "second.bias"}


def test_unused_inputs_get_zeros():
    model = network("tied")
    autojac.backward(outputs_of(model), inputs=trainable(model))
    assert_close(model.unused.weight.jac, torch.zeros(6, 3, 2, dtype=torch.float64))


def test_a_leaf_is_its_own_jacobian():
    w = torch.ones(2, requires_grad=True)
    autojac.backward(w)
    assert_close(w.jac, torch.eye(2))


@pytest.mark.parametrize("chunk", [None, 1])
def test_intermediate_tensors_that_retain_their_gradient_get_jac_and_keep_grad(model, chunk):
    h = model[0](torch.ones(3, 4, dtype=torch.float64))
    h.retain_grad()
    out = model[1:](h)
    (expected,) = rows([out], [h])
    h.grad = None
    autojac.backward(out, inputs=[h, *model.parameters()], parallel_chunk_size=chunk)
    assert_close(h.jac, expected)
    assert h.grad is None
    assert model[0].weight.jac.shape == (6, 5, 4)


def test_other_tensors_that_retain_their_gradient_need_a_plain_loop():
    model = nn.Linear(4, 3)

    def losses() -> tuple[Tensor, Tensor]:
        h = model(torch.ones(5, 4))
        h.retain_grad()
        return h.sinh().sum(1), h

    out, h = losses()
    with pytest.raises(RuntimeError, match=r"(?s)parallel_chunk_size=1 .*retain_grad\(\)"):
        autojac.jac(out, model.weight, parallel_chunk_size=3)
    out, h = losses()
    (expected,) = rows([out], [model.weight])
    assert_close(autojac.jac(out, model.weight, parallel_chunk_size=1)[0], expected)
    assert h.grad.shape == h.shape


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_the_graph_is_freed_by_the_last_chunk_only(model, chunk):
    out = outputs_of(model)
    autojac.backward(out, retain_graph=True, parallel_chunk_size=chunk)
    autojac.backward(out, parallel_chunk_size=chunk)
    with pytest.raises(RuntimeError, match="second time"):
        autojac.backward(out, parallel_chunk_size=chunk)


def test_a_chunk_of_one_is_a_loop_without_vmap(model, monkeypatch):
    monkeypatch.delattr(torch.func, "vmap")
    autojac.backward(outputs_of(model), parallel_chunk_size=1)
    with pytest.raises(AttributeError, match="vmap"):
        autojac.backward(outputs_of(model))


@pytest.mark.parametrize("chunk, calls", [(None, [6]), (4, [4, 2]), (5, [5])])
def test_chunks_have_the_size_asked_for(model, chunk, calls, monkeypatch):
    autojac.backward(outputs_of(model))  # the first time also tries two rows
    vmap, seen = torch.func.vmap, []

    def counted(function):
        return lambda *args: seen.append(len(args[0])) or vmap(function)(*args)

    monkeypatch.setattr(torch.func, "vmap", counted)
    autojac.backward(outputs_of(model), parallel_chunk_size=chunk)
    assert seen == calls


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_backward_is_differentiated_row_by_row(model):
    out = torch.compile(model, backend="aot_eager")(torch.ones(3, 4, dtype=torch.float64))
    expected = rows([model(torch.ones(3, 4, dtype=torch.float64))], list(model.parameters()))
    assert_close(autojac.jac(out, model.parameters()), tuple(expected))


def test_a_wrong_vectorised_gradient_is_found_and_not_used():
    class Wrong(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (7 if torch._C._functorch.is_batchedtensor(gradient) else 1)

    w = torch.ones(3, requires_grad=True)
    assert_close(autojac.jac(Wrong.apply(w), w)[0], torch.eye(3))


# From .jac to .grad


@pytest.mark.parametrize("optimize", [False, True])
def test_jac_to_grad_adds_the_weighted_rows(model, optimize):
    out = outputs_of(model)
    matrix = joined(rows([out], list(model.parameters())))
    weights = Ranked()(matrix @ matrix.T)
    autojac.backward(out)
    found = autojac.jac_to_grad(
        model.parameters(), GramianWeightedAggregator(Ranked()), optimize_gramian_computation=optimize
    )
    assert_close(found, weights)
    assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), weights @ matrix)
    assert not any(hasattr(p, "jac") for p in model.parameters())


def test_jac_to_grad_adds_to_grad_in_place(model):
    before = [torch.ones_like(p) for p in model.parameters()]
    for p, grad in zip(model.parameters(), before, strict=True):
        p.grad = grad
    out = outputs_of(model)
    expected = [1 + x.mean(0) for x in rows([out], list(model.parameters()))]
    autojac.backward(out)
    autojac.jac_to_grad(model.parameters(), Mean())
    assert_close(before, expected)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), before, strict=True))


def test_retain_jac_keeps_it_for_another_aggregator(model):
    autojac.backward(outputs_of(model))
    autojac.jac_to_grad(model.parameters(), Mean(), retain_jac=True)
    autojac.jac_to_grad(model.parameters(), lambda matrix: -matrix.mean(0))
    assert all(p.grad.abs().max() < 1e-12 for p in model.parameters())


def test_a_plain_function_has_no_weights(model):
    autojac.backward(outputs_of(model))
    expected = [p.jac.amax(0) for p in model.parameters()]
    assert autojac.jac_to_grad(model.parameters(), lambda matrix: matrix.amax(0)) is None
    assert_close([p.grad for p in model.parameters()], expected)


def test_every_group_of_parameters_has_its_own_weights(model):
    autojac.backward(outputs_of(model))
    groups = [list(model[0].parameters()), list(model[2].parameters())]
    matrices = [joined([p.jac for p in group]) for group in groups]
    found = [autojac.jac_to_grad(group, GramianWeightedAggregator(Ranked())) for group in groups]
    assert_close(found, [Ranked()(matrix @ matrix.T) for matrix in matrices])


def test_hooks_see_the_matrix_and_change_the_weights(model):
    aggregator = GramianWeightedAggregator(Ranked())
    shapes: list[torch.Size] = []
    aggregator.register_forward_hook(lambda module, args, out: shapes.append(args[0].shape))
    aggregator.weighting.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    autojac.backward(outputs_of(model))
    assert_close(autojac.jac_to_grad(model.parameters(), aggregator), torch.zeros(6, dtype=torch.float64))
    assert shapes == [(6, sum(p.numel() for p in model.parameters()))]
    assert len(aggregator.weighting._forward_hooks) == 1


def test_half_precision_is_combined_in_single():
    w = torch.full((2,), 300.0, dtype=torch.float16, requires_grad=True)  # squares overflow in half precision
    autojac.backward([(w * w).sum(), w.sum()])
    matrix = w.jac.float()
    weights = autojac.jac_to_grad([w], GramianWeightedAggregator(Ranked()))
    assert weights.dtype == torch.float32
    assert_close(weights, Ranked()(matrix @ matrix.T))
    assert w.grad.dtype == torch.float16


@pytest.mark.parametrize("aggregator", [GramianWeightedAggregator(Ranked()), lambda matrix: matrix.sum(0)])
def test_complex_parameters_count_as_pairs_of_real_ones(aggregator):
    w = torch.tensor([1 + 2j, 3 - 1j], requires_grad=True)
    pairs = torch.view_as_real(w.detach()).clone().requires_grad_()

    def losses(v: Tensor) -> Tensor:
        return (v * torch.tensor([1j, 2.0])).abs()

    autojac.backward(losses(w))
    autojac.jac_to_grad([w], aggregator)
    autojac.backward(losses(torch.view_as_complex(pairs)))
    autojac.jac_to_grad([pairs], aggregator)
    assert_close(torch.view_as_real(w.grad), pairs.grad)


# Several tasks


class Trunk(nn.Module):
    """A trunk with two heads that have one layer in common."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
        self.common = nn.Linear(3, 3)
        self.heads = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])

    def losses(self) -> tuple[list[Tensor], Tensor]:
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
        features = self.trunk(x)
        return [head(torch.tanh(self.common(features))).square().mean() for head in self.heads], features


@pytest.fixture
def tasks() -> Trunk:
    torch.manual_seed(0)
    return Trunk().double()


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("explicit", [False, True])
def test_mtl_backward_gives_jacobians_to_the_trunk_and_gradients_to_the_heads(tasks, chunk, explicit):
    losses, features = tasks.losses()
    shared = list(tasks.trunk.parameters())
    own = [*tasks.common.parameters(), *tasks.heads.parameters()]
    expected = rows(losses, shared), [x.sum(0) for x in rows(losses, own)]
    given = {
        "tasks_params": [[*tasks.common.parameters(), *head.parameters()] for head in tasks.heads],
        "shared_params": tasks.trunk.parameters(),
    }
    autojac.mtl_backward(losses, features, parallel_chunk_size=chunk, **(given if explicit else {}))
    assert_close([p.jac for p in shared], expected[0])
    assert_close([p.grad for p in own], expected[1])
    assert not any(hasattr(p, "jac") for p in own)
    assert not any(p.grad is not None for p in shared)


def test_mtl_backward_is_that_of_torchjd(tasks):
    reference = pytest.importorskip("torchjd.autojac", reason="torchjd is in the extra 'test' only")
    losses, features = tasks.losses()
    autojac.mtl_backward(losses, features, retain_graph=True)
    found = [(getattr(p, "jac", None), p.grad) for p in tasks.parameters()]
    for p in tasks.parameters():
        vars(p).pop("jac", None)
        p.grad = None
    reference.mtl_backward(losses, [features], retain_graph=True)
    assert_close(found, [(getattr(p, "jac", None), p.grad) for p in tasks.parameters()])


def test_mtl_backward_takes_gradients_of_tensors_that_are_no_scalars(tasks):
    losses, features = tasks.losses()
    pairs = [torch.stack([loss, loss**2]) for loss in losses]
    given = [torch.tensor([1.0, 2.0]).double(), torch.tensor([-1.0, 0.5]).double()]
    expected = rows([p @ g for p, g in zip(pairs, given, strict=True)], list(tasks.trunk.parameters()))
    autojac.mtl_backward(pairs, features, grad_tensors=given)
    assert_close([p.jac for p in tasks.trunk.parameters()], expected)


def test_a_task_may_use_some_features_only(tasks):
    losses, features = tasks.losses()
    left, right = features[:, :2], features[:, 2:]
    tensors = [left.square().sum(), (left.sum(1) * right.sum(1)).sum()]
    expected = rows(tensors, list(tasks.trunk.parameters()))
    autojac.mtl_backward(tensors, [left, right])
    assert_close([p.jac for p in tasks.trunk.parameters()], expected)


def test_outputs_of_one_operation_are_different_features(tasks):
    x = tasks.losses()[1]
    left, right = x.split([1, 2], dim=1)
    tensors = [left.sum() ** 2, (left * right).sum()]
    expected = rows(tensors, list(tasks.trunk.parameters()))
    autojac.mtl_backward(tensors, [left, right])
    assert_close([p.jac for p in tasks.trunk.parameters()], expected)


def test_mtl_backward_frees_the_graph_unless_it_is_retained(tasks):
    losses, features = tasks.losses()
    autojac.mtl_backward(losses, features, retain_graph=True)
    autojac.mtl_backward(losses, features)
    with pytest.raises(RuntimeError, match="second time"):
        autojac.mtl_backward(losses, features)


def test_heads_that_share_nodes_need_no_retained_graph(tasks):
    _, features = tasks.losses()
    common = tasks.common(features).tanh()
    losses = [head(common).square().mean() for head in tasks.heads]
    expected = rows(losses, list(tasks.trunk.parameters()))
    autojac.mtl_backward(losses, features)
    assert_close([p.jac for p in tasks.trunk.parameters()], expected)


# Errors


def detached(model: nn.Module) -> Tensor:
    return outputs_of(model).detach()


W = torch.ones(2, requires_grad=True)
ERRORS: dict[str, tuple[Callable[[nn.Module], object], type[Exception], str]] = {
    "no tensors": (lambda m: autojac.backward([]), ValueError, "tensors is empty"),
    "no outputs": (lambda m: autojac.jac([], W), ValueError, "outputs is empty"),
    "repeated": (lambda m: autojac.backward([W.sum()] * 2), ValueError, "tensors has a tensor more than once"),
    "detached": (lambda m: autojac.backward([W.sum(), detached(m)]), ValueError, r"tensors\[1\] does not require grad"),
    "no rows": (lambda m: autojac.backward(outputs_of(m)[:0]), ValueError, "was the batch empty"),
    "a number": (lambda m: autojac.backward(3.0), TypeError, "tensors should be a tensor or several, found float"),
    "numbers": (lambda m: autojac.backward([3.0]), TypeError, r"tensors\[0\] should be a tensor, found float"),
    "chunk of 0": (
        lambda m: autojac.backward(W.sum(), parallel_chunk_size=0),
        ValueError,
        "parallel_chunk_size` should",
    ),
    "jac chunk": (lambda m: autojac.jac(W.sum(), W, parallel_chunk_size=-1), ValueError, "parallel_chunk_size` should"),
    "model": (lambda m: autojac.jac(outputs_of(m), m), TypeError, r"inputs should be tensors.*model.parameters\(\)"),
    "used up": (lambda m: autojac.jac(outputs_of(m), iter(())), ValueError, "inputs is empty.*used up"),
    "frozen": (lambda m: autojac.backward(W.sum(), inputs=[W, torch.ones(3)]), ValueError, r"inputs\[1\].*frozen"),
    "no leaf": (lambda m: autojac.backward(W.sum(), inputs=[W * 2]), ValueError, r"inputs\[0\].*retain_grad\(\)"),
    "complex": (lambda m: autojac.jac(W * 1j, W), ValueError, r"outputs\[0\] is complex.*view_as_real"),
    "number of cotangents": (
        lambda m: autojac.jac(W * 1, W, jac_outputs=[]),
        ValueError,
        "jac_outputs should have one",
    ),
    "shape of cotangents": (
        lambda m: autojac.backward(W * 1, jac_tensors=[torch.eye(3)]),
        ValueError,
        r"jac_tensors\[0\] has shape \(3, 3\)",
    ),
    "rows of cotangents": (
        lambda m: autojac.backward([W * 1, W * 2], jac_tensors=[torch.eye(2), torch.ones(3, 2)]),
        ValueError,
        r"jac_tensors\[1\] has 3 rows and jac_tensors\[0\] has 2",
    ),
    "chunk of a fraction": (
        lambda m: autojac.backward(W.sum(), parallel_chunk_size=1.5),
        TypeError,
        "parallel_chunk_size` should be a whole number; got 1.5",
    ),
    "chunk of a word": (lambda m: autojac.backward(W.sum(), parallel_chunk_size="2"), TypeError, "got '2'"),
    "a class": (lambda m: autojac.jac_to_grad(W, Mean), TypeError, r"aggregator is the class Mean; .*: Mean\(\)"),
    "a weighting": (
        lambda m: autojac.jac_to_grad(W, MeanWeighting()),
        TypeError,
        r"weighting MeanWeighting; .* Mean\(\)",
    ),
    "no aggregator": (lambda m: autojac.jac_to_grad(W, None), TypeError, "aggregator should be an aggregator"),
    "parameters of one task": (
        lambda m: autojac.mtl_backward([W.sum()], [W * 1], tasks_params=m),
        TypeError,
        "tasks_params should be a list with the parameters of every task, found Sequential",
    ),
    "nothing to combine": (lambda m: autojac.jac_to_grad([], Mean()), ValueError, "tensors is empty"),
    "no jac": (lambda m: autojac.jac_to_grad(m.parameters(), Mean()), ValueError, r"tensors\[0\].*has no .jac"),
    "features are leaves": (lambda m: autojac.mtl_backward([W.sum()], [W]), ValueError, r"features\[0\] is a leaf"),
}


def test_no_inputs_have_no_jacobians():
    assert autojac.jac(W.sum(), []) == ()
    autojac.backward(W.sum(), inputs=[])
    assert not hasattr(W, "jac")


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_names_the_argument(model, name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call(model)


def test_jacobians_of_different_losses_are_not_added():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    autojac.backward(b * 1)
    with pytest.raises(ValueError, match=r"inputs\[1\].jac has shape \(2, 2\).*jac_to_grad"):
        autojac.backward((a * b).sum(), inputs=[a, b])
    assert not hasattr(a, "jac")
    assert_close(b.jac, torch.eye(2))


def test_jacobians_with_different_rows_are_not_combined():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    autojac.backward(a * 1)
    autojac.backward(b.sum())
    with pytest.raises(ValueError, match=r"tensors\[1\].jac has 1 rows and tensors\[0\].jac has 2"):
        autojac.jac_to_grad([a, b], Mean())
    assert a.grad is None and b.grad is None


@pytest.mark.parametrize("returned", [torch.zeros(3), torch.zeros(1, 2)], ids=str)
def test_an_aggregator_that_returns_another_shape_is_found_out(returned):
    w = torch.ones(2, requires_grad=True)
    autojac.backward(w * 1)
    with pytest.raises(ValueError, match=r"aggregator returned the shape.*should return \(2,\)"):
        autojac.jac_to_grad([w], lambda matrix: returned)
    assert w.grad is None
    assert_close(w.jac, torch.eye(2))


def test_an_aggregator_that_raises_leaves_jac_and_grad(model):
    def fails(matrix: Tensor) -> Tensor:
        raise ZeroDivisionError

    autojac.backward(outputs_of(model))
    with pytest.raises(ZeroDivisionError):
        autojac.jac_to_grad(model.parameters(), fails)
    assert all(p.jac is not None and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("aggregator", [Mean(), lambda matrix: matrix.mean(0)])
def test_optimize_gramian_computation_insists(aggregator):
    w = torch.ones(2, requires_grad=True)
    autojac.backward(w * 1)
    if isinstance(aggregator, Mean):  # knows its weights without any matrix
        autojac.jac_to_grad([w], aggregator, optimize_gramian_computation=True)
        return
    with pytest.raises(ValueError, match="optimize_gramian_computation=True needs"):
        autojac.jac_to_grad([w], aggregator, optimize_gramian_computation=True)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {"tasks_params": [t.heads[0].parameters()]}, "found 1 for 2"),
        (lambda t: {"shared_params": t.parameters()}, r"shared_params and tasks_params\[0\] have tensors in common"),
        (
            lambda t: {"tasks_params": [t.parameters(), []]},
            r"shared_params and tasks_params\[0\] have tensors in common",
        ),
        (lambda t: {"grad_tensors": [torch.ones(2)] * 2}, r"grad_tensors\[0\] has shape \(2,\)"),
        (lambda t: {"grad_tensors": [torch.ones(())]}, "grad_tensors should have one"),
    ],
)
def test_mtl_backward_checks_who_owns_what(tasks, change, message):
    losses, features = tasks.losses()
    with pytest.raises(ValueError, match=message):
        autojac.mtl_backward(losses, features, **change(tasks))
    assert not any(hasattr(p, "jac") or p.grad is not None for p in tasks.parameters())


def test_mtl_backward_raises_for_tensors_that_are_no_scalars(tasks):
    losses, features = tasks.losses()
    with pytest.raises(ValueError, match=r"tensors\[1\] has shape \(1,\).*grad_tensors"):
        autojac.mtl_backward([losses[0], losses[1].view(1)], features)


def test_features_of_features_are_not_counted_twice(tasks):
    losses, features = tasks.losses()
    upper = features * 2
    with pytest.raises(ValueError, match=r"features\[1\] is computed from features\[0\]"):
        autojac.mtl_backward([features.sum(), upper.sum()], [features, upper])


def test_a_trunk_used_beside_the_features_is_found():
    trunk = nn.Linear(2, 2)
    features = trunk(torch.ones(1, 2))
    with pytest.raises(ValueError, match="shared_params and tasks_params.*beside the features"):
        autojac.mtl_backward([features.sum() + trunk.weight.sum(), features.prod()], features)


def test_a_backward_that_raises_leaves_every_field(model):
    def fails(gradient: Tensor) -> None:
        raise ZeroDivisionError

    out = outputs_of(model)
    out.register_hook(fails)
    with pytest.raises(ZeroDivisionError):
        autojac.backward([out.sum(), out.prod()])
    assert not any(hasattr(p, "jac") or p.grad is not None for p in model.parameters())
