"""What bad input gets: an error that names the argument or the layer, what was found, and what would work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

import nngeo
from nngeo import FIM, NTK, Hessian, Jacobian, LayerCollection, random_pvector
from nngeo.linalg import memory
from nngeo.uses import Laplace
from tests import reference

X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 3
PMATS = [nngeo.PMatDense, nngeo.PMatDiag, nngeo.PMatBlockDiag, nngeo.PMatKFAC, nngeo.PMatEKFAC]
PMATS += [nngeo.PMatEKFACBlockDiag, nngeo.PMatQuasiDiag, nngeo.PMatLowRank, nngeo.PMatImplicit]
LARGE = [nngeo.PMatDense, nngeo.PMatBlockDiag, nngeo.PMatKFAC, nngeo.PMatEKFAC, nngeo.PMatLowRank]


@contextmanager
def refused(kind: type[Exception], *words: str) -> Iterator[None]:
    with pytest.raises(kind) as caught:
        yield
    assert caught.type is kind or caught.type.__module__.startswith("nngeo.")
    assert [word for word in words if word not in str(caught.value)] == [], f"missing in {str(caught.value)!r}"


class Then(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Any]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def net(*then: nn.Module | Callable[[Tensor], Any]) -> nn.Module:
    torch.manual_seed(0)
    modules = [module if isinstance(module, nn.Module) else Then(module) for module in then]
    return nn.Sequential(nn.Linear(3, 3), *modules).double().eval()


def fisher(representation: type = nngeo.PMatDiag, model: nn.Module | None = None, examples: Any = None, **options: Any):
    return FIM(model or net(), (X, Y) if examples is None else examples, representation, **options)


def mv(matrix: Any) -> Any:
    return matrix.mv(random_pvector(matrix.layer_collection, dtype=torch.float64))


BY_EXAMPLE = {
    "PMatDense": lambda model, examples: FIM(model, examples, nngeo.PMatDense),
    "PMatImplicit": lambda model, examples: mv(FIM(model, examples, nngeo.PMatImplicit)),
    "NTK": NTK,
    "Jacobian": Jacobian,
}
ALL = BY_EXAMPLE | {"Hessian": lambda model, examples: Hessian(model, examples, nngeo.PMatDense, F.cross_entropy)}
each_by_example = pytest.mark.parametrize("call", BY_EXAMPLE.values(), ids=BY_EXAMPLE)
each_call = pytest.mark.parametrize("call", ALL.values(), ids=ALL)

EXAMPLES = {
    "an empty list": (ValueError, "`loader` gave no batches|empty", lambda: []),
    "an empty loader": (ValueError, "`loader` gave no batches|empty", lambda: DataLoader([])),
    "a used-up iterator": (ValueError, "`loader` gave no batches|used up", lambda: iter([])),
    "a batch without examples": (ValueError, "A batch holds no examples|leave it out", lambda: (X[:0], Y[:0])),
    "a last batch without examples": (ValueError, "no examples|leave it out", lambda: [(X, Y), (X[:0], Y[:0])]),
    "a number": (TypeError, "`loader`|int|DataLoader|tuple of tensors", lambda: 3),
    "nothing": (TypeError, "`loader`|None|DataLoader", lambda: None),
    "a string": (TypeError, "batch|str|tuple (inputs, targets)", lambda: "digits"),
    "arrays": (ValueError, "batch|no tensor", lambda: [(X.numpy(), Y.numpy())]),
}


@each_call
@pytest.mark.parametrize(("kind", "words", "examples"), EXAMPLES.values(), ids=EXAMPLES)
def test_examples_are_refused(kind, words, examples, call):
    with refused(kind, *words.split("|")):
        call(net(), examples())


@each_call
def test_inputs_of_a_wrong_width_are_told_with_their_shapes(call):
    with refused(ValueError, "does not run on a batch of tensors (b, 4), (b)", "4 and 3x3"):
        call(net(), (torch.cat([X, X[:, :1]], 1), Y))


WIDE = torch.cat([X, X[:, :1]], 1)
LATER: dict[str, Callable[[], Any]] = {
    "in a later batch": lambda: fisher(nngeo.PMatDiag, net(), [(X, Y), (WIDE, Y)]),
    "without checks": lambda: FIM(net(), (WIDE, Y), nngeo.PMatDiag, "classif_logits", check=False),
    "in a prediction": lambda: Laplace.fit(net(), (X, Y), nngeo.PMatDiag).predict(WIDE),
}


@pytest.mark.parametrize("call", LATER.values(), ids=LATER)
def test_inputs_of_a_wrong_width_are_told_wherever_they_come(call):
    with refused(ValueError, "does not run on a batch of tensors (b, 4)", "4 and 3x3"):
        call()


def test_an_example_without_a_batch_axis_is_told_how_to_get_one():
    with refused(ValueError, "without a batch axis, for which x[None] is a batch of one"):
        FIM(net(), (X[0],), nngeo.PMatDiag)


TRACKING = nn.InstanceNorm1d(3, track_running_stats=True)
MODELS = {
    "batch norm": (ValueError, "'1' (BatchNorm1d)|train mode|model.eval()", lambda: net(nn.BatchNorm1d(3)).train()),
    "a mean": (ValueError, "examples|influence each other", lambda: net(lambda x: x - x.mean(0))),
    "a running sum": (ValueError, "examples|influence each other", lambda: net(lambda x: x.cumsum(0))),
    "a reference": (ValueError, "examples|influence each other", lambda: net(lambda x: x - x[:1])),
    "its own statistics": (ValueError, "'1' (BatchNorm1d)", lambda: net(nn.BatchNorm1d(3, track_running_stats=False))),
    "dropout": (ValueError, "'1' (Dropout)|train mode|random|model.eval()", lambda: net(nn.Dropout()).train()),
    "instance norm": (ValueError, "'1' (Instance|updates its|model.eval()", lambda: net(TRACKING).train()),
    "a function's dropout": (ValueError, "random numbers|function=", lambda: net(F.dropout)),
    "nan": (ValueError, "'1' (Then)|first to return NaN or inf|inputs are finite", lambda: net(lambda x: 0 * x / 0)),
    "inf": (ValueError, "'1' (Then)|first to return NaN or inf|inputs are finite", lambda: net(lambda x: x / 0)),
    "no batch axis": (ValueError, "(3,|first axis|batch|function=", lambda: net(lambda x: x.T)),
    "a sum": (ValueError, "shape ()|first axis|batch|function=", lambda: net(lambda x: x.sum())),
    "a tuple": (TypeError, "tuple|function=", lambda: net(lambda x: (x, x))),
    "integers": (TypeError, "torch.int64|floating point", lambda: net(lambda x: (10 * x).long())),
}


@each_by_example
@pytest.mark.parametrize(("kind", "words", "model"), MODELS.values(), ids=MODELS)
def test_models_are_refused(kind, words, model, call):
    with refused(kind, *words.split("|")):
        call(model(), (X, Y))


@pytest.mark.parametrize("name", ["batch norm", "dropout", "instance norm", "a function's dropout", "a tuple"])
def test_models_have_no_hessian(name):
    kind, words, model = MODELS[name]
    with refused(kind, *words.split("|")):
        Hessian(model(), (X, Y), nngeo.PMatDense, F.cross_entropy)


class Overwriting(nn.Module):
    """A layer whose gradient does not need its input, which it overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        out = x.exp() * self.weight
        x.zero_()
        return out


