"""A call that works of every public function, class and method: `test_public_calls.py` spoils one argument of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nngeo
from nngeo import (
    FIM,
    NTK,
    Jacobian,
    LayerCollection,
    PMatDense,
    PMatDiag,
    PVector,
    descent,
    layers,
    uses,
    variants,
)
from nngeo import representations as r
from nngeo.descent import aggregation, autogram, autojac, linalg, scalarization

Given = Callable[[], dict[str, Any]]  # arguments by name, made anew for each call

MODULES = [nngeo, layers, variants, r, uses, descent, autogram, autojac, linalg, aggregation, scalarization]


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, Y = normal(4, 3), torch.tensor([0, 1, 1, 0])
LAYERS = LayerCollection.from_model(net())
P = LAYERS.numel()
RULE = {"layer_collection": LAYERS}
FACTORY = {"model": net(), "loader": (X, Y)}


@cache
def fisher(kind: str = "PMatDense") -> Any:
    """A matrix of a class; but for the identity of the same examples."""
    if kind == "PMatEye":
        return nngeo.PMatEye(LAYERS)
    if kind == "PMatLowRankPlusDiag":
        return fisher("PMatLowRank") + 1.0
    options = {"default_representation": PMatDiag} if kind == "PMatMixed" else {}
    return FIM(net(), (X, Y), getattr(nngeo, kind), **options)


def made(kind: str) -> Given:
    return lambda: RULE | {"data": fisher(kind).data}


def vector() -> PVector:
    return PVector.from_model(net()).detach()


def jacobian() -> Any:
    return Jacobian(net(), X)


def squared_norm() -> dict[str, Any]:
    w = PVector.from_model(net())
    return {"scalar": w.dot(w), "pvector": w}


def loss(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y, reduction="sum")


def losses(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y, reduction="none")


def descending(**more: Any) -> dict[str, Any]:
    model = net()
    return {"tensors": losses(model), "inputs": [*model.parameters()], **more}


def jacobians() -> dict[str, Any]:
    model = net()
    autojac.backward(losses(model))
    return {"tensors": [*model.parameters()], "aggregator": aggregation.UPGrad()}


def tasks(**more: Any) -> dict[str, Any]:
    model = net()
    features = model[0](X)
    return {"tensors": [*model[1](features).sum(0)], "features": features, **more}


def fields(**given: Any) -> Given:
    return lambda: dict(given)


CALLS: dict[ModuleType, dict[str, Given]] = {
    nngeo: {
        "FIM": fields(**FACTORY, representation=PMatDiag, ignore_index=-100, covariance=None),
        "FIM_MonteCarlo": fields(**FACTORY, representation=PMatDiag),
        "GGN": fields(**FACTORY, representation=PMatDiag, loss_fn=nn.CrossEntropyLoss()),
        "Hessian": fields(**FACTORY, representation=PMatDense, function=F.cross_entropy),
        "NTK": fields(**FACTORY),
        "GramMatrix": fields(**FACTORY),
        "Jacobian": fields(**FACTORY),
        "grad": squared_norm,
        "random_pvector": fields(**RULE),
        "random_pvector_dict": fields(**RULE),
        "random_fvector": fields(n_samples=2, n_output=3),
        "random_pfmap": fields(**RULE, output_size=(2, 4)),
        "register_rule": fields(module_types=nn.Identity),
        "register_variant": fields(name="a name"),
        "LayerCollection": fields(layers=[LAYERS["0"]]),
        "PVector": fields(**RULE, vector_repr=torch.ones(P)),
        "FVector": fields(vector_repr=torch.ones(2, 4)),
        "FMatDense": lambda: RULE | {"data": NTK(net(), X).data},
        "PFMapDense": lambda: RULE | {"data": jacobian().data},
        "PFMapImplicit": lambda: RULE | {"generator": jacobian().generator, "examples": X},
        **{name: made(name) for name in nngeo.__all__ if name.startswith("PMat")},
        "PMatImplicit": lambda: RULE | {"generator": fisher().generator, "examples": X},
        "PMatMixed": lambda: made("PMatMixed")() | {"map_layers_to": None},
        "PMatEye": fields(**RULE),
    },
    layers: {
        "Layer": fields(name="a", kind="Linear", shapes={"weight": torch.Size([2, 3])}),
        "Affine1d": fields(num_features=3),
        "Cosine1d": fields(in_features=3, out_features=2),
        "WeightNorm1d": fields(in_features=3, out_features=2),
        "WeightNorm2d": fields(in_channels=3, out_channels=2, kernel_size=2),
        "rule_for": fields(module=nn.Linear(2, 2)),
    },
    variants: {
        "make_variant": fields(variant="regression"),
        "FunctionVariant": fields(function=lambda outputs: outputs[None]),
        "OutputHessian": fields(loss_fn=nn.CrossEntropyLoss()),
        **dict.fromkeys(["Empirical", "Exact", "MonteCarlo"], fields(variant=variants.ClassifLogits())),
        **dict.fromkeys(["BinaryLogits", "CausalLM", "ClassifLogits", "ClassifLogSoftmax", "Identity"], dict),
        **dict.fromkeys(["PoissonLogRate", "Regression", "SegmentationLogits", "TokenLogits"], dict),
    },
    r: {
        "register_solver": fields(name="a name"),
        "PMatLowRankPlusDiag": made("PMatLowRankPlusDiag"),
    },
    uses: {
        "alignment": fields(K=torch.eye(3), y=torch.ones(3)),
        "cka": fields(K1=torch.eye(3), K2=torch.eye(3) + 1),
        "effective_rank": fields(K=torch.eye(3)),
        "influence": lambda: {"model": net(), "F": fisher(), "queries": (X, Y), "train": (X, Y), "loss": loss},
        "self_influence": lambda: {"model": net(), "F": fisher(), "train": (X, Y), "loss": loss},
        "kernel_predict": fields(K=torch.eye(3), y=torch.ones(3), K_cross=torch.ones(2, 3)),
        "lds": fields(scores=normal(4, 2), masks=normal(5, 4) > 0, losses=normal(5, 2)),
        "merge": lambda: {"models": [net(), net()], "Fs": [fisher(), fisher()]},
        "prune": lambda: {"F": fisher(), "w": vector(), "fraction": 0.5},
        "EWC": lambda: {"model": net(), "representation": PMatDiag},
        "Laplace": lambda: {"model": net(), "F": fisher()},
        "NaturalGradient": lambda: {"model": net()},
        "Quadratic": dict,
    },
    descent: {
        "backward": lambda: descending(aggregator=aggregation.UPGrad()),
        "mtl_backward": lambda: tasks(aggregator=aggregation.UPGrad()),
        "jac_to_grad": jacobians,
        "jac": lambda: {{"tensors": "outputs"}.get(k, k): v for k, v in descending().items()},
        "Engine": lambda: {"modules": net(), "batch_dim": 0},
    },
    autojac: {
        "backward": descending,
        "mtl_backward": tasks,
    },
    linalg: {"QuadprogProjector": dict, "PivotingProjector": dict},
    aggregation: {
        **dict.fromkeys(aggregation.__all__, dict),
        **dict.fromkeys(["CAGrad", "CAGradWeighting"], fields(c=0.5)),
        **dict.fromkeys(["FairGrad", "FairGradWeighting"], fields(alpha=1.0)),
        **dict.fromkeys(["CRMOGM", "CRMOGMWeighting"], lambda: {"weighting": aggregation.UPGradWeighting()}),
        **dict.fromkeys(["Constant", "ConstantWeighting"], fields(weights=torch.ones(5))),
        **dict.fromkeys(["Krum", "KrumWeighting"], fields(n_byzantine=1)),
        **dict.fromkeys(["NashMTL", "NashMTLWeighting"], fields(n_tasks=5)),
        "TrimmedMean": fields(trim_number=1),
    },
    scalarization: {
        **dict.fromkeys(["DWA", "GeometricMean", "Mean", "Random", "Sum"], dict),
        **dict.fromkeys(["FAMO", "IMTLL", "UW"], fields(shape=4)),
        "COSMOS": fields(lambda_=0.5, weights=torch.ones(4)),
        "PBI": fields(theta=1.0, weights=torch.ones(4)),
        "Constant": fields(weights=torch.ones(4)),
        "STCH": fields(mu=0.1),
    },
}

V, U = vector(), nngeo.FVector(torch.ones(2, 4))
TO = {"device": "cpu", "dtype": torch.float64}
# By the name of the class, of the methods of matrices.
PMAT: dict[str, Callable[[str], dict[str, Any]]] = {
    "add": lambda kind: {"other": fisher(kind), "exact": True},
    "ema_": lambda kind: {"examples": (X, Y), "decay": 0.5},
    "estimate_diag": lambda kind: {"samples": 6},
    "estimate_trace": lambda kind: {"samples": 6},
    "from_mapping": lambda kind: {
        **{**RULE, "generator": fisher().generator, "examples": (X, Y)},
        **{"map_layers_to": {"0": PMatDiag}, "default_representation": PMatDense},
    },
    "from_state_dict": lambda kind: {"state": fisher(stored(kind)).state_dict()},
    "inv": lambda kind: {"regul": 0.1},
    "load": lambda kind: {"path": saved(stored(kind))},
    "load_state_dict": lambda kind: {"state": fisher(stored(kind)).state_dict()},
    "logdet": lambda kind: {},
    "mapTMmap": lambda kind: {"pfmap": jacobian()},
    "mmap": lambda kind: {"pfmap": jacobian()},
    "mv": lambda kind: {"v": V},
    "norm": lambda kind: {"ord": 2},
    "pinv": lambda kind: {"atol": None, "rtol": None},
    "pool": lambda kind: {"matrices": [fisher(kind), fisher(kind)]},
    "pooled": lambda kind: {"other": fisher(kind)},
    "pow": lambda kind: {"exponent": 2.0, "regul": 0.1},
    "sample": lambda kind: {"n": 1, "inverse": False},
    "save": lambda kind: {"path": "F"},
    "size": lambda kind: {},
    "solve": lambda kind: {"x": V, "regul": 0.1, "solve": "cg", **dict.fromkeys(["rtol", "x0", "report"])},
    "spectral_density": lambda kind: {},
    "to": lambda kind: TO,
    "top_eigenpairs": lambda kind: {"k": 1},
    "trace_of": lambda kind: {"f": torch.square},
    "update": lambda kind: {"examples": (X, Y)},
    "update_diag": lambda kind: {"examples": (X, Y)},
    "get_diag": lambda kind: {},
    "vTMv": lambda kind: {"v": V},
}
METHODS: dict[str, dict[str, Given]] = {
    "LayerCollection": {
        "add_layer": lambda: {"name": "a", "layer": layers.Layer("a", "Linear", {"weight": torch.Size([2])})},
        "add_layer_from_model": lambda: dict(zip(("model", "module"), ((m := net()), m[1]), strict=True)),
        **dict.fromkeys(["covers", "get_common_layers", "merge"], fields(other=LAYERS)),
        **dict.fromkeys(["fingerprint", "from_model", "get_layerid_module_map"], lambda: {"model": net()}),
        **dict.fromkeys(["named_parameters", "parameters"], lambda: {"model": net()}),
        "join": fields(parts={"0": torch.ones(8)}),
        "split": fields(flat=torch.ones(8)),
        "split_layer": fields(name="0", flat=torch.ones(8)),
    },
    "PVector": {
        "dot": lambda: {"other": vector()},
        **dict.fromkeys(["embed", "restrict"], fields(**RULE)),
        "from_dict": lambda: RULE | {"tensors": vector().to_dict()},
        "from_model_grad": lambda: {"model": net(), "missing": "zero"},
        **dict.fromkeys(["from_model", "add_to_model", "copy_to_model", "to_model"], lambda: {"model": net()}),
        "norm": fields(p=2),
        "to": fields(**TO),
        "to_torch_layer": fields(name="0"),
    },
    "FVector": {"dot": fields(other=U), "norm": fields(p=2), "to": fields(**TO)},
    "FMatDense": {"mv": fields(v=U), "vTMv": fields(v=U), "solve": fields(x=U, regul=0.1), "norm": dict, "size": dict},
    "PFMapDense": {
        "jvp": fields(v=V),
        "vjp": fields(u=U),
        "size": dict,
        "to_torch_layer": fields(name="0"),
        "from_dict": lambda: {**RULE, "generator": None, "data_dict": {k: x for k, _, x in jacobian().iter_by_layer()}},
    },
    "PFMapImplicit": {"jvp": fields(v=V), "vjp": fields(u=U), "size": dict},
    "EWC": {"consolidate": fields(loader=(X, Y)), "load_state_dict": fields(state={})},
    "Laplace": {
        **dict.fromkeys(["covariance", "variance", "predict"], fields(x=X)),
        "fit": lambda: {"model": net(), "loader": (X, Y), "representation": PMatDiag},
        "load_state_dict": fields(state={}),
        "update": fields(loader=(X, Y)),
        **dict.fromkeys(["log_evidence", "sample"], dict),
        "tune": fields(steps=2),
    },
    "NaturalGradient": {
        "capture": fields(scale=1.0),
        "load_state_dict": fields(state_dict={}),
        "step": dict,
        "update": fields(batch=(X, Y)),
    },
    "Quadratic": {"add": lambda: {"F": fisher("PMatDiag"), "w": vector()}, "load_state_dict": fields(state={})},
    "FAMO": {"update": fields(values=torch.ones(4))},
    "Engine": {
        "compute_gramian": lambda: {"losses": losses(net())},
        "step": lambda: {"losses": losses(net()), "weighting": aggregation.UPGradWeighting()},
    },
}


def stored(kind: str) -> str:
    return "PMatDense" if kind == "PMatImplicit" else kind  # of which there is nothing to store


@cache
def saved(kind: str) -> str:
    path = Path(mkdtemp()) / kind
    fisher(kind).save(path)
    return str(path)
