"""Every public call of nngeo.products and nngeo.nn with each argument wrong: nngeo's own words, no internal error."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nngeo.nn as nnj
from nngeo import LayerCollection, products
from nngeo.nn.classes import __all__ as of_torch
from nngeo.products import DiscreteCurve
from nngeo.products.diagrules import diag_rule_for

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
NET = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
OTHER = LayerCollection.from_model(nn.Linear(5, 5))
P = sum(p.numel() for p in NET.parameters())


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


NONE = {"None": None}
NOT_NUMBERS: dict[str, Any] = {"a string": "1", "a list": [1], "a module": NET, "nan": float("nan")}
COUNTS = NOT_NUMBERS | {"zero": 0, "negative": -1, "a fraction": 1.5, "a flag": True}
NUMBERS = NOT_NUMBERS | {"negative": -1.0, "inf": float("inf"), "two": torch.ones(2)}
NAMES: dict[str, Any] = {"unknown": "magic", "a number": 3, "a list": ["dense"], "a tensor": X, "bytes": b"diag"}
FLAGS: dict[str, Any] = {"a string": "yes", "a number": 3, "a list": [True], "a tensor": X}
OBJECTS: dict[str, Any] = {"a number": 3, "a string": "x", "a list": [1.0, 2.0], "an array": X.numpy(), "a module": NET}
TENSORS = OBJECTS | {
    "no axes": ones(),
    "a wrong shape": ones(7, 5),
    "four axes": ones(2, 2, 2, 2),
    "integers": torch.ones(4, 3, dtype=torch.long),
    "complex": X.to(torch.complex128),
    "float32": X.float(),
    "on meta": X.to("meta"),
}
MODELS = {"a tensor": X, "a class": nn.Linear, "a function": torch.sin, "a list": [NET]} | NONE
INPUTS = TENSORS | NONE | {"a wrong width": ones(4, 5), "no examples": X[:0], "an empty list": [], "nan": X * torch.nan}
WRT = {"unknown": "magic", "a number": 3, "an empty list": [], "twice": ["input", "input"], "bytes": b"input"} | NONE
LAYERS = {"names": ["0"], "a number": 3, "a module": NET, "empty": LayerCollection(), "another model's": OTHER}
OPTIONS = {
    "function": {"a number": 3, "a string": "f", "a tensor": X, "nothing": lambda x: None},
    "create_graph": FLAGS,
    "budget": COUNTS,
}
METRICS = TENSORS
# A module may be a function of the outputs.
OF_OUTPUTS = {name: value for name, value in TENSORS.items() if name != "a module"}
PRODUCT = {"model": MODELS, "x": INPUTS, "wrt": WRT, **OPTIONS}
SANDWICH = PRODUCT | {
    "metric": METRICS,
    "result": NAMES | NONE,
    "method": NAMES | NONE,
    "reduce": NAMES,
    "x2": {name: value for name, value in INPUTS.items() if name != "None"} | {"fewer": X[:2]},
    "generator": {"a number": 3, "a string": "seed"},
}
CORNERS = {name: value for name, value in TENSORS.items() if name != "four axes"} | NONE
ENDS = TENSORS | NONE | {"no examples": X[:0], "nan": X * torch.nan}
CURVE = {
    "model": MODELS,
    "curve": TENSORS | NONE | {"one point": ones(2, 1, 3)},
    "metric": OF_OUTPUTS,
    "method": NAMES | NONE,
    "points": COUNTS,
}
CURVE |= {"function": OPTIONS["function"], "create_graph": FLAGS}
MC = {"method": "mc"}
LINE = DiscreteCurve.straight(X[:2], X[2:], 3)
START = {"model": NET, "start": X[:2], "end": X[2:], "max_evaluations": 3}
GEODESICS = {
    "model": MODELS,
    "start": ENDS,
    "end": ENDS,
    "metric": OF_OUTPUTS,
    "curve": NAMES | NONE,
    "segments": COUNTS,
    "optimizer": NAMES | NONE,
    "method": NAMES,
    "points": COUNTS,
    "tol": NUMBERS,
    "max_evaluations": COUNTS,
    "function": OPTIONS["function"],
}
AT = {"model": NET, "x": X}
SHAPED = {"start": X[:2], "end": X[2:], "coefficients": ones(2, 5, 3)}


def pulled(metric: Any) -> Callable[..., Any]:
    """A metric of the class, used on four examples of two outputs."""
    return lambda **arguments: products.jTmjp(NET, X, metric(**arguments))


def of_weights(metric: Any) -> Callable[..., Any]:
    return lambda **arguments: products.jmjTp(NET, X, metric(**arguments), "weight")


def straight(kind: Any) -> Callable[..., Any]:
    return lambda **arguments: kind.straight(**arguments)


# By name: a call, its arguments when right, and what is wrong for each of some of them.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, dict[str, Any]]]] = {
    "jvp": (products.jvp, AT | {"v": ones(4, 3)}, PRODUCT | {"v": TENSORS | NONE}),
    "vjp": (products.vjp, AT | {"w": ones(4, 2)}, PRODUCT | {"w": TENSORS | NONE}),
    "jmp": (products.jmp, AT | {"m": ones(3, 2)}, PRODUCT | {"m": TENSORS}),
    "mjp": (products.mjp, AT | {"m": ones(2, 2)}, PRODUCT | {"m": TENSORS}),
    "jacobian": (products.jacobian, AT, PRODUCT),
    "jTmjp": (products.jTmjp, AT, SANDWICH),
    "jmjTp": (products.jmjTp, AT, SANDWICH),
    "volume": (products.volume, AT, PRODUCT | {"metric": OF_OUTPUTS}),
    "log_volume": (products.log_volume, AT, PRODUCT | {"metric": OF_OUTPUTS}),
    "forward_laplacian": (
        products.forward_laplacian,
        AT,
        {key: PRODUCT[key] for key in ("model", "x", "wrt", "function", "create_graph")}
        | {"metric": METRICS, "method": NAMES | NONE, "chunk": COUNTS},
    ),
    "curve_energy": (products.curve_energy, {"model": NET, "curve": LINE}, CURVE),
    "curve_length": (products.curve_length, {"model": NET, "curve": LINE}, CURVE),
    "geodesics": (products.geodesics, START, GEODESICS),
    "CubicSpline": (products.CubicSpline, SHAPED, dict.fromkeys(SHAPED, TENSORS | NONE)),
    "DiscreteCurve": (products.DiscreteCurve, SHAPED, dict.fromkeys(SHAPED, TENSORS | NONE)),
    "Dense": (pulled(products.Dense), {"m": ones(2, 2)}, {"m": TENSORS | NONE}),
    "Diagonal": (pulled(products.Diagonal), {"d": ones(2)}, {"d": TENSORS | NONE}),
    "Factor": (pulled(products.Factor), {"v": ones(2, 1)}, {"v": TENSORS | NONE}),
    "LowRankPlusDiagonal": (
        pulled(products.LowRankPlusDiagonal),
        {"v": ones(2, 1), "d": ones(2)},
        {"v": TENSORS | NONE, "d": TENSORS | NONE},
    ),
    "Kronecker": (
        pulled(products.Kronecker),
        {"a": ones(2, 2), "b": ones(1, 1)},
        {"a": TENSORS | NONE, "b": TENSORS | NONE},
    ),
    "Softmax": (pulled(products.Softmax), {"logits": ones(4, 2)}, {"logits": TENSORS | NONE}),
    "BlockDiagonal": (
        of_weights(products.BlockDiagonal),
        {"blocks": {"0": ones(16, 16), "2": ones(10, 10)}},
        {"blocks": TENSORS | NONE | {"other names": {"1": ones(2, 2)}, "numbers": {"0": 1, "2": 2}}},
    ),
    "register_diag_rule": (
        lambda kind: products.register_diag_rule(kind)(type(diag_rule_for(nn.Tanh()))),
        {"kind": nn.Tanh},
        {"kind": {"a module": NET, "a string": "Tanh", "a number": 3} | NONE},
    ),
}
MORE = {
    "jvp of weights": (
        products.jvp,
        AT | {"v": ones(P), "wrt": "weight"},
        {"v": TENSORS | NONE, "layer_collection": LAYERS},
    ),
    "jTmjp, sampled": (
        products.jTmjp,
        AT | MC,
        {"samples": COUNTS | NONE, "generator": {"a number": 3, "a string": "seed"}},
    ),
    "CubicSpline.straight": (
        straight(products.CubicSpline),
        {"start": X[:2], "end": X[2:]},
        {"segments": COUNTS, "start": ENDS},
    ),
    "CubicSpline.through": (
        products.CubicSpline.through,
        {"points": ones(2, 4, 3)},
        {"points": CORNERS, "segments": COUNTS},
    ),
    "a curve": (lambda t: LINE(t), {"t": ones(2)}, {"t": TENSORS | NONE | {"nan": ones(2) * torch.nan}}),
    "a curve's derivative": (lambda t: LINE.derivative(t), {"t": ones(2)}, {"t": TENSORS | NONE}),
}
# What a product returns, or a class to inherit from, takes nothing from users.
RESULTS = {"Curve", "DiagRule", "Geodesics", "Laplacian", "Metric", "Sampled"}

CONVERTED = nnj.convert_to_nnj(NET)
METHOD = {"x": INPUTS, "wrt": WRT}
METHODS = METHOD | {"matrix": METRICS, "from_diag": FLAGS, "to_diag": FLAGS, "diag_backprop": FLAGS}
LIKELIHOOD = {"x": INPUTS, "model": MODELS, "wrt": WRT}
OPTIONS_OF_LIKELIHOODS = dict.fromkeys(("aggregate_batch", "metric_shape", "metric_backprop"), NAMES)


def method(name: str, *defaults: Any) -> Callable[..., Any]:
    """A method of the converted model, by keywords."""
    return lambda x, val=None, **arguments: getattr(CONVERTED, name)(x, val, **arguments)


def likelihood(kind: Any, name: str) -> Callable[..., Any]:
    return lambda **arguments: getattr(kind(), name)(**arguments)


LIKELIHOODS = {
    "LogGaussian": X[:, :2],
    "LogBinaryBernoulli": X[:, :2].abs(),
    "LogBernoulli": torch.tensor([0, 1, 0, 1]),
}
CALLS_OF_NN: dict[str, Any] = {
    "AbstractJacobian": (method("jvp"), {"x": X, "vector": ones(4, 3)}, METHOD | {"vector": TENSORS | NONE}),
    "AbstractDiagonalJacobian": (
        nnj.Tanh().jacobian,
        {"x": X, "diag": True},
        {"x": OBJECTS | NONE | {"no examples": X[:0], "no axes": ones()}, "wrt": WRT, "diag": FLAGS},
    ),
    "Reshape": (
        lambda dims: nnj.Reshape(*dims)(X),
        {"dims": (3, 1)},
        {"dims": {"strings": ("a",), "fractions": (1.5,), "two free": (-1, -1)}},
    ),
    "L2Norm": (nnj.L2Norm, {}, {"eps": NUMBERS}),
    "convert_to_nnj": (
        nnj.convert_to_nnj,
        {"model": NET},
        {"model": {"a tensor": X, "a class": nn.Linear, "a number": 3, "numbers": [3], "a string": "model"} | NONE},
    ),
    "invert_block_diagonal": (
        nnj.invert_block_diagonal,
        {"matrix": [torch.eye(2)]},
        {
            "matrix": TENSORS | NONE | {"nan": torch.eye(2) * torch.nan, "singular": [torch.zeros(2, 2)]},
            "damping": NUMBERS,
        },
    ),
    **{name: (getattr(nnj, name), {}, OPTIONS_OF_LIKELIHOODS) for name in LIKELIHOODS},
}
MORE_OF_NN: dict[str, Any] = {
    "vjp": (method("vjp"), {"x": X, "vector": ones(4, 2)}, METHOD | {"vector": TENSORS | NONE}),
    "jmp": (method("jmp"), {"x": X, "matrix": ones(4, 3, 3)}, METHOD | {"matrix": TENSORS}),
    "mjp": (method("mjp"), {"x": X, "matrix": ones(4, 2, 2)}, METHOD | {"matrix": TENSORS}),
    "jacobian": (method("jacobian"), {"x": X}, METHOD),
    "jTmjp": (method("jTmjp"), {"x": X, "matrix": None}, METHODS),
    "jmjTp": (method("jmjTp"), {"x": X, "matrix": None}, METHODS),
    "jmjTp of weights": (method("jmjTp"), {"x": X, "matrix": None, "wrt": "weight"}, {"matrix": METRICS}),
    "jTmjp_batch2": (
        lambda **arguments: CONVERTED.jTmjp_batch2(**arguments),
        {"x1": X, "x2": X},
        {"x1": INPUTS, "x2": INPUTS, "matrixes": OBJECTS | {"two": (None, None)}, "wrt": WRT},
    ),
    "set_weight": (CONVERTED.set_weight, {"weight": ones(P)}, {"weight": TENSORS | NONE}),
    **{
        f"{kind} {name}": (
            likelihood(getattr(nnj, kind), name),
            {"x": X, "model": NET, "target": target},
            LIKELIHOOD | ({} if name == "ggn" else {"target": TENSORS | NONE | {"fewer": target[:2]}}),
        )
        for kind, target in LIKELIHOODS.items()
        for name in ("gradient", "ggn", "forward")
    },
}
for kind in LIKELIHOODS:
    MORE_OF_NN[f"{kind} forward"][2].pop("wrt")
# Modules and containers, which take what those of torch do; classes to inherit from; modules of functions.
PLAIN = {*of_torch, "LogLikelihood", "Residual", "Sinusoidal", "SkipConnection", "TruncExp", "log_likelihoods", "utils"}

WALK = {
    f"{call}({argument}={what})": (function, right | {argument: value})
    for call, (function, right, wrong) in (
        CALLS | MORE | {f"nn: {k}": v for k, v in (CALLS_OF_NN | MORE_OF_NN).items()}
    ).items()
    for argument, values in wrong.items()
    for what, value in values.items()
}


def own_words(error: BaseException) -> bool:
    """Whether nngeo raised it, by a `raise` of its own."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    assert frame.lineno is not None
    line = linecache.getline(frame.filename, frame.lineno).strip()
    return "/nngeo/" in frame.filename and line.startswith("raise")


def test_every_public_name_is_walked():
    assert set(products.__all__) == {*CALLS, *RESULTS}
    assert set(nnj.__all__) == {*CALLS_OF_NN, *PLAIN}


@pytest.mark.filterwarnings("ignore::nngeo.linalg.cg.ConvergenceWarning")
@pytest.mark.parametrize("case", (CALLS | MORE | CALLS_OF_NN | MORE_OF_NN).values())
def test_the_calls_are_right_as_they_are(case):
    function, right, _ = case
    function(**right)


@pytest.mark.parametrize(("function", "arguments"), WALK.values(), ids=WALK)
def test_wrong_arguments_get_nngeos_own_words(function, arguments):
    with pytest.raises((ValueError, TypeError, NotImplementedError)) as caught:
        function(**arguments)
    assert own_words(caught.value), repr(caught.value)