def test_a_value_that_is_overwritten_after_its_use_is_right():
    matrix = fisher(nngeo.PMatDense, model := net(Overwriting().double()))
    assert_close(matrix.to_torch(), reference.fisher(model, (X, Y), "classif_logits"))


@pytest.mark.parametrize("first", [Overwriting(), Then(lambda x: x.div_(2))], ids=["after its use", "before its use"])
def test_a_model_that_writes_to_its_input_is_right_and_the_data_are_as_they_were(first):
    model, x = nn.Sequential(first, net()).double(), X.clone()
    matrix = fisher(nngeo.PMatDense, model, (x, Y))
    assert torch.equal(x, X)
    function = lambda x, y: model(x.clone())  # noqa: E731
    assert_close(matrix.to_torch(), reference.fisher(model, (X, Y), "classif_logits", function))


def test_parameters_without_influence_get_zeros_and_a_warning():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3)}).double()
    with pytest.warns(UserWarning, match="do not depend on idle.weight, idle.bias: .* zero"):
        diagonal = fisher(model=model, function=lambda x, y: model["used"](x)).get_diag()
    assert diagonal[:12].all() and not diagonal[12:].any()


OTHER = LayerCollection.from_model(nn.Sequential(nn.Linear(3, 4)))
MIXED = nn.Sequential(nn.Linear(3, 3).double(), nn.Linear(3, 3))
SPREAD = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta")).double()
IMPLICIT = nngeo.PMatImplicit
ARGUMENTS = {
    "variant": (ValueError, "'classif'|classif_logits|regression|function", lambda: fisher(variant="classif")),
    "variant's shape": (ValueError, "shape (6, 3)|(k, 6, 3)", lambda: fisher(variant=lambda outputs, y: outputs)),
    "targets": (ValueError, "targets|(inputs, targets)|'labels'", lambda: fisher(examples=(X,), empirical=True)),
    "targets' shape": (ValueError, "(6,)|(6, 1)", lambda: fisher(examples=(X, Y[:, None]), empirical=True)),
    "n_output": (ValueError, "n_output=10|3", lambda: fisher(n_output=10)),
    "mask": (ValueError, "'attn'|'input'", lambda: fisher(examples={"input": X, "labels": Y}, mask="attn")),
    "device": (ValueError, "'meta'|cpu|device", lambda: fisher(device="meta")),
    "devices": (ValueError, "1.weight|meta|to_empty", lambda: fisher(model=SPREAD)),
    "dtypes": (ValueError, "0.bias torch.float64|1.bias torch.float32|model.to(", lambda: fisher(model=MIXED)),
    "dtypes of mv": (ValueError, "torch.float64|torch.float32", lambda: mv(fisher(IMPLICIT, MIXED))),
    "a name": (TypeError, "`representation`|'PMatDiag'|class", lambda: fisher("PMatDiag")),
    "an instance": (TypeError, "`representation`|PMatDiag|class", lambda: fisher(fisher())),
    "no PMat": (TypeError, "`representation`|FMatDense|PMatDiag", lambda: fisher(nngeo.FMatDense)),
    "PMatEye": (NotImplementedError, "identity|`scaling`", lambda: fisher(nngeo.PMatEye)),
    "NTK's": (TypeError, "`representation`|FMatDense", lambda: NTK(net(), (X,), representation=nngeo.PMatDiag)),
    "layers": (ValueError, "another model|'0.weight'|(4, 3)|(3, 3)", lambda: fisher(layer_collection=OTHER)),
    "no layers": (ValueError, "layer", lambda: fisher(layer_collection=LayerCollection())),
    "frozen parameters": (ValueError, "frozen=True", lambda: fisher(model=net().requires_grad_(False))),
    "function of Hessian": (ValueError, "`function`|cross_entropy", lambda: Hessian(net(), (X, Y), nngeo.PMatDense)),
    "Hessian's": (NotImplementedError, "PMatDense", lambda: Hessian(net(), (X, Y), nngeo.PMatKFAC, F.cross_entropy)),
}


