"""Optimizer steps: judged by PyTorch's global hooks, and skipped where they must not be taken.

A hook cannot keep a step from being called. But an optimizer leaves alone what has no gradient,
parameters and state alike; so a bad step finds none, and where it goes through its parameters
without asking for gradients it finds no parameter either. Both are back when it is over.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from stability_search.patches.messages import Level
from stability_search.patches.monitor import Monitor, Verdict
from stability_search.patches.window import LossScaling


class _Unseen(list[torch.Tensor]):
    """Parameters of a group that a loop does not find; `group["params"][0]` is still there."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Return no parameter."""
        return iter(())


@dataclass(kw_only=True, slots=True)
class _Hidden:
    """What an optimizer does not find while it takes a bad step.

    Attributes:
        gradients: Each with its parameter.
        groups: Each with its parameters.
        numbers: Each table of groups and state, with the plain numbers in it: counters.
    """

    gradients: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    groups: list[tuple[dict[str, Any], list[torch.Tensor]]] = field(default_factory=list)
    numbers: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)

    def fill_groups(self) -> None:
        """Put the parameters back into their groups."""
        for group, parameters in self.groups:
            group["params"] = parameters
        self.groups.clear()

    def put_back(self) -> None:
        """Put everything back; a gradient that was made since stays."""
        self.fill_groups()
        for table, numbers in self.numbers:
            table.update(numbers)
        for parameter, gradient in self.gradients:
            if parameter.grad is None:
                parameter.grad = gradient


@dataclass(frozen=True, kw_only=True, slots=True)
class _Running:
    """A step that has begun.

    Attributes:
        optimizer: Whose it is.
        parameters: Ids of its parameters.
        frame: Where PyTorch calls it; gone from the stack where the step has raised.
    """

    optimizer: torch.optim.Optimizer
    parameters: frozenset[int]
    frame: FrameType | None


class _Steps(threading.local):
    """The steps that have begun in a thread, one inside another."""

    def __init__(self) -> None:
        self.running: list[_Running] = []


