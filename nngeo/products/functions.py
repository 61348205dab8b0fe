"""Products of the Jacobian of any module with vectors and matrices, example by example."""

from __future__ import annotations

from typing import Any, TypedDict

from torch import Tensor, nn

from nngeo.generators.batches import Function
from nngeo.layers.collection import LayerCollection
from nngeo.linalg.precision import full_precision
from nngeo.products.differential import finished
from nngeo.products.evaluation import Wrt
from nngeo.products.opening import differential
from nngeo.products.vectors import columns, vector

try:
    from typing import Unpack
except ImportError:  # Python 3.10
    from typing_extensions import Unpack


class Options(TypedDict, total=False):
    """What all products take: see `differential`."""

    layer_collection: LayerCollection | None
    function: Function | None
    create_graph: bool
    budget: int | None


@full_precision
def jvp(model: nn.Module, x: Any, v: Any, wrt: Wrt = "input", **options: Unpack[Options]) -> Tensor:
    """J v (b, o), for v (b, n), (n,) for all examples, shaped like the input, or a PVector.

    >>> import torch
    >>> jvp(torch.nn.Tanh(), torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]))
    tensor([[1., 2.]])
    """
    with differential(model, x, wrt, **options) as at:
        return finished(at.push(vector(v, "v", at.domain)[None])[0], at)


@full_precision
def vjp(model: nn.Module, x: Any, w: Any, wrt: Wrt = "input", **options: Unpack[Options]) -> Tensor:
    """J' w (b, n), for w (b, o), (o,) for all examples, or shaped like the outputs.

    >>> import torch
    >>> vjp(torch.nn.Flatten(), torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]))
    tensor([[1., 2.]])
    """
    with differential(model, x, wrt, **options) as at:
        rows = vector(w, "w", at.codomain)
        return finished(at.pull(rows.expand(at.codomain.b, -1)[None])[0], at)


@full_precision
def jmp(model: nn.Module, x: Any, m: Any = None, wrt: Wrt = "input", **options: Unpack[Options]) -> Tensor:
    """J M (b, o, c), for columns m (b, n, c) or (n, c); J itself for None."""
    with differential(model, x, wrt, **options) as at:
        if m is None:
            return at.jacobian()
        v = columns(m, "m", at.domain, rows=False)
        if len(v) and len(v) * at.push_cost() <= at.codomain.d * (at.pull_cost() + len(v) * at.domain.d):
            return finished(at.push(v).permute(1, 2, 0), at)
        j = at.jacobian()
        # Shared columns are multiplied with the rows of all examples at once.
        shared = len(v) and m.ndim == 2
        return finished((j.flatten(0, 1) @ m).unflatten(0, j.shape[:2]) if shared else j @ m, at)


@full_precision
def mjp(model: nn.Module, x: Any, m: Any = None, wrt: Wrt = "input", **options: Unpack[Options]) -> Tensor:
    """M J (b, c, n), for rows m (b, c, o) or (c, o); J itself for None."""
    with differential(model, x, wrt, **options) as at:
        if m is None:
            return at.jacobian()
        w = columns(m, "m", at.codomain, rows=True).expand(-1, at.codomain.b, -1)
        if len(w) and len(w) * at.pull_cost() <= at.domain.d * (at.push_cost() + len(w) * at.codomain.d):
            return finished(at.pull(w).transpose(0, 1), at)
        return finished(m @ at.jacobian(), at)


@full_precision
def jacobian(model: nn.Module, x: Any, wrt: Wrt = "input", **options: Unpack[Options]) -> Tensor:
    """J (b, o, n), by columns pushed forward or by rows pulled back, whichever costs less.

    >>> import torch
    >>> jacobian(torch.nn.Linear(3, 2), torch.zeros(4, 3), wrt="weight").shape
    torch.Size([4, 2, 8])
    """
    return jmp(model, x, None, wrt, **options)
