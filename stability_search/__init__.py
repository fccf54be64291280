"""Finds the most stable training configuration that still learns.

The names below are loaded when first used, so that `import stability_search` stays cheap:

    GuardedEngine   takes one optimizer step safely
    EngineSettings  how it takes it
    AlarmWatch      says which of its steps are worth a warning
    AlarmSettings   beyond which values
    run             runs a study
    read_run        reads a finished run into tables
    cap_logits      opts a custom attention into `attention_logit_cap`
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers see the real names; at run time `__getattr__` loads them
    from stability_search.alarms.watch import AlarmWatch
    from stability_search.engine import GuardedEngine, cap_logits
    from stability_search.run_tables import read_run
    from stability_search.search.study import run
    from stability_search.settings.alarms import AlarmSettings
    from stability_search.settings.engine import EngineSettings

__version__ = "0.1.0"

__all__ = [
    "AlarmSettings",
    "AlarmWatch",
    "EngineSettings",
    "GuardedEngine",
    "__version__",
    "cap_logits",
    "read_run",
    "run",
]

_HOMES = {
    "AlarmSettings": "stability_search.settings.alarms",
    "AlarmWatch": "stability_search.alarms.watch",
    "EngineSettings": "stability_search.settings.engine",
    "GuardedEngine": "stability_search.engine",
    "cap_logits": "stability_search.engine",
    "read_run": "stability_search.run_tables",
    "run": "stability_search.search.study",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - each name has a type of its own
    """Load a public name on first use.

    Raises:
        AttributeError: The package has no such name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