class Stepping:
    """The two hooks around every optimizer step.

    Args:
        monitor: Judges the steps.
        scaling_of: Says which loss scaling an optimizer has.
        on_verdict: Hears of every step that was judged here, not by a scaler.
    """

    def __init__(
        self,
        monitor: Monitor,
        *,
        scaling_of: Callable[[torch.optim.Optimizer], LossScaling | None],
        on_verdict: Callable[[torch.optim.Optimizer, Verdict], None],
    ) -> None:
        self._monitor = monitor
        self._scaling_of = scaling_of
        self._on_verdict = on_verdict
        self._hidden: dict[int, _Hidden] = {}
        self._steps = _Steps()
        self._judged: dict[int, Verdict | None] = {}

    def put_in(self) -> list[Callable[[], None]]:
        """Register the hooks; return what removes them."""
        before = register_optimizer_step_pre_hook(self._before)
        after = register_optimizer_step_post_hook(self._after)
        return [before.remove, after.remove]

    def was_judged(self, optimizer: torch.optim.Optimizer, verdict: Verdict | None) -> None:
        """Say that the next step of this optimizer has its verdict: it is not judged again."""
        self._judged[id(optimizer)] = verdict

    def forget(self, optimizer: torch.optim.Optimizer) -> None:
        """Take that back."""
        self._judged.pop(id(optimizer), None)

    def _before(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if torch.compiler.is_compiling() or _is_captured():
            return None
        key = id(optimizer)
        left = self._hidden.pop(key, None)
        if left is not None:  # a step that raised never came back for them
            left.fill_groups()
        with self._monitor.messages.survives("check before a step"):
            outer = self._begin(optimizer, sys._getframe(1))  # noqa: SLF001 - who calls
            if outer is not None:
                if id(outer) in self._hidden:
                    self._hide(optimizer)
                return None
            if key in self._judged:
                self._act_on(optimizer, self._judged[key])
                return None
            changed = self._with_checked_closure(optimizer, args, kwargs)
            if changed is not None:
                return changed
            self._judge(optimizer)
        return None

    def _after(
        self, optimizer: torch.optim.Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]
    ) -> None:
        running = self._steps.running
        if running and running[-1].optimizer is optimizer:
            running.pop()
        hidden = self._hidden.pop(id(optimizer), None)
        if hidden is not None:
            hidden.put_back()

    def _begin(
        self, optimizer: torch.optim.Optimizer, frame: FrameType
    ) -> torch.optim.Optimizer | None:
        """Note that a step begins; return the one around it that holds the same parameters."""
        running, outer = self._steps.running, None
        parameters = frozenset(id(p) for group in optimizer.param_groups for p in group["params"])
        if running:
            frames = set(map(id, _frames_from(frame)))
            running[:] = [one for one in running if id(one.frame) in frames]
            outer = next((one for one in running if one.parameters & parameters), None)
        running.append(_Running(optimizer=optimizer, parameters=parameters, frame=frame))
        return None if outer is None else outer.optimizer

    def _judge(self, optimizer: torch.optim.Optimizer) -> None:
        verdict = self._monitor.judge(optimizer, self._scaling_of(optimizer))
        if verdict is not None:
            self._on_verdict(optimizer, verdict)
        self._act_on(optimizer, verdict)

    def _act_on(self, optimizer: torch.optim.Optimizer, verdict: Verdict | None) -> None:
        if verdict is not None and verdict.is_skipped:
            tables = [*optimizer.param_groups, *optimizer.state.values()]
            numbers = [(table, _numbers(table)) for table in tables if isinstance(table, dict)]
            self._hide(optimizer).numbers = numbers

    def _hide(self, optimizer: torch.optim.Optimizer) -> _Hidden:
        hidden = self._hidden.setdefault(id(optimizer), _Hidden())
        for group in optimizer.param_groups:
            parameters = group["params"]
            for parameter in parameters:
                if parameter.grad is not None:
                    hidden.gradients.append((parameter, parameter.grad))
                    parameter.grad = None
            if not isinstance(parameters, _Unseen):
                hidden.groups.append((group, parameters))
                group["params"] = _Unseen(parameters)
        return hidden

    def _with_checked_closure(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Let a closure judge the gradients that it makes; None if there is no closure."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            return None
        num_calls = 0

        @functools.wraps(closure, updated=())
        def checked(*words: Any, **named: Any) -> Any:  # noqa: ANN401 - the script's own closure
            nonlocal num_calls
            hidden = self._hidden.get(id(optimizer))
            if hidden is not None:
                hidden.fill_groups()  # it may set their gradients to zero
            loss = closure(*words, **named)
            num_calls += 1
            with self._monitor.messages.survives("check after a closure"):
                if num_calls == 1:
                    self._judge(optimizer)
                else:
                    self._check_again(optimizer, num_calls)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": checked}
        return (args[0], checked, *args[2:]), kwargs

    def _check_again(self, optimizer: torch.optim.Optimizer, num_calls: int) -> None:
        """Check a further evaluation of the same step, as L-BFGS asks for them."""
        window = self._monitor.window
        reading = window.read(optimizer, self._scaling_of(optimizer))
        window.close()
        if reading is None or reading.grad_norm is None or reading.grad_norm < float("inf"):
            return
        self._monitor.messages.once(
            "closure",
            Level.WARNING,
            f"evaluation {num_calls} of one step gave a gradient of NaN or Inf: the step ends "
            "there, at the point it has reached",
        )
        if not self._monitor.settings.observe:
            self._hide(optimizer)


def _frames_from(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _numbers(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if type(value) in (int, float)}


def _is_captured() -> bool:
    """Return True while a CUDA graph is recorded, in which nothing may reach the host."""
    is_used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return is_used and torch.cuda.is_current_stream_capturing()
