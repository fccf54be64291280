"""Parts of a model, found by the names that a user gave."""

import difflib
from collections.abc import Sequence

from torch import nn

from stability_search.errors import UsageError

_NUM_SHOWN = 12


def require_module(owner: str, model: nn.Module, name: str) -> nn.Module:
    """Return a module of the model by its name in `named_modules`.

    Raises:
        UsageError: There is none.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    require_name(f"{owner}: module", "a module of the model", name, [n for n in modules if n])
    return modules[name]


def require_parameter(owner: str, model: nn.Module, name: str) -> nn.Parameter:
    """Return a parameter of the model by its name in `named_parameters`.

    Raises:
        UsageError: There is none.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    require_name(f"{owner}: parameter", "a parameter of the model", name, list(parameters))
    return parameters[name]


def require_name(what: str, kind: str, name: str, known: Sequence[str]) -> None:
    """Refuse a name that is none of the known ones.

    Raises:
        UsageError: With the closest known name, or some of them.
    """
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=1)
    shown = ", ".join(f"`{each}`" for each in known[:_NUM_SHOWN])
    more = ", ..." if len(known) > _NUM_SHOWN else ""
    raise UsageError(
        f"{what} must name {kind}, but got {name!r}.",
        hint=f"Did you mean `{close[0]}`?" if close else f"There are {shown}{more}.",
    )
