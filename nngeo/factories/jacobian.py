"""Jacobians of a network on examples, and their Gram matrix, the neural tangent kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nngeo.factories.arguments import Device, checked, layers_for
from nngeo.generators import JacobianGenerator
from nngeo.generators.batches import Function
from nngeo.layers import LayerCollection
from nngeo.linalg.precision import full_precision
from nngeo.representations import FMatDense, PFMapDense, PFMapImplicit
from nngeo.variants import Exact, make_variant


@full_precision
def Jacobian(
    model: nn.Module,
    loader: Any,
    function: Function | None = None,
    representation: type[PFMapDense] | type[PFMapImplicit] = PFMapDense,
    layer_collection: LayerCollection | None = None,
    *,
    device: Device = None,
    verbose: bool = False,
    check: bool = True,
) -> Any:
    """Jacobians of all examples, a map from parameters to outputs: (k, n, P), k outputs and n examples.

    Costs a backward for each output, and k n P numbers; PFMapImplicit stores nothing.
    """
    layers = layers_for(model, loader, layer_collection)
    generator = _rows(model, function, device, verbose, check)
    return checked(representation, (PFMapDense, PFMapImplicit))(layers, generator, examples=loader)


@full_precision
def NTK(
    model: nn.Module,
    loader: Any,
    other: Any = None,
    representation: type[FMatDense] = FMatDense,
    layer_collection: LayerCollection | None = None,
    *,
    function: Function | None = None,
    device: Device = None,
    verbose: bool = False,
    check: bool = True,
) -> FMatDense:
    """The neural tangent kernel `J J'` of the examples, (k, n, k, n): their Gram matrix in parameter space.

    Gradients are not formed where inner products of a layer's inputs and output gradients give the same. Each batch is
    run once, so a loader that shuffles is fine. The trace sums over outputs (neural-tangents divides by their number).

    Args:
        other: examples of the columns, for the cross kernel (k, n, k, m) of two sets; by default those of the rows.
            A function in this place is taken for `function`, as in NNGeometry's GramMatrix.
    """
    if isinstance(other, type):
        raise TypeError(
            f"`other` takes a second set of examples, x2 of NTK(model, x1, x2); got the class {other.__name__}. "
            "Give it by name: representation=FMatDense."
        )
    if callable(other) and not isinstance(other, Tensor):
        function, other = other, None
    layers = layers_for(model, loader, layer_collection)
    generator = _rows(model, function, device, verbose, check)
    second = {} if other is None else {"examples2": other}
    return checked(representation, (FMatDense,))(layers, generator, examples=loader, **second)


GramMatrix = NTK


def _rows(model: nn.Module, function: Function | None, device: Device, verbose: bool, check: bool) -> JacobianGenerator:
    return JacobianGenerator(
        model, Exact(make_variant("identity")), function, device=device, verbose=verbose, check=check
    )
