"""Fisher and Gauss-Newton matrices of a network, in any representation: glue, no math."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nngeo.factories.arguments import Device, Mask, VariantChoice, checked, layers_for
from nngeo.generators import JacobianGenerator
from nngeo.generators.batches import Function, Target
from nngeo.layers import LayerCollection
from nngeo.linalg.arguments import count, flag
from nngeo.linalg.precision import full_precision
from nngeo.representations import PMat
from nngeo.variants import Empirical, Estimator, Exact, MonteCarlo, OutputHessian, TokenLogits, Variant, make_variant

Matrix = TypeVar("Matrix", bound=PMat)


@full_precision
def FIM(
    model: nn.Module,
    loader: Any,
    representation: type[Matrix],
    variant: VariantChoice = "classif_logits",
    device: Device = None,
    function: Function | None = None,
    layer_collection: LayerCollection | None = None,
    verbose: bool = False,
    *,
    n_output: int | None = None,
    empirical: bool = False,
    mask: Mask | None = None,
    target: Target | None = None,
    ignore_index: int | None = -100,
    covariance: Any = None,
    check: bool = True,
    **options: Any,
) -> Matrix:
    """The Fisher information matrix, the mean over examples of `J' M J`, in a representation.

    J is the Jacobian of the outputs by the parameters, and M the Fisher of the variant's distribution at the outputs
    of one example (positions of an example are summed over). With `empirical`, `J' M J` is instead the outer product
    of the gradient of -log p at the given target, one for each example.

    Args:
        model: in eval mode, where it has BatchNorm or dropout. It comes back as it was.
        loader: a DataLoader, any iterable of batches, or one batch: a tensor, a tuple (inputs, targets), or a dict of
            the model's keyword arguments.
        representation: a class such as PMatDiag or PMatKFAC; `options` go to it.
        variant: "regression", "classif_logits", "classif_logsoftmax", "classif_binary_logits",
            "segmentation_logits", "token_logits", "causal_lm", "poisson_log_rate", a Variant, or a function
            `outputs, *targets -> c (k, b, ...)` with the sum of c c' over k as metric.
        device: None, or where the model already is.
        function: called as `function(*batch)` (or `function(batch)` with a dict) in place of `model(batch[0])` (or
            `model(**batch)` without its labels).
        layer_collection: the parameters; by default all that require a gradient.
        verbose: show a progress bar.
        n_output: the number of outputs to expect; not needed.
        mask: which positions count: a function of the batch that returns booleans (b, *positions), or a key of dict
            batches. With "token_logits" or "causal_lm" and dict batches, "attention_mask" by default.
        target: which entry of a batch is the target: its index, its key, or a function of the batch. By default what
            follows the inputs; with a function, the last entry; in a dict the "labels".
        ignore_index: target of positions that do not count ("segmentation_logits", "token_logits", "causal_lm");
            None: all count.
        covariance: of the noise of "regression": a number, (o,) variances or (o, o); by default 1.
        check: compare the layers' rules with autograd on a few examples, once for a model: about ten forward or
            backward passes of up to six examples. Without it, unusual uses of parameters are not found, nor are
            examples that influence each other.

    Cost: a forward for each mini-batch, and a backward (without gradients by weights) for each of the k cotangents:
    the number of outputs, less one for a softmax, times the number of positions; one if empirical. Then what the
    representation takes.

    Raises:
        ValueError: an argument, the model's mode, or its outputs, with what would work instead.
        TypeError: an argument or an output of a wrong type.
        NotImplementedError: a layer, named, that the representation or the sweep can't serve.
        MemoryError: a representation too large for this machine.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    >>> from nngeo import PMatDiag, PVector
    >>> F = FIM(model, (torch.randn(10, 4),), PMatDiag)
    >>> v = PVector.from_model(model)
    >>> bool(F.vTMv(v) > 0)
    True
    """
    kind = _variant(variant, ignore_index, covariance)
    estimator = Empirical(kind) if flag("empirical", empirical) else Exact(kind)
    return _matrix(
        model, loader, representation, estimator, layer_collection, options,
        function=function, device=device, mask=mask, target=target, n_output=n_output, check=check, verbose=verbose,
    )  # fmt: skip


@full_precision
def FIM_MonteCarlo(
    model: nn.Module,
    loader: Any,
    representation: type[Matrix],
    variant: VariantChoice = "classif_logits",
    trials: int = 1,
    device: Device = None,
    function: Function | None = None,
    layer_collection: LayerCollection | None = None,
    verbose: bool = False,
    *,
    generator: torch.Generator | None = None,
    n_output: int | None = None,
    mask: Mask | None = None,
    target: Target | None = None,
    ignore_index: int | None = -100,
    covariance: Any = None,
    check: bool = True,
    **options: Any,
) -> Matrix:
    """An unbiased estimate of `FIM`: gradients at targets drawn from the model, `trials` draws for each example.

    Costs `trials` backward passes, however many outputs there are. The draws stay the same for the life of the matrix:
    products with a PMatImplicit are products with one matrix.

    Args:
        trials: draws for each example. The variance of the estimate is proportional to 1 / (trials n).
        generator: source of the draws; without one, a single number is drawn from torch's global generator.

    The other arguments are those of `FIM`.
    """
    estimator = MonteCarlo(_variant(variant, ignore_index, covariance), trials, generator)
    return _matrix(
        model, loader, representation, estimator, layer_collection, options,
        function=function, device=device, mask=mask, target=target, n_output=n_output, check=check, verbose=verbose,
    )  # fmt: skip


@full_precision
def GGN(
    model: nn.Module,
    loader: Any,
    representation: type[Matrix],
    loss_fn: Callable[..., Tensor],
    device: Device = None,
    function: Function | None = None,
    layer_collection: LayerCollection | None = None,
    verbose: bool = False,
    *,
    target: Target | None = None,
    check: bool = True,
    **options: Any,
) -> Matrix:
    """The generalized Gauss-Newton matrix of a loss, the mean over examples of `J' H J` (Schraudolph, 2002).

    H is the Hessian of the loss of one example by its outputs, found by differentiating `loss_fn` twice.

    Args:
        loss_fn: `loss_fn(outputs, *targets) -> scalar`, called for each example as a batch of one; so a loss that
            averages over examples and one that sums over them give the same, and one that averages over outputs, as
            nn.MSELoss does, includes this factor. Class weights and `ignore_index` need reduction="sum".

    The other arguments are those of `FIM`.

    Raises:
        ValueError: the loss is not convex in the outputs, and the representation needs a square root of H; or the
            loss divides by class weights, or by the number of targets that are not ignored.
        NotImplementedError: an operation of the loss has no second derivative.
    """
    return _matrix(
        model, loader, representation, Exact(OutputHessian(loss_fn)), layer_collection, options,
        function=function, device=device, target=target, check=check, verbose=verbose,
    )  # fmt: skip


def _variant(variant: VariantChoice, ignore_index: int | None, covariance: Any) -> Variant:
    if ignore_index is not None:
        count("ignore_index", ignore_index, least=-(2**63))
    options = {"ignore_index": ignore_index} if ignore_index != -100 else {}
    options |= {"covariance": covariance} if covariance is not None else {}
    return make_variant(variant, **options)


def _matrix(
    model: nn.Module,
    loader: Any,
    representation: type[Matrix],
    estimator: Estimator,
    layer_collection: LayerCollection | None,
    options: dict[str, Any],
    **settings: Any,
) -> Matrix:
    layers = layers_for(model, loader, layer_collection)
    if isinstance(estimator.variant, TokenLogits) and settings["function"] is None and _shifts_labels(model):
        warnings.warn(
            f"{type(model).__name__} predicts the next token, and its labels are those of the tokens themselves, but "
            "variant='token_logits' compares logits and targets of one position. Use variant='causal_lm', or shift "
            "them in `function=`.",
            stacklevel=3,
        )
    generator = JacobianGenerator(model, estimator, **settings)
    return checked(representation, (PMat,), options)(layers, generator, examples=loader, **options)


def _shifts_labels(model: nn.Module) -> bool:
    """Whether it is a causal language model of transformers, by its name."""
    return any(kind.__name__.endswith(("ForCausalLM", "LMHeadModel")) for kind in type(model).__mro__)
