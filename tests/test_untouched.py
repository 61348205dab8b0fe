"""The user's model, loader and random numbers come back as they were, whatever happens."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

import nngeo
from nngeo import FIM, FIM_MonteCarlo, LayerCollection, PMatDiag, PMatImplicit


class Everything(nn.Module):
    """All that a sweep could leave changed: buffers, attributes, frozen parts, hooks and mixed training flags."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.normed = nn.utils.weight_norm(nn.Linear(4, 3))
        self.frozen, self.head = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.norm(self.first(x[:, None])).flatten(1)
        if (x > 100).any():
            raise RuntimeError("too large")
        return self.head(self.frozen(self.normed(self.last).tanh()).tanh())


def hook(*args: Any) -> None: ...


def build() -> nn.Module:
    torch.manual_seed(0)
    model = Everything().double().train()
    model.norm.eval().running_mean.normal_()
    model.head.register_forward_hook(hook)
    model.head.register_full_backward_hook(hook)
    model(torch.randn(4, 3, dtype=torch.float64)).sum().backward()
    model.head.bias.grad = None
    return model


fixture = pytest.fixture(build, name="model")
X = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
DATA = TensorDataset(X, torch.arange(7) % 3)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Buffers, and tensors that are plain attributes."""
    return {k: v for k, v in vars(module).items() if isinstance(v, Tensor)} | dict(module.named_buffers(recurse=False))


def facts(model: nn.Module) -> dict[str, Any]:
    """What is compared by equality: identities, flags, hooks and random numbers."""
    flags = torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    found: dict[str, Any] = {"random": torch.get_rng_state().tolist(), "flags": flags}
    for name, p in model.named_parameters():
        found[f"parameter {name}"] = id(p), id(p.grad), p.requires_grad, p._version, p._backward_hooks
    for name, module in model.named_modules():
        hooks = {key: list(value.items()) for key, value in vars(module).items() if key.endswith("_hooks")}
        found[f"module {name}"] = id(module), module.training, list(vars(module)), list(module._parameters), hooks
        found[f"tensors {name}"] = {key: id(value) for key, value in tensors_of(module).items()}
    return found


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors."""
    found = {f"{name} {key}": t for name, module in model.named_modules() for key, t in tensors_of(module).items()}
    found |= dict(model.named_parameters())
    found |= {f"{name} grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


@contextmanager
def unchanged(model: nn.Module):
    known, before = facts(model), values(model)
    yield
    assert facts(model) == known
    assert_close(values(model), before, rtol=0, atol=0)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """All tensors after a step of an optimizer."""
    F.cross_entropy(model(X), DATA.tensors[1]).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return values(model)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def fisher(name: str, **options: Any) -> Any:
    layers = LayerCollection.from_model(build(), ["first", "head"])
    return lambda model, loader: FIM(model, loader, getattr(nngeo, name), layer_collection=layers, **options)


def product(matrix: Any) -> Tensor:
    return matrix.mv(nngeo.random_pvector(matrix.layer_collection, dtype=X.dtype, generator=seeded())).to_torch()


def there_and_back(J: Any) -> None:
    J.vjp(J.jvp(nngeo.random_pvector(J.layer_collection, dtype=X.dtype, generator=seeded())))


STORED = "Dense Diag BlockDiag KFAC EKFAC EKFACBlockDiag QuasiDiag LowRank".split()
CALLS = {f"FIM {name}": fisher(f"PMat{name}") for name in STORED} | {
    "FIM Mixed": fisher("PMatMixed", default_representation=PMatDiag, map_layers_to={"head": nngeo.PMatKFAC}),
    "FIM of all layers": lambda model, loader: FIM(model, loader, PMatDiag),
    "FIM without check": fisher("PMatDiag", check=False),
    "FIM empirical": fisher("PMatDiag", empirical=True),
    "update_diag": lambda model, loader: fisher("PMatEKFAC")(model, loader).update_diag(loader),
    "FIM_MonteCarlo": lambda model, loader: FIM_MonteCarlo(model, loader, PMatDiag, generator=seeded()),
    "mv": lambda model, loader: product(FIM(model, loader, PMatImplicit)),
    "get_diag": lambda model, loader: FIM(model, loader, PMatImplicit).get_diag(),
    "NTK": nngeo.NTK,
    "NTK of two sets": lambda model, loader: nngeo.NTK(model, loader, (X[:2],)),
    "Jacobian": nngeo.Jacobian,
    "jvp": lambda model, loader: there_and_back(nngeo.Jacobian(model, loader, representation=nngeo.PFMapImplicit)),
    "Hessian": lambda model, loader: nngeo.Hessian(model, loader, nngeo.PMatDense, F.cross_entropy),
    "Hessian mv": lambda model, loader: product(nngeo.Hessian(model, loader, PMatImplicit, F.cross_entropy)),
    "GGN": lambda model, loader: nngeo.GGN(model, loader, PMatDiag, F.cross_entropy),
    "GGN mv": lambda model, loader: product(nngeo.GGN(model, loader, PMatImplicit, F.cross_entropy)),
}
SWEEPS = {key: CALLS[key] for key in ("FIM of all layers", "NTK", "mv", "Hessian mv", "jvp")}
each_sweep = pytest.mark.parametrize("call", SWEEPS.values(), ids=SWEEPS)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_model_comes_back_as_it_was_and_trains_on(call, model):
    with unchanged(model):
        call(model, DataLoader(DATA, 3))
    assert_close(trained(model), trained(build()), rtol=0, atol=0)


@each_sweep
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_the_model_can_be_copied_afterwards(copied, call, model):
    model.last = model.normed.weight = None  # torch itself copies no tensors that have a graph
    call(model, DataLoader(DATA, 3))
    assert_close(copied(model)(X), model(X))


class Changed(TensorDataset):
    """Examples that are changed when they are read."""

    def __init__(self, change: Any):
        super().__init__(*DATA.tensors)
        self.change = change

    def __getitem__(self, index: int) -> Any:
        return self.change(index, X[index]), DATA[index][1]


ENDS = {
    "a module": (RuntimeError, lambda index, x: x + 1000 * (index == 6)),
    "the loader": (SystemExit, lambda index, x: sys.exit() if index == 6 else x),
    "the outputs": (ValueError, lambda index, x: torch.nan * x if index == 6 else x),
}
REFUSED = {
    "a layer": (NotImplementedError, lambda model: FIM(model, DATA[:], nngeo.PMatKFAC)),
    "noise": (ValueError, lambda model: FIM(model, DATA[:], PMatDiag, function=lambda x, y: F.dropout(model(x)))),
}


@each_sweep
@pytest.mark.parametrize(("error", "change"), ENDS.values(), ids=ENDS)
def test_the_model_comes_back_when_the_third_batch_raises(error, change, call, model):
    with unchanged(model), pytest.raises(error):
        call(model, DataLoader(Changed(change), 3))


@pytest.mark.parametrize(("error", "call"), REFUSED.values(), ids=REFUSED)
def test_the_model_comes_back_when_it_is_refused(error, call, model):
    with unchanged(model), pytest.raises(error):
        call(model)


class Writer(nn.Linear):
    """A layer that writes to itself."""

    def __init__(self, write: Any):
        super().__init__(3, 3)
        self.write, self.plain = write, torch.zeros(3)
        self.register_buffer("moving", torch.zeros(3))
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        self.write(self, x.detach().mean(0))
        return super().forward(x)


WRITES = {
    "a buffer in place": lambda layer, x: layer.moving.add_(x),
    "another buffer": lambda layer, x: setattr(layer, "moving", layer.moving + x),
    "a buffer that was None": lambda layer, x: setattr(layer, "late", x),
    "an attribute in place": lambda layer, x: layer.plain.add_(x),
    "a gradient": lambda layer, x: setattr(layer.weight, "grad", torch.ones_like(layer.weight)),
    "a new attribute": lambda layer, x: setattr(layer, "fresh", x),
    "gradients": lambda layer, x: backward_of(F.linear(x, layer.weight, layer.bias).sum()),
}


@torch.enable_grad()
def backward_of(loss: Tensor) -> None:
    loss.backward()


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@each_sweep
def test_what_a_forward_writes_is_undone(call, write):
    model = nn.Sequential(Writer(write), nn.Tanh(), nn.Linear(3, 3)).double()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with unchanged(model):
        call(model, DataLoader(DATA, 3))


NOISY = Changed(lambda index, x: x + torch.rand(3, dtype=x.dtype))
LOADERS = {
    "shuffling": lambda g: DataLoader(DATA, 3, shuffle=True),
    "shuffling with a generator": lambda g: DataLoader(DATA, 3, shuffle=True, generator=g),
    "a sampler": lambda g: DataLoader(DATA, 3, sampler=RandomSampler(DATA, generator=g)),
    "weighted": lambda g: DataLoader(DATA, 3, sampler=WeightedRandomSampler([1.0] * 7, 7, generator=g)),
    "batches": lambda g: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA, generator=g), 3, False)),
    "augmenting": lambda g: DataLoader(NOISY, 3, shuffle=True, generator=g),
}
each_loader = pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)


@each_sweep
@each_loader
def test_the_loader_gives_what_it_would_have_given(loader, call, model):
    torch.manual_seed(5)
    expected = list(loader(seeded()))
    torch.manual_seed(5)
    call(model, mine := loader(seeded()))
    assert_close(list(mine), expected, rtol=0, atol=0)


@each_loader
def test_every_sweep_sees_the_same_examples_and_draws(loader, model):
    matrix = FIM_MonteCarlo(model, loader(seeded()), PMatImplicit, generator=seeded())
    assert_close(product(matrix), product(matrix))
