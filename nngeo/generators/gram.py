"""Inner products of the gradients that many mini-batches left at one layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nngeo.generators.record import LayerRecord
from nngeo.linalg.contraction import inner, moment

# Elements of all gradients at one layer that are formed at once: 2**26 are 256 MiB in float32.
BUDGET = 2**26


def gram_tiles(
    rows: Sequence[LayerRecord], columns: Sequence[LayerRecord] | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """(i, j, products (k, b, l, c)) of every record of the rows with every one of the columns.

    Without `columns` they are the rows, and i <= j. The gradients are formed, once for all tiles, where this takes
    fewer multiplications than the inner products of their factors, and where they fit a budget.
    """
    pairs = [(i, j) for i in range(len(rows)) for j in range(i if columns is None else 0, len(columns or rows))]
    others = rows if columns is None else columns
    sizes, widths = ([record.n_cotangents * record.n_examples for record in records] for records in (rows, others))
    p, height, width = rows[0].layer.numel(), sum(sizes), sum(widths)
    forming = sum(record.forming() for record in {id(record): record for record in (*rows, *others)}.values())
    dense = forming + height * width * p // (2 if columns is None else 1)
    if (height + width) * p > BUDGET or dense > sum(rows[i].gram_cost(others[j]) for i, j in pairs):
        for i, j in pairs:
            yield i, j, rows[i].gram(others[j])
        return
    left = torch.cat([record.jacobian().flatten(0, 1) for record in rows])
    if columns is None:
        products = moment(left)
    else:
        products = inner(left, torch.cat([record.jacobian().flatten(0, 1) for record in columns]))
    tiles = [part.split(widths, 1) for part in products.split(sizes)]
    for i, j in pairs:
        yield i, j, tiles[i][j].unflatten(1, _shape(others[j])).unflatten(0, _shape(rows[i]))


def _shape(record: LayerRecord) -> tuple[int, int]:
    return record.n_cotangents, record.n_examples
