"""Autocast and the loss scale of one precision.

The loss scale lives on the host: the engine knows at the window's end whether the gradients
overflowed, so the scale costs no transfer of its own, has a floor, and is never lowered by a
fault that it cannot have caused.
"""

import contextlib
import math

import torch

from stability_search.errors import UsageError
from stability_search.settings.engine import EngineSettings, Precision

GROWTH_FACTOR = 2.0  # torch.amp.GradScaler's defaults
BACKOFF_FACTOR = 0.5

_DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: Precision, device: torch.device) -> None:
    """Refuse a precision that the device only imitates.

    Raises:
        UsageError: bf16 on a GPU without it.
    """
    if (
        precision == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise UsageError(
            f"precision: {torch.cuda.get_device_name(device)} has no bf16.",
            hint="Use fp32 or fp16, or leave bf16 out of the choices.",
        )


def autocast(
    precision: Precision, device: torch.device
) -> contextlib.AbstractContextManager[None]:
    """Return the autocast context of a forward pass; fp32 turns an outer one off."""
    if precision == "fp32":
        is_on = torch.is_autocast_enabled(device.type)
        return torch.autocast(device.type, enabled=False) if is_on else contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[precision])


class LossScale:
    """The factor on an fp16 loss: halved by an overflow, doubled after calm steps.

    Args:
        settings: Its `init_scale`, `growth_interval` and `max_scale` are used.

    Raises:
        UsageError: `init_scale` lies above `max_scale`.

    Source:
        torch.amp.GradScaler, whose growth and backoff factors these are. Unlike it, the scale
        never grows past the largest float32, and the engine ends at a scale below 1.
    """

    def __init__(self, settings: EngineSettings) -> None:
        limit = settings.max_scale if settings.max_scale is not None else math.inf
        if settings.init_scale > limit:
            raise UsageError(
                f"init_scale: init_scale <= max_scale must hold, but got {settings.init_scale:g} "
                f"and {limit:g}.",
                hint="Lower init_scale or raise max_scale.",
            )
        self.value = settings.init_scale
        self._growth_interval = settings.growth_interval
        self._limit = min(limit, torch.finfo(torch.float32).max)
        self._num_calm_steps = 0

    def overflowed(self) -> None:
        """Halve the scale after gradients were NaN or Inf."""
        self.value *= BACKOFF_FACTOR
        self._num_calm_steps = 0

    def worked(self) -> bool:
        """Count a step with finite gradients; return True if the scale rose."""
        self._num_calm_steps += 1
        if self._num_calm_steps < self._growth_interval:
            return False
        self._num_calm_steps = 0
        if self.value * GROWTH_FACTOR > self._limit:
            return False
        self.value *= GROWTH_FACTOR
        return True

    def state_dict(self) -> dict[str, float]:
        """Return what `load_state_dict` needs."""
        return {"value": self.value, "num_calm_steps": float(self._num_calm_steps)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from what `state_dict` returned."""
        self.value = min(state["value"], self._limit)
        self._num_calm_steps = int(state["num_calm_steps"])
