"""Products with a matrix that is never formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from nngeo.generators.batches import Examples
from nngeo.layers.collection import Layer, LayerCollection
from nngeo.linalg.arguments import number
from nngeo.representations.damping import Damping
from nngeo.representations.estimate import positive_count
from nngeo.representations.matrixfree import MatrixFree
from nngeo.representations.solvers import cg, symmetric_map

if TYPE_CHECKING:
    from typing_extensions import Self

    from nngeo.generators import Generator
    from nngeo.representations.inverse import PMatInverse
    from nngeo.representations.linearized import PMatLinearized
    from nngeo.vectors import PVector


class PMatImplicit(MatrixFree):
    """Products by running the model on the examples again, each time: memory O(P), a sweep for each `mv`.

    Many vectors share the forward of a mini-batch; `linearize()` keeps the graphs, so that no product runs it again.
    `solve` is by conjugate gradients, a sweep an iteration; its options are those of `solvers.cg`. It holds no data:
    only the generator and the examples, which must be the same at every sweep. One-shot iterators are kept as a list.
    When the model's parameters have changed, products raise ValueError: make it of a copy of a model that goes on
    learning.

    `F + damping` and multiples are matrices of this kind, differentiable in the damping and the factor (`solve` is
    not). `trace` and `get_diag` are exact, in one sweep; for a Hessian they form the blocks of the layers.

    >>> import torch
    >>> from nngeo.generators import JacobianGenerator
    >>> from nngeo.layers.collection import LayerCollection
    >>> from nngeo.variants import Exact, make_variant
    >>> model = torch.nn.Linear(2, 1)
    >>> layers = LayerCollection.from_model(model)
    >>> generator = JacobianGenerator(model, Exact(make_variant("regression")))
    >>> F = PMatImplicit(layers, generator, examples=(torch.eye(2),))
    >>> F.mv(torch.tensor([1.0, 0.0, 0.0]))
    tensor([0.5000, 0.0000, 0.5000])
    >>> (F + 1.0).mv(torch.tensor([1.0, 0.0, 0.0]))
    tensor([1.5000, 0.0000, 0.5000])
    """

    def __init__(
        self,
        layer_collection: LayerCollection,
        generator: Generator | None = None,
        data: Any = None,
        examples: Any = None,
    ):
        if data is not None:
            raise ValueError("PMatImplicit holds no data: give `generator` and `examples`.")
        self.examples = None if examples is None else Examples.kept(examples)
        self.scaling: float | Tensor = 1.0
        self.shift: Tensor | None = None  # 0-d or (P,), added to the diagonal after scaling
        self._versions: tuple[int, ...] | None = None  # of the model's parameters, which the matrix is made at
        super().__init__(layer_collection, generator, examples=self.examples)

    def _estimate(self, examples: Any) -> tuple[None, None]:
        self._source()
        return None, None

    def _source(self) -> Generator:
        """The generator, if its model still has the parameters at which the matrix was made.

        Raises:
            ValueError: they have been changed since: products would be those of another matrix.
        """
        generator = super()._source()
        versions = tuple(p._version for p in generator.model.parameters() if not p.is_inference())
        if self._versions is None:
            self._versions = versions
        if self._versions != versions:
            raise ValueError(
                "The model's parameters have changed since this PMatImplicit was made, which keeps no copy of them: it "
                "would be another matrix. Make it anew, or make it of a copy: FIM(copy.deepcopy(model), ...)."
            )
        return generator

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._versions = None

    @property
    def dtype(self) -> torch.dtype:
        """That of the results."""
        return super()._source().dtype

    @property
    def device(self) -> torch.device:
        """That of the results."""
        return super()._source().device

    def _product(self, v: Tensor) -> Tensor:
        """One sweep for all vectors of v (..., P)."""
        return self._source().mv(v.detach(), self.examples, self.layer_collection)

    def _mv(self, v: Tensor) -> Tensor:
        product = symmetric_map(v, self._product) if v.numel() else v.clone()
        product = self.scaling * product if isinstance(self.scaling, Tensor) or self.scaling != 1 else product
        return product if self.shift is None else product + self.shift * v

    def vTMv(self, v: PVector | Tensor) -> Tensor:
        """`v' M v`, 0-d, or (...) for a tensor (..., P): the metric of J v, in half the time of a product.

        Differentiable in v, any number of times; where v asks for a gradient, by a product.
        """
        flat, _ = self._coordinates(v)
        if flat.requires_grad or not flat.numel():
            return super().vTMv(v)
        found = self.scaling * self._source().vTMv(flat, self.examples, self.layer_collection)
        return found if self.shift is None else found + (self.shift * flat.square()).sum(-1)

    def _solve(self, v: Tensor, regul: float) -> Tensor:
        return cg(self, v, regul)

    def _solvers(self) -> dict[str, Callable[..., Tensor]]:
        return (named := super()._solvers()) | {"default": named["cg"]}

    def _dense(self) -> Tensor:
        dense = self.scaling * self._source().dense(self.examples, self.layer_collection)[0]
        return dense if self.shift is None else dense + self.shift.expand(len(dense)).diag()

    def _diag(self) -> Tensor:
        """(P,), in one sweep, from the squares of gradients; layer by layer from dense blocks if there are none."""
        layers = self.layer_collection
        batches = self._records(self.examples, factors=False)
        if batches is None:
            total = torch.cat([self._dense_block(layer).diagonal() for layer in layers.layers.values()])
        else:
            total, n = torch.zeros(layers.numel(), dtype=self.dtype, device=self.device), 0
            for batch in batches:
                total += layers.join({name: record.squares() for name, record in batch.layers.items()})
                n += batch.n_examples if batch.first else 0
            total = total / positive_count(n)
        return self.scaling * total if self.shift is None else self.scaling * total + self.shift

    def _dense_block(self, layer: Layer) -> Tensor:
        self._require_memory(f"The block of layer {layer.name!r}", layer.numel() ** 2, self.dtype, self.device)
        return self._source().dense(self.examples, LayerCollection([layer]))[0]

    def linearize(self) -> PMatLinearized:
        """The same matrix, with the graphs of all mini-batches kept: its products run no forward of the model.

        Costs a forward and a backward for each mini-batch here; then each product a backward, or two with the
        Jacobian. Memory: two to three times that of a gradient, for all mini-batches together. It stays at the
        parameters as they are; after they were changed in place, its products are refused.

            with F.linearize() as linear:
                x = linear.solve(v, regul=1e-3)

        Raises:
            NotImplementedError: an operation of the model has no second derivative.
        """
        from nngeo.representations.linearized import PMatLinearized

        new = object.__new__(PMatLinearized)
        new.__dict__.update(self.__dict__)
        new.generator = self._source().linearize(self.examples, self.layer_collection)
        return new

    def inv(self, regul: float = 0.0, **options: Any) -> PMatInverse:
        """`(F + regul I)^-1`, a matrix whose products are solves; `options` are those of `solve` (`preconditioner`)."""
        from nngeo.representations.inverse import PMatInverse

        return PMatInverse(self, regul=number("regul", regul, least=0), **options)

    def _scaled(self, factor: float | Tensor) -> Self:
        new = self._like(None, None)
        new.scaling = factor * self.scaling
        new.shift = None if self.shift is None else factor * self.shift
        return new

    def _shifted(self, damping: Damping) -> Self:
        new = self._like(None, None)
        new.shift = damping.flat() if self.shift is None else self.shift + damping.flat()
        return new

    def _added(self, other: Self) -> NoReturn:
        raise NotImplementedError(
            "A sum of implicit matrices would be over two sets of examples. Add the products, `F1.mv(v) + F2.mv(v)`, "
            "or make one of all examples."
        )

    def _estimated(self, examples: Any) -> NoReturn:
        self._added(self)

    def _pooled(self, other: Self, weight: float, other_weight: float) -> NoReturn:
        self._added(other)

    def _count(self) -> NoReturn:
        self._added(self)

    def _state(self) -> NoReturn:
        raise NotImplementedError("A PMatImplicit holds no data to save: keep the model and the examples.")

    def load_state_dict(self, state: Any) -> NoReturn:
        """Not defined: there are no data."""
        self._state()
