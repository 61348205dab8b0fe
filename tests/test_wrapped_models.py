"""Models that are compiled, scripted, spread over processes, or not there yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import nngeo
from nngeo import FIM, GGN, NTK, Hessian, Jacobian, LayerCollection, PVector
from nngeo.descent import Engine, backward
from nngeo.descent.aggregation import UPGrad
from nngeo.products import jacobian, jTmjp
from nngeo.uses import Laplace
from tests import reference

EXACT = {"rtol": 1e-8, "atol": 1e-10}


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean()


X, Y = drawn(5, 4), drawn(5, 2)
SAYS: dict[str, Callable[[nn.Module], Any]] = {
    "FIM": lambda model: FIM(model, (X,), nngeo.PMatDiag, variant="regression"),
    "GGN": lambda model: GGN(model, (X, Y), nngeo.PMatDense, mean_square),
    "Hessian": lambda model: Hessian(model, (X, Y), nngeo.PMatDense, mean_square),
    "NTK": lambda model: NTK(model, X),
    "Jacobian": lambda model: Jacobian(model, X),
    "products": lambda model: jacobian(model, X, "weight"),
    "graphs": lambda model: jacobian(model, X, "weight", create_graph=True),
    "engine": lambda model: Engine(model, batch_dim=0),
    "posterior": lambda model: Laplace.fit(model, (X, Y), nngeo.PMatDiag, likelihood="regression"),
}
STRUCTURE: dict[str, Callable[[nn.Module], Any]] = {
    "layers": LayerCollection.from_model,
    "vectors": PVector.from_model,
    "vectors of known layers": lambda model: PVector.from_model(model, LayerCollection.from_model(net())),
    "vectors into a model": lambda model: PVector.from_model(net()).to_model(model),
}
each_way = pytest.mark.parametrize("says", SAYS.values(), ids=SAYS)
everywhere = pytest.mark.parametrize("says", (SAYS | STRUCTURE).values(), ids=SAYS | STRUCTURE)


# ------------------------------------------------------------------------------------------ compiled


def in_place(model: nn.Sequential) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def in_part(model: nn.Sequential) -> nn.Module:
    model[0] = torch.compile(model[0], backend="aot_eager")
    return model


COMPILED: dict[str, Callable[[nn.Sequential], Any]] = {
    "wrapped": lambda model: torch.compile(model, backend="aot_eager"),
    "in place": in_place,
    "a part": in_part,
}
each_compiled = pytest.mark.parametrize("compiled", COMPILED.values(), ids=COMPILED)
REPRESENTATIONS = [
    nngeo.PMatDense, nngeo.PMatDiag, nngeo.PMatBlockDiag, nngeo.PMatQuasiDiag, nngeo.PMatLowRank, nngeo.PMatImplicit,
    nngeo.PMatKFAC, nngeo.PMatEKFAC,
]  # fmt: skip


@each_compiled
@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_compiled_models_have_the_matrices_of_the_model(compiled, representation):
    expected = FIM(net(), (X,), representation, variant="regression").to_torch()
    assert_close(FIM(compiled(net()), (X,), representation, variant="regression").to_torch(), expected, **EXACT)


@each_compiled
def test_compiled_models_have_its_derivatives(compiled):
    plain, model = net(), compiled(net())
    for_weights = SAYS["products"]
    assert_close(NTK(model, X).to_torch(), NTK(plain, X).to_torch(), **EXACT)
    assert_close(SAYS["Hessian"](model).to_torch(), SAYS["Hessian"](plain).to_torch(), **EXACT)
    assert_close(for_weights(model), for_weights(plain), **EXACT)
    assert_close(jTmjp(model, X), jTmjp(plain, X), **EXACT)
    layer_by_layer = {"wrt": "weight", "result": "diag", "method": "diag_backprop"}
    assert_close(jTmjp(model, X, **layer_by_layer), jTmjp(plain, X, **layer_by_layer), **EXACT)


def test_compiled_functions_are_run_as_they_were_written():
    model = net()
    function = torch.compile(lambda x: 2 * model(x), backend="aot_eager")
    expected = 4 * FIM(model, (X,), nngeo.PMatKFAC, variant="regression").to_torch()
    assert_close(
        FIM(model, (X,), nngeo.PMatKFAC, variant="regression", function=function).to_torch(), expected, **EXACT
    )


# ------------------------------------------------------------------------------------------ scripted


def scripted(model: nn.Module) -> nn.Module:
    return torch.jit.script(model)


SCRIPTED: dict[str, Callable[[nn.Module], Any]] = {
    "scripted": scripted,
    "traced": lambda model: torch.jit.trace(model, X),
    "frozen": lambda model: torch.jit.freeze(scripted(model.eval())),
}
quiet = pytest.mark.filterwarnings("ignore:.*torch.jit")


@quiet
@everywhere
@pytest.mark.parametrize("inside", [False, True])
def test_scripted_models_have_no_derivatives_by_weights(says, inside):
    model = nn.Sequential(scripted(net()), nn.Linear(2, 2).double()) if inside else scripted(net())
    with pytest.raises(NotImplementedError, match="scripted module .TorchScript."):
        says(model)


@quiet
@pytest.mark.parametrize("script", SCRIPTED.values(), ids=SCRIPTED)
@pytest.mark.parametrize("create_graph", [False, True])
def test_scripted_models_have_derivatives_by_inputs(script, create_graph):
    expected = jacobian(net(), X)
    assert_close(jacobian(script(net()), X, create_graph=create_graph).detach(), expected, **EXACT)
    squares = expected.square().sum(1)  # the whole is one layer
    assert_close(jTmjp(script(net()), X, result="diag", method="diag_backprop"), squares, **EXACT)


@quiet
def test_scripted_parts_without_parameters_are_run():
    model = net()
    expected = reference.jacobian(model, (X, Y))
    model[1] = scripted(model[1])
    assert_close(Jacobian(model, X).to_torch(), expected, **EXACT)


# ------------------------------------------------------------------------------------------ several processes


@pytest.fixture
def two_processes() -> Iterator[Any]:
    """As one of them sees it: nothing is sent."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@each_way
