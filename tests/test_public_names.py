"""No public name, argument or default is lost, moved or added without being noticed."""

from __future__ import annotations

from pathlib import Path

from tests.public_names import lines

KNOWN = Path(__file__).parent / "data" / "public_names.txt"


def test_public_names_and_signatures_are_those_that_are_written_down():
    known, found = set(KNOWN.read_text().splitlines()), set(lines())
    lost, new = sorted(known - found), sorted(found - known)
    assert not lost and not new, "if it is meant, run: python -m tests.public_names > tests/data/public_names.txt"
