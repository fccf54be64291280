"""`run --dry-run`: what would be done, in words."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stability_search.cli.lines import counted, duration, setting_words
from stability_search.cli.outlets import message_sink
from stability_search.cli.printing import print_data, short_path
from stability_search.inert import inert
from stability_search.records.values import Json

if TYPE_CHECKING:
    from stability_search.search.dry_run import Outlook
    from stability_search.search.timing import Timing
    from stability_search.space import Space

_KIB, _MIB = 2**10, 2**20
_NUM_NAMED = 5
_NUM_TIMED = "three steps of configuration 0 on this machine's CPU"


def print_dry_run(space: "Space", *, output: Path | None, address: str | None) -> None:
    """Print what `run` would do, and leave nothing behind.

    Args:
        space: What would be searched.
        output: Run directory that would be made; None for the default.
        address: Ray cluster that would be joined; None for this machine.

    Raises:
        StabilitySearchError: What `run` would come to, as far as it can be seen already. All that
            could be found out has been printed.
    """
    from stability_search import space as spaces
    from stability_search.search import dry_run

    outlook = dry_run.look_ahead(space, output=output, address=address)
    print_data(
        inert(spaces.describe(space)),
        *_stage_lines(space, outlook),
        _resource_line(space, outlook, address),
        *_configuration_lines(space, outlook),
        *_file_lines(space, outlook, address),
    )
    message_sink().write(f"timing {_NUM_TIMED} ...")
    timing = dry_run.time_first(space, outlook)
    print_data(
        _time_line(outlook, timing),
        *_loss_lines(timing),
        "nothing was started and nothing written",
    )
    dry_run.refuse(outlook, timing)


def _stage_lines(space: "Space", outlook: "Outlook") -> list[str]:
    study, confirm = space.study, outlook.confirm
    rates = ", ".join(f"{rate:.3g}" for rate in outlook.pilot_rates)
    horizon = max(study.trial_steps, study.confirm.steps)
    pilot = counted(len(outlook.pilot_rates), "trial")
    lines = [f"pilot: {pilot} of {horizon} steps in fp32, learning rates {rates}"]
    if space.has_space:
        search = counted(study.search.trials, "trial")
        lines.append(f"search: {search} of {study.trial_steps} steps")
    trials = f"{confirm.min_trials} to {confirm.max_trials} trials of {confirm.steps} steps"
    seeds, ladders = study.confirm.seeds, confirm.num_ladders
    return [
        *lines,
        f"confirm: {trials} on {counted(seeds, 'seed')}, {counted(ladders, 'ladder')}",
        f"all stages: at most {outlook.num_trials} trials, {outlook.num_steps} optimizer steps"
        + _budget_words(space),
        *_budget_warnings(space, outlook),
    ]


def _budget_words(space: "Space") -> str:
    search = space.study.search
    words = ""
    if search.step_budget is not None:
        words += f"; search.step_budget ends it at {search.step_budget} steps"
    if search.time_budget_s is not None:
        words += f"; search.time_budget_s ends it after {duration(search.time_budget_s)}"
    return words


def _budget_warnings(space: "Space", outlook: "Outlook") -> list[str]:
    if outlook.enough_steps is None:
        return []
    text = (
        "warning: no search trial can start unless the pilot ends early: it takes "
        f"{outlook.num_pilot_steps} steps, and the search starts none once half of "
        f"search.step_budget={space.study.search.step_budget} is spent; "
        f"{outlook.enough_steps} would do"
    )
    return [text]


def _resource_line(space: "Space", outlook: "Outlook", address: str | None) -> str:
    resources, machine = space.study.search.resources, outlook.machine
    if machine is not None:
        return (
            f"resources: {resources.cpu:g} CPU and no GPU a trial; "
            f"{counted(machine.num_slots, 'trial')} at once on this machine"
        )
    gpu = "a GPU where there is one" if resources.gpu is None else f"{resources.gpu:g} GPU"
    model = f" ({inert(resources.accelerator)})" if resources.accelerator else ""
    whom = "the GPUs of this machine were" if address is None else f"{inert(address)} was"
    return (
        f"resources: {resources.cpu:g} CPU and {gpu}{model} a trial; how many run at once is "
        f"known once it starts: {whom} not asked"
    )


def _configuration_lines(space: "Space", outlook: "Outlook") -> list[str]:
    return [
        f"configuration {index} {space.config_id(settings)}: {_active(settings)}"
        for index, settings in enumerate(outlook.proposals)
    ]


def _active(settings: Mapping[str, Json]) -> str:
    return setting_words({name: v for name, v in settings.items() if v is not None})


def _file_lines(space: "Space", outlook: "Outlook", address: str | None) -> list[str]:
    path = inert(short_path(outlook.path))
    if space.task.file:
        copied = f"{inert(short_path(Path(space.task.file)))} is copied there"
    else:
        copied = f"no file is copied for the task {inert(space.task_name)}"
    needed, free = outlook.needed_bytes / _MIB, outlook.free_bytes / _MIB
    return [
        f"files: in {path}; {copied}",
        f"uploaded: {_upload_words(outlook, address)}",
        *(f"note: {inert(note)}" for note in outlook.notes),
        f"disk: about {needed:.0f} MiB at most, {free:.0f} MiB are free there",
    ]


def _upload_words(outlook: "Outlook", address: str | None) -> str:
    if address is None:
        return "nothing; trials run on this machine"
    files = outlook.uploaded
    if not files:
        return "nothing; the task is installed, and must be on every node, too"
    size = sum(files.values()) / _KIB
    names = ", ".join(map(inert, list(files)[:_NUM_NAMED]))
    more = ", ..." if len(files) > _NUM_NAMED else ""
    return f"{counted(len(files), 'file')}, {size:.1f} KiB, to every node: {names}{more}"


def _time_line(outlook: "Outlook", timing: "Timing") -> str:
    if timing.step_s is None:
        end = timing.end
        reason = "" if end is None else f": configuration 0 ended as {end.outcome}"
        detail = "" if end is None or not end.reason else f" ({inert(end.reason)})"
        return f"time: unknown{reason}{detail}"
    measured = (
        f"{_NUM_TIMED}: {_short(timing.step_s)} a step, {_short(timing.setup_s)} to begin a "
        f"trial, {_short(timing.probe_s)} to read the probe"
    )
    seconds = outlook.seconds(timing)
    if seconds is None:
        return f"time: not estimated, it depends on where trials run; measured from {measured}"
    low, high = map(duration, seconds)
    span = low if low == high else f"{low} to {high}"
    return f"time: about {span} if no trial is killed, an estimate from {measured}"


def _loss_lines(timing: "Timing") -> list[str]:
    if timing.num_nonfinite == 0:
        return []
    steps = f"{timing.num_nonfinite} of the first {counted(timing.num_steps, 'step')}"
    end = "" if timing.end is None else f", which ended as {timing.end.outcome}"
    advice = "look at the task's data and loss before a study is started"
    return [f"loss: infinite or NaN in {steps} of configuration 0{end}; {advice}"]


def _short(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else duration(seconds)
