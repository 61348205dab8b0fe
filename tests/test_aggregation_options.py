"""Arguments of aggregators and weightings: checked, shown, written and forgotten; and what they refuse."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nngeo.descent import aggregation as a
from nngeo.descent import linalg
from tests.aggregators import EVERY, build, matrix

J = "normal 5x8 rank 5"
NOT_WEIGHTED = ("graddrop", "trimmed_mean")
WEIGHTED = [name for name in EVERY if not name.startswith(NOT_WEIGHTED)]
STATEFUL = ["gradvac", "excess_mtl", "excess_mtl_warmup", "pcd", "cr_mogm", "modo", "sdmgrad"]

ILLEGAL = {
    "aligned_mtl scale_mode max": "Unknown scale_mode 'max'; known are 'min', 'median', 'rmse'",
    "cagrad c -1": "c should be at least 0",
    "cagrad c nan": "c should be at least 0",
    "cagrad norm_eps -1": "norm_eps should be at least 0",
    "cr_mogm alpha 1.5": "alpha should be at least 0 and at most 1",
    "dualproj norm_eps -1": "norm_eps should be at least 0",
    "excess_mtl n_warmup_steps -1": "n_warmup_steps should be at least 0",
    "excess_mtl robust_step_size 0": "robust_step_size should be greater than 0",
    "fairgrad alpha -1": "alpha should be at least 0",
    "fairgrad max_iters 0": "max_iters should be at least 1, or None",
    "gradvac beta 1.5": "beta should be at least 0 and at most 1",
    "gradvac eps -1": "eps should be at least 0",
    "krum n_byzantine -1": "n_byzantine should be at least 0",
    "krum n_selected 0": "n_selected should be at least 1",
    "mgda epsilon 0": "epsilon should be greater than 0",
    "mgda max_iters 0": "max_iters should be at least 1",
    "modo gamma 0": "gamma should be greater than 0",
    "modo rho -1": "rho should be at least 0",
    "nash_mtl max_norm -1": "max_norm should be at least 0",
    "nash_mtl n_tasks 0": "n_tasks should be at least 1",
    "nash_mtl optim_niter 0": "optim_niter should be at least 1",
    "nash_mtl update_weights_every 0": "update_weights_every should be at least 1",
    "pcd beta 1": "beta should be at least 0 and less than 1",
    "pcd eps -1": "eps should be at least 0",
    "pcd tau 2": "tau should be at least 0 and at most 1",
    "sdmgrad lambda_ -1": "lambda_ should be at least 0",
    "sdmgrad lr 0": "lr should be greater than 0",
    "sdmgrad momentum 1": "momentum should be at least 0 and less than 1",
    "sdmgrad n_iter 0": "n_iter should be at least 1",
    "trimmed_mean trim_number -1": "trim_number should be at least 0",
    "upgrad reg_eps -1": "reg_eps should be at least 0",
}


def literal(text: str) -> float | int | str:
    return int(text) if re.fullmatch(r"-?\d+", text) else text if text == "max" else float(text)


@pytest.mark.parametrize("case", ILLEGAL)
def test_illegal_values_are_refused_and_leave_the_old_one(case):
    name, option, value = case.split()
    aggregator = build(name, 5)
    before = getattr(aggregator, option)
    with pytest.raises(ValueError, match=re.escape(ILLEGAL[case])):
        setattr(aggregator, option, literal(value))
    assert getattr(aggregator, option) == before


WRONG_TYPES = {
    "upgrad pref_vector": "pref_vector should be a tensor (m,), found str",
    "upgrad projector": "projector` should be a DualConeProjector; got 'x'",
    "upgrad strict": "strict should be True or False, found 'x'",
    "constant weights": "weights should be a tensor (m,), found str",
    "graddrop f": "f should be a function, found str",
    "graddrop leak": "leak should be a tensor (m,), found str",
    "trimmed_mean trim_number": "trim_number should be a whole number, found 'x'",
    "cagrad c": "c should be a number, found 'x'",
    "fairgrad max_iters": "max_iters should be a whole number, or None, found 'x'",
}


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_wrong_types_are_refused(case):
    name, option = case.split()
    with pytest.raises(TypeError, match=re.escape(WRONG_TYPES[case])):
        setattr(build(name, 5), option, "x")


WHOLE = ["krum n_byzantine", "krum n_selected", "mgda max_iters", "nash_mtl n_tasks", "nash_mtl optim_niter"]
WHOLE += ["sdmgrad n_iter", "trimmed_mean trim_number", "fairgrad max_iters", "excess_mtl n_warmup_steps"]


@pytest.mark.parametrize("case", WHOLE)
def test_counts_are_whole_numbers(case):
    name, option = case.split()
    with pytest.raises(TypeError, match=f"{option} should be a whole number"):
        setattr(build(name, 5), option, 1.5)


@pytest.mark.parametrize("kind", ["WeightedAggregator", "GramianWeightedAggregator", "CRMOGM"])
def test_only_a_weighting_weights(kind):
    with pytest.raises(TypeError, match="weighting` should be a Weighting; got 3"):
        getattr(a, kind)(3)


def test_a_projector_of_ones_own_has_its_own_options():
    with pytest.raises(ValueError, match="give them to yours"):
        a.UPGrad(projector=a.PivotingProjector(), strict=True)


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_options_of_the_projector_are_written_through(name):
    aggregator, j = build(name, 5), matrix("strong 5x8 rank 4")
    aggregator.strict = True
    assert aggregator.projector.strict
    assert_close(aggregator(j), build(f"{name}_strict", 5)(j))


@pytest.mark.parametrize(("option", "value"), [("c", 0.5), ("norm_eps", 1e-3)], ids=["c", "norm_eps"])
def test_options_written_later_count(option, value):
    aggregator = a.CAGrad(c=1.0)
    setattr(aggregator, option, value)
    expected = a.CAGrad(**{"c": 1.0, option: value})
    assert repr(aggregator) == repr(expected)
    assert torch.equal(aggregator(matrix(J)), expected(matrix(J)))


PIVOTING = "PivotingProjector(norm_eps=0.0, reg_eps=0.0001, strict=False)"
REPRS = {
    "mean": "Mean()",
    "sum": "Sum()",
    "random": "Random()",
    "constant": "Constant(weights=tensor([0.2000, 0.9000], dtype=torch.float64))",
    "upgrad": f"UPGrad(pref_vector=None, projector={PIVOTING})",
    "dualproj": f"DualProj(pref_vector=None, projector={PIVOTING})",
    "mgda": "MGDA(epsilon=0.001, max_iters=100)",
    "aligned_mtl": "AlignedMTL(pref_vector=None, scale_mode='min')",
    "config": "ConFIG(pref_vector=None)",
    "imtl_g": "IMTLG()",
    "pcgrad": "PCGrad()",
    "gradvac": "GradVac(beta=0.5, eps=1e-08)",
    "graddrop": "GradDrop(f=identity, leak=None)",
    "excess_mtl": "ExcessMTL(robust_step_size=1.0, n_warmup_steps=0)",
    "pcd": "PCD(tau=0.02, beta=0.999, eps=1e-08)",
    "krum": "Krum(n_byzantine=0, n_selected=1)",
    "trimmed_mean": "TrimmedMean(trim_number=0)",
    "cagrad": "CAGrad(c=1.0, norm_eps=0.0001)",
    "nash_mtl": "NashMTL(n_tasks=2, max_norm=1.0, update_weights_every=1, optim_niter=20)",
    "fairgrad": "FairGrad(alpha=1.0, max_iters=None)",
    "modo": "MoDo(gamma=0.1, rho=0.1)",
    "sdmgrad": "SDMGrad(lr=10.0, momentum=0.5, n_iter=20, lambda_=0.3, pref_vector=None)",
    "cr_mogm": f"CRMOGM(weighting=UPGradWeighting(pref_vector=None, projector={PIVOTING}), "
    "alpha=0.9, initial_weights=None)",
}


@pytest.mark.parametrize("name", REPRS)
def test_repr_shows_every_argument(name):
    assert repr(build(name, 2)) == REPRS[name]


STRINGS = {
    "mean": "Mean",
    "random": "Random",
    "constant": "Constant([0.2, 0.9])",
    "upgrad": "UPGrad",
    "upgrad_preference": "UPGrad([0.2, 0.9])",
    "dualproj_preference": "DualProj([0.2, 0.9])",
    "mgda": "MGDA",
    "aligned_mtl_preference": "AlignedMTL([0.2, 0.9])",
    "config_preference": "ConFIG([0.2, 0.9])",
    "graddrop": "GradDrop",
    "graddrop_leak": "GradDrop([0.2, 0.9])",
    "cagrad_half": "CAGrad0.5",
    "cagrad": "CAGrad1",
    "krum": "Krum0-1",
    "trimmed_mean": "TM0",
    "fairgrad": "1.0-FairGrad",
    "nash_mtl": "NashMTL",
    "pcd": "PCD",
}


@pytest.mark.parametrize("name", STRINGS)
def test_str_is_short(name):
    assert str(build(name, 2)) == STRINGS[name]


@pytest.mark.parametrize("name", STRINGS)
def test_str_is_that_of_torchjd(name):
    torchjd = pytest.importorskip("torchjd.aggregation", reason="needs torchjd")
    assert str(build(name, 2)) == str(build(name, 2, torchjd))


def test_strs_of_compositions_show_their_parts():
    assert str(a.UPGrad(torch.tensor([0.25, 1.0])) << torch.abs) == "UPGrad([0.25, 1.]) << abs"


def test_reprs_of_compositions_show_their_parts():
    assert repr(a.MeanWeighting() << torch.abs) == "MeanWeighting() << abs"
    assert repr(a.Mean() << torch.abs) == "Mean() << abs"
    assert repr(a.WeightedAggregator(a.SumWeighting())) == "WeightedAggregator(SumWeighting())"


@pytest.mark.parametrize("name", WEIGHTED)
def test_aggregators_are_their_weightings_times_rows(name):
    j, aggregator = matrix(J), build(name, 5)
    torch.manual_seed(0)
    expected = build(name, 5)(j)
    torch.manual_seed(0)
    assert_close(aggregator.weighting(j) @ j, expected)


@pytest.mark.parametrize("name", [name for name in WEIGHTED if hasattr(build(name, 5), "gramian_weighting")])
def test_gramian_weightings_need_no_rows(name):
    j, weighting = matrix(J), build(name, 5).gramian_weighting
    torch.manual_seed(0)
    expected = build(name, 5)(j)
    torch.manual_seed(0)
    assert_close(weighting(j @ j.T) @ j, expected)
    torch.manual_seed(0)
    assert_close(a.GramianWeightedAggregator(build(name, 5).gramian_weighting)(j), expected)


def test_composition_applies_the_function_first():
    j = matrix(J)
    weighting = a.MGDAWeighting() << (lambda rows: rows @ rows.T)
    assert_close(a.WeightedAggregator(weighting)(j), a.MGDA()(j))
    assert_close((a.Mean() << torch.exp)(j), j.exp().mean(0))


def calls(aggregator: a.Aggregator, n: int = 3) -> Tensor:
    """Results (n, ...) for one Jacobian after the other."""
    torch.manual_seed(0)
    return torch.stack([aggregator(matrix(J, seed)) for seed in range(n)])


@pytest.mark.parametrize("name", STATEFUL)
def test_reset_forgets_and_state_dict_remembers(name):
    aggregator = build(name, 5)
    first = calls(aggregator)
    assert not torch.equal(calls(aggregator), first)
    aggregator.reset()
    assert torch.equal(calls(aggregator), first)
    copy = build(name, 5)
    copy.load_state_dict(aggregator.state_dict())
    assert torch.equal(calls(copy), calls(aggregator))


def test_compositions_are_reset_with_their_parts():
    composed = a.ExcessMTL() << torch.clone
    first = calls(composed)
    composed.reset()
    assert torch.equal(calls(composed), first)


def test_weights_are_kept_between_updates():
    j, aggregator = matrix(J), a.NashMTL(n_tasks=5, update_weights_every=2, max_norm=0.0)
    weights = [aggregator.weighting(matrix(J, seed)) for seed in range(3)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert_close(weights[0], a.FairGrad(1.0).weighting(j))


PREFERENCES = ["upgrad", "dualproj", "aligned_mtl", "config", "sdmgrad"]


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_of_equal_entries_are_the_default(name):
    default, j = build(name, 5), matrix(J)
    preferred = build(name, 5)
    preferred.pref_vector = torch.full((5,), 1.0 if name == "config" else 0.2)
    assert_close(preferred(j), default(j), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_of_another_length_are_refused(name):
    aggregator = build(name, 5)
    aggregator.pref_vector = torch.ones(3)
    with pytest.raises(ValueError, match="pref_vector has 3 entries for a matrix with 5 rows"):
        aggregator(matrix(J))


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_are_vectors(name):
    with pytest.raises(ValueError, match=re.escape("pref_vector should be a tensor (m,), found the shape (5, 1)")):
        build(name, 5).pref_vector = torch.ones(5, 1)


WRONG_ROWS = {
    "constant": "weights has 5 entries for a matrix with 2 rows",
    "graddrop_leak": "leak has 5 entries for a matrix with 2 rows",
    "nash_mtl": "n_tasks is 5, but the matrix has 2 rows",
    "krum": "needs at least 3 rows, found 2",
    "trimmed_mean": "needs at least 5 rows, found 2",
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_matrices_with_too_few_rows_are_refused(name):
    with pytest.raises(ValueError, match=WRONG_ROWS[name]):
        build(name, 5)(matrix(J)[:2])


@pytest.mark.parametrize("shape", [(2, 5, 3), (3,)], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_only_matrices_are_aggregated(name, shape):
    with pytest.raises(ValueError, match=re.escape(f"found the shape {shape}")):
        build(name, 5)(torch.ones(shape))


FIXED_ROWS = ("krum", "trimmed_mean", "nash_mtl")


@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith(FIXED_ROWS)])
def test_no_rows_give_zero(name):
    assert torch.equal(build(name, 0)(torch.ones(0, 3)), torch.zeros(3))


@pytest.mark.parametrize("name", [name for name in EVERY if name.startswith(FIXED_ROWS)])
def test_no_rows_are_too_few_for_a_number_of_rows(name):
    with pytest.raises(ValueError, match="rows"):
        build(name, 5)(torch.ones(0, 3))


def some_weighting(statistic: type) -> type[a.Weighting]:
    class Some(a.Weighting[statistic]):
        def forward(self, matrix: Tensor, /) -> Tensor:
            return matrix.new_ones(len(matrix))

    return Some


@pytest.mark.parametrize("statistic", [linalg.Matrix, linalg.PSDMatrix])
def test_weightings_are_declared_for_a_kind_of_matrix(statistic):
    j = matrix(J)
    assert_close(a.WeightedAggregator(some_weighting(statistic)())(j), j.sum(0))


class Doubled(linalg.DualConeProjector):
    """Of its own, by the one method that TorchJD has."""

    def __call__(self, U: Tensor, G: Tensor) -> Tensor:
        return 2 * U


@pytest.mark.parametrize("kind", [a.UPGrad, a.DualProj])
def test_projectors_are_written_as_one_call(kind):
    assert_close(kind(projector=Doubled())(matrix(J)), 2 * matrix(J).mean(0))


def test_a_projector_without_a_method_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        linalg.DualConeProjector()


@pytest.mark.parametrize("given", [[[1.0, 2.0]], 3, None], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_only_tensors_are_aggregated(name, given):
    with pytest.raises(TypeError, match=f"matrix should be a tensor, found {type(given).__name__}"):
        build(name, 5)(given)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_only_real_floating_point_numbers_are_aggregated(dtype):
    with pytest.raises(TypeError, match=f"matrix should have real floating-point numbers, found {dtype}"):
        a.UPGrad()(torch.ones(2, 2, dtype=dtype))
    with pytest.raises(TypeError, match=f"gramian should have real floating-point numbers, found {dtype}"):
        a.UPGradWeighting()(torch.ones(2, 2, dtype=dtype))


CLASSES = {
    "a weighting": (lambda: a.WeightedAggregator(a.MeanWeighting), "make one of it, MeanWeighting()"),
    "a smoothed weighting": (lambda: a.CRMOGM(a.UPGradWeighting), "make one of it, UPGradWeighting()"),
    "a projector": (lambda: a.UPGrad(projector=a.PivotingProjector), "make one of it, PivotingProjector()"),
}


@pytest.mark.parametrize("case", CLASSES)
def test_a_class_where_an_object_belongs_is_named(case):
    call, words = CLASSES[case]
    with pytest.raises(TypeError, match=re.escape(words)):
        call()


@pytest.mark.parametrize("given", ["U", "G"])
def test_projectors_take_tensors(given):
    arguments = {"U": torch.ones(2), "G": torch.eye(2), given: [[1.0]]}
    with pytest.raises(TypeError, match=f"`{given}` should be a Tensor; got a list"):
        a.PivotingProjector()(**arguments)


@pytest.mark.parametrize("name", EVERY)
def test_autocast_does_not_lower_the_precision(name):
    j = matrix(J, dtype=torch.float32)
    torch.manual_seed(0)
    expected = build(name, 5)(j)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(build(name, 5)(j), expected)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_rows_that_are_not_finite_are_named(name, value):
    j = matrix(J)
    j[3, 2] = value
    with pytest.raises(ValueError, match=re.escape("in the rows [3]")):
        build(name, 5)(j)


@pytest.mark.parametrize("shape", [(2, 3), (3,)], ids=str)
def test_weightings_of_gramians_refuse_jacobians(shape):
    with pytest.raises(ValueError, match="gramian should be a square matrix"):
        a.UPGradWeighting()(torch.ones(shape))
