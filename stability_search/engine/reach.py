"""Attention that the cap on its logits would not reach, found in one forward pass.

Hand-written attention is known by what it does: a product of two activations, a softmax of it,
and a product with that softmax. What happens to the values between (scale, mask, dropout, another
precision or shape) does not matter.
"""

import functools
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

_PRODUCTS = frozenset({"matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "mm", "einsum"})
_SOFTMAXES = frozenset({"softmax", "special_softmax", "_softmax"})
# What keeps logits logits and weights weights. Not tanh: whoever caps logits by hand is let be.
_KEEPERS = frozenset(
    {
        *("add", "sub", "mul", "div", "true_divide", "add_", "sub_", "mul_", "div_", "where"),
        *(
            "__add__",
            "__radd__",
            "__iadd__",
            "__sub__",
            "__isub__",
            "__mul__",
            "__rmul__",
            "__imul__",
        ),
        *("__truediv__", "__itruediv__", "masked_fill", "masked_fill_", "nan_to_num", "clamp"),
        *(
            "clamp_min",
            "dropout",
            "dropout_",
            "to",
            "type",
            "type_as",
            "float",
            "half",
            "bfloat16",
        ),
        *("double", "view", "reshape", "transpose", "permute", "movedim", "swapaxes", "unsqueeze"),
        *("squeeze", "contiguous", "clone", "expand", "flatten", "unflatten", "__getitem__"),
    }
)


class ReachWatch(TorchFunctionMode):
    """Notice, within this context, attention that was not capped.

    Args:
        fused: torch's own scaled_dot_product_attention. Within the context nobody should reach
            it: whoever does has imported it by name before it was replaced.
        count_capped: Says how many calls were capped so far.
        is_watching: Says whether what runs now is to be judged.
        inside: Modules whose attention is judged; empty for all.
    """

    def __init__(
        self,
        fused: Callable[..., Any],
        *,
        count_capped: Callable[[], int],
        is_watching: Callable[[], bool],
        inside: Collection[nn.Module] = (),
    ) -> None:
        super().__init__()
        self._fused = fused
        self._count_capped = count_capped
        self._is_watching = is_watching
        self._inside = set(inside)
        self._kinds = WeakTensorKeyDictionary()
        self.missed: tuple[nn.Module | None, str] | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 - torch's signature
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - torch's signature
        """Run the function, and follow what it returns."""
        num_before = self._count_capped()
        result = func(*args, **(kwargs or {}))
        if self.missed is not None or not self._is_watching():
            return result
        if func is self._fused:
            self._miss("calls scaled_dot_product_attention by a name imported before the engine")
        elif func is F.multi_head_attention_forward:
            if self._count_capped() == num_before:
                self._miss("takes a softmax of its own in multi_head_attention_forward")
        else:
            self._follow(_name_of(func), _tensors((args, kwargs)), result)
        return result

    def _follow(self, name: str, tensors: list[torch.Tensor], result: object) -> None:
        kinds = {self._kinds[tensor] for tensor in tensors if tensor in self._kinds}
        if name in _PRODUCTS:
            if "weights" in kinds:
                self._miss("takes a softmax of its own")
            elif not any(_is_parameter(tensor) for tensor in tensors):
                self._mark(result, "logits")
        elif not kinds:
            return
        elif name in _SOFTMAXES and "logits" in kinds:
            self._mark(result, "weights")
        elif name in _KEEPERS:
            self._mark(result, "weights" if "weights" in kinds else "logits")

    def _mark(self, result: object, kind: str) -> None:
        if isinstance(result, torch.Tensor):
            self._kinds[result] = kind

    def _miss(self, what: str) -> None:
        running = _running_modules()
        if not self._inside or self._inside.intersection(running):
            self.missed = (running[0] if running else None, what)


def _running_modules() -> list[nn.Module]:
    """Return the modules whose code is running, the innermost first."""
    found = []
    frame = sys._getframe()  # noqa: SLF001 - the stack, without the cost of inspect
    while frame is not None:
        found += [
            owner
            for name in ("self", "module")
            if isinstance(owner := frame.f_locals.get(name), nn.Module)
        ]
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _name_of(func: Callable[..., Any]) -> str:
    while isinstance(func, functools.partial) and func.args:
        func = func.args[0]  # a function that the engine replaced, found by torch under its name
    name: str = getattr(func, "__name__", "")
    return name


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _is_parameter(tensor: torch.Tensor) -> bool:
    # A weight, or a view of one: a linear layer written out makes no attention logits.
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)  # noqa: SLF001
