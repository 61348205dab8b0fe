"""Large mini-batches are swept in parts of their examples: nothing that comes back depends on where they are cut."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo
from nngeo import FIM, GGN, NTK, FIM_MonteCarlo, Jacobian, PMatDense, PMatDiag, PMatImplicit
from nngeo.generators import plans, sizing
from nngeo.generators.recording import Recording
from nngeo.generators.remembered import Remembered
from nngeo.layers.conv import ConvolutionRule
from nngeo.layers.rule import LinearMapRule, rule_for
from nngeo.linalg import outer
from tests import networks, reference
from tests.cases import CASES, lengths_mask
from tests.contracts import (
    PMATS,
    Setting,
    cases_of,
    each_case,
    each_of,
    each_pair,
    loader,
    setting,
    unused_is_known,
)
from tests.test_untouched import Everything, build, unchanged

pytestmark = unused_is_known
EXACT = {"rtol": 1e-8, "atol": 1e-10}
PMATS_BY_KIND = {pmat.kind: pmat for pmat in reversed(PMATS)}
STORED = [pmat for pmat in PMATS if pmat.kind is not PMatImplicit]

# Elements that one backward pass may hold: for one cotangent of two examples, for a few, and for all.
ONE, SOME, ALL = 1, 60, 2**25


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[Callable[[int], None]]:
    """Sets what a backward pass may hold, at first `ONE`, where two examples at least stay together.

    Plans remember how many examples fit; so there are others for the time being.
    """
    with pytest.MonkeyPatch.context() as patch:

        def set_to(budget: int) -> None:
            patch.setattr(plans, "_PLANS", Remembered())
            patch.setattr(sizing, "BUDGET", budget)
            patch.setattr(sizing, "LARGEST", budget)

        patch.setattr(sizing, "TOGETHER", 2)
        set_to(ONE)
        yield set_to


@pytest.fixture
def budget(tiny):
    """The same, for one test."""
    yield tiny
    tiny(ONE)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Noted:
    """The function of a case, which notes how many examples it is called with.

    In slots: with other values in its `__dict__`, it would be another function, about which nothing is known.
    """

    __slots__ = ("at", "sizes", "__weakref__")

    def __init__(self, at: Setting):
        self.at, self.sizes = at, list[int]()

    def __call__(self, *content: Any) -> Tensor:
        batch = content[0] if isinstance(content[0], dict) else content
        self.sizes.append(len(reference.target(batch)))
        return reference.outputs(self.at.model, batch, self.at.function)

    def of(self, call: Callable[[], Any]) -> list[int]:
        """The numbers of examples, in a call after the first one."""
        call()
        self.sizes.clear()
        call()
        return list(self.sizes)


# ------------------------------------------------------------------------------------------ the same matrices


@each_pair(CASES, [pmat for pmat in PMATS if pmat.id in ("diag", "kfac", "ekfac")])
def test_matrices_from_parts_are_their_definitions(pmat, case):
    at = setting(case)
    found = pmat.build(at, at.batch)
    assert found.n_examples == case.n
    assert_close(found.to_torch(), pmat.expected(at), **EXACT)


OTHERS = [pmat for pmat in STORED if pmat.id not in ("diag", "kfac", "ekfac")]
KINDS = cases_of(
    *("scalar", "counts", "segmentation_ignore", "tokens_ignore", "tokens_regression", "conv2d_groups"),
    *("conv_transpose1d", "embedding_padding", "position_embedding", "folded_first", "layer_norm", "attention_first"),
    *("gpt2", "lstm", "weight_norm", "called_twice", "tied_linears", "hidden_use", "unused_layer", "dict_batch"),
)


@each_pair(KINDS, OTHERS)
def test_the_other_matrices_from_parts_of_uneven_batches_are_their_definitions(pmat, case):
    at = setting(case)
    found = pmat.build(at)
    assert found.n_examples == case.n
    assert_close(found.to_torch(), pmat.expected(at), **EXACT)


SHARING = cases_of("linear", "segmentation_ignore", "tokens", "conv2d_groups", "conv_transpose2d", "embedding_padding")


@each_pair(SHARING, STORED)
def test_matrices_from_parts_and_some_cotangents_at_a_time_are_their_definitions(pmat, case, budget):
    budget(SOME)
    at = setting(case)
    assert_close(pmat.build(at, at.batch).to_torch(), pmat.expected(at), **EXACT)


@each_case
def test_rows_of_the_jacobian_keep_the_order_of_examples(case):
    at = setting(case)
    found = Jacobian(at.model, at.batch, function=at.function)
    assert found.n_examples == case.n
    assert_close(found.to_torch(), at.jacobian, **EXACT)


@each_of([case for case in KINDS if not isinstance(case.data, dict)])
@pytest.mark.parametrize("size", [3, 5])
def test_rows_of_the_jacobian_keep_the_order_of_a_loader_that_does_not_divide(case, size):
    at = setting(case)
    found = Jacobian(at.model, loader(case, batch_size=size), function=at.function)
    assert_close(found.to_torch(), at.jacobian, **EXACT)


@each_of(KINDS)
def test_kernels_from_parts_are_products_of_gradients(case):
    at = setting(case)
    kernel = torch.einsum("kbp,lcp->kblc", at.jacobian, at.jacobian)
    assert_close(NTK(at.model, at.batch, function=at.function).to_torch(), kernel, **EXACT)
    between = NTK(at.model, at.batch, at.batches[2], function=at.function).to_torch()
    assert_close(between, kernel[..., case.n - 2 :], **EXACT)


@pytest.mark.parametrize("elements", [ONE, SOME], ids=["one cotangent", "some cotangents"])
@each_pair(cases_of("linear", "conv2d_groups", "tokens_ignore", "called_twice"), [p for p in PMATS if p.id == "ekfac"])
def test_scalings_updated_from_parts_are_squares_in_the_eigenbasis(pmat, case, elements, budget):
    at = setting(case)
    budget(ALL)
    whole = pmat.build(at, at.batch)
    budget(elements)
    found = pmat.build(at, at.batch)
    for matrix in (whole, found):
        matrix.update_diag(at.batches)
    assert_close(found.trace(), at.fisher.trace(), **EXACT)
    assert_close(found.to_torch(), whole.to_torch(), **EXACT)


@each_of(KINDS)
def test_the_empirical_matrix_from_parts_is_that_of_gradients_at_targets(case):
    at = setting(case)
    found = at.fim(PMatDense, at.batch, empirical=True).to_torch()
    assert_close(found, reference.empirical_fisher(at.model, at.batch, case.variant, at.function), **EXACT)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_gauss_newton_matrix_from_parts_takes_the_loss_of_single_examples(reduction):
    at = setting(*cases_of("tokens_regression"))
    loss = nn.MSELoss(reduction=reduction)
    found = GGN(at.model, at.batch, PMatDense, loss).to_torch()
    assert_close(found, reference.ggn(at.model, at.batch, loss), **EXACT)


@each_of(cases_of("linear", "conv2d_groups", "tokens_ignore", "counts"))
def test_the_diagonal_of_a_matrix_free_fisher_is_that_of_its_products(case):
    at = setting(case)
    found = at.fim(PMatImplicit)
    assert_close(found.get_diag(), at.fisher.diagonal(), **EXACT)
    assert_close(found.mv(at.vector()), at.fisher @ at.vector(), **EXACT)


# ------------------------------------------------------------------------------------------ what is run


WAYS: dict[str, Callable[[Setting, Any, Noted], Any]] = {
    "dense": lambda at, examples, noted: FIM(at.model, examples, PMatDense, at.case.variant, function=noted),
    "diagonal": lambda at, examples, noted: FIM(at.model, examples, PMatDiag, at.case.variant, function=noted),
    "jacobian": lambda at, examples, noted: Jacobian(at.model, examples, function=noted),
    "kernel": lambda at, examples, noted: NTK(at.model, examples, function=noted),
    "empirical": lambda at, examples, noted: FIM(
        at.model, examples, PMatDiag, at.case.variant, function=noted, empirical=True
    ),
}


@pytest.mark.parametrize("way", WAYS)
@each_of(cases_of("linear", "counts", "conv2d_groups", "tokens_regression", "dict_batch"))
def test_every_example_is_run_once_in_parts_that_are_as_equal_as_can_be(case, way):
    at = setting(case)
    noted, run = Noted(at), WAYS[way]
    whole = {4: [2, 2], 6: [2, 2, 2], 7: [1, 2, 2, 2]}[case.n]
    assert noted.of(lambda: run(at, at.batch, noted)) == whole
    uneven = {4: [1, 1, 2], 6: [1, 2, 1, 2], 7: [2, 2, 1, 2]}[case.n]
    assert noted.of(lambda: run(at, at.batches, noted)) == uneven


@pytest.mark.parametrize(
    ("room", "expected"), [(1, [2, 2, 2]), (2.9, [2, 2, 2]), (3, [3, 3]), (5.9, [3, 3]), (6, [6])], ids=str
)
def test_parts_hold_as_many_examples_as_fit(room, expected, budget):
    at = setting(*cases_of("linear"))
    units = sum(module.out_features for module in at.model.modules() if isinstance(module, nn.Linear))
    budget(int(room * 2 * units))  # two cotangents
    noted = Noted(at)
    assert noted.of(lambda: WAYS["dense"](at, at.batch, noted)) == expected


def test_what_fits_is_found_out_once_for_a_kind_of_batches():
    at = setting(*cases_of("linear"))
    noted = Noted(at)
    WAYS["diagonal"](at, at.batches, noted)
    looked_at = len(noted.sizes)
    noted.sizes.clear()
    WAYS["diagonal"](at, [at.batch, *at.batches, at.batch], noted)
    assert looked_at > 4 and noted.sizes == [2, 2, 2, 1, 2, 1, 2, 2, 2, 2]


def test_what_fits_is_known_apart_for_each_number_of_cotangents(budget):
    at = setting(*cases_of("linear"))
    budget(6 * sum(module.out_features for module in at.model.modules() if isinstance(module, nn.Linear)))
    noted, ways = Noted(at), [WAYS[name] for name in ("empirical", "dense", "jacobian")]
    found = [noted.of(lambda way=way: way(at, at.batch, noted)) for way in [*ways, *reversed(ways)]]
    of_one, of_two, of_three = [6], [3, 3], [2, 2, 2]
    assert found == [of_one, of_two, of_three, of_three, of_two, of_one]


@pytest.mark.parametrize("size", [1, 2])
def test_batches_that_are_small_are_not_split(size):
    at = setting(*cases_of("linear"))
    noted = Noted(at)
    examples = list(zip(*(x.split(size) for x in at.batch), strict=True))
    assert noted.of(lambda: WAYS["dense"](at, examples, noted)) == [size] * (6 // size)


def test_cotangents_are_pulled_back_once_for_each_part(monkeypatch):
    at, pulled = setting(*cases_of("linear")), []
    records = Recording.records

    def note(self, c, **options):
        pulled.append(tuple(c.shape[:2]))
        return records(self, c, **options)

    monkeypatch.setattr(Recording, "records", note)
    at.fim(PMatDense, at.batch)
    assert pulled == [(1, 2)] * 6  # two cotangents of three parts


@pytest.mark.parametrize("representation", [PMatDense, PMatDiag, Jacobian], ids=["dense", "diagonal", "jacobian"])
def test_a_graph_is_gone_before_the_next_one_is_recorded(representation, monkeypatch, budget):
    budget(ONE)  # with plans that are to be made
    at, graphs, alive = setting(*cases_of("conv2d_zeros")), list[weakref.ref](), list[int]()
    start = Recording.__init__

    def note(self, *args):
        alive.append(sum(graph() is not None for graph in graphs))
        graphs.append(weakref.ref(self))
        start(self, *args)

    make = representation if representation is Jacobian else partial(FIM, representation=representation)
    monkeypatch.setattr(Recording, "__init__", note)
    make(at.model, at.batch)
    assert len(alive) >= 4 and not any(alive)  # at least of the whole, and of three parts


# ------------------------------------------------------------------------------------------ what is not split


def columns(outputs: Tensor, *targets: Tensor) -> Tensor:
    """Cotangents that depend on the whole batch, which a function may."""
    return torch.eye(outputs.shape[1]).to(outputs)[:, None] * outputs.std(0).expand(1, *outputs.shape)


UNSPLIT: dict[str, Callable[[Setting, Any], Any]] = {
    "Monte-Carlo": lambda at, noted: FIM_MonteCarlo(
        at.model, at.batch, PMatDense, at.case.variant, trials=2, function=noted, generator=seeded()
    ),
    "a function as variant": lambda at, noted: FIM(at.model, at.batch, PMatDense, columns, function=noted),
    "a function as mask": lambda at, noted: FIM(
        at.model, at.batch, PMatDense, at.case.variant, function=noted, mask=lambda b: b[0][:, 0] > b[0][:, 0].mean()
    ),
}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("way", UNSPLIT)
def test_what_a_whole_batch_decides_is_taken_from_whole_batches(way, budget):
    at = setting(*cases_of("linear"))
    noted, found = Noted(at), []
    for elements in (ALL, ONE):
        budget(elements)
        found.append(UNSPLIT[way](at, noted).to_torch())
        assert noted.of(lambda: UNSPLIT[way](at, noted)) == [6]
    assert_close(found[0], found[1], **EXACT)


@pytest.mark.parametrize("representation", [PMatDense, PMatDiag, nngeo.PMatBlockDiag])
@each_of(cases_of("linear", "tokens_ignore", "conv2d_groups"))
def test_draws_are_the_same_in_products_and_diagonals(case, representation):
    at = setting(case)
    examples = [at.batch, at.batches[0]]
    options: dict[str, Any] = {"variant": case.variant, "trials": 2}
    free = FIM_MonteCarlo(at.model, examples, PMatImplicit, generator=seeded(), **options)
    stored = FIM_MonteCarlo(at.model, examples, representation, generator=seeded(), **options)
    dense = free.mv(torch.eye(at.size, dtype=torch.float64))
    assert_close(free.get_diag(), dense.diagonal(), **EXACT)
    found = stored.to_torch()
    assert_close(found, dense * (found != 0), **EXACT)
    assert_close(found.diagonal(), dense.diagonal(), **EXACT)


# ------------------------------------------------------------------------------------------ what batches hold


class Scaled(nn.Module):
    """Logits times whatever else the batch holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, table: Tensor, factor: Any = 1.0, more: Any = (1.0,), sign: str = "+") -> Tensor:
        return self.linear(x * more[0]) * table.square().mean() * factor * (1 if sign == "+" else -2)


