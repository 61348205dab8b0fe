"""Merge networks that were trained apart from a common start (Matena & Raffel, 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nngeo.linalg.arguments import count, instance, number, shown
from nngeo.linalg.cg import conjugate_gradients
from nngeo.linalg.precision import full_precision
from nngeo.representations import PMat
from nngeo.uses.averages import averaged
from nngeo.vectors import PVector


@full_precision
def merge(
    models: Sequence[nn.Module | PVector],
    Fs: Sequence[PMat],
    damping: float = 1e-4,
    *,
    weights: Sequence[float] | None = None,
    rtol: float = 1e-5,
    max_iter: int = 1000,
) -> PVector:
    """The weights that minimise `sum_i a_i (w - w_i)' (F_i + damping) (w - w_i)`, over the layers of the matrices.

    By conjugate gradients on the sum as it is: a sum of Kronecker products is none, and is never formed. Where no F
    says anything, the weights are averaged. `merge(...).to_model(model)` puts them into a network.

    Args:
        models: networks of one form, or their weights as PVectors.
        Fs: a matrix for each, at its weights and of its examples; each in any representation.
        weights: a_i; equal if None. (Each F is a mean over examples: give counts to weigh by them.)
        rtol: residual at which it stops, relative to the right-hand side.

    Raises:
        ValueError: none, different numbers, other layers, or a damping that is not positive.
        RuntimeError: `max_iter` products did not reach `rtol`.

    >>> from nngeo import FIM, PMatKFAC
    >>> models, x = [nn.Linear(3, 2), nn.Linear(3, 2)], torch.randn(8, 3)
    >>> merge(models, [FIM(model, (x,), PMatKFAC) for model in models])
    PVector(8 coordinates of 1 layer, flat, torch.float32, cpu)
    """
    for name, given in (("models", models), ("Fs", Fs)):
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise TypeError(f"`{name}` should be a list; got {shown(given)}.")
    for i, (model, F) in enumerate(zip(models, Fs, strict=False)):
        if not isinstance(model, nn.Module | PVector):
            raise TypeError(f"`models[{i}]` should be a torch.nn.Module or a PVector; got {shown(model)}.")
        instance(f"Fs[{i}]", F, PMat)
    if not models or len(models) != len(Fs):
        raise ValueError(f"`models` and `Fs` should be equally many, one or more; found {len(models)} and {len(Fs)}.")
    layers = Fs[0].layer_collection
    if any(F.layer_collection != layers for F in Fs):
        raise ValueError("All matrices should be over the same layers.")
    damping, rtol = number("damping", damping, positive=True), number("rtol", rtol, least=0)
    count("max_iter", max_iter, least=0)
    if weights is not None and (not isinstance(weights, Sequence | Tensor) or len(weights) != len(Fs)):
        raise ValueError(f"`weights` should be {len(Fs)} positive numbers; got {shown(weights)}.")
    shares = [number("weights", share, positive=True) for share in ([1.0] * len(Fs) if weights is None else weights)]
    a = [share / sum(shares) for share in shares]
    ws = [_weights(model, F) for model, F in zip(models, Fs, strict=True)]

    def product(v: Tensor) -> Tensor:
        return torch.stack([share * F.mv(v) for share, F in zip(a, Fs, strict=True)]).sum(0) + damping * v

    start = torch.stack([share * w for share, w in zip(a, ws, strict=True)]).sum(0)[None]
    right = torch.stack([share * F.mv(w) for share, F, w in zip(a, Fs, ws, strict=True)]).sum(0)[None] + damping * start
    near = _mean(Fs, a)

    def precondition(r: Tensor) -> Tensor:
        if near is not None:
            return near.solve(r, regul=damping)
        return torch.stack([share * F.solve(r, regul=damping) for share, F in zip(a, Fs, strict=True)]).sum(0)

    found = conjugate_gradients(product, right, x0=start, rtol=rtol, max_iter=max_iter, precondition=precondition)
    if not found.converged:
        raise RuntimeError(
            f"Conjugate gradients stopped after {found.iterations} steps at a relative residual of "
            f"{float(found.residuals.max()):.1e}, above rtol={rtol:.1e}: raise `damping`, `rtol` or `max_iter`."
        )
    return PVector(layers, found.x[0])


def _weights(model: nn.Module | PVector, F: PMat) -> Tensor:
    w = model if isinstance(model, PVector) else PVector.from_model(model, F.layer_collection)
    return w.restrict(F.layer_collection).to_torch().detach().to(dtype=F.dtype, device=F.device)


def _mean(Fs: Sequence[PMat], a: Sequence[float]) -> PMat | None:
    """What all examples together would give, a matrix near to the mean; None where there is none of this kind."""
    mean, total = Fs[0], a[0]
    try:
        for F, share in zip(Fs[1:], a[1:], strict=True):
            mean, total = averaged(mean, F, total, share), total + share
        return mean
    except (NotImplementedError, TypeError):  # two eigenbases; matrices never formed; different representations
        return None
