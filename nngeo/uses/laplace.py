"""Laplace approximation: a normal distribution over the weights of a trained network (MacKay, 1992)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nngeo.factories import Jacobian
from nngeo.generators import Batch, Examples
from nngeo.generators.batches import Function
from nngeo.generators.independence import explained, run
from nngeo.layers import LayerCollection
from nngeo.layers.replace import replaced
from nngeo.linalg.arguments import callback, choice, count, flag, instance, number, random_source, shown
from nngeo.linalg.decompose import eigh
from nngeo.linalg.precision import FullPrecision
from nngeo.linalg.spectrum import logarithm
from nngeo.products import jmjTp
from nngeo.representations import PMat
from nngeo.uses.estimates import fisher
from nngeo.uses.likelihoods import likelihood_of
from nngeo.uses.state import packed, unpacked
from nngeo.vectors import PVector

if TYPE_CHECKING:
    from typing_extensions import Self

LINKS = ("probit", "bridge", "mc", "samples")


class Laplace(FullPrecision):
    """The posterior `N(w, H^-1)`, `H = n / (noise temperature) F + prior_precision`, around the weights w of a model.

    F is a mean over n examples; the factor n is seen to here. Predictions are those of the network linearized at w.

    Args:
        F: of the likelihood, in any representation; over the last layer, by `layer_collection`, if it is of that.
        likelihood: "regression", "classif_logits", "token_logits", "segmentation_logits", "classif_binary_logits" or
            "poisson_log_rate".
        prior_precision: a number, a tensor (layers,), or (P,). Weight decay c on a mean loss is n c.
        noise: variance of the targets of a regression.
        temperature: by which the likelihood is divided; below 1 the posterior is narrower.
        function: called as `function(*x)`, or `function(x)` with a dict, in place of the model.
        verbose: show a progress bar.

    >>> from nngeo import PMatKFAC
    >>> model, x, y = nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
    >>> la = Laplace.fit(model, (x, y), PMatKFAC, likelihood="classif_logits").tune()
    >>> la.predict(x).shape
    torch.Size([8, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        F: PMat,
        likelihood: str = "classif_logits",
        prior_precision: Any = 1.0,
        noise: float | Tensor = 1.0,
        *,
        temperature: float = 1.0,
        function: Function | None = None,
        verbose: bool = False,
    ):
        instance("model", model, nn.Module)
        instance("F", F, PMat, "as of FIM")
        flag("verbose", verbose)
        self.model, self.F, self.likelihood = model, F, likelihood
        self._likelihood = likelihood_of(likelihood)
        if F.n_examples is None:
            raise ValueError(f"This {type(F).__name__} has no count of examples: set F.n_examples.")
        self.temperature, self.verbose = number("temperature", temperature, positive=True), verbose
        self.function = callback("function", function, "of the inputs", optional=True)
        self.mean = PVector.from_model(model, F.layer_collection).to(dtype=F.dtype).detach().clone()
        self.prior_precision, self.noise = self._prior(prior_precision), self._noise(noise)
        self._fit, self._count = torch.zeros((), dtype=F.dtype, device=F.device), 0

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        loader: Any,
        representation: type[PMat],
        likelihood: str = "classif_logits",
        prior_precision: Any = 1.0,
        noise: float | Tensor = 1.0,
        *,
        layer_collection: LayerCollection | None = None,
        function: Function | None = None,
        trials: int | None = None,
        temperature: float = 1.0,
        verbose: bool = False,
        **options: Any,
    ) -> Self:
        """From the examples that the model was trained on, (inputs, targets).

        Args:
            function: called as `function(*batch)` while fitting, and as `function(x)` in predictions; so it should
                take the inputs alone, too.
            trials: draws for each example; None for the exact Fisher (Gauss-Newton) matrix.
            options: others of `FIM` or `FIM_MonteCarlo`.

        Costs an estimate of the matrix and a forward over the examples.
        """
        likelihood_of(likelihood)
        examples = Examples.kept(loader)
        options |= {"layer_collection": layer_collection, "function": function, "verbose": verbose}
        F = fisher(model, examples, representation, likelihood, trials, **options)
        new = cls(model, F, likelihood, prior_precision, noise, temperature=temperature, verbose=verbose)
        new.function = function
        new._add_fit(examples)
        return new

    def update(self, loader: Any) -> Self:
        """Let further examples join: the counts, the matrix (in its eigenbasis, for EKFAC) and the fit add up."""
        examples = Examples.kept(loader)
        self.F = copy.copy(self.F).update(examples)
        self.__dict__.pop("_eigenvalues", None)
        self._add_fit(examples)
        return self

    # The evidence

    def log_evidence(self, prior_precision: Any = None, noise: float | Tensor | None = None) -> Tensor:
        """log p(targets), 0-d, with the weights integrated out; differentiable in the prior precision and the noise.

        Raises:
            ValueError: the examples had no targets, or the matrix was given and not fitted here.
        """
        if not self._count:
            raise ValueError("The evidence takes targets: use Laplace.fit(model, loader of (inputs, targets), ...).")
        prior = self.prior_precision if prior_precision is None else self._prior(prior_precision)
        noise = self.noise if noise is None else self._noise(noise)
        w, scale = self.mean.to_torch(), self._scale(noise)
        each = self._flat(prior).expand(len(w))
        likelihood = self._likelihood.log_likelihood(self._fit, self._count, noise) / self.temperature
        if prior.ndim == 0:
            logdet = logarithm(scale * self._eigenvalues + prior).sum()
        else:
            logdet = (self.F + prior / scale).logdet() + len(w) * scale.log()
        return likelihood - (each * w.square()).sum() / 2 + each.log().sum() / 2 - logdet / 2

    def tune(self, steps: int = 50) -> Self:
        """Set the prior precision, and the noise of a regression, to where the evidence is largest. Returns itself.

        By at most so many steps of L-BFGS on logarithms; each costs a few evaluations of `log_evidence`.
        """
        logs = [self.prior_precision.log()] + ([self.noise.log()] if self._likelihood.noisy else [])
        logs = [x.detach().clone().requires_grad_() for x in logs]
        optimizer = torch.optim.LBFGS(logs, max_iter=count("steps", steps), line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = -self.log_evidence(*[x.exp() for x in logs])
            value.backward()
            return value

        optimizer.step(loss)
        self.prior_precision = logs[0].detach().exp()
        self.noise = logs[1].detach().exp() if self._likelihood.noisy else self.noise
        return self

    # Predictions

    def covariance_of_weights(self) -> PMat:
        """H^-1, a matrix."""
        scale = self._scale(self.noise)
        return (self.F + self.prior_precision / scale).inv() * float(1 / scale)

    def variance(self, x: Any) -> Tensor:
        """The variance of each output, in their shape, without the noise of targets. No Jacobian is formed."""
        f = self._outputs(x)
        return self._pushed(x, "diag").reshape(f.shape)

    def covariance(self, x: Any) -> Tensor:
        """The covariance (b, o, b, o) of all outputs of all examples, without noise; forms the Jacobian (o, b, P)."""
        J = Jacobian(self.model, self._inputs(x), self.function, layer_collection=self.F.layer_collection)
        return self.covariance_of_weights().mapTMmap(J, "full").data.permute(1, 0, 3, 2)

    def predict(
        self, x: Any, link: str = "probit", samples: int = 100, generator: torch.Generator | None = None
    ) -> Any:
        """Means of the targets in the shape of the outputs (probabilities); for a regression (mean, variance).

        The variance is that of a target: it holds the noise.

        Args:
            x: inputs: a tensor, a tuple of arguments, or a dict.
            link: how uncertain logits become probabilities: "probit", closed form from their variances; "bridge", of a
                Dirichlet from their covariances; "mc", the mean over draws of the logits; "samples", the mean over
                networks with drawn weights, which are not linearized.
            samples: of the last two.
        """
        choice("link", link, LINKS)
        count("samples", samples)
        random_source(generator)
        if link == "samples":
            outputs = self._networks(x, self.sample(samples, generator))
            if self._likelihood.noisy:
                return outputs.mean(0), outputs.var(0, correction=0) + self.noise
            return self._likelihood.inverse_link(outputs.flatten(0, 1)).unflatten(0, outputs.shape[:2]).mean(0)
        f = self._outputs(x)
        if self._likelihood.noisy:
            return f, self.variance(x) + self.noise
        if link == "probit":
            return self._likelihood.probit(f, self.variance(x))
        covariance = self._pushed(x, "dense")
        if link == "bridge":
            return self._likelihood.bridge(f, covariance)
        device = f.device if generator is None else generator.device
        z = torch.randn(samples, *covariance.shape[:2], generator=generator, dtype=f.dtype, device=device).to(f.device)
        values, vectors = eigh(covariance, "covariance")
        draws = torch.einsum("bij,bj,sbj->sbi", vectors, values.clamp(min=0).sqrt(), z).reshape(samples, *f.shape)
        return self._likelihood.inverse_link((f + draws).flatten(0, 1)).unflatten(0, draws.shape[:2]).mean(0)

    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """(n, P), weights from the posterior."""
        scale = self._scale(self.noise)
        draws = (self.F + self.prior_precision / scale).sample(n, generator) / scale.sqrt()
        return self.mean.to_torch() + draws

    # State

    def state_dict(self) -> dict[str, Tensor]:
        """Matrix, mean, prior, noise and fit, as tensors only."""
        return packed(
            F=self.F.state_dict(), mean=self.mean.to_torch(), prior=self.prior_precision, noise=self.noise,
            fit=self._fit, count=self._count, likelihood=self.likelihood, temperature=self.temperature,
        )  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take all of a `state_dict()`; the model and function stay.

        Raises:
            ValueError: it is of something else, or of another likelihood.
        """
        parts = unpacked(state, "a Laplace")
        if parts.get("likelihood") != self.likelihood:
            raise ValueError(
                f"This state is of likelihood {parts.get('likelihood')!r}; here it is {self.likelihood!r}."
            )
        self.F = PMat.from_state_dict(parts["F"], self.F.generator)
        self.mean = PVector(self.F.layer_collection, parts["mean"].clone())
        self.prior_precision, self.noise = parts["prior"].clone(), parts["noise"].clone()
        self._fit, self._count, self.temperature = parts["fit"].clone(), parts["count"], parts["temperature"]
        self.__dict__.pop("_eigenvalues", None)

    def __repr__(self) -> str:
        return f"Laplace({self.likelihood}, {self.F!r})"

    # Helpers

    @cached_property
    def _eigenvalues(self) -> Tensor:
        return self.F.eigh()[0]

    def _scale(self, noise: Tensor) -> Tensor:
        assert self.F.n_examples is not None
        return self.F.n_examples / (self.temperature * (noise if self._likelihood.noisy else torch.ones_like(noise)))

    def _noise(self, value: float | Tensor) -> Tensor:
        number("noise", value, positive=True)
        return torch.as_tensor(value, dtype=self.F.dtype, device=self.F.device)

    def _prior(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            number("prior_precision", value)
        prior = torch.as_tensor(value, dtype=self.F.dtype, device=self.F.device)
        allowed = [(), (len(self.F.layer_collection),), (self.F.layer_collection.numel(),)]
        if tuple(prior.shape) not in allowed:
            raise ValueError(
                f"`prior_precision` should be of shape {', '.join(map(str, allowed))}; found {prior.shape}."
            )
        if not bool((prior > 0).all()):
            raise ValueError("`prior_precision` should be positive.")
        return prior

    def _flat(self, prior: Tensor) -> Tensor:
        """0-d or (P,)."""
        sizes = [layer.numel() for layer in self.F.layer_collection.layers.values()]
        by_layer = prior.ndim and len(prior) == len(sizes)
        return prior.repeat_interleave(torch.tensor(sizes, device=prior.device)) if by_layer else prior

    def _add_fit(self, examples: Examples) -> None:
        for batch in examples:
            moved = batch.to(next(self.model.parameters()).device)
            if targets := moved.targets(self.function):
                f = run(self.model, self.function, moved).detach().to(self._fit.dtype)
                fit, count = self._likelihood.fit(f, *targets)
                self._fit, self._count = self._fit + fit, self._count + count

    def _inputs(self, x: Any) -> Any:
        if not Batch.of(x).tensors():
            raise TypeError(f"`x` should be inputs (a tensor, a tuple or a dict of them); got {shown(x)}.")
        return Batch.of(x).inputs if isinstance(x, Mapping) and self.function is None else x

    def _outputs(self, x: Any) -> Tensor:
        content = self._inputs(x)
        batch = Batch.of(content).to(next(self.model.parameters()).device)
        by_user = self.function is not None or isinstance(content, Mapping)
        function = self.function if by_user else self.model  # of all entries: none is a target

        def plain(batch: Batch) -> Tensor:
            return run(self.model, function, batch)

        with explained(plain, batch):
            return plain(batch).detach().to(self.F.dtype)

    def _pushed(self, x: Any, result: str) -> Tensor:
        return jmjTp(
            self.model, self._inputs(x), self.covariance_of_weights(), "weight", result=result,
            layer_collection=self.F.layer_collection, function=self.function,
        )  # fmt: skip

    def _networks(self, x: Any, draws: Tensor) -> Tensor:
        """(n, b, ...), the outputs of networks with weights (n, P); the model is given these for a moment."""
        own, outputs = dict(self.F.layer_collection.named_parameters(self.model)), []
        for draw in draws:
            values = PVector(self.F.layer_collection, draw)
            drawn = {name: value.to(p) for (name, p), (_, value) in zip(own.items(), values, strict=True)}
            with replaced(self.model, drawn):
                outputs.append(self._outputs(x))
        return torch.stack(outputs)
