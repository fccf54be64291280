"""The calls of a model's modules: what went into each, and what came out.

Every call is watched from outside, by hooks that change nothing. They keep 0-d values on the
device, which are read after the pass.
"""

import bisect
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from torch.autograd.graph import Node

from stability_search.engine import batches
from stability_search.engine.losses import NUMERICAL_ERRORS


class Extent(NamedTuple):
    """Lowest, highest and largest finite absolute value of a tensor, 0-d, on its device."""

    lowest: torch.Tensor
    highest: torch.Tensor
    size: torch.Tensor


@dataclass(kw_only=True, slots=True, eq=False)
class Call:
    """One call of a module, and the operators made in it by their sequence numbers.

    Some -Inf is no offence, since an additive mask is full of it, unless it comes out of weights.
    """

    name: str
    outer: "Call | None"
    has_weights: bool
    inputs: list[Extent]
    first_node: int
    end_node: int | None = None
    outputs: list[Extent] = field(default_factory=list)
    has_raised: bool = False

    def is_broken(self, extents: list[Extent]) -> bool:
        """Return True if its inputs or outputs are an offence."""
        return any(
            not math.isfinite(extent.highest.item())
            or (self.has_weights and not math.isfinite(extent.lowest.item()))
            for extent in extents
        )

    def around(self) -> "Iterator[Call]":
        """Yield this call and those it was made in, innermost first."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.outer


class Calls:
    """Record every call of the model's modules within a context."""

    def __init__(self, model: nn.Module) -> None:
        self.opened: list[Call] = []
        self.closed: list[Call] = []
        self._names = {m: name or type(model).__name__ for name, m in model.named_modules()}
        self._open: list[tuple[nn.Module, Call]] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        """Begin to watch."""
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
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._names, self._open, self._hooks = {}, [], []

    def has_broken_output(self) -> bool:
        """Return True if what the model returned is NaN or Inf, or nothing but -Inf."""
        returned = [e for call in self.closed if call.outer is None for e in call.outputs]
        return any(not math.isfinite(extent.highest.item()) for extent in returned)

    def maker(self, node: Node) -> Call | None:
        """Return the innermost call that an operator was made in; None outside of all."""
        number: int = node._sequence_nr()  # noqa: SLF001 - no public way
        num_before = bisect.bisect_right(self.opened, number, key=lambda call: call.first_node)
        around = self.opened[num_before - 1].around() if num_before else iter(())
        return next((c for c in around if c.end_node is None or number < c.end_node), None)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ANN401
        call = Call(
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


def _extents(nest: Any) -> list[Extent]:  # noqa: ANN401 - any argument
    found = []
    for _, tensor in batches.tensors(nest):
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # noqa: SLF001 - no public way
            continue  # its values do not outlive the transform
        values = stored_values(tensor)
        if values.is_floating_point() and values.numel():
            finite = torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
            found.append(Extent(values.amin(), values.amax(), largest(finite)))
    return found


def stored_values(tensor: torch.Tensor) -> torch.Tensor:
    """Return the stored numbers of any tensor as a strided real one."""
    values = tensor.detach()
    if values.layout is torch.sparse_coo:
        values = values.coalesce()
    if values.layout is not torch.strided:
        values = values.values()
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values


def largest(values: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value, 0-d."""
    # NaN where a value is. The norm of order infinity takes many times as long on a CPU.
    return torch.maximum(values.amax(), -values.amin())
