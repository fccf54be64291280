"""Functions of ours in the place of torch's attention and softmax, for a while."""

import functools
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

Function = Callable[..., torch.Tensor]
Functions = tuple[Function, Function]  # fused attention, and softmax
_Guard = TypeVar("_Guard")
_turn = threading.RLock()


class Reach(Generic[_Guard]):
    """Put functions in the place of torch's while a `with` block runs; blocks may be nested.

    Written out, since it is entered in every step: a generator for each part costs more than it.
    The functions are the process's, so engines of several threads take their steps in turn.

    Args:
        acting: Where the guard stands, as the last, while the block runs.
        guard: That guard; None for none.
        replace: Turns the functions found into those that stand for them.
    """

    def __init__(
        self,
        acting: list[_Guard | None],
        guard: _Guard | None,
        replace: Callable[[Functions], Functions],
    ) -> None:
        self._acting = acting
        self._guard = guard
        self._replace = replace
        self._found: Functions | None = None
        self._stand_ins: Functions | None = None
        self._before: list[tuple[Functions, bool]] = []

    def __enter__(self) -> None:
        """Put them there, once no other thread has any."""
        _turn.acquire()
        found = F.scaled_dot_product_attention, F.softmax
        if self._stand_ins is None or found != self._found:
            self._found, self._stand_ins = found, self._replace(found)
        # In eval mode nn.TransformerEncoder would pass its attention modules by, and give zeros
        # where a sequence is padded; a probe must not depend on whether attention is capped.
        self._before.append((found, torch.backends.mha.get_fastpath_enabled()))
        torch.backends.mha.set_fastpath_enabled(False)
        self._acting.append(self._guard)
        F.scaled_dot_product_attention, F.softmax = self._stand_ins

    def __exit__(self, *_: object) -> None:
        """Give back what was found."""
        found, was_enabled = self._before.pop()
        F.scaled_dot_product_attention, F.softmax = found
        self._acting.pop()
        torch.backends.mha.set_fastpath_enabled(was_enabled)
        _turn.release()


def in_place_of(function: Function, ours: Function) -> Function:
    """Return `ours`, called with the function of torch's that it stands for, then the arguments.

    Args:
        function: torch's, or what stands for it already.
        ours: Takes torch's own function first.
    """
    torchs = plain_one(function)
    standing_in = functools.partial(ours, torchs)
    functools.update_wrapper(standing_in, torchs)  # torch.compile asks for names
    return standing_in


def plain(found: Functions) -> Functions:
    """Return torch's own functions, whatever stands for them."""
    return plain_one(found[0]), plain_one(found[1])


def plain_one(function: Function) -> Function:
    """Return torch's own function, whatever stands for it."""
    while isinstance(function, functools.partial) and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function
