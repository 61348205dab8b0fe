"""The Hessian of a loss by the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from nngeo.factories.arguments import Device, checked, layers_for
from nngeo.generators import HessianGenerator
from nngeo.layers import LayerCollection
from nngeo.linalg.precision import full_precision
from nngeo.representations import PMat

Matrix = TypeVar("Matrix", bound=PMat)


@full_precision
def Hessian(
    model: nn.Module,
    loader: Any,
    representation: type[Matrix],
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
    verbose: bool = False,
    *,
    device: Device = None,
    reduction: str = "sum",
    **options: Any,
) -> Matrix:
    """The Hessian of a loss by the parameters, the sum over batches of that of `function(prediction, *targets)`.

    By double backward: two gradients for each product with a vector. PMatDense, PMatBlockDiag, PMatDiag and
    PMatImplicit hold it; the others are made of outer products, which an indefinite matrix is not.

    Args:
        function: the loss of a batch. A loss that averages over the batch makes the sum depend on the batch size.
        reduction: "sum", or "mean": the sum divided by the number of examples (for losses that sum over the batch).
    """
    if function is None:
        raise ValueError("Hessian needs `function`, the loss: for example function=torch.nn.functional.cross_entropy.")
    layers = layers_for(model, loader, layer_collection)
    generator = HessianGenerator(model, function, device=device, reduction=reduction, verbose=verbose)
    return checked(representation, (PMat,), options)(layers, generator, examples=loader, **options)
