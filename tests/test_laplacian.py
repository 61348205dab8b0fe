"""forward_laplacian against Hessians that are built entry by entry with autograd."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from nngeo.layers.kernels import plain_kernels
from nngeo.products.laplacian import forward_laplacian
from nngeo.products.metrics import Dense, Diagonal, Factor
from nngeo.products.structured import BlockDiagonal
from tests.cases import CASES
from tests.networks import Net

REAL = [
    case
    for case in CASES
    if case.apply is None and not isinstance(case.data, dict) and case.batch()[0].is_floating_point()
]
SINGLE = [case for case in REAL if not case.tags & {"checkpoint", "differentiates"} and len(case.batch()) == 2]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hessians(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (b, o), Jacobians (b, o, n) and Hessians (b, o, n, n), one entry after the other."""
    x = x.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        y = f(x)
    y = y.reshape(len(y), -1)
    rows, matrices = [], []
    for j in range(y.shape[1]):
        (g,) = torch.autograd.grad(y[:, j].sum(), x, create_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(g.flatten(1))
        lines = []
        for entry in rows[-1].T:
            if entry.requires_grad:
                (h,) = torch.autograd.grad(entry.sum(), x, create_graph=True, allow_unused=True, materialize_grads=True)
            else:
                h = torch.zeros_like(x)
            lines.append(h.flatten(1))
        matrices.append(torch.stack(lines, 1))
    return y, torch.stack(rows, 1), torch.stack(matrices, 1)


def model_of(f: Callable[[Tensor], Tensor], **parts: nn.Module | nn.Parameter) -> Net:
    return Net(lambda net, x: f(x), **parts)


# ------------------------------------------------------------------------------------------ networks and metrics


@pytest.mark.parametrize("case", SINGLE, ids=lambda case: case.id)
def test_one_pass_gives_value_jacobian_and_trace_of_the_hessian(case):
    model, x = case.make(), case.batch()[0][:3]
    with plain_kernels(model):
        y, jacobian, hessian = hessians(model, x)
    found = forward_laplacian(model, x, method="forward")
    assert_close(found.value, y.detach())
    assert_close(found.columns, jacobian.detach())
    assert_close(found.laplacian, hessian.diagonal(dim1=-2, dim2=-1).sum(-1).detach(), rtol=1e-8, atol=1e-10)


def _symmetric(n: int) -> Tensor:
    a = draw(3, n, n, seed=3)
    return a + a.mT


METRICS = {
    "diagonal": (lambda n: Diagonal(draw(3, n).abs()), lambda m, n: torch.diag_embed(m.d)),
    "diagonal_indefinite": (lambda n: Diagonal(draw(n)), lambda m, n: torch.diag(m.d)),
    "tensor": (lambda n: _symmetric(n) @ _symmetric(n), lambda m, n: m),
    "dense_indefinite": (lambda n: Dense(_symmetric(n)), lambda m, n: m.m),
    "dense_nonsymmetric": (lambda n: Dense(draw(n, n)), lambda m, n: m.m),
    "factor": (lambda n: Factor(draw(3, n, 2)), lambda m, n: m.v @ m.v.mT),
    "factor_shared": (lambda n: Factor(draw(n, 1)), lambda m, n: m.v @ m.v.mT),
    "zero": (lambda n: Diagonal(torch.zeros(n, dtype=torch.float64)), lambda m, n: torch.diag(m.d)),
}
ATTENTION = next(case for case in CASES if case.id == "encoder_layer")


@pytest.mark.parametrize("method", ["forward", "backward"])
@pytest.mark.parametrize("kind", METRICS)
def test_trace_with_a_metric(kind, method):
    model, x = ATTENTION.make(), ATTENTION.batch()[0][:3]
    make, dense = METRICS[kind]
    n = x[0].numel()
    metric = make(n)
    with plain_kernels(model):
        hessian = hessians(model, x)[2].detach()
    found = forward_laplacian(model, x, metric, method=method)
    expected = torch.einsum("boij,bij->bo", hessian, dense(metric, n).expand(3, n, n))
    assert found.method == method
    assert_close(found.laplacian, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_of_columns_add_up(chunk):
    model, x = ATTENTION.make(), ATTENTION.batch()[0][:3]
    whole, parts = (forward_laplacian(model, x, Dense(_symmetric(x[0].numel())), chunk=c) for c in (None, chunk))
    assert_close(parts.laplacian, whole.laplacian)
    assert_close(parts.columns, whole.columns)


@pytest.mark.parametrize("wrt", ["x", "y", ("x", "y"), ("y", "x")], ids=str)
def test_inputs_by_name(wrt):
    net = Net(
        lambda net, x, y, flag: (net.a(x) * net.b(y)).tanh() * flag, a=nn.Linear(3, 2), b=nn.Linear(2, 2)
    ).double()
    data = {"x": draw(3, 3), "y": draw(3, 2), "flag": 2.0}
    names = [wrt] if isinstance(wrt, str) else list(wrt)
    sizes = [data[name].shape[1] for name in names]

    def joint(z: Tensor) -> Tensor:
        parts = dict(zip(names, z.split(sizes, 1), strict=True))
        return net.run(net, **{**data, **parts})

    expected = hessians(joint, torch.cat([data[name] for name in names], 1))[2].detach()
    blocks = {
        name: torch.eye(size, dtype=torch.float64) * (i + 2)
        for i, (name, size) in enumerate(zip(names, sizes, strict=True))
    }
    weights = torch.cat([block.diagonal() for block in blocks.values()])
    found = forward_laplacian(net, data, BlockDiagonal(blocks), wrt=wrt, function=lambda d: net.run(net, **d))
    assert_close(found.laplacian, (expected.diagonal(dim1=-2, dim2=-1) * weights).sum(-1), rtol=1e-8, atol=1e-10)


# ------------------------------------------------------------------------------------------ operations

W = draw(6, 6, seed=1)


def bent(x: Tensor) -> Tensor:
    return torch.sin(x @ W) + 0.3 * x * x


def _into_a_clone(x: Tensor) -> Tensor:
    h = bent(x).clone()
    h[:, 0] = x[:, 1] ** 3
    return h**2


def _in_place(x: Tensor) -> Tensor:
    h = bent(x)
    h += x
    h *= x
    h.sigmoid_()
    return h * h


def _through_views(x: Tensor) -> Tensor:
    h = bent(x)
    g = h.reshape(-1, 2, 3).transpose(1, 2)
    g[:, 0].mul_(x[:, :2])
    g.add_(1.0)
    g[:, 1].zero_()
    return h**2


def _one_branch(x: Tensor) -> Tensor:
    return bent(x) if bent(x).sum() > 0 else x**3


def _attention(x: Tensor) -> Tensor:
    q, k, v = (bent(x * s).reshape(-1, 3, 2) for s in (1, 2, 3))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: F.softmax(bent(x), -1),
    "log_softmax": lambda x: F.log_softmax(bent(x).reshape(-1, 2, 3), 1),
    "logsumexp": lambda x: bent(x).logsumexp(-1),
    "div": lambda x: bent(x) / (2 + bent(x) ** 2),
    "reversed": lambda x: (3 - bent(x)) * 2 / (1 + x * x),
    "pow": lambda x: (bent(x) ** 2 + 1) ** bent(x),
    "broadcast": lambda x: torch.atan2(bent(x)[:, :, None], x[:, None] ** 2 + 1),
    "same_twice": lambda x: torch.hypot(bent(x).exp(), bent(x).exp()),
    "normalize": lambda x: F.normalize(bent(x), dim=-1),
    "norm": lambda x: torch.norm(bent(x), 3, dim=-1),
    "std": lambda x: bent(x).std(-1),
    "var_mean": lambda x: torch.cat([m[:, None] for m in torch.var_mean(bent(x), -1)], 1) ** 2,
    "prod": lambda x: bent(x).prod(-1),
    "cumprod": lambda x: bent(x).cumprod(-1),
    "cumsum": lambda x: bent(x).cumsum(-1) ** 2,
    "max": lambda x: bent(x).max(-1)[0] ** 2,
    "amax": lambda x: bent(x).amax(-1) ** 2,
    "sort": lambda x: bent(x).sort(-1)[0] ** 2,
    "topk": lambda x: bent(x).topk(2)[0] ** 2,
    "maximum": lambda x: torch.maximum(bent(x), x**2),
    "outer": lambda x: torch.einsum("bi,bj->bij", bent(x), x.tanh()),
    "bmm": lambda x: bent(x).reshape(-1, 2, 3) @ x.sin().reshape(-1, 3, 2),
    "baddbmm": lambda x: torch.baddbmm(
        bent(x)[:, :4].reshape(-1, 2, 2), *(bent(x).reshape(-1, *s) for s in ((2, 3), (3, 2)))
    ),
    "bilinear": lambda x: F.bilinear(bent(x), x.sin(), torch.stack([W, W.T])),
    "hypernetwork": lambda x: F.conv1d(
        bent(x).reshape(1, -1, 6), x[:, None, :3].sin(), x[:, 0].exp(), groups=len(x)
    ).reshape(len(x), -1),
    "where": lambda x: torch.where(x > 0, bent(x), x.exp()),
    "clamp": lambda x: bent(x).clamp(-0.5, 0.5) ** 2,
    "lerp": lambda x: torch.lerp(bent(x), x.sin(), x.cos()),
    "addcdiv": lambda x: torch.addcdiv(x, bent(x), 2 + x.cos()),
    "cat": lambda x: torch.cat([bent(x), x**2, torch.ones(len(x), 1, dtype=x.dtype)], 1) ** 3,
    "pad": lambda x: F.pad(bent(x), (1, 1), value=2.0) ** 2,
    "index": lambda x: bent(x)[:, [0, 2, 2]] ** 2,
    "gather": lambda x: bent(x).gather(1, torch.zeros(len(x), 2, dtype=torch.long)) ** 2,
    "masked_fill": lambda x: bent(x).masked_fill(x > 0, 3.0) ** 2,
    "unfold": lambda x: bent(x).unfold(1, 2, 2) ** 2,
    "flip": lambda x: bent(x).flip(1) * x.roll(1, 1),
    "split": lambda x: bent(x).split([2, 4], 1)[1] ** 2,
    "expand": lambda x: bent(x)[:, None].expand(-1, 3, -1).sin() * x[:, None],
    "interpolate": lambda x: F.interpolate(bent(x)[:, None], scale_factor=2, mode="linear") ** 2,
    "overlapping_max_pool": lambda x: F.max_pool2d(bent(x).reshape(-1, 1, 2, 3), 2, 1) ** 2,
    "lp_pool": lambda x: F.lp_pool1d(bent(x)[:, None].abs(), 2, 2),
    "response_norm": lambda x: F.local_response_norm(bent(x).reshape(-1, 3, 2), 2),
    "fold": lambda x: F.fold(F.unfold(bent(x).reshape(-1, 1, 2, 3), 2), (2, 3), 2) ** 2,
    "attention": _attention,
    "glu": lambda x: F.glu(bent(x)),
    "polar": lambda x: torch.stack([x.norm(dim=1), torch.atan2(x[:, 0], x[:, 1])], 1),
    "floor": lambda x: bent(x).floor() * x + x**2,
    "into_a_clone": _into_a_clone,
    "in_place": _in_place,
    "through_views": _through_views,
    "detach": lambda x: bent(x) * bent(x).detach(),
    "data": lambda x: bent(x) * bent(x).data,
    "item": lambda x: bent(x) * float(bent(x)[0].abs().max() > 0),
    "branch": _one_branch,
    "ones_like": lambda x: torch.ones_like(x) * x**3,
    "constant": lambda x: 0 * x[:, :1] + torch.ones(len(x), 2, dtype=x.dtype),
    "identity": lambda x: x,
}
ACTIVATIONS = [
    *("CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU", "LogSigmoid", "Mish"),
    *("PReLU", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softmin", "Softplus", "Softshrink", "Softsign", "Tanh"),
    *("Tanhshrink", "GLU"),
]


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_carry_second_derivatives(name):
    f, x = OPERATIONS[name], draw(3, 6)
    y, jacobian, hessian = hessians(f, x)
    found = forward_laplacian(model_of(f), x, _symmetric(6), method="forward")
    assert_close(found.value, y.detach())
    expected = torch.einsum("boij,bij->bo", hessian, _symmetric(6)).detach()
    assert_close(found.laplacian, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("detach", "data")])  # move in differences
def test_operations_carry_what_can_be_differentiated(name):
    f, x = OPERATIONS[name], draw(3, 6).requires_grad_()
    model, metric = model_of(f), _symmetric(6)
    found = forward_laplacian(model, x, metric, method="forward", create_graph=True)
    weights = draw(*found.laplacian.shape, seed=5)
    loss = (found.laplacian * weights).sum() + 0 * x.sum()
    (grad,) = torch.autograd.grad(loss, x)
    step = draw(3, 6, seed=6)

    def value(t: float) -> Tensor:
        at = forward_laplacian(model, x.detach() + t * step, metric, method="forward")
        return (at.laplacian * weights).sum()

    assert_close((grad * step).sum(), slope(value), rtol=1e-5, atol=1e-5)


def slope(value: Callable[[float], Tensor], h: float = 1e-4) -> Tensor:
    """The derivative at 0, by central differences of the fourth order."""
    return (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_carry_second_derivatives(name):
    activation, x = getattr(nn, name)().double(), draw(3, 6)
    smooth = {"Hardsigmoid": lambda h: F.relu6(h + 3) / 6, "Hardswish": lambda h: h * F.relu6(h + 3) / 6}  # twice
    y, _, hessian = hessians(lambda x: smooth.get(name, activation)(bent(x)), x)
    found = forward_laplacian(model_of(lambda x: activation(bent(x)), part=activation), x, method="forward")
    assert_close(found.value, y.detach())
    assert_close(found.laplacian, hessian.diagonal(dim1=-2, dim2=-1).sum(-1).detach(), rtol=1e-8, atol=1e-10)


# ------------------------------------------------------------------------------------------ what has no rule


class Square(torch.autograd.Function):
    """x^2 whose derivative is said to be 3 x."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 3 * g * ctx.saved_tensors[0]


def _without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = bent(x).abs().amax(1, keepdim=True)
    return bent(x) / scale


def _into_a_plain_tensor(x: Tensor) -> Tensor:
    h = torch.zeros(len(x), 6, dtype=x.dtype)
    h[:, 0] = x[:, 1] ** 3
    return h**2


def _gradient_inside(x: Tensor) -> Tensor:
    x = x if x.requires_grad else x.requires_grad_()
    return torch.autograd.grad((bent(x) ** 2).sum(), x, create_graph=True)[0]


def _checkpointed(x: Tensor) -> Tensor:
    return checkpoint(bent, bent(x), use_reentrant=False)


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "custom_function": lambda x: Square.apply(bent(x)),
    "no_grad": _without_gradients,
    "into_a_plain_tensor": _into_a_plain_tensor,
    "gradient_inside": _gradient_inside,
    "linalg": lambda x: torch.linalg.matrix_exp(bent(x)[:, :4].reshape(-1, 2, 2)),
    "checkpointed": _checkpointed,
    "bits": lambda x: bent(x) * (1 + 0 * bent(x).view(torch.int64).double()),
    "power_of_complex": lambda x: ((0.3 + 1j) ** bent(x)).real,  # torch's forward mode leaves the imaginary part out
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused_or_right_and_said(name):
    f, x = REFUSED[name], draw(3, 6)
    expected = hessians(f, x)[2].diagonal(dim1=-2, dim2=-1).sum(-1).detach()
    with pytest.raises(RuntimeError):
        forward_laplacian(model_of(f), x, method="forward")
    with pytest.warns(UserWarning, match="No forward pass"):
        found = forward_laplacian(model_of(f), x)
    assert found.method == "backward"
    assert_close(found.laplacian, expected, rtol=1e-8, atol=1e-10)


# ------------------------------------------------------------------------------------------ gradients of it


def pinn() -> nn.Module:
    layers = [nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 1)]
    torch.manual_seed(0)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("method", ["forward", "backward"])
@pytest.mark.parametrize("network", ["pinn", "encoder_layer", "lstm", "inplace"])
def test_the_result_can_be_differentiated(network, method):
    case = next((case for case in CASES if case.id == network), None)
    model, x = (pinn(), draw(3, 2)) if case is None else (case.make(), case.batch()[0][:2])
    x.requires_grad_()
    tensors = [x, *model.parameters()]
    found = forward_laplacian(model, x, create_graph=True, method=method)
    loss = found.laplacian.square().sum() + found.columns.sin().sum() + found.value.sum()
    grads = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
    steps = [draw(*tensor.shape, seed=j) for j, tensor in enumerate(tensors)]

    def value(t: float) -> Tensor:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, step in zip(moved.parameters(), steps[1:], strict=True):
                p.add_(t * step)
        with plain_kernels(moved):
            y, jacobian, hessian = hessians(moved, x.detach() + t * steps[0])
        return (hessian.diagonal(dim1=-2, dim2=-1).sum(-1).square().sum() + jacobian.sin().sum() + y.sum()).detach()

    inner = sum((g * step).sum() for g, step in zip(grads, steps, strict=True))
    assert_close(inner, slope(value), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------ work, and the model


def test_one_forward_of_the_model_with_a_column_for_each_input():
    layers = [nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)]
    calls: list[int] = []
    model, x = Net(lambda net, x: calls.append(1) or net.body(x), body=nn.Sequential(*layers)), torch.randn(8, 32)
    forward_laplacian(model, x)  # looks at the model for the first time
    forward = flops(lambda: model(x))
    calls.clear()
    found = flops(lambda: forward_laplacian(model, x))
    assert len(calls) == 1
    assert 33 * forward <= found <= 40 * forward  # 34, but the profiler counts an operation again in what it calls


def flops(run: Callable[[], object]) -> int:
    """Of the matrix products."""
    with torch.profiler.profile(with_flops=True) as profile:
        run()
    return sum(event.flops for event in profile.key_averages() if "mm" in event.key)


def test_it_takes_less_time_than_hessian_vector_products():
    model, x = (
        nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1)),
        torch.randn(64, 32),
    )

    def seconds(method: str) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            forward_laplacian(model, x, method=method)
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds("forward") < seconds("backward")


def test_the_model_and_the_random_state_come_back_untouched():
    model, x = pinn(), draw(3, 2)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[2].weight.requires_grad_(False)
    before = {name: p for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    forward_laplacian(model, x, create_graph=True)
    forward_laplacian(model, x)
    assert all(before[name] is p for name, p in model.named_parameters())
    assert not model[2].weight.requires_grad and model[0].weight.requires_grad
    assert_close(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[4].weight.grad is None
    assert torch.equal(state, torch.get_rng_state())
    assert not x.requires_grad


def test_channels_last():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.GELU(), nn.Conv2d(3, 2, 2), nn.Tanh(), nn.Flatten()).double()
    x = draw(3, 2, 4, 4)
    expected = forward_laplacian(model, x).laplacian
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    assert_close(forward_laplacian(model, x, method="forward").laplacian, expected)
    last = forward_laplacian(model, x, method="forward", function=lambda x: model(x.contiguous()))
    assert_close(last.laplacian, expected)
    into = forward_laplacian(
        model, x.contiguous(), method="forward", function=lambda x: model(x.to(memory_format=torch.channels_last))
    )
    assert_close(into.laplacian, expected)


def test_float32_and_no_grad_are_served():
    model, x = pinn().float(), draw(3, 2).float()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = forward_laplacian(model, x)
    assert found.laplacian.dtype == torch.float32 and not found.laplacian.requires_grad
    expected = forward_laplacian(model.double(), x.double()).laplacian
    assert_close(found.laplacian.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "fast"}, ValueError, "known are 'auto', 'forward', 'backward'"),
        ({"chunk": 0}, ValueError, "at least 1"),
        ({"wrt": "weight"}, ValueError, "by the inputs"),
        ({"wrt": "latent"}, ValueError, "latent"),
        ({"metric": torch.eye(3, dtype=torch.float64)}, ValueError, "shape"),
        ({"metric": "identity"}, TypeError, "metric"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        forward_laplacian(pinn(), draw(3, 2), **options)


def test_a_model_in_train_mode_that_draws_is_refused():
    with pytest.raises(ValueError, match="train mode"):
        forward_laplacian(nn.Sequential(nn.Linear(2, 2), nn.Dropout()).double(), draw(3, 2))
