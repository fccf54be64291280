"""The guards inside a training script that nobody edited; every patch can be taken back.

settings    every value, from the environment, arguments or Python
installing  puts the patches in and takes them back
replacing   names replaced, and put back
messages    what is said on standard error, and what happens when one of our own hooks fails
monitor     judges each step: one reading, one label, one line
window      what was seen since the last step, brought to the host in one transfer
course      what one optimizer has been through: steps, labels, alarms
stepping    optimizer steps: a bad one is skipped
scaling     `GradScaler`: safe values, a floor, loops that would crash
safe_values those values, and where a loss scale may go
clipping    gradient clipping: unscaled gradients, finite norm
loading     data loaders: batches and epochs
statistics  running statistics of BatchNorm: put back after NaN
deprecated  `torch.cuda.amp` names without their warning
lateness    what was made or bound before the patches
startup     puts them into every Python process of a command
"""

from stability_search.patches.settings import PatchSettings

__all__ = ["PatchSettings", "install", "uninstall"]


def install(settings: PatchSettings | None = None, *, is_quiet: bool = False) -> tuple[str, ...]:
    """Put the guards into PyTorch, for the training script of this process.

    A second call changes nothing, and says so if it asks for other settings.

    Args:
        settings: How; None reads them from the environment (`STABILITY_SEARCH_...`).
        is_quiet: True keeps every message back until the process takes a training step, for
            processes that may never do.

    Returns:
        What is patched, one entry each.

    Raises:
        UsageError: A variable of the environment cannot be honoured; all of them are listed.
    """
    chosen = PatchSettings.from_environment() if settings is None else settings
    from stability_search.patches.installing import put_in

    return put_in(chosen, is_quiet=is_quiet)


def uninstall() -> None:
    """Take every patch back: each name is what it was before; nothing if none is in."""
    from stability_search.patches.installing import take_out

    take_out()
