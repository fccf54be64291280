"""The curves of a long training as one picture: loss, gradient norm, metrics, learning rate."""

import io
import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stability_search.inert import plain
from stability_search.training.history import History
from stability_search.training.state import Phase

_WIDTH, _PANEL_HEIGHT = 9.0, 2.3  # inches
_DPI = 100
_LOG_SPAN = 30.0  # values that differ by more are drawn on a log axis
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # told apart by every eye
_RED, _GREY = "#c00000", "#707070"
_NUM_LABEL_ROWS = 3  # so that neighbours do not cover each other
_MAX_CHANGES = 2  # named on a phase's line; the rest is counted


def draw(title: str, history: History, phases: Sequence[Phase]) -> bytes:
    """Draw the curves.

    Args:
        title: Stands on top.
        history: At least one epoch.
        phases: Each but the first is a line with what it changed.

    Returns:
        A PNG.
    """
    points = history.epochs
    metrics = list(dict.fromkeys(name for point in points for name in point.metrics))
    num_panels = 4 if metrics else 3
    figure = Figure(figsize=(_WIDTH, _PANEL_HEIGHT * num_panels), dpi=_DPI, layout="constrained")
    panels: list[Axes] = list(figure.subplots(num_panels, 1, sharex=True))
    figure.suptitle(_plain(title), fontsize=11)

    steps = [point.step for point in points]
    loss, norm, *others = panels
    of_loss = {
        "training loss, epoch mean": [point.loss for point in points],
        "probe loss": [point.probe_loss for point in points],
    }
    _fill(loss, "loss", steps, of_loss)
    of_norm = {"epoch mean, before clipping": [point.grad_norm for point in points]}
    _fill(norm, "gradient norm", steps, of_norm)
    if metrics:
        of_metrics = {name: [point.metrics.get(name) for point in points] for name in metrics}
        _fill(others[0], "metrics on the probe", steps, of_metrics)
    of_rate = {"at the epoch's end": [point.learning_rate for point in points]}
    _fill(others[-1], "learning rate", steps, of_rate)
    others[-1].set_xlabel("optimizer step")
    _mark_bad(loss, history.bad_steps)
    for row, phase in enumerate(_on_this_path(phases)):
        _mark_phase(panels, phase, row=row % _NUM_LABEL_ROWS)

    target = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(target, format="png")
    return target.getvalue()


def _fill(
    panel: Axes, name: str, steps: Sequence[int], curves: Mapping[str, Sequence[float | None]]
) -> None:
    """Draw curves by their names, each broken where a value is not finite."""
    finite = [value for values in curves.values() for value in values if value is not None]
    for number, (label, values) in enumerate(curves.items()):
        panel.plot(
            steps,
            [math.nan if value is None else value for value in values],
            marker=".",
            markersize=4,
            linewidth=1.4,
            color=_COLOURS[number % len(_COLOURS)],
            label=_plain(label),
        )
    panel.set_ylabel(name)
    panel.grid(visible=True, alpha=0.3)
    if not finite:
        panel.text(0.5, 0.5, "no finite value", transform=panel.transAxes, ha="center")
        return
    if 0 < min(finite) < max(finite) / _LOG_SPAN:
        panel.set_yscale("log")
    panel.legend(loc="best", fontsize=8, frameon=False)


def _mark_bad(panel: Axes, steps: Sequence[int]) -> None:
    """Put a tick at the top of the panel for each bad step."""
    if not steps:
        return
    panel.plot(
        list(steps), [1.0] * len(steps), marker=3, linestyle="none", color=_RED, markersize=8,
        transform=panel.get_xaxis_transform(), clip_on=False, label=f"bad steps ({len(steps)})",
    )  # fmt: skip
    panel.legend(loc="best", fontsize=8, frameon=False)


def _on_this_path(phases: Sequence[Phase]) -> list[Phase]:
    """Return the phases after the first whose steps were not given up for an earlier one."""
    return [
        phase
        for index, phase in enumerate(phases)
        if index and all(later.first_step > phase.first_step for later in phases[index + 1 :])
    ]


def _mark_phase(panels: Sequence[Axes], phase: Phase, *, row: int) -> None:
    for panel in panels:
        panel.axvline(phase.first_step - 0.5, color=_GREY, linestyle="--", linewidth=1)
    low, high = panels[0].get_xlim()
    is_right = phase.first_step > (low + high) / 2  # the label would leave the picture
    panels[0].annotate(
        _plain(f"phase {phase.number}: {_changed(phase.changes)}"),
        (phase.first_step - 0.5, 0.98),
        xycoords=panels[0].get_xaxis_transform(),
        xytext=(-4 if is_right else 4, -12 * row),
        ha="right" if is_right else "left",
        textcoords="offset points",
        fontsize=8,
        color=_GREY,
        va="top",
    )


def _changed(changes: Mapping[str, tuple[str, str]]) -> str:
    words = [f"{name.removeprefix('fixed.')} {now}" for name, (_, now) in changes.items()]
    more = f" and {len(words) - _MAX_CHANGES} more" if len(words) > _MAX_CHANGES else ""
    return ", ".join(words[:_MAX_CHANGES]) + more


def _plain(text: str) -> str:
    """Keep matplotlib from reading mathematics into a name, or hiding one that starts with _."""
    return plain(text).replace("$", r"\$").lstrip("_")
