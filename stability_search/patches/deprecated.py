"""`torch.cuda.amp` and `torch.cpu.amp`: the names go to `torch.amp`, without their warning.

The classes are `torch.amp`'s own with a warning around them. Only that is taken away, in place, so
that a name which was bound earlier is healed too.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from stability_search.patches.replacing import Replacements

_DEVICES = ("cuda", "cpu")


def patch_deprecated_names(replacements: Replacements) -> list[str]:
    """Take the warning from every deprecated name; return what was patched."""
    done = []
    for device in _DEVICES:
        module = getattr(torch, device).amp
        replacements.put(module.autocast, "__new__", staticmethod(_new))
        replacements.put(module.GradScaler, "__init__", _scaler_init(device))
        done += [
            f"torch.{device}.amp.{name} -> torch.amp.{name}" for name in ("autocast", "GradScaler")
        ]
    for name in ("custom_fwd", "custom_bwd"):
        original = getattr(torch.amp, name)
        replacement = functools.partial(original, device_type="cuda")
        functools.update_wrapper(replacement, original)
        for owner in (torch.cuda.amp, torch.cuda.amp.autocast_mode):
            replacements.put(owner, name, replacement)
        done.append(f"torch.cuda.amp.{name} -> torch.amp.{name}")
    return done


def _new(cls: type[Any], *_args: object, **_kwargs: object) -> Any:  # noqa: ANN401 - as object's
    return object.__new__(cls)


def _scaler_init(device: str) -> Callable[..., None]:
    def __init__(self: torch.amp.GradScaler, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401, N807 - stands in for it
        torch.amp.GradScaler.__init__(self, device, *args, **kwargs)

    return __init__