def scaled_fisher(model: Scaled, batches: list[dict[str, Any]]) -> Tensor:
    """(P, P)."""
    parts, n = [], 0
    for batch in batches:
        x, y = batch["x"], batch["labels"]
        rest = {name: value for name, value in batch.items() if name not in ("x", "labels")}
        parts.append(len(x) * reference.fisher(model, (x, y), "classif_logits", lambda x, y, r=rest: model(x, **r)))
        n += len(x)
    return sum(parts) / n


HELD: dict[str, dict[str, Any]] = {
    "scalar": {"factor": torch.tensor(2.0, dtype=torch.float64)},
    "number": {"factor": 0.5},
    "text": {"sign": "-"},
    "nested": {"more": [drawn(3), None]},
    "one row": {"factor": drawn(1, 3, seed=3)},
}


@pytest.mark.parametrize("held", HELD.values(), ids=HELD)
@pytest.mark.parametrize("sizes", [(6,), (7, 5), (6, 5, 1, 5)], ids=str)
def test_what_is_the_same_for_all_examples_is_not_split(held, sizes):
    # The table is as long as a batch, which is not the first one.
    model, shared = Scaled().double(), {"table": drawn(5, seed=1), **held}
    batches = [{"x": drawn(n, 3, seed=n), "labels": torch.arange(n) % 3, **shared} for n in sizes]
    expected = scaled_fisher(model, batches)
    assert_close(FIM(model, batches, PMatDense).to_torch(), expected, **EXACT)
    assert_close(FIM(model, batches, PMatDiag).get_diag(), expected.diagonal(), **EXACT)


