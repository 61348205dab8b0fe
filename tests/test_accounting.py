"""Uses of parameters that a first look at the data can't see: behind zeros, behind branches, behind routing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo
from nngeo import Jacobian, products
from nngeo.generators.batches import Batch
from nngeo.generators.plans import Planner
from tests import networks, reference

EXACT = {"rtol": 1e-8, "atol": 1e-10}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(run, **modules) -> networks.Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in modules.values():
            for child in module.modules():
                getattr(child, "reset_parameters", lambda: None)()
        return networks.Net(run, **modules).double().eval()


def is_exact(model: nn.Module, batches: list[tuple]) -> None:
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    assert_close(Jacobian(model, batches).to_torch(), reference.jacobian(model, whole), **EXACT)


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0)


def adapter(net: networks.Net, x: Tensor) -> Tensor:
    low = F.linear(x, net.down.weight)  # a use of its weight that no hook sees
    return net.head((x + net.up(low)).tanh())


def gate(net: networks.Net, x: Tensor) -> Tensor:
    inner = net.inner(x).tanh()
    return net.head(inner + net.up(inner @ net.inner.weight.T).tanh())


ZEROS = {
    "a head": (lambda net, x: net.up(net.body(x).mean(1)), {"body": attention(), "up": nn.Linear(4, 3)}, (6, 3, 4)),
    "an adapter": (
        adapter,
        {"down": nn.Linear(4, 2, bias=False), "up": nn.Linear(2, 4, bias=False), "head": nn.Linear(4, 3)},
        (6, 4),
    ),
    "a gate": (gate, {"inner": nn.Linear(4, 4), "up": nn.Linear(4, 4), "head": nn.Linear(4, 3)}, (6, 4)),
}


@pytest.mark.parametrize(("run", "modules", "shape"), ZEROS.values(), ids=ZEROS)
def test_what_is_behind_zeros_is_right_when_they_have_changed(run, modules, shape):
    model = made(run, **modules)
    nn.init.zeros_(model.up.weight)
    batch = (drawn(*shape), torch.zeros(shape[0]))
    is_exact(model, [batch])
    nn.init.normal_(model.up.weight, generator=torch.Generator().manual_seed(1))
    is_exact(model, [batch])


def signed(n: int, dead: int) -> Tensor:
    """(n, 4), the first entry negative in the first `dead` examples and positive in the others."""
    x = drawn(n, 4)
    x[:, 0] = x[:, 0].abs() * torch.where(torch.arange(n) < dead, -1.0, 1.0)
    return x


def another_branch(net: networks.Net, x: Tensor) -> Tensor:
    return net.head(torch.where(x[:, :1] < 0, net.other(x), F.linear(x, net.inner.weight)).tanh())


def hidden_in_some(net: networks.Net, x: Tensor) -> Tensor:
    return net.head((net.inner(x) + F.relu(x[:, :1]) * (x @ net.inner.weight.T)).tanh())


@pytest.mark.parametrize("sizes", [[20], [5, 5, 5, 5]], ids=str)
def test_a_use_that_the_first_examples_do_not_come_to_is_found(sizes):
    model = made(another_branch, inner=nn.Linear(4, 4, bias=False), other=nn.Linear(4, 4), head=nn.Linear(4, 2))
    is_exact(model, list(zip(signed(20, 12).split(sizes), torch.zeros(20).split(sizes), strict=True)))


def test_a_use_that_some_of_the_first_examples_come_to_is_found():
    model = made(hidden_in_some, inner=nn.Linear(4, 4), head=nn.Linear(4, 2))
    is_exact(model, [(signed(8, 2), torch.zeros(8))])


def experts(net: networks.Net, x: Tensor) -> Tensor:
    choice, out = net.route(x).argmax(1), torch.zeros_like(x)
    for j, expert in enumerate(net.experts):
        index = (choice == j).nonzero()[:, 0]
        if len(index):
            out = out.index_add(0, index, expert(x[index]).tanh())
    return net.head(out)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("sizes", [[20], [5, 5, 5, 5]], ids=str)
@pytest.mark.filterwarnings("ignore:The outputs do not depend on")  # the choice of an expert has no derivative
def test_experts_that_are_passed_by_are_right(sizes, seed):
    experts_of = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model = made(experts, route=nn.Linear(4, 3), experts=experts_of, head=nn.Linear(4, 2))
    x = drawn(20, 4, seed=seed)
    is_exact(model, list(zip(x.split(sizes), torch.zeros(20).split(sizes), strict=True)))


def test_random_numbers_without_effect_are_no_reason_to_refuse():
    def run(net: networks.Net, x: Tensor) -> Tensor:
        torch.rand(3)
        return net.head(x)

    is_exact(made(run, head=nn.Linear(4, 2)), [(drawn(5, 4), torch.zeros(5))])


def test_an_embedding_that_rewrites_its_weight_is_refused():
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.5), nn.Linear(3, 2))
    before = model[0].weight.detach().clone()
    with pytest.raises(NotImplementedError, match="'0'.*max_norm=0.5"):
        Jacobian(model, (torch.tensor([0, 1, 2]),))
    assert_close(model[0].weight.detach(), before, rtol=0, atol=0)


def test_a_list_of_tensors_is_refused_because_it_could_be_two_things():
    with pytest.raises(ValueError, match="tuple"):
        Jacobian(nn.Linear(3, 2), [torch.ones(5, 3), torch.ones(5, 3)])


def test_the_mask_of_an_encoder_is_not_that_of_the_decoder():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.T5Config(
        vocab_size=9,
        d_model=8,
        d_kv=4,
        d_ff=6,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.T5ForConditionalGeneration(config).double().eval()
    ids = torch.arange(12).reshape(3, 4) % 9
    batch = {"input_ids": ids, "decoder_input_ids": ids.flip(0), "attention_mask": torch.ones(3, 4).long()}
    batch["attention_mask"][:, 2:] = 0
    layers = nngeo.LayerCollection.from_model(model, "decoder.final_layer_norm")
    found = nngeo.FIM(model, batch, nngeo.PMatDiag, "token_logits", layer_collection=layers)
    everywhere = {"layer_collection": layers, "mask": lambda batch: torch.ones(3, 4)}
    assert_close(found.trace(), nngeo.FIM(model, batch, nngeo.PMatDiag, "token_logits", **everywhere).trace())


@pytest.mark.parametrize("depth", [20, 32])
def test_layers_whose_gradients_vanish_beside_others_are_settled(depth):
    """With default parameters each layer divides gradients by about two: the first layers' are beyond rounding."""
    torch.manual_seed(1)
    hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(64, 64), nn.ReLU())]
    model, batch = nn.Sequential(*hidden, nn.Linear(64, 3)), (torch.randn(8, 64), torch.arange(8) % 3)
    layers = nngeo.LayerCollection.from_model(model)
    assert Planner(model, None, layers, check=True).record(Batch(batch)).plan.undetermined == set()
    found = Jacobian(model, [batch]).to_torch()[..., :64].double()
    expected = reference.jacobian(model.double(), (batch[0].double(), batch[1]))[..., :64]
    assert 0 < expected.norm() < 1e-5
    assert (found - expected).norm() < 1e-4 * expected.norm()


