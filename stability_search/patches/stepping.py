"""Optimizer steps: judged by PyTorch's global hooks, and skipped where they must not be taken.

A hook cannot keep a step from being called. But an optimizer leaves alone what has no gradient,
parameters and state alike; so a bad step finds none, and the gradients are back when it is over.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from stability_search.patches.messages import Level
from stability_search.patches.monitor import Monitor, Verdict

_Hidden = list[tuple[torch.Tensor, torch.Tensor]]


class Stepping:
    """The two hooks around every optimizer step.

    Args:
        monitor: Judges the steps.
        is_scaled: Says whether the gradients of an optimizer still carry the loss scale.
        on_verdict: Hears of every step that was judged here, not by a scaler.
    """

    def __init__(
        self,
        monitor: Monitor,
        *,
        is_scaled: Callable[[torch.optim.Optimizer], bool],
        on_verdict: Callable[[torch.optim.Optimizer, Verdict], None],
    ) -> None:
        self._monitor = monitor
        self._is_scaled = is_scaled
        self._on_verdict = on_verdict
        self._hidden: dict[int, _Hidden] = {}
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
        self._hidden.pop(key, None)  # a step that raised never came back for them
        with self._monitor.messages.survives("check before a step"):
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
        for parameter, gradient in self._hidden.pop(id(optimizer), ()):
            if parameter.grad is None:
                parameter.grad = gradient

    def _judge(self, optimizer: torch.optim.Optimizer) -> None:
        verdict = self._monitor.judge(optimizer, is_scaled=self._is_scaled(optimizer))
        if verdict is not None:
            self._on_verdict(optimizer, verdict)
        self._act_on(optimizer, verdict)

    def _act_on(self, optimizer: torch.optim.Optimizer, verdict: Verdict | None) -> None:
        if verdict is not None and verdict.is_skipped:
            self._hide(optimizer)

    def _hide(self, optimizer: torch.optim.Optimizer) -> None:
        hidden = self._hidden.setdefault(id(optimizer), [])
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    hidden.append((parameter, parameter.grad))
                    parameter.grad = None

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
        reading = window.read(optimizer, is_scaled=self._is_scaled(optimizer))
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


def _is_captured() -> bool:
    """Return True while a CUDA graph is recorded, in which nothing may reach the host."""
    is_used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return is_used and torch.cuda.is_current_stream_capturing()
