"""Matrices in files, on other devices, in numpy and scipy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from nngeo.layers.collection import LayerCollection, checked_layers
from nngeo.linalg.arguments import destination
from nngeo.linalg.precision import FullPrecision
from nngeo.representations.files import check_path, read, write

if TYPE_CHECKING:
    from typing_extensions import Self

    from nngeo.generators import Generator


class Exchange(FullPrecision):
    """What a PMat has in common with the world outside torch's models: a mixin of PMat."""

    @property
    def origin(self) -> Mapping[str, Any] | None:
        """{"variant": what was estimated, "weights": the fingerprint of the parameters at which}; None if unknown.

        "weights" is `F.layer_collection.fingerprint(model)`, to compare a loaded matrix with a model; None where the
        parameters have changed since the estimate. Files keep it; matrices made of others (`F + damping`) have none.
        """
        matrix: Any = self
        if matrix.generator is None or matrix._weights is None:
            return matrix._origin
        same = matrix._weights == matrix._versions_of_weights()
        weights = matrix.layer_collection.fingerprint(matrix.generator.model) if same else None
        return {"variant": matrix.generator.described, "weights": weights}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save in safetensors, with a header that names class, layers, shapes, count, convention and `origin`.

        The file is there as a whole or not at all, and replaces another one. A PMatImplicit has nothing to save.

        Raises:
            OSError: the file can't be written (no such folder, no right to, a full disk).
        """
        check_path(path)
        write(path, self.state_dict() | {"origin": self.origin})  # type: ignore[attr-defined]

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        layer_collection: LayerCollection | None = None,
        generator: Generator | None = None,
    ) -> Self:
        """A saved matrix: of the class that the file names, which must be this one or, as PMat.load, any.

        Args:
            layer_collection: the layers to expect; by default those of the file.
            generator: to run the model with, for updates.

        Raises:
            FileNotFoundError: there is no file.
            ValueError: it is damaged, foreign, of a later format, or of another class or other layers.
        """
        if layer_collection is not None:
            checked_layers(layer_collection)
        state = read(path)
        try:
            new = cls.from_state_dict(state, generator)  # type: ignore[attr-defined]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error
        if layer_collection is not None and new.layer_collection != layer_collection:
            raise ValueError(f"{path} is of other layers: {new.layer_collection}; expected {layer_collection}.")
        return new

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The same matrix on another device or in another dtype; arguments as those of `Tensor.to`."""

        matrix: Any = self
        destination(torch.empty(0, dtype=matrix.dtype, device=matrix.device), args, kwargs)

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(*args, **kwargs) if tensor.is_floating_point() else tensor

        new = self._like(None, self.n_examples)  # type: ignore[attr-defined]
        new.data = new._load(self._state(), move)  # type: ignore[attr-defined]
        return new

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """(P, P), for scipy.sparse.linalg (eigsh, cg, ...): products by `mv`, on vectors in numpy."""
        matrix: Any = self
        like, size = torch.empty(0, dtype=matrix.dtype, device=matrix.device), matrix.layer_collection.numel()

        def product(columns: np.ndarray) -> np.ndarray:
            v = torch.as_tensor(np.ascontiguousarray(columns.T)).to(like)
            return matrix.mv(v).detach().cpu().numpy().T

        def one(v: np.ndarray) -> np.ndarray:
            return product(v.reshape(-1, 1))[:, 0]

        dtype = like.cpu().numpy().dtype
        return scipy.sparse.linalg.LinearOperator((size, size), one, rmatvec=one, matmat=product, dtype=dtype)

    def numpy(self) -> np.ndarray:
        """(P, P), `to_torch()` as a numpy array."""
        return self.to_torch().detach().cpu().numpy()  # type: ignore[attr-defined]
