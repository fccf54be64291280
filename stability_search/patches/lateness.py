"""What was made or bound before the patches, and is therefore as it was."""

import gc
import sys
from collections.abc import Iterable

import torch

from stability_search.patches.messages import Level, Messages

_LINE = "import stability_search.instrument"


def say_what_is_late(
    messages: Messages, originals: Iterable[tuple[str, object]], *, observe: bool
) -> None:
    """Name every scaler that exists and every replaced name that somebody has bound.

    Args:
        messages: Where to.
        originals: Name and former value of what was replaced in modules.
        observe: True if no scaler is given other values anyway.
    """
    late = [] if observe else _scalers()
    late += _bound_names({id(value): name for name, value in originals})
    if not late:
        return
    for fact in late:
        messages.say(Level.WARNING, f"patched too late: {fact}")
    main = getattr(sys.modules.get("__main__"), "__file__", None) or "the script"
    messages.say(
        Level.WARNING,
        f"the line `{_LINE}` must be the first of {main}, before the script's own imports; or "
        "leave it out and run `stability-search instrument -- python ...`",
    )


def _scalers() -> list[str]:
    kinds = {torch.amp.GradScaler, *torch.amp.GradScaler.__subclasses__()}
    found = [thing for thing in gc.get_objects() if type(thing) in kinds]
    return [
        f"a GradScaler exists already (init_scale {scaler.get_scale():g}, growth_interval "
        f"{scaler.get_growth_interval()}) and keeps these values"
        for scaler in found
        if scaler.is_enabled()
    ]


def _bound_names(names: dict[int, str]) -> list[str]:
    found = []
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] in ("torch", "stability_search", "__mp_main__"):
            continue
        values = getattr(module, "__dict__", None)
        for bound, value in list(values.items()) if isinstance(values, dict) else ():
            name = names.get(id(value))
            if name is not None:
                file = getattr(module, "__file__", None) or module_name
                found.append(f"{file} has bound {name} as {bound}, which stays PyTorch's own")
    return found