def test_masks_in_batches_are_split_with_them():
    at = setting(*cases_of("tokens"))
    batch = {"input": at.batch[0], "padded": lengths_mask(4)(6, None), "labels": at.batch[1]}  # type: ignore[arg-type]
    function = lambda b: at.model(b["input"])  # noqa: E731
    found = FIM(at.model, batch, PMatDense, "token_logits", function=function, mask="padded")
    ignored = at.batch[0], at.batch[1].masked_fill(batch["padded"] == 0, -100)
    assert_close(found.to_torch(), reference.fisher(at.model, ignored, "token_logits"), **EXACT)


def test_data_and_layouts_of_any_stride_survive():
    at = setting(*cases_of("conv2d_zeros"))
    x = at.batch[0].permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    assert_close(Jacobian(at.model, (x, at.batch[1])).to_torch(), at.jacobian, **EXACT)


def test_tensors_of_inference_mode_survive():
    at = setting(*cases_of("linear"))
    with torch.inference_mode():
        batch = tuple(x.clone() for x in at.batch)
        found = at.fim(PMatDense, batch).to_torch()
    assert_close(found.clone(), at.fisher, **EXACT)


X = drawn(6, 3)


def test_a_loader_may_fill_the_same_tensor_again():
    def batches() -> Iterator[tuple[Tensor]]:
        buffer = torch.empty(3, 3, dtype=torch.float64)
        for part in X.split(3):
            yield (buffer.copy_(part),)

    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    assert_close(NTK(model, batches()).to_torch(), NTK(model, (X,)).to_torch())


