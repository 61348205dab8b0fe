"""Symmetric matrices over the parameters of a network, however they are stored."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor

from nngeo.linalg.arguments import axis, choice, flag, number, shown, takes_options, tensor
from nngeo.linalg.memory import require_memory
from nngeo.linalg.symmetric import DAMPING
from nngeo.representations.coordinates import coordinates
from nngeo.representations.estimate import check_kind, checked_generator
from nngeo.representations.exchange import Exchange
from nngeo.representations.memory import what_fits
from nngeo.representations.pooling import Pooling
from nngeo.representations.solvers import SOLVERS
from nngeo.representations.state import check_header, check_match, header, layers_of
from nngeo.vectors import PVector

if TYPE_CHECKING:
    from typing_extensions import Self

    from nngeo.generators import Generator
    from nngeo.representations.maps import PFMapDense

X = TypeVar("X", Tensor, PVector, "PFMapDense")

MATRICES: dict[str, type[PMat]] = {}


class PMat(Pooling, Exchange):
    """A symmetric matrix (P, P) over the parameters of a LayerCollection: the mean over examples of `J' M J`.

    It acts on a PVector, a PFMapDense or a tensor (..., P), and answers in kind. A matrix over some layers acts on the
    vectors of all: outside its layers it is zero, and so is its `solve`, damping included.

    Args:
        layer_collection: the parameters, in the order of the coordinates.
        generator: runs the model; needed for `examples`, kept for updates.
        data: what the representation stores, in place of an estimate.
        examples: what to estimate it from: a loader, an iterable of batches, or one batch.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        MATRICES[cls.__name__] = cls

    # What a representation provides: products with flat tensors (..., P), and so on.

    @abstractmethod
    def _mv(self, v: Tensor) -> Tensor: ...

    @abstractmethod
    def _solve(self, v: Tensor, regul: float) -> Tensor: ...

    @abstractmethod
    def _norm(self, ord: str | int) -> Tensor: ...

    @abstractmethod
    def _diag(self) -> Tensor: ...

    def _resolution(self) -> float:
        """The least damping that rounding does not drown; 0 for a matrix that is solved entry by entry."""
        return 0.0

    @property
    def _sample(self) -> Tensor:
        """A tensor of the dtype and device of the matrix."""
        return self.data

    def _solvers(self) -> dict[str, Callable[..., Tensor]]:
        """Functions (v, regul, **options) by the names that `solve` takes."""
        return {name: partial(solver, self) for name, solver in SOLVERS.items()} | {"default": self._solve}

    def _state(self) -> dict[str, Any]:
        """The data as named tensors and plain values."""
        return {"data": self.data.detach()}

    def _load(self, state: Mapping[str, Any], to: Callable[[Tensor], Tensor]) -> Any:
        """The data from `_state()`, with `to` applied to its tensors."""
        return self._checked(to(tensor("data", entry(state, "data"), "as in `state_dict()`")))

    # Products

    def mv(self, v: X) -> X:
        """`M v`, of the type of v."""
        flat, back = self._coordinates(v)
        return back(self._mv(flat))

    @overload
    def __matmul__(self, other: PVector) -> PVector: ...
    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: PFMapDense) -> PFMapDense: ...
    def __matmul__(self, other: Any) -> Any:
        return self.mv(other)

    def vTMv(self, v: PVector | Tensor) -> Tensor:
        """`v' M v`, 0-d, or (...) for a tensor (..., P). Differentiable in v, any number of times."""
        flat, _ = self._coordinates(v)
        return (flat * self._mv(flat)).sum(-1)

    def mmap(self, pfmap: PFMapDense) -> PFMapDense:
        """The map (k, n, P) with M applied to each of its rows."""
        return self.mv(pfmap)

    def __rmatmul__(self, other: Any) -> Any:
        """The matrix is symmetric: `J @ M` are the products with the rows of J."""
        return self.mv(other)

    def mapTMmap(self, pfmap: PFMapDense, reduction: str = "sum") -> Any:
        """`J M J'` for the map J (k, n, P), or the part of it that `reduction` names; P x P is never formed.

        "full": all of it, an FMatDense (k, n, k, n); "blocks": (n, k, k), the part within each example; "diag":
        (k, n), `j' M j` for the rows j; "sum": (n,), the diagonal summed over outputs; "trace": 0-d.
        `J @ M @ J.T` is the full one.
        """
        if not hasattr(pfmap, "jvp"):
            raise TypeError(f"`pfmap` should be a PFMapDense, as of `Jacobian`; got {shown(pfmap)}.")
        if not isinstance(reduction, str) or reduction not in ("full", "blocks", "diag", "sum", "trace"):
            raise ValueError(
                f"Unknown reduction {reduction!r}; known are 'full' -> (k, n, k, n), 'blocks' -> (n, k, k), 'diag' -> "
                "(k, n), 'sum' -> (n,) and 'trace' -> ()."
            )
        if reduction == "full":
            return self.mv(pfmap) @ pfmap.T
        rows, _ = self._coordinates(pfmap)
        if reduction == "blocks":
            return torch.einsum("knp,lnp->nkl", self._mv(rows), rows)
        diag = (self._mv(rows) * rows).sum(-1)
        return {"diag": diag, "sum": diag.sum(0), "trace": diag.sum()}[reduction]

    def solve(self, x: X, regul: float | None = None, solve: str = "default", **options: Any) -> X:
        """`(M + regul I)^-1 x`, of the type of x: exact Tikhonov damping, whatever the representation.

        Eigenvalues that rounding can't tell from zero count as zero, so that `regul` alone decides about them.

        Args:
            regul: if None 1e-8, or ten times the rounding of the largest eigenvalue (of the Frobenius norm, where that
                is known) if that is more, as it mostly is in float32; always 1e-8 for diagonal and quasi-diagonal
                matrices, which are solved entry by entry.
            solve: "default" is the representation's own; "cg" works for all, with the options of `solvers.cg`. Some
                have more ("factored" damping for KFAC); `register_solver` adds others.

        Raises:
            ValueError: an unknown `solve`, a negative `regul`, or a singular matrix with `regul=0`.
        """
        regul = max(DAMPING, self._resolution()) if regul is None else number("regul", regul, least=0)
        solver = (solvers := self._solvers())[choice("solve", solve, solvers)]
        takes_options(f"solve={solve!r} of {type(self).__name__}", solver, options)
        flat, back = self._coordinates(x)
        return back(solver(flat, regul, **options))

    # Numbers

    def get_diag(self, inverse: bool = False) -> Tensor:
        """(P,), the diagonal, or that of the inverse."""
        return self.inv()._diag() if flag("inverse", inverse) else self._diag()

    def trace(self) -> Tensor:
        """The trace, 0-d."""
        return self.get_diag().sum()

    def norm(self, ord: str | int | None = None) -> Tensor:
        """The norm, 0-d: Frobenius ("fro" or None), or the largest (2) or smallest (-2) singular value."""
        ord = choice("ord", ord, (None, "fro", 2, -2))
        return self._norm("fro" if ord is None else ord)

    def to_torch(self) -> Tensor:
        """(P, P), a new tensor, in the order of `model.named_parameters()`.

        Raises:
            MemoryError: it would not fit.
        """
        numel = self.layer_collection.numel()
        self._require_memory(f"The dense form of this {type(self).__name__}", numel**2, self.dtype, self.device)
        return self._dense()

    def _dense(self) -> Tensor:
        return self._mv(torch.eye(self.layer_collection.numel(), dtype=self.dtype, device=self.device))

    def size(self, dim: int | None = None) -> torch.Size | int:
        """(P, P), or one of the two."""
        size = torch.Size((self.layer_collection.numel(),) * 2)
        return size if dim is None else size[axis("dim", dim, 2)]

    @property
    def dtype(self) -> torch.dtype:
        """That of the results."""
        return self._sample.dtype

    @property
    def device(self) -> torch.device:
        """That of the results."""
        return self._sample.device

    def get_device(self) -> torch.device:
        """`device`, under its name in NNGeometry."""
        return self.device

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """The data, class, layers and count: flat, of tensors and plain values only.

        `torch.load(path, weights_only=True)` reads what `torch.save(F.state_dict(), path)` wrote.
        """
        return header(type(self).__name__, self.n_examples, self.layer_collection) | self._state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take copies of the data of a `state_dict()`, on this matrix's device and in its dtype.

        Raises:
            ValueError: the state is of another class or of other layers, or incomplete.
        """
        check_match(state, type(self).__name__, self.layer_collection)
        like = self._sample
        self.data = self._load(state, lambda tensor: tensor.to(like, copy=True))
        self.n_examples = state["n_examples"]

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], generator: Generator | None = None) -> Self:
        """A matrix of the class and layers that the state names; called on PMat, of any class."""
        check_header(state)
        kind = MATRICES.get(state["class"])
        if kind is None or not issubclass(kind, cls):
            raise ValueError(f"This state_dict is of a {state['class']}, which is no {cls.__name__}.")
        new = object.__new__(kind)
        new.layer_collection, new.generator = layers_of(state), checked_generator(generator)
        new.data = new._load(state, torch.clone)
        new.n_examples, new._origin = state["n_examples"], state.get("origin")
        return new

    # Helpers

    def _coordinates(self, x: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        flat, back = coordinates(x, self.layer_collection)
        self._check_kind(flat)
        return flat, back

    def _check_kind(self, flat: Tensor) -> None:
        check_kind(flat, type(self).__name__, self.dtype, self.device)

    def _require_memory(self, what: str, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        instead = partial(what_fits, self.layer_collection, dtype, device, self.generator)
        require_memory(what, numel, dtype, device, instead)

    def __repr__(self) -> str:
        count = "" if self.n_examples is None else f", {self.n_examples} examples"
        p, m = self.layer_collection.numel(), len(self.layer_collection)
        return f"{type(self).__name__}({p} parameters of {m} layer{'s' * (m != 1)}{count}, {self.dtype}, {self.device})"


def entry(state: Mapping[str, Any], key: str) -> Any:
    if key not in state:
        raise ValueError(f"The state_dict has no {key!r}: it is incomplete.")
    return state[key]
