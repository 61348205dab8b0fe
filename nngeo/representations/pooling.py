"""More examples: a matrix is sums and a count, so that shards, updates and moving averages are one operation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

from nngeo.linalg.arguments import flag, number, shown
from nngeo.representations.spectral import SpectralAlgebra

if TYPE_CHECKING:
    from typing_extensions import Self


class Pooling(SpectralAlgebra):
    """Matrices of several sets of examples, brought together."""

    def update(self, examples: Any) -> Self:
        """Let further examples join, in place: what an estimate from all of them would be, to rounding. Returns itself.

        Costs an estimate from the new examples. The eigenbasis of an EKFAC with exact scalings stays, and the
        scalings become the mean over all examples. A Hessian of a sum of losses becomes the sum over all.
        """
        new = self._estimated(examples)
        return self._become(new._added_to(self) if self._is_sum() else self.pooled(new))

    def ema_(self, examples: Any, decay: float) -> Self:
        """Become `decay * F + (1 - decay) * F_new`, in place, with F_new estimated from the examples. Returns itself.

        For Kronecker factors it is the moving average of each factor. `n_examples` counts all that were seen.
        """
        decay = number("decay", decay, least=0, most=1)
        return self._become(self._pooled(self._estimated(examples), decay, 1 - decay))

    def pooled(self, other: Self) -> Self:
        """`(n F + m G) / (n + m)` for matrices of n and of m examples: what all of the examples together would give.

        Exact to rounding for every representation that is estimated by sums. Kronecker factors are pooled each on its
        own. Of EKFAC, estimates with update_diag=False pool, and exact scalings only in the same eigenbasis.

        Raises:
            ValueError: a matrix without a count, over other layers.
        """
        n, m = self._count(), self._checked_term(other)._count()
        return self._pooled(other, n / (n + m), m / (n + m))

    @staticmethod
    def pool(matrices: Sequence[Any]) -> Any:
        """`pooled` for any number of matrices: of shards, or of the processes of a group."""
        if not isinstance(matrices, Sequence) or not all(isinstance(matrix, Pooling) for matrix in matrices):
            raise TypeError(f"`matrices` should be a list of matrices (PMat); got {shown(matrices)}.")
        if not matrices:
            raise ValueError("`matrices` is empty: there is nothing to pool.")
        return reduce(lambda first, second: first.pooled(second), matrices)

    def add(self, other: Self, *, exact: bool = False) -> Any:
        """The sum of two matrices: `F + G` or, with `exact`, the sum where `F + G` is refused, too.

        A sum of Kronecker products is not one, unless they share a factor or an eigenbasis. With `exact` both terms are
        kept: products cost twice as much, and `solve`, `inv` and what needs eigenvalues forms dense blocks.
        """
        return self._added_exactly(other) if flag("exact", exact) else self + other

    # What a representation may do in another way

    def _estimated(self, examples: Any) -> Self:
        """A matrix like this one, from other examples."""
        new = self._like(None, None)
        new.data, new.n_examples = new._estimate(examples)
        return new

    def _pooled(self, other: Self, weight: float, other_weight: float) -> Self:
        total = self._scaled(weight)._added(other._scaled(other_weight))
        total.n_examples = self._joint_count(other)
        return total

    def _added_exactly(self, other: Self) -> Any:
        return self._checked_term(other) and self._added(other)

    # Helpers

    def _is_sum(self) -> bool:
        """Whether the matrix is a sum over examples: the Hessian of a summed loss."""
        return getattr(self._source(), "reduction", "mean") == "sum"

    def _added_to(self, other: Self) -> Self:
        return other._added(self)

    def _become(self, new: Self) -> Self:
        self.__dict__.pop("_cache", None)
        self.data, self.n_examples = new.data, new.n_examples
        self._weights = self._versions_of_weights()
        return self

    def _count(self) -> int:
        if self.n_examples is None:
            raise ValueError(
                f"This {type(self).__name__} has no count of examples to weight it with: it was made from data, or is "
                "damped, or a function of another matrix. Set `n_examples`, or add multiples: `a * F + b * G`."
            )
        return self.n_examples

    def _checked_term(self, other: Any) -> Any:
        self._check_term(other)
        return other
