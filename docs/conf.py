"""Configuration of the documentation: `sphinx-build -W docs docs/_build/html`."""

from __future__ import annotations

import re
from pathlib import Path

from nngeo.representations import table

project = "nngeo"
author = "the nngeo authors"
copyright = "2026, the nngeo authors"
release = version = "0.1.0"

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "*.inc"]
html_theme = "furo"
html_title = "nngeo"
default_role = "code"

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
python_use_unqualified_type_names = True


_CODE = re.compile(r"(``.+?``|`[^`]+`)")


def plain_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text with code in single backticks: escape what reStructuredText would take for markup.

    Doctests, which end at a blank line, stay as they are.
    """
    in_doctest = False
    for i, line in enumerate(lines):
        in_doctest = line.lstrip().startswith(">>>") or (in_doctest and bool(line.strip()))
        if not in_doctest:
            parts = _CODE.split(line)
            parts[::2] = [re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
            lines[i] = "".join(parts)


def setup(app) -> None:
    app.connect("autodoc-process-docstring", plain_text, priority=400)  # before napoleon, whose markup must stay


# The table of operations is made from the code each time, so that it cannot go stale.
Path(__file__).with_name("operations.inc").write_text(table.as_rst())
