"""Where a non-finite value first appeared: one more pass over a micro-batch, under hooks."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from stability_search.engine.calls import Call, Calls
from stability_search.engine.gradient_flow import Graph, Sizes, Trail, on_host, sizes_of
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
    calls = Calls(model)
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
    calls = Calls(model)
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


def _forward_origin(calls: Calls, *, is_loss_broken: bool, is_numerical: bool) -> Origin:
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


def _backward_origin(calls: Calls, loss: torch.Tensor, leaves: list[torch.Tensor]) -> Origin:
    graph = Graph(calls, loss)
    sizes: Sizes = []
    has_raised, is_numerical = False, False
    try:
        with graph:
            sizes = sizes_of(torch.autograd.grad(loss, leaves, allow_unused=True))
    except Exception as error:  # noqa: BLE001 - the fault itself, as above
        has_raised, is_numerical = True, isinstance(error, NUMERICAL_ERRORS)
    pairs = zip(leaves, on_host(sizes), strict=False)  # no sizes where it raised
    broken = {graph.leaves[id(leaf)] for leaf, size in pairs if not math.isfinite(size)}
    if not broken and not has_raised:
        return Origin()
    trail = Trail(graph)
    for call in trail.breaks(broken):
        if call is not None:
            return _within(call, trail)
        value = abs(loss.item())
        return Origin(phase="loss", last_finite_max=value if math.isfinite(value) else None)
    call = trail.unfinished() if is_numerical else None
    if call is None:
        return Origin(phase="backward", is_known=is_numerical)
    return _within(call, trail)


def _within(call: Call, trail: Trail) -> Origin:
    last = trail.largest_into(call)
    return Origin(module=call.name, phase="backward", last_finite_max=last)