@pytest.mark.parametrize("inside", [False, True])
def test_examples_spread_over_processes_are_refused(two_processes, says, inside):
    model: nn.Module = DistributedDataParallel(net())
    model = nn.Sequential(model, nn.Tanh()) if inside else model
    with pytest.raises(NotImplementedError, match=r"over 2 processes .*model\.module"):
        says(model)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_a_single_process_holds_all(one_process, representation):
    expected = FIM(net(), (X,), representation, variant="regression").to_torch()
    model = DistributedDataParallel(net())
    assert_close(FIM(model, (X,), representation, variant="regression").to_torch(), expected, **EXACT)


def test_products_in_a_single_process(one_process):
    model = DistributedDataParallel(net())
    assert_close(NTK(model, X).to_torch(), NTK(net(), X).to_torch(), **EXACT)
    assert_close(SAYS["products"](model), SAYS["products"](net()), **EXACT)
    assert_close(SAYS["Hessian"](model).to_torch(), SAYS["Hessian"](net()).to_torch(), **EXACT)


def sharded_2(model: nn.Sequential, mesh: Any) -> nn.Module:
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensors(model: nn.Sequential, mesh: Any) -> nn.Module:
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)]))
    return model


def sharded_1(model: nn.Sequential, mesh: Any, original: bool) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=original)


SHARDED: dict[str, tuple[Callable[[nn.Sequential, Any], nn.Module], str]] = {
    "FSDP": (lambda model, mesh: sharded_1(model, mesh, False), "sharded by FSDP"),
    "FSDP of original parameters": (lambda model, mesh: sharded_1(model, mesh, True), "sharded by FSDP"),
    "fully_shard": (sharded_2, "sharded by FSDP"),
    "DTensor": (tensors, "'weight' of Linear '0' is a DTensor"),
}


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed")
@everywhere
@pytest.mark.parametrize("shard, match", SHARDED.values(), ids=SHARDED)
def test_shards_are_not_taken_for_the_whole(two_processes, shard, match, says):
    model = shard(net(), two_processes)
    with pytest.raises(NotImplementedError, match=match):
        says(model)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed")
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_jacobian_descent_takes_no_shards(two_processes, original, given):
    model = sharded_1(net().float(), two_processes, original)
    losses = model(X.float()).square().sum(1)
    with pytest.raises(NotImplementedError, match="sharded by FSDP, of which this process holds a part only"):
        backward(losses, list(model.parameters()) if given else None, UPGrad())


# ------------------------------------------------------------------------------------------ not there yet


@everywhere
def test_lazy_modules_are_to_be_run_first(says):
    model = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.Linear(3, 2)).double()
    with pytest.raises(ValueError, match=r"'weight' of LazyLinear '0' has no shape yet: run the model once"):
        says(model)


@each_way
def test_models_without_values_are_refused(says):
    with pytest.raises(ValueError, match=r"'0.weight' is on the meta device"):
        says(net().to("meta"))


def test_the_structure_of_a_model_needs_no_values():
    assert LayerCollection.from_model(net().to("meta")) == LayerCollection.from_model(net())
