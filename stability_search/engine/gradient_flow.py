"""Gradients between the operators behind a loss, and where they broke on their way.

Every operator of the graph is watched, and belongs to the innermost call in which it was made.
Hooks on modules or tensors could not tell modules apart that share an input, whose gradient is
one sum; hooks that insert operators of their own break in-place operators. These change nothing,
and keep 0-d values on the device, which are read after the pass.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch.autograd.graph import Node

from stability_search.engine.calls import Call, Calls, largest, stored_values

_Slot = tuple[int, int]  # an operator, and one of its outputs
_Edge = tuple[int, int]  # an operator, and one of its inputs
Sizes = list[torch.Tensor | None]  # largest absolute gradients, 0-d; None without a gradient


@dataclass(kw_only=True, slots=True)
class _Operator:
    """One operator of the graph.

    Attributes:
        call: The innermost call it was made in; None outside of all.
        targets: What made each of its inputs; None for one that needs no gradient.
        arrived: Gradients of its outputs, once the backward pass came by.
        left: Gradients of its inputs; None before they were computed.
    """

    call: Call | None
    targets: Sequence[_Slot | None]
    arrived: Sizes = field(default_factory=list)
    left: Sizes | None = None


class Graph:
    """Watch the gradients between the operators behind a loss, within a context."""

    def __init__(self, calls: Calls, loss: torch.Tensor) -> None:
        nodes = _nodes(loss)
        positions = {node: position for position, node in enumerate(nodes)}
        self.operators: list[_Operator] = []
        self.order: list[int] = []  # in which the backward pass came by
        self.leaves: dict[int, int] = {}  # position of a leaf, by its id
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for position, node in enumerate(nodes):
            targets = [None if to is None else (positions[to], k) for to, k in node.next_functions]
            operator = _Operator(call=calls.maker(node), targets=targets)
            self.operators.append(operator)
            if type(node).__name__ == "AccumulateGrad":
                self.leaves[id(node.variable)] = position  # type: ignore[attr-defined]
                continue
            before = functools.partial(_note_arrived, operator, self.order, position)
            after = functools.partial(_note_left, operator)
            self._hooks += [node.register_prehook(before), node.register_hook(after)]

    def __enter__(self) -> Self:
        """Begin to watch: the hooks are there."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()


def _nodes(loss: torch.Tensor) -> list[Node]:
    assert loss.grad_fn is not None  # noqa: S101 - the caller made sure
    found = {loss.grad_fn: None}
    unseen = [loss.grad_fn]
    while unseen:
        for node, _ in unseen.pop().next_functions:
            if node is not None and node not in found:
                found[node] = None
                unseen.append(node)
    return list(found)


def _note_arrived(
    operator: _Operator, order: list[int], position: int, grads: Sequence[torch.Tensor | None]
) -> None:
    order.append(position)
    operator.arrived = sizes_of(grads)


def _note_left(
    operator: _Operator, grads: Sequence[torch.Tensor | None], _arrived: object
) -> None:
    operator.left = sizes_of(grads)


def sizes_of(grads: Iterable[torch.Tensor | None]) -> Sizes:
    """Return the largest absolute value of each gradient, on its device."""
    return [None if g is None or not g.numel() else largest(stored_values(g)) for g in grads]


def on_host(sizes: Sizes) -> list[float]:
    """Return such sizes as numbers; 0 for a missing gradient."""
    return [0.0 if size is None else size.item() for size in sizes]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Flow:
    """What passed through an operator, on the host; `left` is None if it raised."""

    call: Call | None
    arrived: list[float]
    left: list[float] | None


class Trail:
    """Follow broken gradients from where they began to the leaves."""

    def __init__(self, graph: Graph) -> None:
        self._flows: dict[int, _Flow] = {}  # in backward order
        self._targets: dict[_Edge, _Slot] = {}
        self._sources: defaultdict[_Slot, list[_Edge]] = defaultdict(list)
        for position in graph.order:
            seen = graph.operators[position]
            self._flows[position] = _Flow(
                call=seen.call,
                arrived=on_host(seen.arrived),
                left=None if seen.left is None else on_host(seen.left),
            )
            for which, target in enumerate(seen.targets if seen.left is not None else ()):
                if target is not None:
                    self._targets[position, which] = target
                    self._sources[target].append((position, which))

    def breaks(self, leaves: set[int]) -> Iterator[Call | None]:
        """Yield the calls in which gradients broke, None for outside of all, in backward order.

        Args:
            leaves: Only what reached one of these counts. If there are none the backward pass
                did not come to its end, and everything counts.
        """
        that_count = self._broken_towards(leaves)
        feeds = {edge[0] for edge in that_count}
        slots = {self._targets[edge] for edge in that_count}
        for position, flow in self._flows.items():
            broken = [k for k, size in enumerate(flow.arrived) if not math.isfinite(size)]
            if not broken and position in feeds:
                yield flow.call
            for slot in ((position, k) for k in broken):
                # Finite gradients break on arrival: where several are summed, or by a hook on
                # the tensor.
                if (position in feeds or not leaves) and slot not in slots:
                    edges = self._sources[slot]
                    yield self._around(edges) if len(edges) > 1 else flow.call
        for slot in ((leaf, 0) for leaf in sorted(leaves)):
            if slot not in slots:
                yield self._around(self._sources[slot])

    def unfinished(self) -> Call | None:
        """Return the call of the operator that raised; None if there is none."""
        return next((flow.call for flow in self._flows.values() if flow.left is None), None)

    def largest_into(self, call: Call) -> float | None:
        """Return the largest finite gradient that came back to a call; None without one."""
        sizes: list[float] = []
        for position, flow in self._flows.items():
            if not _is_within(flow.call, call):
                continue
            for which, size in enumerate(flow.arrived):
                edges = self._sources[position, which]
                outside = [e for e in edges if not _is_within(self._flows[e[0]].call, call)]
                if outside or not edges:
                    sizes += [size] if math.isfinite(size) else map(self._left, outside)
        return max((size for size in sizes if math.isfinite(size)), default=None)

    def _broken_towards(self, leaves: set[int]) -> set[_Edge]:
        # A broken gradient that something further back masks reaches no leaf.
        found: set[_Edge] = set()
        reach = set(leaves)
        for edge, target in reversed(self._targets.items()):
            if not math.isfinite(self._left(edge)) and (target[0] in reach or not leaves):
                found.add(edge)
                reach.add(edge[0])
        return found

    def _left(self, edge: _Edge) -> float:
        left = self._flows[edge[0]].left
        assert left is not None  # noqa: S101 - an operator that raised has no edges
        return left[edge[1]]

    def _around(self, edges: list[_Edge]) -> Call | None:
        """Return the innermost call around all of these operators."""
        calls = [self._flows[position].call for position, _ in edges]
        if not calls or calls[0] is None:
            return None
        shared = (c for c in calls[0].around() if all(_is_within(other, c) for other in calls))
        return next(shared, None)


def _is_within(call: Call | None, outer: Call) -> bool:
    return call is not None and any(one is outer for one in call.around())
