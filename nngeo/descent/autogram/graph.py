"""The graph below some losses, with the calls of modules that are part of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from nngeo.descent.autogram.hooks import Watcher
from nngeo.generators.watch import Call


@dataclass(frozen=True)
class Use:
    """A call of a module on the way to the losses, and the edges of the leaves of its output that lead there.

    Edge -n is at the n-th node above its only output that just adds it to something.
    """

    module: str
    call: Call
    edges: dict[int, GradientEdge]


@dataclass(frozen=True)
class Graph:
    """Nodes from the losses down to the parameters, breadth first.

    The key is equal for graphs of the same operations, connected in the same way, at the same parameters, with the same
    shapes at every module.
    """

    nodes: list[Any]
    key: tuple
    uses: list[Use]
    parameters: dict[int, int]  # identity of a parameter -> the place of its node

    @classmethod
    def below(cls, losses: Tensor, watcher: Watcher, numbers: Mapping[int, int]) -> Graph:
        """The graph of the losses; `numbers` are those of the parameters, by their identity."""
        root: Any = get_gradient_edge(losses).node
        nodes: list[Any] = [root]
        place = {root: 0}
        key: list[Any] = []
        calls: dict[int, Use] = {}
        found: dict[int, int] = {}
        for node in nodes:
            kind = type(node)
            key.append(kind)
            for lower, number in node.next_functions:
                at = -1 if lower is None else place.get(lower)
                if at is None:
                    at = place[lower] = len(nodes)
                    nodes.append(lower)
                key.append(at)
                key.append(number)
            for module, call, leaf, number in watcher.entries(node):
                use = calls.get(id(call))
                if use is None:
                    use = calls[id(call)] = Use(module, call, {})
                    key.append((module, *call.argument_shapes(), *call.returned))
                use.edges[leaf] = GradientEdge(node, number)
                key.append((leaf, number))
            if kind.__name__ == "AccumulateGrad":
                parameter = id(node.variable)
                key.append(numbers.get(parameter, -1))
                if parameter in numbers:
                    found[parameter] = place[node]
        return cls(nodes, tuple(key), list(calls.values()), found)

    def edges_to(self, parameter: Tensor) -> int:
        """How many operations use a parameter."""
        node = self.nodes[self.parameters[id(parameter)]]
        return sum(lower is node for upper in self.nodes for lower, _ in upper.next_functions)

    def node_of(self, parameter: Tensor) -> Any:
        """The node at which a parameter's gradient is accumulated; None if it is not on the graph."""
        place = self.parameters.get(id(parameter))
        return None if place is None else self.nodes[place]

    def users(self) -> dict[Any, list[Any]]:
        """The nodes that use the output of each node."""
        found: dict[Any, list[Any]] = {}
        for upper in self.nodes:
            for lower, _ in upper.next_functions:
                found.setdefault(lower, []).append(upper)
        return found

    def is_routed(self) -> bool:
        """Whether tensors pick rows somewhere: then it may be the data that decide which example a row belongs to."""
        return any(operation(node) in _PICKS for node in self.nodes)


_PICKS = {"Index", "IndexSelect", "Gather", "MaskedSelect", "Take", "Sort", "Topk"}
_PICKS |= {"IndexPut", "IndexAdd", "IndexCopy", "Scatter", "ScatterAdd", "MaskedScatter"}


def operation(node: Any) -> str:
    """ "Index" of an IndexBackward0."""
    return type(node).__name__.rstrip("0123456789").removesuffix("Backward")
