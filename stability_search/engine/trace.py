"""Where a non-finite value first appeared: one more pass over a micro-batch, under hooks.

Forwards, every call of a module is watched from outside: what went in, what came out. Backwards,
every operator of the graph is watched, and belongs to the innermost call in which it was made.
Hooks on modules or tensors could not tell modules apart that share an input, whose gradient is
one sum; hooks that insert operators of their own break in-place operators. These change nothing.

Hooks keep 0-d values on the device; they are read after the pass.
"""

import bisect
import functools
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from torch.autograd.graph import Node

from stability_search.engine import batches
from stability_search.engine.losses import NUMERICAL_ERRORS


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where the fault was first seen.

    Attributes:
        module: Name of the module that turned finite values non-finite, as `named_modules` gives
            it, the class for the model itself; None if no module did.
        phase: `forward`, `loss` (what the task computes outside of every module) or `backward`;
            None if the fault did not show again.
        last_finite_max: The last good largest absolute value: of what went into the module; for
            `backward` of the gradient that came back to it; for `loss` of what the model
            returned, or of the loss where it is the loss's gradient that broke. Finite; None
            where there was no such value.
        is_known: False where the repeat raised (out of memory, say) before anything was
            non-finite, so that nothing can be said.
    """

    module: str | None = None
    phase: str | None = None
    last_finite_max: float | None = None
    is_known: bool = True


def trace_forward(model: nn.Module, run: Callable[[], torch.Tensor]) -> Origin:
    """Run a forward pass again and name the first module that broke.

    Args:
        model: The model whose modules are watched.
        run: The forward pass; returns the loss. What it raises is swallowed: it is the fault
            under investigation.

    Returns:
        The origin. A module that only passes on what came in broken is not named, but its phase
        is `forward` all the same. One that raised a numerical error on finite values is named.
    """
    calls = _Calls(model)
    is_loss_broken, is_numerical, has_raised = True, False, False
    try:
        with calls:
            is_loss_broken = not bool(torch.isfinite(run()).all())
    except Exception as error:  # noqa: BLE001 - the fault itself; the engine has its own record of it
        has_raised, is_numerical = True, isinstance(error, NUMERICAL_ERRORS)
    origin = _forward_origin(calls, is_loss_broken=is_loss_broken, is_numerical=is_numerical)
    is_known = not has_raised or is_numerical or origin.phase == "forward"
    return origin if is_known else Origin(is_known=False)


def trace_backward(
    model: nn.Module, run: Callable[[], torch.Tensor], parameters: Iterable[torch.Tensor]
) -> Origin:
    """Run a forward and a backward pass again and name the first module that broke.

    No `.grad` is touched. Reentrant checkpointing (`use_reentrant=True`) refuses that, so that no
    module can be named for it.

    Args:
        model: The model whose modules are watched.
        run: The forward pass; returns the loss, 0-d, times the loss scale. It must make the graph
            itself, on the calling thread. What it or the backward pass raises is swallowed.
        parameters: Leaves whose gradients count; frozen ones are left out.

    Returns:
        The origin: where the loss or what the model returns is non-finite already, what
        `trace_forward` returns; otherwise the first module, in backward order, that turned
        finite gradients into non-finite ones which reached a parameter. Gradients that break
        where they are summed belong to the innermost module around the sum. If a pass raises and
        nothing was non-finite, only the phase is given, `backward`, and it is not known.
    """
    leaves = [p for p in parameters if p.requires_grad]
    calls = _Calls(model)
    loss: torch.Tensor | None = None
    is_loss_broken, is_numerical, has_raised = False, False, False
    try:
        with calls, torch.enable_grad():
            loss = run()
        is_loss_broken = not bool(torch.isfinite(loss).all())
    except Exception as error:  # noqa: BLE001 - the fault itself, as above
        has_raised, is_numerical = True, isinstance(error, NUMERICAL_ERRORS)
    if loss is None or is_loss_broken or calls.has_broken_output():
        forward = _forward_origin(calls, is_loss_broken=is_loss_broken, is_numerical=is_numerical)
        is_guess = has_raised and not is_numerical and forward.phase != "forward"
        if forward.phase is not None and not is_guess:
            return forward
    if loss is None or (leaves and loss.grad_fn is None):
        return Origin(phase="backward", is_known=False)
    if not leaves:
        return Origin()
    return _backward_origin(calls, loss, leaves)


# -- forwards --------------------------------------------------------------------------------


class _Extent(NamedTuple):
    """Lowest, highest and largest finite absolute value of a tensor, 0-d, on its device."""

    lowest: torch.Tensor
    highest: torch.Tensor
    size: torch.Tensor


@dataclass(kw_only=True, slots=True, eq=False)
class _Call:
    """One call of a module, and the operators made in it by their sequence numbers.

    Some -Inf is no offence, since an additive mask is full of it, unless it comes out of weights.
    """

    name: str
    outer: "_Call | None"
    has_weights: bool
    inputs: list[_Extent]
    first_node: int
    end_node: int | None = None
    outputs: list[_Extent] = field(default_factory=list)
    has_raised: bool = False

    def is_broken(self, extents: list[_Extent]) -> bool:
        return any(
            not math.isfinite(extent.highest.item())
            or (self.has_weights and not math.isfinite(extent.lowest.item()))
            for extent in extents
        )

    def around(self) -> "Iterator[_Call]":
        """Yield this call and those it was made in, innermost first."""
        call: _Call | None = self
        while call is not None:
            yield call
            call = call.outer


class _Calls:
    """Record every call of the model's modules within a context."""

    def __init__(self, model: nn.Module) -> None:
        self.opened: list[_Call] = []
        self.closed: list[_Call] = []
        self._names = {m: name or type(model).__name__ for name, m in model.named_modules()}
        self._open: list[tuple[nn.Module, _Call]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for module in self._names:
            self._hooks += [
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._names, self._open, self._hooks = {}, [], []

    def has_broken_output(self) -> bool:
        """Return True if what the model returned is NaN or Inf, or nothing but -Inf."""
        returned = [e for call in self.closed if call.outer is None for e in call.outputs]
        return any(not math.isfinite(extent.highest.item()) for extent in returned)

    def maker(self, node: Node) -> _Call | None:
        """Return the innermost call that an operator was made in; None outside of all."""
        number: int = node._sequence_nr()  # noqa: SLF001 - no public way
        num_before = bisect.bisect_right(self.opened, number, key=lambda call: call.first_node)
        around = self.opened[num_before - 1].around() if num_before else iter(())
        return next((c for c in around if c.end_node is None or number < c.end_node), None)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ANN401
        call = _Call(
            name=self._names[module],
            outer=self._open[-1][1] if self._open else None,
            has_weights=next(module.parameters(recurse=False), None) is not None,
            inputs=_extents((args, kwargs)),  # now: the module may change them in place
            first_node=_next_node(),
        )
        self._open.append((module, call))
        self.opened.append(call)

    def _after(self, module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:  # noqa: ANN401
        if not self._open or self._open[-1][0] is not module:
            return  # another hook raised before ours saw the call
        call = self._open.pop()[1]
        call.end_node = _next_node()
        call.outputs = _extents(output)
        call.has_raised = output is None and isinstance(sys.exception(), NUMERICAL_ERRORS)
        self.closed.append(call)


def _next_node() -> int:
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]  # noqa: SLF001 - no public way
    return number


def _extents(nest: Any) -> list[_Extent]:  # noqa: ANN401 - any argument
    found = []
    for _, tensor in batches.tensors(nest):
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # noqa: SLF001 - no public way
            continue  # its values do not outlive the transform
        values = _values(tensor)
        if values.is_floating_point() and values.numel():
            finite = torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
            found.append(_Extent(values.amin(), values.amax(), _size(finite)))
    return found


def _values(tensor: torch.Tensor) -> torch.Tensor:
    """Return the stored numbers of any tensor as a strided real one."""
    values = tensor.detach()
    if values.layout is torch.sparse_coo:
        values = values.coalesce()
    if values.layout is not torch.strided:
        values = values.values()
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


def _size(values: torch.Tensor) -> torch.Tensor:
    # NaN where a value is. The norm of order infinity takes many times as long on a CPU.
    return torch.maximum(values.amax(), -values.amin())


def _forward_origin(calls: _Calls, *, is_loss_broken: bool, is_numerical: bool) -> Origin:
    # Calls end from the inside out, so the first that broke is the innermost.
    has_carrier = False
    for call in calls.closed:
        if call.is_broken(call.outputs) or (is_numerical and call.has_raised):
            if not call.is_broken(call.inputs):
                sizes = [extent.size.item() for extent in call.inputs]
                largest = max(sizes, default=None)
                return Origin(module=call.name, phase="forward", last_finite_max=largest)
            has_carrier = True
    if has_carrier:
        return Origin(phase="forward")
    if not is_loss_broken:
        return Origin()
    returned = [e.size.item() for call in calls.closed if call.outer is None for e in call.outputs]
    return Origin(phase="loss", last_finite_max=max(returned, default=None))


# -- backwards -------------------------------------------------------------------------------

_Slot = tuple[int, int]  # an operator, and one of its outputs
_Edge = tuple[int, int]  # an operator, and one of its inputs
_Sizes = list[torch.Tensor | None]  # largest absolute gradients, 0-d; None without a gradient


@dataclass(kw_only=True, slots=True)
class _Operator:
    """One operator of the graph.

    Attributes:
        call: The innermost call it was made in; None outside of all.
        targets: What made each of its inputs; None for one that needs no gradient.
        arrived: Gradients of its outputs, once the backward pass came by.
        left: Gradients of its inputs; None before they were computed.
    """

    call: _Call | None
    targets: Sequence[_Slot | None]
    arrived: _Sizes = field(default_factory=list)
    left: _Sizes | None = None


class _Graph:
    """Watch the gradients between the operators behind a loss, within a context."""

    def __init__(self, calls: _Calls, loss: torch.Tensor) -> None:
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
        return self

    def __exit__(self, *_: object) -> None:
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
    operator.arrived = _sizes(grads)


def _note_left(
    operator: _Operator, grads: Sequence[torch.Tensor | None], _arrived: object
) -> None:
    operator.left = _sizes(grads)


def _sizes(grads: Iterable[torch.Tensor | None]) -> _Sizes:
    return [None if g is None or not g.numel() else _size(_values(g)) for g in grads]


def _on_host(sizes: _Sizes) -> list[float]:
    return [0.0 if size is None else size.item() for size in sizes]


def _backward_origin(calls: _Calls, loss: torch.Tensor, leaves: list[torch.Tensor]) -> Origin:
    graph = _Graph(calls, loss)
    sizes: _Sizes = []
    has_raised, is_numerical = False, False
    try:
        with graph:
            sizes = _sizes(torch.autograd.grad(loss, leaves, allow_unused=True))
    except Exception as error:  # noqa: BLE001 - the fault itself, as above
        has_raised, is_numerical = True, isinstance(error, NUMERICAL_ERRORS)
    pairs = zip(leaves, _on_host(sizes), strict=False)  # no sizes where it raised
    broken = {graph.leaves[id(leaf)] for leaf, size in pairs if not math.isfinite(size)}
    if not broken and not has_raised:
        return Origin()
    trail = _Trail(graph)
    for call in trail.breaks(broken):
        if call is not None:
            return trail.origin(call)
        value = abs(loss.item())
        return Origin(phase="loss", last_finite_max=value if math.isfinite(value) else None)
    call = trail.unfinished() if is_numerical else None
    if call is None:
        return Origin(phase="backward", is_known=is_numerical)
    return trail.origin(call)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Flow:
    """What passed through an operator, on the host; `left` is None if it raised."""

    call: _Call | None
    arrived: list[float]
    left: list[float] | None


class _Trail:
    """Follow broken gradients from where they began to the leaves."""

    def __init__(self, graph: _Graph) -> None:
        self._flows: dict[int, _Flow] = {}  # in backward order
        self._targets: dict[_Edge, _Slot] = {}
        self._sources: defaultdict[_Slot, list[_Edge]] = defaultdict(list)
        for position in graph.order:
            seen = graph.operators[position]
            self._flows[position] = _Flow(
                call=seen.call,
                arrived=_on_host(seen.arrived),
                left=None if seen.left is None else _on_host(seen.left),
            )
            for which, target in enumerate(seen.targets if seen.left is not None else ()):
                if target is not None:
                    self._targets[position, which] = target
                    self._sources[target].append((position, which))

    def breaks(self, leaves: set[int]) -> Iterator[_Call | None]:
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

    def unfinished(self) -> _Call | None:
        """Return the call of the operator that raised; None if there is none."""
        return next((flow.call for flow in self._flows.values() if flow.left is None), None)

    def origin(self, call: _Call) -> Origin:
        """Name the call, with the largest finite gradient that came back to it."""
        sizes: list[float] = []
        for position, flow in self._flows.items():
            if not _is_within(flow.call, call):
                continue
            for which, size in enumerate(flow.arrived):
                edges = self._sources[position, which]
                outside = [e for e in edges if not _is_within(self._flows[e[0]].call, call)]
                if outside or not edges:
                    sizes += [size] if math.isfinite(size) else map(self._left, outside)
        finite = [size for size in sizes if math.isfinite(size)]
        return Origin(
            module=call.name, phase="backward", last_finite_max=max(finite, default=None)
        )

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

    def _around(self, edges: list[_Edge]) -> _Call | None:
        """Return the innermost call around all of these operators."""
        calls = [self._flows[position].call for position, _ in edges]
        if not calls or calls[0] is None:
            return None
        shared = (c for c in calls[0].around() if all(_is_within(other, c) for other in calls))
        return next(shared, None)


def _is_within(call: _Call | None, outer: _Call) -> bool:
    return call is not None and any(one is outer for one in call.around())
