"""A study whose events also go to trackers."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stability_search.events import Listener

if TYPE_CHECKING:
    from stability_search.search.closing import Study


def tracked(
    study: Callable[[Listener], "Study"], names: Sequence[str]
) -> Callable[[Listener], "Study"]:
    """Return the study, logged to trackers as well.

    Args:
        study: Runs it, and tells a listener.
        names: Of `tensorboard`, `mlflow` and `wandb`; may be empty.

    Raises:
        UsageError: There is no such tracker, or what it needs is not installed.
    """
    if not names:
        return study
    from stability_search.trackers import tracking
    from stability_search.trackers.names import named_trackers

    chosen = named_trackers(names)

    def run(on_event: Listener) -> "Study":
        with tracking(chosen, on_event) as hear:
            return study(hear)

    return run
