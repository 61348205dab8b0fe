"""The scripts in examples/ reach the figures that they are there for, and draw. About a minute on one core."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pyplot = pytest.importorskip("matplotlib.pyplot", reason="the examples draw")
pytest.importorskip("sklearn", reason="the examples take its digits")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def picture(tmp_path: Path):
    """Where a script may draw; it has to."""
    pyplot.switch_backend("Agg")
    path = tmp_path / "picture.png"
    yield str(path)
    pyplot.close("all")
    assert path.stat().st_size > 10_000


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["ntk", "laplace", "multi_task", "latent_geometry"])
def test_a_script_has_less_than_a_hundred_lines(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 100


@pytest.mark.parametrize("name", ["ewc", "influence", "merging", "natural_gradient"])
def test_a_job_takes_less_than_eighty_lines_of_seventy_eight_columns(name):
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    assert len(lines) < 80
    assert max(map(len, lines)) <= 78


def test_ewc_forgets_less_with_kfac_than_with_a_diagonal_than_without(picture):
    accuracy = script("ewc").main(out=picture)  # the mean of three seeds
    assert accuracy["PMatKFAC"] >= 0.82
    assert accuracy["PMatKFAC"] >= accuracy["PMatDiag"] + 0.15
    assert accuracy["PMatDiag"] >= accuracy["no penalty"] + 0.15


def test_natural_gradient_needs_a_few_steps_where_adam_needs_hundreds(picture):
    steps = script("natural_gradient").main(out=picture)  # the mean of three seeds
    assert steps["Adam"] >= 250
    assert steps["KFAC"] <= 30
    assert steps["KFAC, exact momentum"] <= 19


def test_influence_refined_on_the_exact_matrix_is_as_good_as_the_dense_inverse(picture):
    score = script("influence").main(out=picture)
    assert score["EKFAC"] >= 0.65
    assert score["EKFAC, refined"] >= 0.77
    assert score["EKFAC, refined"] >= score["dense"] - 0.01
    assert score["EKFAC"] >= score["diagonal"] + 0.1


def test_networks_merge_and_shrink_by_their_fisher_matrices(picture):
    found = script("merging").main(out=picture)  # means of three seeds
    assert found["merged by PMatEye"] <= 0.45  # the average of the weights
    assert found["merged by PMatKFAC"] >= 0.82
    assert found["70% pruned by PMatKFAC"] >= 0.95
    assert found["70% pruned by PMatKFAC"] >= found["70% pruned by PMatDiag"] + 0.03
    assert found["70% pruned by PMatDiag"] >= found["70% pruned by PMatEye"] + 0.05  # by magnitude
    assert found["90% pruned by PMatKFAC"] >= 0.62


def test_the_kernel_of_a_wide_network_recognises_digits_and_foresees_its_training(picture):
    found = script("ntk").main(out=picture)
    assert found["accuracy"][2048] >= 0.95
    assert found["distance"][2048] <= 0.02
    assert found["distance"][2048] < found["distance"][256] < found["distance"][32]


def test_laplace_is_bayesian_linear_regression_and_the_posterior_of_the_kernel(picture):
    found = script("laplace").main(out=picture)
    assert found["linear evidence"] <= 1e-10
    assert found["linear variance"] <= 1e-10
    assert found["kernel"] <= 1e-10
    assert found["PMatDense"] > found["PMatKFAC"] > found["PMatDiag"]


def test_upgrad_spares_the_task_that_the_mean_of_gradients_spoils(picture):
    found = script("multi_task").main(out=picture)  # the mean of three seeds
    assert found["mean of gradients"]["worst"] >= 4 * found["mean of gradients"]["before"]
    assert found["UPGrad"]["worst"] <= 1.01 * found["UPGrad"]["before"]
    assert found["UPGrad"]["after"] <= 0.9 * found["UPGrad"]["before"]
    assert found["UPGrad"]["right"] <= 2 * found["mean of gradients"]["right"] <= 2


def test_geodesics_between_digits_are_shorter_than_straight_lines(picture):
    found = script("latent_geometry").main(out=picture)
    assert all(found["converged"])
    pairs = list(zip(found["geodesic length"], found["straight length"], strict=True))
    assert len(pairs) == 3 and all(geodesic <= 0.9 * straight for geodesic, straight in pairs)
    energies = zip(found["geodesic energy"], found["straight energy"], found["geodesic length"], strict=True)
    assert all(length**2 <= geodesic <= 0.75 * straight for geodesic, straight, length in energies)
