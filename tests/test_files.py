"""What saving leaves in a folder, what a file says of its matrix, and what becomes of damaged files and states."""

from __future__ import annotations

import copy
import errno
import os
import resource
import stat
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import nngeo
from nngeo import FIM, FIM_MonteCarlo, Hessian, LayerCollection, PMat
from nngeo.representations import DenseBlock, DiagBlock, replacing

KINDS = [nngeo.PMatDense, nngeo.PMatDiag, nngeo.PMatBlockDiag, nngeo.PMatQuasiDiag, nngeo.PMatKFAC, nngeo.PMatEKFAC]
KINDS += [nngeo.PMatEKFACBlockDiag, nngeo.PMatLowRank]
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))


@cache
def matrices() -> dict[str, PMat]:
    """One of everything that can be saved."""
    model = network()
    found: dict[str, PMat] = {kind.__name__: FIM(model, (X,), kind) for kind in KINDS}
    found["damped low rank"] = found["PMatLowRank"] + 0.5
    found["sum of KFACs"] = found["PMatKFAC"].add(found["PMatKFAC"] * 0.5, exact=True)
    found["eye"] = nngeo.PMatEye(LayerCollection.from_model(model), 2.0)
    return found


NAMES = [*(kind.__name__ for kind in KINDS), "damped low rank", "sum of KFACs", "eye"]
each = pytest.mark.parametrize("name", NAMES)
LINUX = pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files without a name are Linux's")
either_way = pytest.mark.parametrize("way", [pytest.param("unnamed", marks=LINUX), "beside"])


def take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "beside":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@either_way
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077], ids=oct)
def test_a_new_file_has_the_rights_of_the_umask(mask, way, tmp_path, monkeypatch):
    take(way, monkeypatch)
    before = os.umask(mask)
    try:
        matrices()["PMatDiag"].save(tmp_path / "F")
    finally:
        os.umask(before)
    assert rights(tmp_path / "F") == 0o666 & ~mask


@either_way
def test_a_file_that_is_replaced_keeps_its_rights_and_its_link(way, tmp_path, monkeypatch):
    take(way, monkeypatch)
    there = tmp_path / "there"
    there.mkdir()
    (there / "F").write_text("old")
    (there / "F").chmod(0o640)
    (tmp_path / "link").symlink_to(there / "F")
    matrices()["PMatDiag"].save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and rights(there / "F") == 0o640
    assert PMat.load(there / "F").n_examples == 6
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["F", "link", "there"]


@either_way
@pytest.mark.parametrize("old", [True, False], ids=["over an old file", "new"])
def test_a_full_disk_is_an_os_error_and_leaves_things_as_they_were(old, way, tmp_path, monkeypatch):
    take(way, monkeypatch)
    F = matrices()["PMatDense"]
    if old:
        F.save(tmp_path / "F")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            (2 * F).save(tmp_path / "F")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["F"] * old
    assert not old or torch.equal(PMat.load(tmp_path / "F").to_torch(), F.to_torch())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_device_is_written_to_and_not_replaced():
    with pytest.raises(OSError) as caught:
        matrices()["PMatDense"].save("/dev/full")
    assert caught.value.errno == errno.ENOSPC and stat.S_ISCHR(os.stat("/dev/full").st_mode)


