"""Matrices in files, in scipy and numpy, in another dtype."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo
from nngeo import FIM, LayerCollection, PMat
from nngeo.representations import files

STORED = [
    nngeo.PMatDense,
    nngeo.PMatDiag,
    nngeo.PMatBlockDiag,
    nngeo.PMatKFAC,
    nngeo.PMatEKFAC,
    nngeo.PMatEKFACBlockDiag,
    nngeo.PMatQuasiDiag,
    nngeo.PMatLowRank,
]
EXACT = {"rtol": 1e-8, "atol": 1e-12}
each = pytest.mark.parametrize("kind", STORED, ids=lambda kind: kind.__name__)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(inner: int = 4) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, inner), nn.Tanh()
        return nn.Sequential(*body, nn.Linear(inner, 3)).double()


def fisher(kind: type[PMat] = nngeo.PMatDiag, inner: int = 4) -> PMat:
    return FIM(network(inner), (torch.arange(14).reshape(7, 2) % 5,), kind)


@each
def test_a_saved_matrix_comes_back(kind, tmp_path):
    F = fisher(kind)
    F.save(tmp_path / "F.safetensors")
    again = PMat.load(tmp_path / "F.safetensors", F.layer_collection)
    assert (type(again), again.n_examples) == (kind, 7)
    assert_close(again.to_torch(), F.to_torch(), **EXACT)
    assert [path.name for path in tmp_path.iterdir()] == ["F.safetensors"]


def test_damped_and_updated_matrices_come_back(tmp_path):
    F = fisher(nngeo.PMatEKFAC)
    (F + 0.1).save(tmp_path / "F")
    assert_close(nngeo.PMatEKFAC.load(tmp_path / "F").to_torch(), (F + 0.1).to_torch(), **EXACT)


def test_an_implicit_matrix_has_nothing_to_save(tmp_path):
    with pytest.raises((NotImplementedError, ValueError)):
        fisher(nngeo.PMatImplicit).save(tmp_path / "F")
    assert not list(tmp_path.iterdir())


def truncated(path):
    fisher().save(path)
    path.write_bytes(path.read_bytes()[:-20])


def foreign(path):
    save_file({"weight": torch.ones(3)}, path)


def no_safetensors(path):
    path.write_text("no tensors here")


def relabelled(path, **changes):
    """A file with other entries beside its state."""
    fisher().save(path)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()[files.KEY]) | changes
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    save_file(tensors, path, metadata={files.KEY: json.dumps(about)})


def another_convention(path):
    relabelled(path, convention="sums over examples")


def a_later_version(path):
    relabelled(path, version=files.VERSION + 1)


def another_checksum(path):
    relabelled(path, sha256="0" * 64)


def another_class(path):
    fisher(nngeo.PMatDense).save(path)


def another_model(path):
    fisher(inner=5).save(path)


BAD = {
    "truncated": (truncated, "truncated"),
    "foreign": (foreign, "no matrix of nngeo"),
    "no safetensors": (no_safetensors, "no safetensors"),
    "another convention": (another_convention, "another convention"),
    "a later version": (a_later_version, "format version 2, .* upgrade nngeo"),
    "another checksum": (another_checksum, "damaged.*checksum"),
    "another class": (another_class, "PMatDense.*PMatDiag"),
    "another model": (another_model, "other layers"),
}


@pytest.mark.parametrize(("write", "message"), BAD.values(), ids=BAD)
def test_a_file_that_does_not_fit_is_refused_with_what_it_is(write, message, tmp_path):
    write(tmp_path / "F")
    with pytest.raises(ValueError, match=message):
        nngeo.PMatDiag.load(tmp_path / "F", LayerCollection.from_model(network()))


@each
def test_scipy_finds_the_eigenvalues(kind):
    F = fisher(kind)
    values = scipy.sparse.linalg.eigsh(F.to_scipy(), k=3, return_eigenvectors=False, tol=1e-12)
    assert_close(torch.as_tensor(np.sort(values)), torch.linalg.eigvalsh(F.to_torch())[-3:], rtol=1e-8, atol=1e-10)


@each
def test_scipy_solves(kind):
    F, b = fisher(kind) + 0.1, drawn(58).numpy()
    x, failed = scipy.sparse.linalg.cg(F.to_scipy(), b, rtol=1e-12)
    assert not failed
    assert_close(F.mv(torch.as_tensor(x)), torch.as_tensor(b), rtol=1e-8, atol=1e-8)


@each
def test_damped_matrices_survive_a_pickle(kind):
    F = fisher(kind) + 0.1
    again = pickle.loads(pickle.dumps(F))
    assert_close(again.to_torch(), F.to_torch(), **EXACT)
    assert_close(again.logdet(), F.logdet(), **EXACT)


def test_scipy_uses_an_implicit_matrix():
    F = fisher(nngeo.PMatImplicit)
    assert_close(torch.as_tensor(F.to_scipy() @ np.ones(58)), F.to_torch().sum(1), **EXACT)


@each
def test_another_dtype_is_the_same_matrix(kind):
    F = fisher(kind)
    single = F.to(torch.float32)
    assert single.dtype == single.to_torch().dtype == torch.float32
    assert F.dtype == torch.float64
    assert_close(single.to_torch().double(), F.to_torch(), rtol=1e-4, atol=1e-5)
    assert_close(F.numpy(), F.to_torch().numpy())
