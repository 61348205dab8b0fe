"""Jacobian products as methods of a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from nngeo import products
from nngeo.linalg.arguments import flag, shown, tensor
from nngeo.linalg.precision import full_precision
from nngeo.nn.blocks import Blocks, branches, pulled_blocks, pushed_blocks
from nngeo.nn.flags import as_metric, is_weight, options_of, plain
from nngeo.nn.own import HasJacobian, by_autograd, own_derivatives


def _older(name: str) -> Callable[..., Any]:
    """A method of NNJ's older, underscored name; it follows a subclass that overrides the newer one."""

    def method(self: AbstractJacobian, *args: Any, **options: Any) -> Any:
        return getattr(self, name)(*args, **options)

    method.__name__, method.__doc__ = f"_{name}", f"`{name}` under its older name."
    return method


class AbstractJacobian(HasJacobian):
    """Mix-in for `nn.Module`: the products of its Jacobian, for each of b examples, with flat vectors and matrices.

    J is (b, o, n): o entries of one output; n of one input for `wrt="input"` (or "inputs"), or the `_n_params`
    trainable parameters for `wrt="weight"` (or "weights"), for which a module without any returns None. `val`, the
    output, is never needed: all is computed from x. `matrix=None` is the identity. Further options are those of
    `nngeo.products`.

    A class may define `forward` and `jacobian(x, val, wrt)` alone: the other products follow from it, in every
    container, and `forward` need not be differentiable. Its weights' Jacobian has a column for each entry of
    `parameters()`; `val` is the output.

    >>> class Cube(AbstractJacobian, nn.Module):
    ...     def forward(self, x):
    ...         return x.detach() ** 3
    ...
    ...     def jacobian(self, x, val, wrt="input"):
    ...         return torch.diag_embed(3 * x**2) if wrt == "input" else None
    >>> x = torch.tensor([[1.0, 2.0]])
    >>> Cube().vjp(x, None, torch.ones(1, 2))
    tensor([[ 3., 12.]])
    """

    @property
    def _n_params(self) -> int:
        """The number P of trainable parameters, tied ones counted once: as they are now."""
        return sum(p.numel() for p in _module(self).parameters() if p.requires_grad)

    @_n_params.setter
    def _n_params(self, value: int) -> None:
        """Layers written for NNJ set it; it is counted all the same."""

    def get_weight(self) -> Tensor:
        """A copy (P,) of the trainable parameters, in the order of every product's weight axis."""
        flat = [p.detach().reshape(-1) for p in _module(self).parameters() if p.requires_grad]
        return torch.cat(flat) if flat else torch.zeros(0)

    def set_weight(self, weight: Tensor) -> None:
        """Write (P,) into the trainable parameters, in place."""
        tensor("weight", weight, "(P,)")
        if weight.shape != (self._n_params,):
            raise ValueError(f"`weight` has shape {tuple(weight.shape)}; the parameters need {(self._n_params,)}.")
        trainable = [p for p in _module(self).parameters() if p.requires_grad]
        with torch.no_grad():
            for p, piece in zip(trainable, weight.split([p.numel() for p in trainable]), strict=True):
                p.copy_(piece.reshape(p.shape))

    @by_autograd
    @full_precision
    def jacobian(self, x: Any, val: Tensor | None = None, wrt: str = "input", **options: Any) -> Tensor | None:
        """J (b, o, n)."""
        if self._nothing(wrt):
            return None
        # A class's own `jacobian` may be on its way here by super().
        with own_derivatives(_module(self), root=False):
            return products.jacobian(_module(self), x, wrt, **options)

    @full_precision
    def jvp(self, x: Any, val: Tensor | None, vector: Tensor, wrt: str = "input", **options: Any) -> Tensor | None:
        """J v (b, o) for v (b, n)."""
        return self._product(products.jvp, x, vector, wrt, options)

    @full_precision
    def vjp(self, x: Any, val: Tensor | None, vector: Tensor, wrt: str = "input", **options: Any) -> Tensor | None:
        """J' w (b, n) for w (b, o)."""
        return self._product(products.vjp, x, vector, wrt, options)

    @full_precision
    def jmp(
        self, x: Any, val: Tensor | None, matrix: Tensor | None, wrt: str = "input", **options: Any
    ) -> Tensor | None:
        """J M (b, o, c) for the columns of M (b, n, c)."""
        return self._product(products.jmp, x, matrix, wrt, options)

    @full_precision
    def mjp(
        self, x: Any, val: Tensor | None, matrix: Tensor | None, wrt: str = "input", **options: Any
    ) -> Tensor | None:
        """M J (b, c, n) for the rows of M (b, c, o)."""
        return self._product(products.mjp, x, matrix, wrt, options)

    @full_precision
    def jmjTp(
        self,
        x: Any,
        val: Tensor | None,
        matrix: Any,
        wrt: str = "input",
        from_diag: bool = False,
        to_diag: bool = False,
        diag_backprop: bool = False,
        **options: Any,
    ) -> Tensor | None:
        """J M J' (b, o, o), or its diagonal (b, o) with `to_diag`.

        `matrix` is (b, n, n), or the diagonal (b, n) with `from_diag`, or a metric of `nngeo.products`; for weights
        also a list of blocks (b, p, p) or (p, p), as `jTmjp` of a container returns it. `diag_backprop` keeps only
        diagonals between layers, which is an approximation.
        """
        if self._nothing(wrt):
            return None
        model, matrix = _module(self), plain(matrix, options)
        options = options_of(to_diag, diag_backprop, matrix, from_diag) | options
        with own_derivatives(model):
            if isinstance(matrix, list | tuple):
                return pushed_blocks(model, x, matrix, wrt, from_diag, options)
            return products.jmjTp(model, x, as_metric(matrix, from_diag), wrt, **options)

    @full_precision
    def jTmjp(
        self,
        x: Any,
        val: Tensor | None,
        matrix: Any,
        wrt: str = "input",
        from_diag: bool = False,
        to_diag: bool = False,
        diag_backprop: bool = False,
        **options: Any,
    ) -> Blocks | None:
        """J' M J (b, n, n), or its diagonal (b, n) with `to_diag`.

        `matrix` is (b, o, o), or the diagonal (b, o) with `from_diag`, or a metric of `nngeo.products`. For the weights
        of a container, without `to_diag`, the result is the list of the diagonal blocks (b, p, p) of its children that
        have weights, nested as the containers are; `result="dense"` (b, P, P) holds all that is between layers, too.
        `diag_backprop` keeps only diagonals between layers, which is an approximation.
        """
        if self._nothing(wrt):
            return None
        model, matrix = _module(self), plain(matrix, options)
        listed = is_weight(wrt) and not to_diag and "result" not in options and branches(model) is not None
        options = options_of(to_diag, diag_backprop, matrix, from_diag) | options
        with own_derivatives(model):
            if listed:
                return pulled_blocks(model, x, as_metric(matrix, from_diag), options)
            return products.jTmjp(model, x, as_metric(matrix, from_diag), wrt, **options)

    @full_precision
    def jjT(
        self,
        x: Any,
        val: Tensor | None = None,
        wrt: str = "input",
        to_diag: bool = False,
        diag_backprop: bool = False,
        **options: Any,
    ) -> Tensor | None:
        """J J' (b, o, o) or its diagonal (b, o)."""
        return self.jmjTp(x, val, None, wrt, False, to_diag, diag_backprop, **options)

    @full_precision
    def jTj(
        self,
        x: Any,
        val: Tensor | None = None,
        wrt: str = "input",
        to_diag: bool = False,
        diag_backprop: bool = False,
        **options: Any,
    ) -> Blocks | None:
        """J' J as `jTmjp` returns it."""
        return self.jTmjp(x, val, None, wrt, False, to_diag, diag_backprop, **options)

    @full_precision
    def jTmjp_batch2(
        self,
        x1: Any,
        x2: Any,
        val1: Tensor | None = None,
        val2: Tensor | None = None,
        matrixes: tuple[Any, Any, Any] | None = None,
        wrt: str = "input",
        from_diag: bool = False,
        to_diag: bool = False,
        diag_backprop: bool = False,
        **options: Any,
    ) -> tuple[Blocks, Blocks, Blocks] | None:
        """J1' M11 J1, J1' M12 J2 and J2' M22 J2, each as `jTmjp` returns it, example by example of x1 and x2.

        `matrixes` are (M11, M12, M22), with None for identities. With `to_diag`, the first minus twice the second plus
        the third is the Gauss-Newton diagonal of `0.5 |f(x1) - f(x2)|^2`.
        """
        if self._nothing(wrt):
            return None
        if not (matrixes is None or (isinstance(matrixes, list | tuple) and len(matrixes) == 3)):
            raise TypeError(f"`matrixes` should be (M11, M12, M22), or None for identities; got {shown(matrixes)}.")
        m11, m12, m22 = (None, None, None) if matrixes is None else matrixes
        flags = (wrt, from_diag, to_diag, diag_backprop)
        first = self.jTmjp(x1, val1, m11, *flags, **options)
        mixed = self.jTmjp(x1, val1, m12, *flags, **(options | {"x2": x2}))
        last = self.jTmjp(x2, val2, m22, *flags, **options)
        return cast("tuple[Blocks, Blocks, Blocks]", (first, mixed, last))

    _jacobian, _jvp, _jmp, _vjp, _mjp = map(_older, ("jacobian", "jvp", "jmp", "vjp", "mjp"))
    _jmjTp, _jTmjp, _jjT, _jTj, _jTmjp_batch2 = map(_older, ("jmjTp", "jTmjp", "jjT", "jTj", "jTmjp_batch2"))

    def _product(
        self, product: Callable[..., Tensor], x: Any, operand: Tensor | None, wrt: str, options: dict[str, Any]
    ) -> Tensor | None:
        if self._nothing(wrt):
            return None
        with own_derivatives(_module(self)):
            return product(_module(self), x, plain(operand, options), wrt, **options)

    def _nothing(self, wrt: str) -> bool:
        return is_weight(wrt) and not any(p.requires_grad for p in _module(self).parameters())


class AbstractDiagonalJacobian(AbstractJacobian):
    """An AbstractJacobian whose output has the input's entries, each a function of its own one.

    >>> from nngeo.nn import Tanh
    >>> Tanh().jacobian(torch.zeros(1, 2), diag=True)
    tensor([[1., 1.]])
    """

    @by_autograd
    @full_precision
    def jacobian(
        self, x: Any, val: Tensor | None = None, wrt: str = "input", diag: bool = False, **options: Any
    ) -> Tensor | None:
        """J (b, n, n), or its diagonal (b, n)."""
        if not flag("diag", diag) or self._nothing(wrt):
            return super().jacobian(x, val, wrt, **options)
        if is_weight(wrt):
            raise ValueError("`diag=True` is for the Jacobian by the input; that by the weights is not diagonal.")
        if tensor("x", x, "(b, ...)").ndim == 0 or not len(x):
            raise ValueError(f"`x` has the shape {tuple(x.shape)}; it should be (b, ...), of 1 example or more.")
        with own_derivatives(_module(self), root=False):
            return products.vjp(_module(self), x, torch.ones_like(x[0]).reshape(-1), wrt, **options)


def _module(self: AbstractJacobian) -> nn.Module:
    return cast(nn.Module, self)
