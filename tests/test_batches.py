"""What a batch may be: mappings of any kind, lists, a single example, several entries beside the target."""

import types
from collections import OrderedDict, UserDict

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import nngeo
from nngeo import FIM, GGN, NTK, Hessian, Jacobian, PMatDense, PMatDiag, PMatImplicit, PMatLowRank
from nngeo.products import jvp

D = torch.double
EXACT = {"rtol": 1e-10, "atol": 1e-13}


class Own(dict):
    """A dict with attributes, as BatchEncoding has them."""

    def __getattr__(self, name):
        return self[name]


class Unmade(UserDict):
    """A mapping that can't be made of a dict."""

    def __init__(self, *, x):
        super().__init__(x=x)


@pytest.fixture
def data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(D)
    x, y = torch.randn(6, 4, dtype=D), torch.randint(3, (6,))
    return model, x, y, FIM(model, (x, y), PMatDense, empirical=True).to_torch()


def empirical(model, examples, **options):
    return FIM(model, examples, PMatDense, empirical=True, **options).to_torch()


MAPPINGS = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "UserDict": UserDict,
    "dict with attributes": Own,
    "read only": lambda **entries: types.MappingProxyType(entries),
    "not made of a dict": Unmade,
}


@pytest.mark.parametrize("make", MAPPINGS.values(), ids=MAPPINGS)
@pytest.mark.parametrize("single", [True, False], ids=["one batch", "a list of batches"])
def test_a_mapping_and_its_target_are_a_batch(data, make, single):
    model, x, y, want = data
    batch = (make(x=x), y)
    assert_close(empirical(model, batch if single else [batch], function=lambda b, y: model(b["x"])), want, **EXACT)


@pytest.mark.parametrize("make", MAPPINGS.values(), ids=MAPPINGS)
def test_mappings_within_mappings_are_divided_among_the_examples(data, make):
    model, x, y, want = data
    nested = {"inner": [make(x=x)], "labels": y}
    assert_close(empirical(model, nested, function=lambda b: model(b["inner"][0]["x"])), want, **EXACT)


@pytest.mark.parametrize("make", [UserDict, Own], ids=["UserDict", "dict with attributes"])
def test_a_function_gets_the_mapping_that_came(data, make):
    model, x, y, want = data
    seen = set()

    def function(batch, y):
        seen.add(type(batch))
        return model(batch["x"])

    batches = [(make(x=x[:4]), y[:4]), (make(x=x[4:]), y[4:])]
    assert_close(empirical(model, batches, function=function), want, **EXACT)
    assert seen == {make}


@pytest.mark.parametrize("make", [UserDict, Own], ids=["UserDict", "dict with attributes"])
def test_a_mapping_of_keyword_arguments_is_a_batch(data, make):
    model, x, y, want = data
    assert_close(empirical(model, make(input=x, labels=y)), want, **EXACT)


def test_a_mapping_is_left_as_it_is(data):
    model, x, y, _ = data
    batch = UserDict(x=x)
    empirical(model, (batch, y), function=lambda b, y: model(b["x"]))
    assert list(batch) == ["x"] and batch["x"] is x


def test_products_take_mappings_within_arguments(data):
    model, x, _, _ = data
    v = torch.randn(6, 4, dtype=D)
    given = (x, UserDict(scale=torch.full((6, 1), 2.0, dtype=D)))
    found = jvp(model, given, v, wrt="x", function=lambda x, other: model(x * other["scale"]))
    assert_close(found, 2 * jvp(model, 2 * x, v), **EXACT)


def test_a_batch_is_a_list_where_it_comes_from_a_loader(data):
    model, x, y, want = data
    (batch,) = DataLoader(TensorDataset(x, y), batch_size=6)
    assert isinstance(batch, list)
    assert_close(empirical(model, batch), want, **EXACT)
    assert_close(empirical(model, [{"input": x}, y], function=lambda b, y: model(**b)), want, **EXACT)


@pytest.mark.parametrize("entries", [((6, 4), (6, 4)), ((6, 4), (5,))], ids=["alike", "of several lengths"])
def test_a_list_that_could_be_several_batches_is_refused(data, entries):
    with pytest.raises(ValueError, match="one batch or several"):
        FIM(data[0], [torch.randn(*shape, dtype=D) for shape in entries], PMatDiag)


