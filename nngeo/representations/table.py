"""What every representation can do, at which cost: the table of the documentation, and of the test that walks it.

In costs, P counts all parameters; p, i and o the parameters, inputs (with the bias) and outputs of a layer, over which
sums run; r = k n the rows of a low-rank matrix; s is one sweep: a forward and two backward passes over the examples; m
iterations of a solver, q products of an estimator. A first use decomposes, and what it found is kept.
"""

from __future__ import annotations

COLUMNS = ("Dense", "BlockDiag", "KFAC", "EKFAC", "QuasiDiag", "Diag", "LowRank", "Implicit", "Eye")
EXACT, ESTIMATED, NONE = "exact", "estimated", "none"

_COSTS = {
    "mv": "P^2 | sum p^2 | sum p(i+o) | sum p(i+o) | P | P | rP | s | P",
    "vTMv": "P^2 | sum p^2 | sum p(i+o) | sum p(i+o) | P | P | rP | s | P",
    "mapTMmap": "rP^2 | r sum p^2 | r sum p(i+o) | r sum p(i+o) | rP | rP | r^2 P | rs | rP",
    "solve": "P^3 | sum p^3 | sum i^3+o^3 | sum p(i+o) | P | P | r^2 P | ms | P",
    "trace": "P | P | sum i+o | P | P | P | rP | s | 1",
    "norm": "P^2 | sum p^2 | sum i^2+o^2 | P | P | P | r^2 P | P s | 1",
    "norm 2": "P^3 | sum p^3 | sum i^3+o^3 | P | sum p i^2 | P | r^2 P | qs | 1",
    "get_diag": "P | P | sum p | sum p(i+o) | P | P | rP | s | P",
    "to_torch": "P^2 | P^2 | P^2 | sum p^2(i+o) | P^2 | P^2 | rP^2 | P^2 s | P^2",
    "F + damping": "P^2 | sum p^2 | sum i^3+o^3 | P | P | P | P | P | 1",
    "inv": "P^3 | sum p^3 | sum i^3+o^3 | P | sum p i^2 | P | r^2 P | ms | 1",
    "pinv": "P^3 | sum p^3 | sum i^3+o^3 | P | sum p i^2 | P | r^2 P | - | 1",
    "pow": "P^3 | sum p^3 | sum i^3+o^3 | P | sum p i^2 | P | r^2 P | - | 1",
    "logdet": "P^3 | sum p^3 | sum i^3+o^3 | P | sum p i^2 | P | r^2 P | ~ qs | 1",
    "sample": "P^3 | sum p^3 | sum i^3+o^3 | sum p(i+o) | sum p i^2 | P | r^2 P | - | P",
    "get_diag(inverse)": "P^3 | sum p^3 | sum i^3+o^3 | sum p(i+o) | P | P | r^2 P | - | P",
    "eigh": "P^3 | sum p^3 | sum i^3+o^3 | P | sum p i^2 | P | r^2 P | - | P",
    "top_eigenpairs": "P^3 | sum p^3 | sum i^3+o^3 | P | sum p i^2 | P | r^2 P | qs | P",
    "cond": "P^3 | sum p^3 | sum i^3+o^3 | P | sum p i^2 | P | r^2 P | qs | 1",
    "F + G": "P^2 | sum p^2 | sum i^2+o^2 | P | P | P | rP | - | 1",
    "update": "as estimating | as estimating | as estimating | as estimating | as estimating | as estimating | "
    "as estimating | - | -",
    "save": "P^2 | sum p^2 | sum i^2+o^2 | sum p+i^2+o^2 | P | P | rP | - | 1",
    "J F J'": "rP^2 | r sum p^2 | r sum p(i+o) | r sum p(i+o) | rP | rP | r^2 P | rs | r^2 P",
}


def cells() -> dict[tuple[str, str], tuple[str, str]]:
    """{(operation, representation): (cost, "exact" | "estimated" | "none")}, without a gap."""
    found = {}
    for operation, row in _COSTS.items():
        for column, cost in zip(COLUMNS, row.split(" | "), strict=True):
            kind = NONE if cost == "-" else ESTIMATED if cost.startswith("~") else EXACT
            found[operation, f"PMat{column}"] = (cost.removeprefix("~ "), kind)
    return found


def as_rst() -> str:
    """The table in reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    lines += [f"   {'* -' if j == 0 else '  -'} {name}" for j, name in enumerate(("operation", *COLUMNS))]
    known = cells()
    for operation in _COSTS:
        lines.append(f"   * - ``{operation}``")
        for column in COLUMNS:
            cost, kind = known[operation, f"PMat{column}"]
            lines.append(f"     - {'none' if kind == NONE else cost + (' (estimated)' if kind == ESTIMATED else '')}")
    return "\n".join(lines) + "\n"