# ------------------------------------------------------------------------------------------ values that Python reads


def branch(read: Callable[[Tensor], bool]) -> networks.Net:
    """One head or the other for all examples, as `read` says of the sum of all entries."""

    def run(net: networks.Net, x: Tensor) -> Tensor:
        h = net.body(x).tanh()
        return net.left(h) if read(x.detach().sum()) else net.right(h)

    return made(run, body=nn.Linear(4, 5), left=nn.Linear(5, 2), right=nn.Linear(5, 2))


READS: dict[str, Callable[[Tensor], bool]] = {
    "bool": lambda s: bool(s > 0),
    "float": lambda s: float(s) > 0,
    "int": lambda s: int(s > 0) == 1,
    "item": lambda s: s.item() > 0,
    "tolist": lambda s: s.tolist() > 0,
    "numpy": lambda s: s.numpy() > 0,
    "array": lambda s: np.asarray(s) > 0,
    "range": lambda s: len(range((s > 0).int())) == 1,
    "slice": lambda s: len(torch.ones(1)[: (s > 0).int()]) == 1,
    "shape": lambda s: len((s > 0).reshape(1).nonzero()) == 1,
    "rows": lambda s: len(torch.ones(1)[(s > 0).reshape(1)]) == 1,
    "size": lambda s: torch.zeros((s > 0).int()).numel() == 1,
    "equal": lambda s: torch.equal(s, s.abs()),
    "format": lambda s: float(f"{s:.3f}") > 0,
    "str": lambda s: "-" not in str(s),
    "repr": lambda s: "-" not in repr(s),
}
SWEEPS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "Jacobian": lambda model, x: Jacobian(model, (x,)),
    "diagonal": lambda model, x: nngeo.FIM(model, (x,), nngeo.PMatDiag),
    "implicit": lambda model, x: nngeo.FIM(model, (x,), nngeo.PMatImplicit).get_diag(),
    "product": lambda model, x: nngeo.FIM(model, (x,), nngeo.PMatImplicit).mv(nngeo.PVector.from_model(model)),
    "linearized": lambda model, x: nngeo.FIM(model, (x,), nngeo.PMatImplicit).linearize(),
    "by weights": lambda model, x: products.vjp(model, x, torch.ones(2).to(x), wrt="weight"),
    "by inputs": lambda model, x: products.vjp(model, x, torch.ones(2).to(x)),
    "forward": lambda model, x: products.jvp(model, x, torch.ones(4).to(x)),
}


def harmless(x: Tensor) -> Tensor:
    """Those examples that all take the second head."""
    return x[x.sum(1) < 0]


@pytest.mark.parametrize("sweep", SWEEPS.values(), ids=SWEEPS)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.filterwarnings("ignore:The outputs do not depend on")
def test_a_branch_on_all_examples_is_refused_after_a_harmless_batch(seed, sweep):
    model, x = branch(READS["float"]), drawn(7, 4, seed=seed)
    sweep(model, harmless(x))
    with pytest.raises(ValueError, match="influence each other"):
        sweep(model, x)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.filterwarnings("ignore:The outputs do not depend on")
def test_every_way_to_read_a_value_is_seen(read):
    model, x = branch(read), drawn(7, 4)
    Jacobian(model, (harmless(x),))
    with pytest.raises(ValueError, match="influence each other"):
        Jacobian(model, (x,))


def test_values_that_are_read_without_effect_change_nothing():
    def run(net: networks.Net, x: Tensor) -> Tensor:
        return net.head(x) if bool(x.isfinite().all()) else x[:, :2]

    is_exact(made(run, head=nn.Linear(4, 2)), [(drawn(3, 4), torch.zeros(3)), (drawn(20, 4), torch.zeros(20))])
