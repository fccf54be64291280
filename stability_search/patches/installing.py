"""Puts the patches in and takes them back.

PyTorch's official global hooks come first (optimizer steps); names are replaced only where it has
none: `GradScaler`, clipping, the start of a backward pass, data loaders, deprecated names.
"""

import atexit
import functools
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stability_search.patches.clipping import Clipping
from stability_search.patches.deprecated import patch_deprecated_names
from stability_search.patches.lateness import say_what_is_late
from stability_search.patches.loading import patch_loaders
from stability_search.patches.messages import Level, Messages, rank_of_process
from stability_search.patches.monitor import Monitor
from stability_search.patches.replacing import Replacements
from stability_search.patches.scaling import Scaling
from stability_search.patches.settings import PatchSettings
from stability_search.patches.stepping import Stepping


@dataclass(kw_only=True, slots=True)
class _Installed:
    """What is in this process."""

    settings: PatchSettings
    messages: Messages
    monitor: Monitor
    replacements: Replacements
    removers: list[Callable[[], None]] = field(default_factory=list)
    patched: tuple[str, ...] = ()


class _Process:
    """Holds what is installed; one at a time."""

    installed: _Installed | None = None


def put_in(settings: PatchSettings, *, is_quiet: bool) -> tuple[str, ...]:
    """Put the patches in; see `stability_search.patches.install`."""
    present = _Process.installed
    if present is not None:
        if present.settings != settings:
            text = "the patches are in already, with other settings, which stay: uninstall() first"
            present.messages.say(Level.WARNING, text)
        return present.patched
    # A process of a data loader imports the script too, and never trains.
    is_child = multiprocessing.current_process().name != "MainProcess"
    messages = Messages(is_quiet=is_quiet or is_child, rank=rank_of_process())
    monitor = Monitor(settings, messages)
    installed = _Installed(
        settings=settings, messages=messages, monitor=monitor, replacements=Replacements()
    )
    _Process.installed = installed
    installed.patched = _put_all_in(installed)
    mode = "watching, nothing is changed" if settings.observe else "patched"
    for what in installed.patched:
        messages.say(Level.INFO, f"{mode}: {what}")
    say_what_is_late(messages, installed.replacements.originals(), observe=settings.observe)
    atexit.register(_say_summary)
    return installed.patched


def take_out() -> None:
    """Take the patches back; see `stability_search.patches.uninstall`."""
    installed, _Process.installed = _Process.installed, None
    if installed is None:
        return
    atexit.unregister(_say_summary)
    for remove in installed.removers:
        remove()
    for name in installed.replacements.undo():
        text = f"{name} was replaced by somebody else since, and is left to them"
        installed.messages.say(Level.WARNING, text)


def _put_all_in(installed: _Installed) -> tuple[str, ...]:
    """Put every patch in; return what was done, an entry for each."""
    settings, monitor = installed.settings, installed.monitor
    replacements = installed.replacements
    scaling = Scaling(monitor)
    stepping = Stepping(monitor, scaling_of=scaling.scaling_of, on_verdict=scaling.was_judged)
    done = [] if settings.observe else patch_deprecated_names(replacements)
    scaling.put_in(replacements, stepping)
    high = "no upper limit" if settings.max_scale is None else f"at most {settings.max_scale:g}"
    done.append(
        f"GradScaler: init_scale {settings.first_scale:g}, growth_interval {settings.interval}, "
        f"never below {settings.min_scale:g}, {high}"
        if not settings.observe
        else "GradScaler: its loss scale"
    )
    installed.removers += stepping.put_in()
    if not settings.observe:
        installed.removers.append(monitor.statistics.put_in())
    deed = "counted" if settings.observe else "skipped and counted"
    done.append(f"optimizer steps: NaN and Inf in loss or gradient are {deed}")
    Clipping(monitor, scaling.scale_of).put_in(replacements)
    done.append(
        "clip_grad_norm_ and clip_grad_value_: "
        + ("the norm they find" if settings.observe else "unscaled gradients, finite norm")
    )
    _patch_backward(monitor, replacements)
    patch_loaders(
        monitor.data,
        monitor.messages,
        replacements,
        on_epoch=monitor.epoch_ended,
        on_batch=monitor.batch_arrived,
    )
    done.append("DataLoader: batches and epochs are counted")
    if settings.anomaly:
        installed.removers.append(_turn_anomaly_mode_on())
        done.append("anomaly mode: it names the operation that gives NaN; about 30 % slower")
    return tuple(done)


def _patch_backward(monitor: Monitor, replacements: Replacements) -> None:
    """Let every backward pass tell its loss; anomaly mode must not end the training."""
    original = torch.autograd.backward

    @functools.wraps(original)
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as PyTorch's
        if torch.compiler.is_compiling() or monitor.window.is_in_backward:
            original(tensors, *args, **kwargs)
            return
        if not isinstance(tensors, Sequence | torch.Tensor):
            tensors = tuple(tensors)  # a generator can be read only once, and PyTorch reads it
        window = monitor.window
        with monitor.messages.survives("loss of a backward pass"):
            for loss in (tensors,) if isinstance(tensors, torch.Tensor) else tensors:
                window.add_loss(loss)
        window.is_in_backward = True
        try:
            original(tensors, *args, **kwargs)
        except RuntimeError as error:
            if monitor.settings.observe or "returned nan values" not in str(error):
                raise
            monitor.backward_was_aborted(error)
        finally:
            window.is_in_backward = False

    replacements.put(torch.autograd, "backward", backward)


def _turn_anomaly_mode_on() -> Callable[[], None]:
    was_on, checked = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    torch.autograd.set_detect_anomaly(True)

    def put_back() -> None:
        torch.autograd.set_detect_anomaly(was_on, checked)

    return put_back


def _say_summary() -> None:
    """Say at the end of the process how the run went."""
    installed = _Process.installed
    if installed is not None:
        for line in installed.monitor.summary():
            installed.messages.say(Level.INFO, line)
