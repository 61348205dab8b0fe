"""Matrices known by their products alone, against dense ones: solvers, eigenpairs, estimates and kept graphs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo
from nngeo import Hessian, PMatDiag, PMatEKFAC, PMatImplicit, PMatKFAC, PVector
from nngeo.generators import differentiable
from nngeo.linalg.cg import ConvergenceWarning
from nngeo.linalg.diagonal import estimate_diag
from nngeo.linalg.eigenpairs import top_eigenpairs
from nngeo.linalg.operator import Products
from nngeo.linalg.quadrature import Quadrature, logdet, spectral_density, trace_of
from nngeo.linalg.trace import estimate_trace
from nngeo.representations.solvers import SolveReport
from tests.contracts import cases_of, setting

exact = partial(assert_close, rtol=1e-8, atol=1e-10)


# ------------------------------------------------------------------------------------------ matrices


def summed_loss(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs, target, reduction="sum")


def made(kind: str, id: str) -> Any:
    """A Fisher matrix, or a Hessian, of a case."""
    (case,) = cases_of(id)
    at = setting(case)
    return Hessian(at.model, at.batches, PMatImplicit, summed_loss) if kind == "hessian" else at.fim(PMatImplicit)


@cache
def matrix(kind: str, id: str) -> Any:
    """The same for all tests that leave it as it is."""
    return made(kind, id)


@cache
def dense(kind: str, id: str) -> Tensor:
    return matrix(kind, id).to_torch()


FISHERS = ["linear", "conv2d_groups", "attention_tokens", "lstm", "tied_embedding", "layer_norm", "checkpointed"]
NETS = [("fisher", id) for id in FISHERS] + [("hessian", id) for id in ("layer_norm", "linear", "group_norm", "lstm")]
each_net = pytest.mark.parametrize("kind, id", NETS, ids=lambda value: value)
each_fisher = pytest.mark.parametrize("id", FISHERS)
each_seed = pytest.mark.parametrize("seed", [0, 1, 2])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def vectors(kind: str, id: str, *lead: int) -> Tensor:
    return normal(*lead, len(dense(kind, id)))


@contextmanager
def forwards(model: nn.Module):
    """Counts the calls of the model inside."""
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: calls.append(1))
    yield calls
    handle.remove()


def of_tensor(tensor: Tensor) -> Products:
    return Products(lambda v: v @ tensor, len(tensor), tensor.dtype, tensor.device)


def with_spectrum(values: Tensor) -> Products:
    basis, _ = torch.linalg.qr(normal(len(values), len(values)))
    return of_tensor(basis @ values.diag() @ basis.mT)


# ------------------------------------------------------------------------------------------ many vectors


@each_net
def test_many_vectors_are_multiplied_as_by_the_dense_matrix(kind, id):
    v = vectors(kind, id, 2, 3)
    exact(matrix(kind, id).mv(v), v @ dense(kind, id))


@each_net
def test_one_vector_is_multiplied_as_among_many(kind, id):
    v = vectors(kind, id, 2)
    exact(matrix(kind, id).mv(v[0]), matrix(kind, id).mv(v)[0])


@pytest.mark.parametrize("budget", [1, 300, 2000])
@pytest.mark.parametrize("kind, id", [NETS[0], ("fisher", "attention_tokens"), ("hessian", "layer_norm")])
def test_chunks_of_vectors_do_not_matter(kind, id, budget, monkeypatch):
    monkeypatch.setattr(differentiable, "BUDGET", budget)
    monkeypatch.setattr("nngeo.generators.products.BUDGET", budget)
    v = vectors(kind, id, 7)
    exact(made(kind, id).mv(v), v @ dense(kind, id))


@pytest.mark.parametrize("kind, id", [net for net in NETS if net[1] != "checkpointed"], ids=lambda value: value)
def test_all_vectors_share_one_forward_of_a_batch(kind, id):
    found, v = matrix(kind, id), vectors(kind, id, 7)
    found.mv(v)  # the first product also looks at what the model does
    looks = 1 if kind == "hessian" else 0  # a Hessian's sweep tests the first batch each time, without a gradient
    with forwards(found.generator.model) as calls:
        found.mv(v)
    assert len(calls) <= len(setting(*cases_of(id)).batches) + 2 * looks


def test_a_jacobian_takes_many_vectors_both_ways():
    at = setting(*cases_of("attention_tokens"))
    J = nngeo.Jacobian(at.model, at.batches, representation=nngeo.PFMapImplicit)
    v, u = normal(2, 3, at.size), normal(2, *at.jacobian.shape[:2])
    exact(J._jvp(v), torch.einsum("knp,stp->stkn", at.jacobian, v))
    exact(J._vjp(u), torch.einsum("knp,skn->sp", at.jacobian, u))


@pytest.mark.parametrize("fault", ["wrong", "refused"])
def test_what_torch_does_not_vectorise_goes_row_by_row(monkeypatch, fault):
    def faulty(outputs, inputs, cotangents):
        if fault == "refused":
            raise RuntimeError("no batching rule")
        return [torch.ones(len(cotangents[0]), *x.shape, dtype=x.dtype) for x in inputs]

    monkeypatch.setattr(differentiable, "_grads", faulty)
    found = made("hessian", "group_norm")
    v = vectors("hessian", "group_norm", 3)
    exact(found.mv(v), v @ dense("hessian", "group_norm"))
    assert found.generator.backward._vectorized is False


@pytest.mark.parametrize("form", ["PVector", "PFMapDense"])
def test_products_answer_in_kind(form):
    found, v = matrix("fisher", "linear"), vectors("fisher", "linear", 2, 3)
    layers, want = found.layer_collection, v @ dense("fisher", "linear")
    if form == "PVector":
        exact((found @ PVector(layers, v[0, 0])).to_torch(), want[0, 0])
    else:
        exact(found.mmap(nngeo.PFMapDense(layers, data=v)).to_torch(), want)


@each_net
def test_quadratic_forms_are_those_of_the_dense_matrix(kind, id):
    v = vectors(kind, id, 3).requires_grad_()
    form = matrix(kind, id).vTMv(v)
    exact(form.detach(), torch.einsum("mp,pq,mq->m", v, dense(kind, id), v).detach())
    exact(torch.autograd.grad(form.sum(), v)[0], 2 * (v @ dense(kind, id)).detach())


# ------------------------------------------------------------------------------------------ kept graphs


@each_net
def test_linearized_products_are_the_same(kind, id):
    v = vectors(kind, id, 4)
    with matrix(kind, id).linearize() as linear:
        exact(linear.mv(v), v @ dense(kind, id))
        exact(linear.mv(v[0]), v[0] @ dense(kind, id))


@pytest.mark.parametrize("kind, id", [net for net in NETS if net[1] != "checkpointed"], ids=lambda value: value)
def test_linearized_products_run_no_forward(kind, id):
    found, v = matrix(kind, id), vectors(kind, id, 3)
    linear = found.linearize()
    with forwards(found.generator.model) as calls:
        linear.mv(v), linear.mv(v[0]), (2 * linear + 0.1).mv(v)
        linear.solve(v[0], regul=50.0, rtol=1e-3), linear.top_eigenpairs(1, rtol=1e-2, generator=seeded())
    assert not calls


@each_net
def test_linearizing_leaves_the_model_as_it_was(kind, id):
    found = made(kind, id)
    model = found.generator.model
    before = [(id_of, p.requires_grad, p.grad, p.detach().clone()) for id_of, p in model.named_parameters()]
    numbers = torch.get_rng_state()
    found.linearize().mv(vectors(kind, id, 2))
    after = [(id_of, p.requires_grad, p.grad, p.detach()) for id_of, p in model.named_parameters()]
    assert [entry[:3] for entry in before] == [entry[:3] for entry in after]
    assert_close([entry[3] for entry in before], [entry[3] for entry in after], rtol=0, atol=0)
    assert torch.equal(numbers, torch.get_rng_state())


def test_a_frozen_parameter_can_be_linearized():
    (case,) = cases_of("linear")
    model = case.make().requires_grad_(False)
    layers = nngeo.LayerCollection.from_model(model, frozen=True)
    found = nngeo.FIM(model, case.batches(), PMatImplicit, case.variant, layer_collection=layers)
    v = vectors("fisher", "linear", 2)
    exact(found.linearize().mv(v), v @ dense("fisher", "linear"))


def test_a_linearized_monte_carlo_matrix_keeps_its_draws():
    at = setting(*cases_of("linear"))
    found = nngeo.FIM_MonteCarlo(at.model, at.batches, PMatImplicit, at.case.variant, generator=seeded())
    v = normal(3, at.size)
    exact(found.linearize().mv(v), found.mv(v))


def test_released_graphs_are_refused():
    linear = made("fisher", "linear").linearize()
    doubled = 2 * linear
    linear.release()
    with pytest.raises(ValueError, match="released.*linearize"):
        doubled.mv(vectors("fisher", "linear"))


@pytest.mark.parametrize("kind", ["fisher", "hessian"])
def test_parameters_changed_since_are_refused(kind):
    (case,) = cases_of("linear")
    model, batches = case.make(), case.batches()
    found = (
        Hessian(model, batches, PMatImplicit, summed_loss)
        if kind == "hessian"
        else nngeo.FIM(model, batches, PMatImplicit, case.variant)
    )
    linear = found.linearize()
    with torch.no_grad():
        model.get_parameter(found.layer_collection.names[-2]).add_(1.0)
    with pytest.raises(ValueError, match="changed"):
        linear.mv(vectors(kind, "linear"))


def test_what_has_no_second_derivative_is_not_linearized():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, *grads):
            raise NotImplementedError("derivative for Once is not implemented")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(self.layer(x))

    found = nngeo.FIM(Net().double(), (normal(4, 3),), PMatImplicit, "regression")
    with pytest.raises(NotImplementedError, match="second derivative.*without linearize"):
        found.linearize()


# ------------------------------------------------------------------------------------------ damping and multiples


@each_net
def test_damped_multiples_are_matrices_of_their_kind(kind, id):
    found, m = 2 * (matrix(kind, id) + 0.3) - 0.1, 2 * dense(kind, id)
    m = m + 0.5 * torch.eye(len(m), dtype=m.dtype)
    v = vectors(kind, id, 2)
    exact(found.mv(v), v @ m)
    exact(found.to_torch(), m)
    exact(found.get_diag(), m.diagonal())
    exact(found.trace(), m.trace())


@pytest.mark.parametrize("form", ["by layer", "PVector"])
@each_fisher
def test_damping_by_layer_or_parameter_is_added_to_the_diagonal(id, form):
    found, m = matrix("fisher", id), dense("fisher", id)
    layers = found.layer_collection
    values = torch.arange(1, len(layers) + 1, dtype=m.dtype)
    flat = torch.cat([value.expand(layer.numel()) for value, layer in zip(values, layers.layers.values(), strict=True)])
    damping = PVector(layers, flat) if form == "PVector" else dict(zip(layers, values.tolist(), strict=True))
    v = vectors("fisher", id)
    exact((found + damping).mv(v), v @ m + flat * v)
    exact((found + damping).to_torch(), m + flat.diag())


def test_products_are_differentiable_in_damping_and_factor():
    found, v = matrix("fisher", "linear"), vectors("fisher", "linear")
    damping, factor = torch.tensor([0.5, 2.0], dtype=torch.float64).requires_grad_()
    form = (factor * found + damping).vTMv(v)
    exact(torch.stack(torch.autograd.grad(form, [damping, factor])), torch.stack([v @ v, found.vTMv(v)]))


# ------------------------------------------------------------------------------------------ solvers


def damped(kind: str, id: str, regul: float) -> Tensor:
    m = dense(kind, id)
    return m + regul * torch.eye(len(m), dtype=m.dtype)


def solved(found: Any, v: Tensor, **options: Any) -> tuple[Tensor, SolveReport]:
    reports: list[SolveReport] = []
    x = found.solve(v, report=reports.append, **options)
    (report,) = reports
    return x, report


SOLVES = {"cg": {"rtol": 1e-12}, "minres": {"rtol": 1e-12}, "lsmr": {"rtol": 1e-14, "max_iter": 4000}}


@pytest.mark.parametrize("solve", SOLVES)
@each_fisher
def test_solvers_find_what_the_dense_matrix_gives(id, solve):
    found, v = matrix("fisher", id).linearize(), vectors("fisher", id, 2)
    x, report = solved(found, v, regul=0.1, solve=solve, **SOLVES[solve])
    exact(x, torch.linalg.solve(damped("fisher", id, 0.1), v.mT).mT)
    assert report.solver == solve and report.converged and 0 < report.iterations


@pytest.mark.parametrize("solve", ["minres", "lsmr"])
@pytest.mark.parametrize("id", ["linear", "lstm"])
def test_indefinite_systems_are_solved(id, solve):
    m = damped("hessian", id, 0.05)
    assert torch.linalg.eigvalsh(m)[0] < 0
    found, v = matrix("hessian", id).linearize(), vectors("hessian", id)
    x, report = solved(found, v, regul=0.05, solve=solve, **SOLVES[solve] | {"max_iter": 20000})
    assert report.converged
    assert_close(x @ m, v, rtol=1e-7, atol=1e-7)


@pytest.mark.filterwarnings("ignore::nngeo.linalg.cg.ConvergenceWarning")
def test_conjugate_gradients_say_that_a_matrix_is_indefinite():
    found = matrix("hessian", "layer_norm")
    with pytest.warns(ConvergenceWarning, match="CG stopped.*no positive curvature"):
        found.solve(vectors("hessian", "layer_norm"), regul=1e-3)


@pytest.mark.parametrize("solve", ["cg", "minres"])
@pytest.mark.parametrize("near", [PMatKFAC, PMatEKFAC, PMatDiag, nngeo.PMatDense], ids=lambda kind: kind.__name__)
def test_preconditioners_of_any_kind_give_the_same_solution(near, solve):
    at = setting(*cases_of("linear"))
    found, v = matrix("fisher", "linear").linearize(), vectors("fisher", "linear", 2)
    x, _ = solved(found, v, regul=1e-3, solve=solve, preconditioner=at.fim(near), rtol=1e-12)
    exact(x, torch.linalg.solve(damped("fisher", "linear", 1e-3), v.mT).mT)


@pytest.mark.parametrize("solve", ["cg", "minres"])
@pytest.mark.parametrize("near", [PMatKFAC, PMatEKFAC, nngeo.PMatBlockDiag], ids=lambda kind: kind.__name__)
def test_preconditioning_reduces_iterations(near, solve):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    examples = (normal(300, 6) * torch.logspace(-1.5, 1, 6).double(),)
    found = nngeo.FIM(model, examples, PMatImplicit).linearize()
    run = partial(solved, found, normal(found.size(0)), regul=1e-4, solve=solve)
    (_, plain), (_, better) = run(), run(preconditioner=nngeo.FIM(model, examples, near))
    assert better.converged and better.iterations < 0.8 * plain.iterations


@pytest.mark.parametrize("solve", ["cg", "minres", "lsmr"])
@each_fisher
def test_a_warm_start_reduces_iterations(id, solve):
    found, v = matrix("fisher", id).linearize(), vectors("fisher", id)
    near = torch.linalg.solve(damped("fisher", id, 0.01), v)
    near = near + 1e-5 * near.norm() * normal(len(v), seed=6) / len(v) ** 0.5
    run = partial(solved, found, v, regul=0.01, solve=solve, rtol=1e-8, max_iter=4000)
    (_, cold), (_, warm) = run(), run(x0=near)
    assert warm.converged and warm.iterations < cold.iterations


@pytest.mark.parametrize("solve", ["cg", "minres"])
def test_a_start_at_the_solution_takes_no_iteration(solve):
    found, v = matrix("fisher", "linear"), vectors("fisher", "linear", 2)
    v[1] = 0  # whose tolerance is zero, too
    _, report = solved(
        found, v, regul=0.1, solve=solve, x0=torch.linalg.solve(damped("fisher", "linear", 0.1), v.mT).mT
    )
    assert report == SolveReport(solve, 0, report.residual, True)


@pytest.mark.parametrize("solve, name", [("cg", "CG"), ("minres", "MINRES"), ("lsmr", "LSMR")])
def test_solvers_that_stop_too_early_warn_and_report_the_residual(solve, name):
    found, v = matrix("fisher", "linear"), vectors("fisher", "linear")
    with pytest.warns(ConvergenceWarning, match=f"{name} stopped after 2 iterations at a relative residual"):
        x, report = solved(found, v, regul=1e-4, solve=solve, max_iter=2)
    assert not report.converged and report.iterations == 2
    exact(torch.tensor(report.residual, dtype=v.dtype), (found.mv(x) + 1e-4 * x - v).norm() / v.norm())


def test_least_squares_solve_a_singular_system():
    found, m = matrix("fisher", "layer_norm").linearize(), dense("fisher", "layer_norm")
    v = vectors("fisher", "layer_norm")
    x, report = solved(found, v, regul=0.0, solve="lsmr", rtol=1e-13, max_iter=10000)
    assert not report.converged and report.residual > 1e-3
    assert_close(x @ m @ m, v @ m, rtol=1e-7, atol=1e-9)


def test_a_preconditioner_over_other_layers_is_refused():
    found = matrix("fisher", "linear")
    other = setting(*cases_of("conv1d")).fim(PMatDiag)
    with pytest.raises(ValueError, match="preconditioner is over other layers"):
        found.solve(vectors("fisher", "linear"), solve="minres", preconditioner=other)


# ------------------------------------------------------------------------------------------ the inverse


@each_fisher
def test_the_inverse_is_that_of_the_dense_matrix(id):
    found = (matrix("fisher", id).linearize() + 0.1).inv(rtol=1e-12)
    inverse, v = torch.linalg.inv(damped("fisher", id, 0.1)), vectors("fisher", id, 2)
    exact(found.mv(v), v @ inverse)
    exact((2 * found).mv(v), 2 * v @ inverse)
    exact(found.solve(v, regul=0.0), v @ damped("fisher", id, 0.1))
    eye = torch.eye(len(inverse), dtype=v.dtype)
    exact(found.solve(v, regul=0.5, rtol=1e-12), v @ torch.linalg.inv(inverse + 0.5 * eye))


def test_the_inverse_of_the_inverse_is_the_matrix():
    found = matrix("fisher", "linear") + 0.1
    assert found.inv().inv() is found


def test_norms_of_an_inverse_are_those_of_the_dense_one():
    found = (matrix("fisher", "linear").linearize() + 0.1).inv(rtol=1e-13)
    inverse = torch.linalg.inv(damped("fisher", "linear", 0.1))
    exact(found.norm(2), torch.linalg.matrix_norm(inverse, 2))
    exact(found.norm(), inverse.norm())
    exact(found.top_eigenpairs(2, generator=seeded()).values, torch.linalg.eigvalsh(inverse).flip(0)[:2])


# ------------------------------------------------------------------------------------------ eigenpairs


ENDS: dict[str, Callable[[Tensor], Tensor]] = {"largest": lambda x: x, "smallest": torch.neg, "magnitude": torch.abs}


def leading(values: Tensor, which: str, k: int) -> Tensor:
    return values[ENDS[which](values).argsort(descending=True)[:k]]


@pytest.mark.parametrize("which", ENDS)
@each_net
def test_lanczos_finds_the_eigenpairs_of_the_dense_matrix(kind, id, which):
    m = dense(kind, id)
    found = top_eigenpairs(matrix(kind, id).linearize(), 4, which=which, generator=seeded(), max_products=4000)
    scale = float(m.norm())
    assert_close(found.values, leading(torch.linalg.eigvalsh(m), which, 4), rtol=1e-8, atol=1e-10 * scale)
    assert_close(found.vectors @ m, found.values[:, None] * found.vectors, rtol=1e-8, atol=1e-9 * scale)
    exact(found.vectors @ found.vectors.mT, torch.eye(4, dtype=m.dtype))


@pytest.mark.parametrize("which", ["largest", "smallest"])
@pytest.mark.filterwarnings("ignore::nngeo.linalg.cg.ConvergenceWarning")  # slow in a null space, but near it
@each_net
def test_lobpcg_finds_the_eigenpairs_of_the_dense_matrix(kind, id, which):
    m = dense(kind, id)
    found = top_eigenpairs(
        of_tensor(m), 3, method="lobpcg", which=which, generator=seeded(), rtol=1e-6, max_products=6000
    )
    assert_close(found.values, leading(torch.linalg.eigvalsh(m), which, 3), rtol=0, atol=1e-6 * float(m.norm()))


@each_seed
@pytest.mark.parametrize("which", ENDS)
def test_eigenvalues_that_occur_several_times_are_found_as_often(which, seed):
    values = torch.cat([torch.full((5,), 3.0), torch.full((5,), -3.5), torch.linspace(-1, 1, 80)]).double()
    found = top_eigenpairs(with_spectrum(values), 7, which=which, generator=seeded(seed))
    exact(found.values, leading(values, which, 7))


def test_the_null_space_of_a_matrix_of_low_rank_is_found():
    values = torch.cat([torch.linspace(0.5, 1, 30), torch.zeros(70)]).double()
    assert_close(
        top_eigenpairs(with_spectrum(values), 5, which="smallest", generator=seeded()).values,
        torch.zeros(5, dtype=torch.float64),
        rtol=0,
        atol=1e-10,
    )


@pytest.mark.parametrize("m", [torch.zeros(9, 9), torch.eye(9)], ids=["zero", "identity"])
def test_all_eigenvalues_of_a_matrix_that_is_a_number_are_found(m):
    exact(top_eigenpairs(of_tensor(m.double()), 9, generator=seeded()).values, m.diagonal().double())


def test_restarts_with_a_small_basis_find_the_same():
    values = torch.arange(1, 151).double() ** -0.5
    found = top_eigenpairs(with_spectrum(values), 3, basis=8, generator=seeded(), max_products=3000)
    exact(found.values, values[:3])


def test_a_preconditioner_saves_lobpcg_products():
    values = torch.logspace(-6, 0, 200).double()
    basis, _ = torch.linalg.qr(normal(200, 200))
    matrices = {p: of_tensor(basis @ (values**p).diag() @ basis.mT) for p in (1, -0.8)}
    options: dict[str, Any] = {"method": "lobpcg", "which": "smallest", "rtol": 1e-9, "max_products": 400}
    with pytest.warns(ConvergenceWarning, match="LOBPCG stopped"):
        top_eigenpairs(matrices[1], 2, generator=seeded(), **options)
    found = top_eigenpairs(matrices[1], 2, generator=seeded(), preconditioner=matrices[-0.8].mv, **options)
    assert_close(found.values, values[:2], rtol=1e-2, atol=0)


def test_eigenpairs_that_do_not_converge_warn():
    with pytest.warns(ConvergenceWarning, match="Lanczos stopped after about 20 products"):
        top_eigenpairs(with_spectrum(torch.linspace(1, 2, 300).double()), 3, max_products=20, generator=seeded())


@each_net
def test_spectral_norms_are_those_of_the_dense_matrix(kind, id):
    found, m = matrix(kind, id).linearize(), dense(kind, id)
    exact(found.norm(2), torch.linalg.matrix_norm(m, 2))
    exact((found + 20.0).cond(), torch.linalg.cond(m + 20.0 * torch.eye(len(m), dtype=m.dtype)))


@pytest.mark.parametrize(
    "kind", [nngeo.PMatDense, PMatDiag, PMatKFAC, PMatEKFAC, nngeo.PMatLowRank], ids=lambda kind: kind.__name__
)
def test_every_matrix_has_eigenpairs_and_estimates_by_its_products(kind):
    found = setting(*cases_of("linear")).fim(kind)
    m = found.to_torch()
    exact(top_eigenpairs(found, 3, generator=seeded()).values, leading(torch.linalg.eigvalsh(m), "largest", 3))
    assert_estimates(estimate_trace(found, 30, generator=seeded()), m.trace())
    assert_estimates(trace_of(found, torch.square, generator=seeded()), m.square().sum())


# ------------------------------------------------------------------------------------------ estimates


def assert_estimates(found: Any, truth: Tensor, errors: float = 4.0) -> None:
    """Within so many standard errors; of the norm, where there are several numbers."""
    assert found.value.shape == found.error.shape == truth.shape
    assert (found.value - truth).norm() <= errors * found.error.norm() + 1e-9 * truth.norm()


@each_seed
@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
@each_net
def test_traces_are_within_their_errors(kind, id, method, seed):
    m = dense(kind, id)
    assert_estimates(estimate_trace(of_tensor(m), 60, method=method, generator=seeded(seed)), m.trace())


@each_seed
@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
@each_net
def test_diagonals_are_within_their_errors(kind, id, method, seed):
    m = dense(kind, id)
    assert_estimates(estimate_diag(of_tensor(m), 24, method=method, generator=seeded(seed)), m.diagonal(), errors=3.0)


@each_seed
@each_fisher
def test_methods_estimate_from_the_products_of_the_network(id, seed):
    found, m = matrix("fisher", id).linearize(), dense("fisher", id)
    assert_estimates(found.estimate_trace(20, generator=seeded(seed)), m.trace())
    assert_estimates(found.estimate_diag(20, generator=seeded(seed)), m.diagonal())
    assert_estimates(found.trace_of(torch.square, samples=30, steps=15, generator=seeded(seed)), m.square().sum())
    truth = torch.logdet(damped("fisher", id, 0.1))
    assert_estimates((found + 0.1).logdet(samples=20, steps=60, generator=seeded(seed)), truth)


ESTIMATORS: dict[str, Callable[..., Any]] = {
    "trace hutchinson": partial(estimate_trace, method="hutchinson"),
    "trace hutch++": partial(estimate_trace, method="hutch++"),
    "trace xtrace": partial(estimate_trace, method="xtrace"),
    "diagonal hutchinson": partial(estimate_diag, method="hutchinson"),
    "diagonal xdiag": partial(estimate_diag, method="xdiag"),
}
SPECTRA = {
    "decay": torch.arange(1, 151).double() ** -1.5,
    "flat": torch.linspace(0.5, 1.5, 150).double(),
    "indefinite": torch.linspace(-1, 2, 150).double(),
}


def spread(
    estimate: Callable[..., Any], of: Products, samples: int, truth: Tensor, seeds: int = 40
) -> tuple[float, float]:
    """The root mean squares of the true and the reported error over some seeds."""
    found = [estimate(of, samples, generator=seeded(seed)) for seed in range(seeds)]
    true = torch.stack([(each.value - truth).square().mean() for each in found]).mean().sqrt()
    return float(true), float(torch.stack([each.error.square().mean() for each in found]).mean().sqrt())


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_reported_errors_are_the_true_ones(name, spectrum):
    of = with_spectrum(SPECTRA[spectrum])
    m = of.mv(torch.eye(150).double())
    true, reported = spread(ESTIMATORS[name], of, 40, m.trace() if "trace" in name else m.diagonal())
    assert 0.65 < reported / true < 1.8


@pytest.mark.parametrize("name", ["trace xtrace", "diagonal xdiag"])
def test_estimates_that_share_their_vectors_do_not_report_too_small_an_error(name):
    """The spread of such estimates alone would be 0.8 of the true error here."""
    of = with_spectrum(1 / torch.arange(1, 101).double())
    m = of.mv(torch.eye(100).double())
    true, reported = spread(ESTIMATORS[name], of, 20, m.trace() if "trace" in name else m.diagonal(), seeds=200)
    assert 0.95 < reported / true < 1.3


@pytest.mark.parametrize("name", ["trace hutchinson", "diagonal hutchinson"])
def test_the_error_of_hutchinson_halves_with_four_times_the_samples(name):
    of = with_spectrum(SPECTRA["decay"])
    few, many = (ESTIMATORS[name](of, samples, generator=seeded()).error.norm() for samples in (250, 1000))
    assert_close(many / few, torch.tensor(0.5).double(), rtol=0.15, atol=0)


@pytest.mark.parametrize("name", ["trace hutch++", "trace xtrace", "diagonal xdiag"])
def test_errors_fall_faster_than_that_where_the_spectrum_decays(name):
    of = with_spectrum(SPECTRA["decay"])
    m = of.mv(torch.eye(150).double())
    truth = m.trace() if "trace" in name else m.diagonal()
    few, many = (spread(ESTIMATORS[name], of, samples, truth)[0] for samples in (15, 60))
    assert many < few / 4


def test_xtrace_needs_fewer_products_than_the_others_where_the_spectrum_decays():
    of = with_spectrum(SPECTRA["decay"])
    names = ["trace hutchinson", "trace hutch++", "trace xtrace"]
    errors = [spread(ESTIMATORS[name], of, 60, SPECTRA["decay"].sum())[0] for name in names]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", ["trace xtrace", "diagonal xdiag"])
def test_matrices_of_low_rank_are_found_exactly(name):
    of = with_spectrum(torch.cat([torch.rand(9, generator=seeded()) - 0.5, torch.zeros(60)]).double())
    m = of.mv(torch.eye(69).double())
    found = ESTIMATORS[name](of, 24, generator=seeded())
    exact(found.value, m.trace() if "trace" in name else m.diagonal())
    assert found.error.max() < 1e-9


@pytest.mark.parametrize("name", ESTIMATORS)
def test_as_many_samples_as_parameters_are_enough_and_zero_is_no_exception(name):
    found = ESTIMATORS[name](of_tensor(torch.zeros(4, 4).double()), 12, generator=seeded())
    exact(torch.stack([found.value.sum(), found.error.sum()]), torch.zeros(2).double())
    many = ESTIMATORS[name](of_tensor(torch.zeros(40, 40).double()), 12, generator=seeded())
    exact(torch.stack([many.value.sum(), many.error.sum()]), torch.zeros(2).double())


@pytest.mark.parametrize("name", ["trace hutchinson", "diagonal hutchinson"])
def test_groups_of_samples_do_not_matter(name, monkeypatch):
    of = with_spectrum(SPECTRA["flat"])
    whole = ESTIMATORS[name](of, 20, generator=seeded())
    monkeypatch.setattr("nngeo.linalg.operator.BUDGET", 150 * 6)
    grouped = ESTIMATORS[name](of, 20, generator=seeded())
    assert_close(grouped.error, whole.error, rtol=1.0, atol=0)
    assert (grouped.value - whole.value).norm() < 6 * whole.error.norm()


# ------------------------------------------------------------------------------------------ quadrature


@each_seed
@each_net
def test_traces_of_functions_are_within_their_errors(kind, id, seed):
    m = dense(kind, id)
    found = trace_of(of_tensor(m), torch.exp, samples=40, steps=40, generator=seeded(seed))
    assert_estimates(found, torch.linalg.eigvalsh(m).exp().sum())


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5])
def test_three_steps_are_exact_for_polynomials_up_to_the_fifth_degree(degree):
    values = torch.linspace(-1, 2, 40).double()  # of a diagonal matrix, for which random signs have no variance
    found = trace_of(of_tensor(values.diag()), lambda x: x**degree, steps=3, generator=seeded())
    exact(torch.stack([found.value, found.error]), torch.stack([(values**degree).sum(), torch.zeros(()).double()]))


def test_more_steps_than_the_krylov_space_has_change_nothing():
    values = torch.tensor([1.0, 1.0, 2.0, 5.0, 5.0, 5.0]).double()
    found = logdet(of_tensor(values.diag()), steps=50, generator=seeded())
    exact(found.value, values.log().sum())


def test_the_quadrature_of_the_logarithm_converges_in_the_steps():
    values = torch.logspace(-3, 0, 200).double()
    gaps = [
        abs(float(logdet(of_tensor(values.diag()), steps=s, generator=seeded()).value - values.log().sum()))
        for s in (10, 20, 40, 80)
    ]
    assert gaps[3] < 1e-3 * gaps[2] and gaps[2] < 0.1 * gaps[1] < 0.1 * gaps[0]


def test_the_logarithm_of_an_indefinite_determinant_is_refused():
    with pytest.raises(ValueError, match=r"not positive definite.*F \+ damping"):
        matrix("hessian", "layer_norm").logdet(samples=2, generator=seeded())


def test_the_spectral_density_is_that_of_the_eigenvalues():
    values = torch.cat([torch.linspace(0, 1, 90), torch.full((10,), 3.0)]).double()
    grid, density, width = spectral_density(of_tensor(values.diag()), steps=60, broadening=0.05, generator=seeded())
    exact(torch.trapezoid(density, grid), torch.ones(()).double(), rtol=1e-3)
    exact(torch.trapezoid(density * grid, grid), values.mean(), rtol=1e-3)
    exact(torch.trapezoid(density * (grid > 2), grid), torch.tensor(0.1).double(), rtol=1e-3)
    bells = torch.exp(-0.5 * ((grid - values[:, None]) / width) ** 2) / (width * (2 * torch.pi) ** 0.5)
    assert (density - bells.mean(0)).abs().max() < 0.02 * density.max()


def test_the_density_of_a_network_spans_its_eigenvalues():
    found, values = matrix("hessian", "layer_norm"), torch.linalg.eigvalsh(dense("hessian", "layer_norm"))
    grid, density, width = found.linearize().spectral_density(samples=3, generator=seeded())
    assert grid[0] < values[0] and grid[-1] > values[-1] and (density >= 0).all()


@pytest.mark.parametrize("m", [torch.zeros(8, 8), torch.eye(8)], ids=["zero", "identity"])
def test_one_eigenvalue_has_a_density(m):
    grid, density, _ = spectral_density(of_tensor(m.double()), generator=seeded())
    exact(torch.trapezoid(density, grid), torch.ones(()).double(), rtol=1e-3)


def test_weights_are_those_of_a_probability():
    rule = Quadrature.of(with_spectrum(SPECTRA["indefinite"]), samples=3, steps=20, generator=seeded())
    exact(rule.weights.sum(-1), torch.ones(3).double())
    assert (rule.weights >= 0).all()


# ------------------------------------------------------------------------------------------ generators, refusals


RANDOM: dict[str, Callable[..., Any]] = {
    **{name: partial(method, samples=12) for name, method in ESTIMATORS.items()},
    "trace_of": partial(trace_of, f=torch.exp),
    "density": spectral_density,
    "lanczos": top_eigenpairs,
    "lobpcg": partial(top_eigenpairs, method="lobpcg"),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_generator_decides_all_numbers_and_spares_the_global_one(name):
    of, before = with_spectrum(SPECTRA["decay"]), torch.get_rng_state()
    first, again = (RANDOM[name](of, generator=seeded(3)) for _ in range(2))
    assert_close(tuple(first), tuple(again), rtol=0, atol=0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_without_a_generator_the_global_numbers_are_used(name):
    of = with_spectrum(SPECTRA["flat"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first, second = (ESTIMATORS[name](of, 12) for _ in range(2))
    assert not torch.equal(first.value, second.value)


REFUSED: dict[str, tuple[type[Exception], str, Callable[[Any], Any]]] = {
    "eigh": (NotImplementedError, "top_eigenpairs.*PMatDense", lambda f: f.eigh()),
    "pow": (NotImplementedError, "products with vectors only", lambda f: f.pow(0.5)),
    "sample": (NotImplementedError, "PMatLowRank", lambda f: f.sample(2)),
    "sum": (NotImplementedError, "one of all examples", lambda f: f + f),
    "update": (NotImplementedError, "two sets of examples", lambda f: f.update((normal(2, 3),))),
    "pooled": (NotImplementedError, "two sets of examples", lambda f: f.pooled(f)),
    "diagonal of the inverse": (NotImplementedError, "estimate_diag", lambda f: f.get_diag(inverse=True)),
    "saving": (NotImplementedError, "no data", lambda f: f.state_dict()),
    "samples": (ValueError, "at least 4 samples", lambda f: f.estimate_trace(2)),
    "method": (ValueError, "'hutchinson', 'hutch\\+\\+', 'xtrace'", lambda f: f.estimate_trace(9, method="exact")),
    "diagonal": (ValueError, "'hutchinson', 'xdiag'", lambda f: f.estimate_diag(9, method="exact")),
    "k": (ValueError, "from 1 to", lambda f: f.top_eigenpairs(0)),
    "which": (ValueError, "'largest', 'smallest', 'magnitude'", lambda f: f.top_eigenpairs(1, which="middle")),
    "eigensolver": (ValueError, "'lanczos', 'lobpcg'", lambda f: f.top_eigenpairs(1, method="qr")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_defined_says_what_to_use(name):
    error, message, call = REFUSED[name]
    with pytest.raises(error, match=message):
        call(matrix("fisher", "linear"))


@pytest.mark.parametrize("rows", [(), (2,)], ids=["one vector", "two vectors"])
def test_products_with_vectors_made_in_inference_mode_are_the_same(rows):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    matrix = nngeo.FIM(model, torch.randn(5, 3, dtype=torch.float64), PMatImplicit)
    v = torch.randn(*rows, 26, dtype=torch.float64)
    with torch.inference_mode():
        found = matrix.mv(v.clone())
    exact(found.clone(), matrix.mv(v))