KILLED = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("replacing", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
with module.replacing(sys.argv[2]) as file:
    file.write(b"new" * 10000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@LINUX
def test_a_process_that_is_killed_leaves_nothing_behind(tmp_path):
    (tmp_path / "F").write_text("old")
    ended = subprocess.run([sys.executable, "-c", KILLED, replacing.__file__, str(tmp_path / "F")])
    assert ended.returncode < 0
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("F", "old")]


PATHS = {
    "a folder": (OSError, lambda folder: folder),
    "in no folder": (OSError, lambda folder: folder / "none" / "F"),
    "None": (TypeError, lambda folder: None),
    "a number": (TypeError, lambda folder: 3),
}


@pytest.mark.parametrize(("error", "path"), PATHS.values(), ids=PATHS)
def test_paths_are_refused(error, path, tmp_path):
    with pytest.raises(error):
        matrices()["PMatDiag"].save(path(tmp_path))
    with pytest.raises(error):
        PMat.load(path(tmp_path))
    assert not list(tmp_path.iterdir())


@each
def test_tensors_that_share_memory_and_gradients_are_saved(name, tmp_path):
    scaling = torch.ones((), requires_grad=True)
    F = matrices()[name] * scaling
    F.save(tmp_path / "F")
    again = PMat.load(tmp_path / "F")
    assert type(again) is type(F) and again.dtype == F.dtype
    assert_close(again.to_torch(), F.to_torch().detach(), rtol=1e-6, atol=1e-7)


# What a file says of its matrix


def test_a_file_names_the_variant_and_the_weights(tmp_path):
    model = network()
    F = FIM(model, (X,), nngeo.PMatDiag, "regression")
    F.save(tmp_path / "F")
    found = nngeo.PMatDiag.load(tmp_path / "F")
    assert found.origin == F.origin
    assert found.origin["variant"] == "regression, Exact"
    assert found.origin["weights"] == found.layer_collection.fingerprint(model)
    assert found.origin["weights"] == found.layer_collection.fingerprint(copy.deepcopy(model))
    with torch.no_grad():
        model[0].weight[0, 0].add_(1e-6)
    assert found.origin["weights"] != found.layer_collection.fingerprint(model)
    assert F.origin["weights"] is None  # a fingerprint can't be taken of weights that are gone
    F.update((X,))
    assert F.origin["weights"] == F.layer_collection.fingerprint(model)


def test_origins_name_what_was_estimated():
    model, y = network(), torch.zeros(6, dtype=torch.long)
    kind = nngeo.PMatDense
    assert FIM(model, (X, y), kind, empirical=True).origin["variant"] == "classif_logits, Empirical"
    assert FIM_MonteCarlo(model, (X,), kind).origin["variant"] == "classif_logits, MonteCarlo"
    hessian = Hessian(model, (X, y), kind, nn.functional.cross_entropy)
    assert hessian.origin["variant"] == "Hessian of cross_entropy, sum"
    assert (hessian + 1.0).origin is None and kind(hessian.layer_collection, data=torch.eye(14)).origin is None


STORED = Path(__file__).parent / "data"


@pytest.mark.parametrize("kind", [nngeo.PMatKFAC, nngeo.PMatEKFAC], ids=lambda kind: kind.__name__)
def test_a_loaded_matrix_is_updated_as_it_was_made(kind, tmp_path):
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Flatten()), torch.randn(6, 4, 3)
    F = FIM(model, (x,), kind, weight_sharing="reduce")
    F.save(tmp_path / "F")
    again = kind.load(tmp_path / "F", generator=F.generator)
    assert_close(again.update((x + 1,)).to_torch(), F.update((x + 1,)).to_torch())


def test_files_of_format_1_are_read():
    F = PMat.load(STORED / "format1.safetensors")
    assert (type(F), F.n_examples, F.origin["variant"]) == (nngeo.PMatKFAC, 2, "regression, Exact")
    assert_close(F.to_torch(), torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.5, 0.5], [0.5, 0.5, 1.0]]))


# Damage


@cache
def saved(name: str, folder: Path) -> bytes:
    path = folder / name.replace(" ", "_")
    matrices()[name].save(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


Damage = tuple[str, float, int, bytes]
damages = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "overwrite", "digit"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
        st.binary(min_size=1, max_size=40),
    ),
    min_size=1,
    max_size=3,
)


def damaged(raw: bytes, damage: list[Damage]) -> bytes:
    for how, where, byte, more in damage:
        at = int(where * len(raw))
        if how == "flip" and raw:
            raw = raw[:at] + bytes([raw[at] ^ (1 << byte % 8)]) + raw[at + 1 :]
        elif how == "cut":
            raw = raw[:at] + raw[at + byte :] if byte < 200 else raw[:at]
        elif how == "insert":
            raw = raw[:at] + more + raw[at:]
        elif how == "overwrite":
            raw = raw[:at] + more + raw[at + len(more) :]
        elif (digit := next((i for i in range(at, len(raw)) if raw[i : i + 1].isdigit()), None)) is not None:
            raw = raw[:digit] + b"%d" % (byte % 10) + raw[digit + 1 :]
    return raw