def test_a_tuple_with_a_tuple_of_inputs_is_one_batch(data):
    model, x, y, want = data
    assert_close(empirical(model, ((x, x), y), function=lambda xs, y: model(xs[0])), want, **EXACT)


# ------------------------------------------------------------------------------------------ squeezed examples


class Squeezed(nn.Module):
    """Removes all axes of size one, and so that of a single example."""

    def __init__(self, squeeze):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 3, 2), nn.LayerNorm(3)
        self.head, self.squeeze = nn.Linear(3, 3), squeeze

    def forward(self, x):
        pooled = torch.tanh(self.conv(x)).mean(-1, keepdim=True)
        return self.head(self.norm(pooled.squeeze() if self.squeeze else pooled.squeeze(-1)))


@pytest.fixture(params=[D, torch.float32], ids=["float64", "float32"])
def squeezed(request):
    torch.manual_seed(0)
    pair = Squeezed(True).to(request.param), Squeezed(False).to(request.param)
    pair[1].load_state_dict(pair[0].state_dict())
    return *pair, torch.randn(5, 2, 4, dtype=request.param), torch.randint(3, (5,))


SPLITS = {"last": [4, 1], "first": [1, 4], "all": [1] * 5}


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("kind", [PMatDense, PMatDiag, PMatLowRank, PMatImplicit, nngeo.PMatEKFACBlockDiag])
def test_a_batch_of_one_example_may_lose_its_axis(squeezed, sizes, kind):
    model, other, x, _ = squeezed
    batches = [(part,) for part in x.split(sizes)]
    assert_close(FIM(model, batches, kind).to_torch(), FIM(other, batches, kind).to_torch())


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_jacobian_kernel_and_hessian_of_a_squeezed_example(squeezed, sizes):
    model, other, x, y = squeezed
    batches = [*zip(x.split(sizes), y.split(sizes), strict=True)]
    loss = nn.CrossEntropyLoss(reduction="sum")

    def found(net):
        jacobian, kernel = Jacobian(net, batches).to_torch(), NTK(net, batches).to_torch()
        return jacobian, kernel, Hessian(net, batches, PMatDense, function=loss).to_torch()

    assert_close(found(model), found(other), rtol=1e-4, atol=1e-5)


def test_a_function_may_squeeze_its_outputs():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1).to(D), torch.randn(5, 4, dtype=D)
    found = FIM(model, [(x[:4],), (x[4:],)], PMatDense, variant="regression", function=lambda x: model(x).squeeze())
    assert_close(found.to_torch(), FIM(model, (x,), PMatDense, variant="regression").to_torch(), **EXACT)


# ------------------------------------------------------------------------------------------ targets of a function


@pytest.mark.parametrize("target", [1, lambda batch: batch[1]], ids=["index", "function"])
def test_target_says_which_entry_is_the_target(data, target):
    model, x, y, want = data
    batch = (x, y, torch.arange(6) % 3)
    assert_close(empirical(model, batch, function=lambda x, y, i: model(x), target=target), want, **EXACT)


def test_target_may_be_a_key(data):
    model, x, y, want = data
    assert_close(
        empirical(model, {"input": x, "classes": y}, target="classes", function=lambda b: model(b["input"])), want
    )


@pytest.mark.parametrize("target", [7, "y"])
def test_a_target_that_is_not_there_is_refused(data, target):
    model, x, y, _ = data
    with pytest.raises(ValueError, match=f"target={target!r} is no entry of the batch, which has 2 entries"):
        empirical(model, (x, y), target=target)


@pytest.mark.parametrize("y", [torch.arange(6) % 3, torch.randn(6, dtype=D)], ids=["classes", "numbers"])
def test_a_target_that_could_be_another_entry_is_warned_about(data, y):
    model, x, index = *data[:2], torch.arange(6)
    with pytest.warns(UserWarning, match="Say which by `target=`"):
        GGN(model, (x, y, index), PMatDiag, lambda f, t: f.square().sum(), function=lambda x, y, i: model(x))


def test_further_inputs_of_a_function_are_no_targets(data):
    model, x, y, want = data
    assert_close(empirical(model, (x, x, y), function=lambda x, other, y: model(x)), want, **EXACT)
    assert_close(empirical(model, (x, x[:, :1], y), function=lambda x, other, y: model(x)), want, **EXACT)


def test_targets_that_do_not_matter_are_not_warned_about(data):
    model, x, y, _ = data
    FIM(model, (x, y, y), PMatDiag, function=lambda x, y, i: model(x))