@pytest.mark.parametrize(("kind", "words", "call"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_are_refused(kind, words, call):
    with refused(kind, *words.split("|")):
        call()


OPERATIONS = {
    "a vector of other layers": (ValueError, "PVector|'0'", lambda F: F.mv(random_pvector(OTHER, dtype=X.dtype))),
    "another dtype": (ValueError, "float32|float64|v.to(", lambda F: F.mv(random_pvector(F.layer_collection))),
    "another device": (ValueError, "meta|cpu|v.to(", lambda F: F.mv(torch.zeros(12, device="meta", dtype=X.dtype))),
    "another type": (TypeError, "PVector|ndarray", lambda F: F.mv(torch.zeros(12).numpy())),
    "another size": (ValueError, "(..., 12)|(11,)", lambda F: F.mv(torch.zeros(11))),
    "negative damping": (ValueError, "`regul`|-1", lambda F: F.solve(torch.zeros(12, dtype=X.dtype), regul=-1.0)),
    "a solver": (ValueError, "'magic'|cg", lambda F: F.solve(torch.zeros(12, dtype=X.dtype), solve="magic")),
    "a norm": (ValueError, "1|'fro'", lambda F: F.norm(1)),
    "a reduction": (ValueError, "'mean'|'sum'|'diag'", lambda F: F.mapTMmap(Jacobian(net(), (X,)), reduction="mean")),
    "a sum": (TypeError, "PMatEye|.to_torch()", lambda F: F + nngeo.PMatEye(F.layer_collection)),
}


@pytest.mark.parametrize("representation", PMATS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("kind", "words", "call"), OPERATIONS.values(), ids=OPERATIONS)
def test_operations_are_refused(kind, words, call, representation):
    with refused(kind, *words.split("|")):
        call(fisher(representation))


STATES = {
    "another model": (ValueError, "other layers|'0'", lambda kind: fisher(kind, nn.Linear(3, 3).double()).state_dict()),
    "a network's": (ValueError, "not the state_dict of a matrix", lambda kind: net().state_dict()),
    "another class": (ValueError, "PMatEye", lambda kind: nngeo.PMatEye(OTHER).state_dict()),
}


@pytest.mark.parametrize("representation", PMATS[:-1], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("kind", "words", "state"), STATES.values(), ids=STATES)
def test_states_are_refused(kind, words, state, representation):
    with refused(kind, *words.split("|")):
        fisher(representation).load_state_dict(state(representation))


CUTS = [(nngeo.PMatDense, "data"), (nngeo.PMatKFAC, "0/a"), (nngeo.PMatEKFAC, "0/ua"), (nngeo.PMatQuasiDiag, "0/cross")]


@pytest.mark.parametrize(("representation", "key"), CUTS, ids=[key for _, key in CUTS])
def test_incomplete_states_are_refused(representation, key):
    state = fisher(representation).state_dict()
    del state[key]
    with refused(ValueError, "incomplete"):
        fisher(representation).load_state_dict(state)


def test_a_matrix_too_large_is_refused_before_it_is_made():
    with refused(MemoryError, "PMatDense", "6.58e+04 GiB", "PMatKFAC", "PMatDiag", "PMatImplicit"):
        fisher(nngeo.PMatDense, nn.Linear(3000, 1400), (torch.zeros(1, 3000),))


@pytest.mark.parametrize("representation", LARGE, ids=lambda kind: kind.__name__)
def test_every_large_representation_looks_at_the_memory(representation, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 100)
    monkeypatch.setattr(memory, "SMALL", 0)
    with refused(MemoryError, representation.__name__, "GiB", "free on cpu", "PMatImplicit"):
        fisher(representation)


@pytest.mark.parametrize("representation", [nngeo.PMatDense, nngeo.PMatBlockDiag, nngeo.PMatDiag])
def test_a_generator_of_batches_is_enough_for_a_hessian(representation):
    model = net(nn.Linear(3, 3))
    matrix = Hessian(model, iter([(X, Y)]), representation, F.cross_entropy)
    assert_close(matrix.trace(), Hessian(model, (X, Y), representation, F.cross_entropy).trace())


def refilled() -> Iterator[tuple[Tensor]]:
    buffer = torch.empty(3, 3, dtype=torch.float64)
    for part in X.split(3):
        yield (buffer.copy_(part),)


def test_a_loader_may_fill_the_same_small_tensor_again():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    torch.testing.assert_close(NTK(model, refilled()).to_torch(), NTK(model, (X,)).to_torch())


def test_a_loader_may_fill_the_same_large_tensor_again(monkeypatch):
    monkeypatch.setattr("nngeo.generators.sizing.INPUTS", 0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    torch.testing.assert_close(NTK(model, refilled()).to_torch(), NTK(model, (X,)).to_torch())


# Operators, which Python calls before nngeo does.
OPERATORS = {
    "over zero": (ValueError, "can't be divided by 0", lambda F: F / 0),
    "over a zero tensor": (ValueError, "can't be divided by 0", lambda F: F / torch.zeros(())),
    "times nan": (ValueError, "`factor`|finite|nan", lambda F: F * float("nan")),
    "over nan": (ValueError, "`divisor`|finite|nan", lambda F: F / float("nan")),
    "plus nan": (ValueError, "damping|finite", lambda F: F + float("nan")),
}


@pytest.mark.parametrize("kind", PMATS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("error", "words", "call"), OPERATORS.values(), ids=OPERATORS)
def test_operators_refuse_numbers_that_are_none(error, words, call, kind):
    with refused(error, *words.split("|")):
        call(fisher(kind))
