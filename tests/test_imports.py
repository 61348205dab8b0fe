"""The tree of docs/design.rst, held: who may import whom, and how long a file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "nngeo"
ORDER = (
    *("linalg", "layers", "vectors", "variants", "generators", "representations"),
    *("products", "nn", "descent", "factories", "uses"),
)
FILES = sorted(ROOT.rglob("*.py"))
INNER = [path for path in FILES if path != ROOT / "__init__.py"]  # the public names come from everywhere


def _part(module: tuple[str, ...]) -> str:
    """The part of nngeo that a dotted name (with the leading "nngeo") belongs to; "" for nngeo itself."""
    return module[1] if len(module) > 1 else ""


def _dotted(path: Path) -> tuple[str, ...]:
    """nngeo/layers/rule.py -> ("nngeo", "layers", "rule"); a package's __init__ is the package."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def _imported(path: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line number and dotted name of everything that a file imports from nngeo, at any depth of its code."""
    package = _dotted(path) if path.name == "__init__.py" else _dotted(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = (*above, *(node.module.split(".") if node.module else ()))
            names = [(*base, alias.name) for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name[0] == "nngeo")


def _wrong_way(path: Path) -> list[str]:
    part = _part(_dotted(path))
    allowed = ORDER[: ORDER.index(part) + 1]
    return [f"line {line}: {'.'.join(name)}" for line, name in _imported(path) if _part(name) not in allowed]


def test_there_are_files_to_look_at():
    assert len(INNER) > 10


@pytest.mark.parametrize("path", INNER, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_its_left(path):
    assert _part(_dotted(path)) in ORDER, f"{path.name} is not in the order {' -> '.join(ORDER)}"
    assert not _wrong_way(path), f"{path.relative_to(ROOT)} may not import {_wrong_way(path)}"


def test_an_import_from_the_right_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path / "nngeo")
    path = tmp_path / "nngeo" / "layers" / "rule.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from nngeo.linalg.outer import OuterProducts\n"
        "from .collection import Layer\n"
        "from ..factories import FIM\n"
        "def inside():\n"
        "    import nngeo.vectors\n"
        "from nngeo import PVector\n"
    )
    assert _wrong_way(path) == ["line 3: nngeo.factories.FIM", "line 6: nngeo.PVector", "line 5: nngeo.vectors"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_at_most_350_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350