@pytest.mark.parametrize("representation", [PMatDense, PMatDiag, nngeo.PMatKFAC])
def test_a_loader_may_fill_the_same_tensor_where_batches_are_used_up(representation):
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        buffer = torch.empty(3, 3, dtype=torch.float64)
        for part in X.split(3):
            yield buffer.copy_(part), torch.zeros(3, dtype=torch.long)

    model = networks.mlp().double().eval()
    expected = FIM(model, (X, torch.zeros(6, dtype=torch.long)), representation)
    assert_close(FIM(model, batches(), representation).to_torch(), expected.to_torch(), **EXACT)


# ------------------------------------------------------------------------------------------ patches of slices

CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(2, 4, 3, stride=2, padding=1), (2, 7)),
    "1d same": (nn.Conv1d(2, 4, 2, padding="same", groups=2), (2, 5)),
    "2d": (nn.Conv2d(3, 4, (3, 2), dilation=(1, 2)), (3, 5, 5)),
    "2d circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", groups=2), (4, 4, 3)),
    "3d": (nn.Conv3d(2, 2, 2, padding=1), (2, 2, 3, 2)),
    "2d transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (4, 3, 2)),
    "linear": (nn.Linear(3, 4), (5, 3)),
}


@pytest.mark.parametrize("by_example", [False, True], ids=["by feature", "by example"])
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "bias"])
@pytest.mark.parametrize(("module", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_inputs_of_slices_are_slices_of_the_inputs_in_both_layouts(module, shape, bias, by_example):
    rule, x = rule_for(module), drawn(5, 2, *shape)  # two positions of an example in the batch
    assert isinstance(rule, LinearMapRule)
    whole = rule.with_room(module, x, bias)[..., : -1 if bias else None]
    found = rule.with_room(module, x[1:4], bias, by_example)[..., : -1 if bias else None]
    assert_close(found, whole[:, 1:4], rtol=0, atol=0)


@pytest.mark.parametrize(("module", "shape"), [CONVOLUTIONS["1d"], CONVOLUTIONS["2d circular"]], ids=["1d", "grouped"])
def test_layouts_are_those_that_were_asked_for(module, shape):
    rule, x = rule_for(module), drawn(5, 2, *shape)
    assert isinstance(rule, LinearMapRule)
    together, apart = (rule.with_room(module, x, True, by_example) for by_example in (False, True))
    assert together.permute(0, 3, 1, 2).is_contiguous() and apart.mT.is_contiguous()


@pytest.mark.parametrize("representation", [PMatDiag, nngeo.PMatKFAC])
def test_patches_are_made_for_a_few_examples_at_a_time(representation, monkeypatch, budget):
    budget(ALL)
    monkeypatch.setattr(outer, "PART", 1)
    monkeypatch.setattr(outer, "CACHED", 1)
    at, made, with_room = setting(*cases_of("conv2d_zeros")), [], ConvolutionRule.with_room

    def note(self, module, x, *options):
        made.append((module, len(x)))
        return with_room(self, module, x, *options)

    at.fim(representation, at.batch)
    monkeypatch.setattr(ConvolutionRule, "with_room", note)
    found = at.fim(representation, at.batch)
    convolutions = [module for module in at.model.modules() if isinstance(module, nn.Conv2d)]
    assert Counter(made) == {(module, 1): 6 for module in convolutions}
    assert_close(found.get_diag(), PMATS_BY_KIND[representation].expected(at).diagonal(), **EXACT)


def test_patches_leave_the_data_as_they_are():
    model, x = networks.conv2d("zeros").double().eval(), drawn(6, 1, 4, 4)
    before = x.clone()
    FIM(model, (x, torch.arange(6) % 3), PMatDiag)
    assert torch.equal(x, before)


# ------------------------------------------------------------------------------------------ what comes back


@pytest.mark.parametrize("bad", [7, 8], ids=["in the part before the last", "in the last part"])
@pytest.mark.parametrize("representation", [PMatDense, PMatDiag, Jacobian])
def test_the_model_comes_back_when_a_later_part_raises(representation, bad):
    model = build()
    x = drawn(9, 3, seed=1)  # six of them are looked at before
    x[bad] = 1000.0
    with unchanged(model), pytest.raises(RuntimeError, match="too large"):
        if representation is Jacobian:
            Jacobian(model, (x, torch.arange(9) % 3))
        else:
            FIM(model, (x, torch.arange(9) % 3), representation)


class Late(Everything):
    """Raises at some call of its forward."""

    left = 10**9

    def forward(self, x: Tensor) -> Tensor:
        type(self).left -= 1
        if type(self).left < 0:
            raise RuntimeError("too late")
        return super().forward(x)


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_the_model_comes_back_when_only_a_part_raises(calls, monkeypatch):
    model, data = Late().double().eval(), (drawn(6, 3, seed=1), torch.arange(6) % 3)
    FIM(model, data, PMatDiag)
    monkeypatch.setattr(Late, "left", calls)
    with unchanged(model), pytest.raises((RuntimeError, ValueError), match="too late"):
        FIM(model, data, PMatDiag)


def test_buffers_that_a_forward_changes_are_those_of_before_at_every_part():
    model = build()
    counted: list[float] = []
    model.head.register_forward_hook(lambda *args: counted.append(model.calls.item()))
    with unchanged(model):
        FIM(model, (drawn(6, 3, seed=1), torch.arange(6) % 3), PMatDiag)
    assert len(counted) > 4 and set(counted) == {counted[0]}


def test_errors_about_examples_name_the_batch_as_it_was_given():
    model = networks.mlp().double().eval()
    data = drawn(6, 3), torch.tensor([0, 1, 2, 0, 1, 7])
    with pytest.raises(ValueError, match="targets from 0 to 2; found 7"):
        FIM(model, data, PMatDiag, empirical=True)


def test_a_loss_of_single_examples_is_never_called_with_more():
    sizes: list[int] = []

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        sizes.append(len(outputs))
        return F.cross_entropy(outputs, target)

    at = setting(*cases_of("linear"))
    found = GGN(at.model, at.batch, PMatDense, loss).to_torch()
    assert set(sizes) == {1}
    assert_close(found, at.fisher, **EXACT)
