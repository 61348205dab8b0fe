"""Natural gradient descent (Amari, 1998), by KFAC (Martens & Grosse, 2015) or another Fisher matrix."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nngeo.factories import FIM
from nngeo.generators import Generator
from nngeo.layers.collection import LayerCollection, layers_of
from nngeo.linalg.arguments import callback, choice, count, flag, instance, number
from nngeo.linalg.decompose import pinv
from nngeo.linalg.precision import FullPrecision
from nngeo.representations import PMat, PMatImplicit, PMatKFAC
from nngeo.uses.averages import averaged
from nngeo.uses.capture import Capture, Captured
from nngeo.uses.estimates import check_fisher, fisher
from nngeo.uses.state import packed, unpacked
from nngeo.vectors import PVector

SMALLEST, LARGEST = 1e-8, 1e8  # of a damping that adapts itself


class NaturalGradient(FullPrecision, torch.optim.Optimizer):
    """Steps along `-(F + damping)^-1 g`, with a Fisher matrix F that is a moving average over mini-batches.

    A step is `opt.zero_grad(); loss.backward(); opt.update((x, y)); opt.step()`; or, with the factors of the training
    pass itself (those of the gradients at the targets), `with opt.capture(): loss.backward()`, where the forward is
    inside, too.

    `param_groups[0]` are the parameters of `layer_collection`; the others, if there are any, are `param_groups[1]`, and
    take steps of gradient descent. So schedulers, clipping and GradScaler work as with any optimizer.

    Args:
        representation: of F, with a `solve`.
        variant: of F, as in `FIM`.
        trials: draws for each example; None for the exact Fisher matrix.
        empirical: gradients at the targets in place of draws.
        damping: a number, or "lm": from 1 on it follows Levenberg and Marquardt, by what `step(closure)` finds; a step
            is as long as the quadratic model with the exact Fisher matrix of the last mini-batch says, times lr.
        decay: of the moving average; the mean of all that was seen until that is larger.
        update_every: of so many calls of `update` or `capture` only the first does something.
        solve_every: of so many steps only the first decomposes F anew.
        momentum: a number; or "exact" for `step(closure)`: step and the one before combined so that this model is least
            (Martens & Grosse, section 7).
        kl_clip: largest change of the outputs' distributions in a step, `lr^2 g' (F + damping)^-1 g`.
        weight_decay: c of c / 2 |w|^2, a part of the loss: its curvature joins the damping.
        layer_collection: the parameters to serve; by default all that require a gradient.
        others: whether the other parameters take gradient descent here, or are left to another optimizer.
        function, options: as in `FIM`.

    >>> model, x, y = nn.Linear(3, 2), torch.randn(8, 3), torch.randint(2, (8,))
    >>> opt = NaturalGradient(model)
    >>> nn.functional.cross_entropy(model(x), y).backward()
    >>> opt.update((x, y)), opt.step()
    (None, None)
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        representation: type[PMat] = PMatKFAC,
        variant: Any = "classif_logits",
        trials: int | None = 1,
        damping: float | str = 1e-2,
        decay: float = 0.95,
        update_every: int = 1,
        solve_every: int = 1,
        momentum: float | str = 0.0,
        kl_clip: float | None = None,
        weight_decay: float = 0.0,
        *,
        empirical: bool = False,
        layer_collection: LayerCollection | None = None,
        others: bool = True,
        **options: Any,
    ):
        _check(lr, damping, decay, update_every, solve_every, momentum, kl_clip, weight_decay)
        check_fisher(representation, variant, trials)
        flag("empirical", empirical)
        flag("others", others)
        self.model, self.representation, self.variant = model, representation, variant
        self.layers = layers_of(model, layer_collection)
        self.trials, self.empirical, self.decay = None if empirical else trials, empirical, decay
        self.update_every, self.solve_every = update_every, solve_every
        self.adapts, self.exact = damping == "lm", momentum == "exact"
        self.F: PMat | None = None
        self.near: PMat | None = None  # F as it was when it was decomposed last
        self.calls = self.updates = self.steps = 0
        self._options, self._batch = options, None
        self._capture: Capture | None = None
        self._source: Generator | None = None
        served = list(self.layers.parameters(model))
        groups = [{"params": served, "damping": 1.0 if damping == "lm" else damping}]
        taken = {id(p) for p in served}
        if others and (rest := [p for p in model.parameters() if p.requires_grad and id(p) not in taken]):
            groups.append({"params": rest, "damping": 0.0})
        defaults = {
            "lr": lr, "momentum": 0.0 if momentum == "exact" else momentum, "kl_clip": kl_clip,
            "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(groups, defaults)

    # The matrix

    def update(self, batch: Any) -> None:
        """Let the mini-batch, at the model's weights, join the moving average. Costs an estimate of F."""
        self._batch = batch
        if not self._due():
            return
        empirical = {"empirical": True} if self.empirical else {}
        options = {"layer_collection": self.layers, **empirical, **self._options}
        self._join(fisher(self.model, batch, self.representation, self.variant, self.trials, **options))

    @contextmanager
    def capture(self, scale: float | None = None) -> Iterator[None]:
        """A context for the forward and the backward pass, whose inputs and gradients at the layers are to be F's.

        Args:
            scale: what the loss is divided by: the number of examples if None; for a mean over all tokens their
                number; with a GradScaler divided by its scale.

        Raises:
            NotImplementedError: a layer that is not a linear map.
            ValueError: nothing was run, or it does not add up to the gradients that it left.
        """
        if scale is not None:
            number("scale", scale, positive=True)
        if not self._due():
            yield
            return
        if self._capture is None:
            self._capture = Capture(self.model, self.layers)
        before = {name: p.grad is not None for name, p in self.layers.named_parameters(self.model)}
        with self._capture.watching():
            yield
        record = self._capture.record(scale, before)
        self._join(self.representation(self.layers, Captured(self.model, record), examples=[]))

    def _due(self) -> bool:
        self.calls += 1
        return (self.calls - 1) % self.update_every == 0

    def _join(self, new: PMat) -> None:
        self.updates += 1
        new.generator = None
        weight = min(self.decay, 1 - 1 / self.updates)
        if self.F is None or weight == 0:
            self.F = new
            return
        try:
            self.F = averaged(self.F, new, weight, 1 - weight)
        except NotImplementedError as error:
            name = type(new).__name__
            raise NotImplementedError(f"{name} has no moving average: take decay=0, or another one. {error}") from error

    # Steps

    @torch.no_grad()
    def precondition(self) -> None:
        """Replace the gradients g by `(F + damping)^-1 g`, before a step of any optimizer."""
        g = PVector.from_model_grad(self.model, self.layers, missing="zero")
        self._set_grad(self._solved(g.to_torch()))
        self.steps += 1

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step; without a closure by the gradients that are there.

        Args:
            closure: returns the loss of the batch that was given to `update`. It may call backward() or leave that to
                the step, which then costs less; it is called once, or twice with damping="lm".

        Raises:
            ValueError: no matrix yet; or no closure, where the damping or the momentum takes one.
        """
        if closure is None and (self.adapts or self.exact):
            raise ValueError("damping='lm' and momentum='exact' take the loss: opt.step(closure).")
        loss, by_closure = self._evaluated(closure)
        served, *rest = self.param_groups
        w = PVector.from_model(self.model, self.layers).to_torch()
        g = PVector.from_model_grad(self.model, self.layers, missing="zero").to_torch()
        g = g + served["weight_decay"] * w
        direction = -self._solved(g)
        self.steps += 1
        if served["kl_clip"] is not None:
            change = served["lr"] ** 2 * float(-(g @ direction))
            direction = direction * min(1.0, (served["kl_clip"] / max(change, 1e-30)) ** 0.5)
        if self.exact or self.adapts:
            move, predicted = self._by_the_model(g, direction)
        else:
            move, predicted = self._with_momentum(direction), 0.0
        self._move(move)
        for group in rest:
            self._descend(group)
        if self.adapts and closure is not None:
            self._adapt(float(loss), self._penalised(closure, by_closure), predicted, move)
        return loss

    def _evaluated(self, closure: Callable[[], Any] | None) -> tuple[Any, bool]:
        """The loss, its gradients being there, and whether the closure made them."""
        if closure is None:
            return None, False
        callback("closure", closure, "of nothing")
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
            made = any(p.grad is not None for p in self.param_groups[0]["params"])
            if not made:
                loss.backward()
        return loss.detach() if isinstance(loss, Tensor) else loss, made

    def _penalised(self, closure: Callable[[], Any], by_closure: bool) -> float:
        """The loss at the new weights; the gradients stay those of the old ones."""
        if not by_closure:
            return float(closure())
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        loss, _ = self._evaluated(closure)
        for p, grad in zip((p for group in self.param_groups for p in group["params"]), grads, strict=True):
            p.grad = grad
        return float(loss)

    def _solved(self, g: Tensor) -> Tensor:
        if self.F is None:
            raise ValueError("There is no matrix yet: call update(batch), or run the passes within capture().")
        if self.near is None or self.steps % self.solve_every == 0:
            self.near = copy.copy(self.F)
        group = self.param_groups[0]
        solved = self.near.solve(g.to(self.near.dtype), regul=group["damping"] + group["weight_decay"])
        return solved.to(g.dtype)

    def _with_momentum(self, direction: Tensor) -> Tensor:
        group = self.param_groups[0]
        if group["momentum"]:
            direction = group["momentum"] * self._last(direction) + direction
            self._remember(direction)
        return group["lr"] * direction

    def _by_the_model(self, g: Tensor, direction: Tensor) -> tuple[Tensor, float]:
        """The combination of directions at which `g's + s'(F + damping)s / 2` is least, and this value."""
        group = self.param_groups[0]
        rows = direction[None]
        if self.exact and self.steps > 1:
            rows = torch.stack([direction, self._last(direction)])
        if self._batch is None:
            raise ValueError("The exact model is of the batch given to update(batch): call it before step(closure).")
        F = self._exact_matrix(self._batch)
        damping = group["damping"] + group["weight_decay"]
        curvature = rows @ (F.mv(rows.to(F.dtype)).to(rows) + damping * rows).mT
        slope = rows @ g
        coefficients = -group["lr"] * (pinv(curvature.double()) @ slope.double()).to(rows)
        predicted = slope @ coefficients + coefficients @ curvature @ coefficients / 2
        move = coefficients @ rows
        self._remember(move)
        return move, float(predicted)

    def _exact_matrix(self, batch: Any) -> PMat:
        """The exact Fisher matrix of a batch, by its products."""
        if self._source is not None:  # which has looked at the model before
            return PMatImplicit(self.layers, self._source, examples=batch)
        options = {key: value for key, value in self._options.items() if key != "generator"}
        F = FIM(self.model, batch, PMatImplicit, self.variant, layer_collection=self.layers, **options)
        self._source = F.generator
        return F

    def _adapt(self, before: float, after: float, predicted: float, move: Tensor) -> None:
        """Set the damping by how far the loss changed as predicted; take back a step uphill (Martens & Grosse, 6.5)."""
        group = self.param_groups[0]
        w, c = PVector.from_model(self.model, self.layers).to_torch(), group["weight_decay"]
        penalty = c * float(w @ move - move @ move / 2)  # what the squared weights rose by
        agreement = (after - before + penalty) / predicted if predicted < 0 else -1.0
        factor = 0.5 if agreement > 0.75 else 2.0 if not agreement >= 0.25 else 1.0
        group["damping"] = min(max(group["damping"] * factor, SMALLEST), LARGEST)
        if not agreement >= 0:
            self._move(-move)

    def _descend(self, group: dict[str, Any]) -> None:
        for p in (p for p in group["params"] if p.grad is not None):
            d = p.grad + group["weight_decay"] * p
            if group["momentum"]:
                state = self.state[p]
                d = state["last"] = d if "last" not in state else group["momentum"] * state["last"] + d
            p.sub_(group["lr"] * d)

    # Vectors over the served parameters

    def _move(self, step: Tensor) -> None:
        for p, (_, x) in zip(self.param_groups[0]["params"], PVector(self.layers, step), strict=True):
            p.add_(x)

    def _set_grad(self, v: Tensor) -> None:
        for p, (_, x) in zip(self.param_groups[0]["params"], PVector(self.layers, v), strict=True):
            if p.grad is not None:
                p.grad.copy_(x)

    def _last(self, like: Tensor) -> Tensor:
        found = [self.state[p].get("last", torch.zeros_like(p)) for p in self.param_groups[0]["params"]]
        return torch.cat([x.flatten() for x in found]).to(like)

    def _remember(self, step: Tensor) -> None:
        for p, (_, x) in zip(self.param_groups[0]["params"], PVector(self.layers, step), strict=True):
            self.state[p]["last"] = x.clone()

    # State

    def state_dict(self) -> dict[str, Any]:
        """The state of a torch optimizer, and under "natural" the matrices and counters, as tensors only."""
        matrices = {name: F.state_dict() for name, F in (("F", self.F), ("near", self.near)) if F is not None}
        return super().state_dict() | {
            "natural": packed(calls=self.calls, updates=self.updates, steps=self.steps, **matrices)
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take all of a `state_dict()`: steps go on exactly as they would have."""
        instance("state_dict", state_dict, dict)
        parts = unpacked(state_dict.get("natural", {}), "a NaturalGradient")
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "natural"})
        self.calls, self.updates, self.steps = parts["calls"], parts["updates"], parts["steps"]
        self.F, self.near = (PMat.from_state_dict(parts[x]) if x in parts else None for x in ("F", "near"))


def _check(
    lr: float, damping: Any, decay: float, update_every: int, solve_every: int, momentum: Any, kl_clip: Any, c: float
) -> None:
    if isinstance(damping, str):
        choice("damping", damping, ["lm"])
    else:
        number("damping", damping, least=0)
    if isinstance(momentum, str):
        choice("momentum", momentum, ["exact"])
    else:
        number("momentum", momentum, least=0, below=1)
    number("decay", decay, least=0, below=1)
    number("lr", lr, least=0)
    number("weight_decay", c, least=0)
    count("update_every", update_every)
    count("solve_every", solve_every)
    if kl_clip is not None:
        number("kl_clip", kl_clip, positive=True)