def raised_here(error: BaseException) -> bool:
    """Whether the last frame of an error is in nngeo."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(Path(nngeo.__file__).parent)


@each
@settings(max_examples=100, deadline=None)
@given(damage=damages)
def test_a_damaged_file_is_refused_or_right(name, folder, damage):
    path = folder / "damaged"
    path.write_bytes(damaged(saved(name, folder), damage))
    try:
        found = PMat.load(path)
    except ValueError as error:
        assert type(error) is ValueError and raised_here(error), repr(error)
        return
    assert torch.equal(found.to_torch(), matrices()[name].to_torch())
    assert (type(found), found.n_examples) == (type(matrices()[name]), matrices()[name].n_examples)


values = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.text(max_size=5),
    st.lists(st.integers(-3, 3), max_size=8), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(["PMatDiag", "DenseBlock", "SumBlock", [1, 1, 1, False]]),
    st.lists(st.integers(0, 4), max_size=4).map(torch.ones),
    st.just(torch.ones(14, dtype=torch.long)), st.just(torch.ones(14, dtype=torch.complex64)),
)  # fmt: skip


@each
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_state_is_refused_or_is_a_matrix(name, data):
    state = matrices()[name].state_dict()
    key = data.draw(st.sampled_from(sorted(state)))
    entry = state[key]
    if isinstance(entry, dict) and entry and data.draw(st.booleans()):
        state[key] = entry | {data.draw(st.sampled_from(sorted(entry))): data.draw(values)}
    elif data.draw(st.booleans()):
        state[key] = data.draw(values)
    else:
        del state[key]
    try:
        found = PMat.from_state_dict(state)
    except (ValueError, TypeError) as error:
        assert type(error) in (ValueError, TypeError) and raised_here(error), repr(error)
        return
    p = found.layer_collection.numel()
    assert found.to_torch().shape == (p, p) and (found.n_examples is None or found.n_examples > 0)


LAYERS = LayerCollection.from_model(network())
BLOCKS: dict[str, Any] = {
    "PMatKFAC": (nngeo.PMatKFAC, {"0": DiagBlock(torch.ones(8)), "2": DiagBlock(torch.ones(6))}),
    "PMatDiag": (nngeo.PMatDiag, {"0": DenseBlock(torch.eye(8)), "2": DiagBlock(torch.ones(6))}),
    "PMatEKFACBlockDiag": (nngeo.PMatEKFACBlockDiag, {"0": DenseBlock(torch.eye(8)), "2": DiagBlock(torch.ones(6))}),
}


@pytest.mark.parametrize(("kind", "blocks"), BLOCKS.values(), ids=BLOCKS)
def test_a_matrix_is_made_of_its_own_blocks(kind, blocks):
    with pytest.raises(ValueError, match="is made of .* the block of layer .* PMatMixed takes any"):
        kind(LAYERS, data=blocks)
    assert nngeo.PMatMixed(LAYERS, data=blocks).trace() == 14


def entries(**changes: Any) -> dict[str, Any]:
    return matrices()["PMatKFAC"].state_dict() | changes


HEADERS = {
    "a negative count": entries(n_examples=-5),
    "a count in words": entries(n_examples="many"),
    "no name": entries(**{"class": None}),
    "no layers": entries(layers={}),
    "layers without shapes": entries(layers={"0": {"kind": "Linear"}}),
    "a shape in words": entries(layers={"0": {"kind": "Linear", "shapes": {"weight": ["two"]}}}),
    "blocks of another class": entries(**matrices()["PMatDiag"]._state()),
    "no blocks": entries(blocks=[]),
    "integers": entries(**{"0/a": torch.ones(1, 4, 4, dtype=torch.long), "0/g": torch.ones(1, 2, 2, dtype=torch.long)}),
}


@pytest.mark.parametrize("state", HEADERS.values(), ids=HEADERS)
def test_headers_are_checked(state):
    with pytest.raises(ValueError, match="(damaged|is made of)"):
        PMat.from_state_dict(state)


def test_nothing_reads_tensors_that_are_not_there() -> None:
    state: dict[str, Tensor] = {}
    with pytest.raises(ValueError, match="not the state_dict of a matrix"):
        PMat.from_state_dict(state)
