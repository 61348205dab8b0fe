"""The graph that autograd recorded below some tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from typing import Any, cast

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from nngeo.layers.models import check_no_shard

# An output of a node; the outputs of `x.chunk(2)` are two edges of one node.
Edge = tuple[Node, int]


def edge(tensor: Tensor) -> Edge:
    """Where the gradient of a tensor that requires one enters the graph."""
    found = get_gradient_edge(tensor)
    return found.node, found.output_nr


def edges(starts: Iterable[Edge], beyond: Collection[Edge] = ()) -> list[Edge]:
    """Every edge reached from the starts, those included, breadth first, but none through an edge of `beyond`."""
    seen = set(beyond)
    queue = deque(dict.fromkeys(start for start in starts if start not in seen))
    seen.update(queue)
    expanded: set[Node] = set()
    found = []
    while queue:
        found.append(queue.popleft())
        node = found[-1][0]
        if node not in expanded:
            expanded.add(node)
            new = [e for e in below(found[-1]) if e not in seen]
            queue.extend(dict.fromkeys(new))
            seen.update(new)
    return found


def below(start: Edge) -> list[Edge]:
    """The edges that a node passes gradients on to."""
    return [(node, number) for node, number in start[0].next_functions if node is not None]


def leaves(tensors: Iterable[Tensor], beyond: Iterable[Tensor] = ()) -> list[Tensor]:
    """Where the graph ends, parameters for instance, if it is reached other than through the tensors of `beyond`."""
    found = edges([edge(t) for t in tensors], {edge(t) for t in beyond})
    ends = [cast(Any, node).variable for node, _ in found if node.name() == "torch::autograd::AccumulateGrad"]
    for end in ends:
        check_no_shard(f"A parameter of shape {tuple(end.shape)}", end)
    return ends


def kinds(tensors: Iterable[Tensor]) -> frozenset[str]:
    """The names of the operations in the graph."""
    seen: set[Node] = set()
    left = [edge(t)[0] for t in tensors]
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            left += [deeper for deeper, _ in node.next_functions if deeper is not None]
    return frozenset(type(node).__qualname__ for node in seen)
