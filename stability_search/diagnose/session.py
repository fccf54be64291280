"""One diagnosis from a space to its files: what is read, run and written, in which order."""

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch

from stability_search import space as spaces
from stability_search.assembly import training_stream
from stability_search.diagnose.batch_statistics import read_batches
from stability_search.diagnose.conclusion import Verdict, conclude, incomplete
from stability_search.diagnose.document import Diagnosis, as_json, as_markdown, yaml_value
from stability_search.diagnose.ladder import MOST_SEEDS, Ladder, Say
from stability_search.diagnose.overfit import Overfit, overfit
from stability_search.diagnose.task_code import task_code
from stability_search.errors import StabilitySearchError, UsageError
from stability_search.files import write_whole
from stability_search.records.values import Json
from stability_search.seeding import derive_seed
from stability_search.settings.trial import TrialConfig
from stability_search.space import Space
from stability_search.space_directory import default_path, make_folder
from stability_search.task_module import refuse_missing_module
from stability_search.tasks.loading import load_task

Check = Callable[[], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A diagnosis whose files are written.

    Attributes:
        directory: Where they are.
        diagnosis: What they hold.
    """

    directory: Path
    diagnosis: Diagnosis


def diagnose(
    space: Space,
    *,
    output: Path | None = None,
    overrides: Sequence[str] = (),
    say: Say = lambda _: None,
    check: Check = lambda: None,
) -> Finished:
    """Find what breaks the configuration of today, and write down why.

    Args:
        space: Its file's one configuration is diagnosed, or the first of `start_with`.
        output: Directory for `diagnosis.md` and `diagnosis.json`; made if missing, else it must
            be empty. None takes `reports/<name>-diagnosis-<UTC time>/`.
        overrides: `key=value` of each `--set` that the space was loaded with; the command that
            diagnoses again repeats them.
        say: Takes a line per rung.
        check: Called between steps; a `StabilitySearchError` from it ends the diagnosis, and
            what is known so far is written.

    Returns:
        The verdict, and where it was written.

    Raises:
        UsageError: The directory is used, or model or device cannot honour the configuration.
        UserCodeError: The task failed in the same way with two seeds; the files are written.
        InfrastructureError: The machine failed; the files are written.
    """
    now = datetime.now(UTC)
    refuse_missing_module(space.task)
    directory = open_directory(output, f"{space.study.name}-diagnosis", now)
    session = _Session(
        space, overrides=overrides, created=f"{now:%Y-%m-%dT%H:%M:%SZ}", say=say, check=check
    )
    try:
        verdict = session.find()
    except UsageError:
        remove_if_empty(directory)
        raise
    except StabilitySearchError as error:
        _write(directory, session.diagnosis(incomplete(session.ladder, error.message)))
        error.hint = f"{error.hint} (what is known so far: {directory / 'diagnosis.md'})".strip()
        raise
    diagnosis = session.diagnosis(verdict)
    _write(directory, diagnosis)
    return Finished(directory=directory, diagnosis=diagnosis)


def overfit_test(
    space: Space,
    *,
    output: Path | None = None,
    say: Say = lambda _: None,
    check: Check = lambda: None,
) -> tuple[Path, Overfit]:
    """Test that the configuration of today learns a handful of samples by heart.

    Args:
        space: As in `diagnose`.
        output: Directory for `overfit.json`; as in `diagnose`, `reports/<name>-overfit-<UTC
            time>/` by default.
        say: Takes a line now and then.
        check: As in `diagnose`.

    Returns:
        The directory, and what the test showed.

    Raises:
        UsageError: As in `diagnose`.
        UserCodeError: The task raised.
    """
    refuse_missing_module(space.task)
    directory = open_directory(output, f"{space.study.name}-overfit", datetime.now(UTC))
    try:
        config = config_of_today(space, seed=diagnosis_seeds(space)[0])
        say(configuration_line(space))
        with task_code("training"):
            result = overfit(config, say=say, check=check)
    except StabilitySearchError:
        remove_if_empty(directory)
        raise
    write_whole(directory / "overfit.json", result.to_json())
    return directory, result


class _Session:
    """The parts of one diagnosis."""

    def __init__(
        self, space: Space, *, overrides: Sequence[str], created: str, say: Say, check: Check
    ) -> None:
        self.ladder: Ladder | None = None
        self._space = space
        self._overrides = tuple(overrides)
        self._created = created
        self._say = say
        self._check = check
        self._started = time.monotonic()

    def find(self) -> Verdict:
        seeds = diagnosis_seeds(self._space)
        config = config_of_today(self._space, seed=seeds[0])
        self._say(
            f"diagnosing {self._space.study.name} on {config.device}: "
            f"trials of {config.num_planned_steps} steps"
        )
        self._say(configuration_line(self._space))
        self.ladder = open_ladder(config, seeds=seeds, say=self._say, check=self._check)
        return climb(self.ladder)

    def diagnosis(self, verdict: Verdict) -> Diagnosis:
        space = self._space
        is_helpful = verdict.cause.is_named and bool(verdict.changes)
        return Diagnosis(
            name=space.study.name,
            task=space.task_name,
            device=device_of(space),
            created=self._created,
            settings=space.today_settings(),
            configuration=configuration_line(space),
            task_args=space.task_args,
            verdict=verdict,
            command=command_with(space, verdict.changes, self._overrides) if is_helpful else "",
            ladder=self.ladder,
            wall_s=time.monotonic() - self._started,
        )


def open_ladder(config: TrialConfig, *, seeds: Sequence[int], say: Say, check: Check) -> Ladder:
    """Look at the batches of a configuration, and put a ladder at it.

    Args:
        config: The configuration as given.
        seeds: Seeds to use, in this order, at least 5.
        say: Takes a line per rung.
        check: Called between steps; may raise to stop everything.
    """
    first = replace(config, seed=seeds[0])
    task = load_task(first.task, first.task_args)
    with task_code("reading batches"):
        stream = training_stream(
            task, batch_size=first.batch_size, seed=first.seed, device=torch.device("cpu")
        )
        data, sieve = read_batches(
            task, stream, num_batches=first.num_planned_steps * first.accumulation_steps
        )
    check()
    for defect in data.defects[:1]:
        say(f"data: WARNING {defect.source} batch {defect.batch_index}: {defect.text}")
    return Ladder(first, seeds=seeds, data=data, sieve=sieve, say=say, check=check)


def climb(ladder: Ladder) -> Verdict:
    """Climb a ladder to its end, and say what it shows.

    Raises:
        UsageError: Model or device cannot honour the configuration as given.
        UserCodeError: The task failed in the same way with two seeds.
        InfrastructureError: The machine failed.
    """
    cause, decided_by = ladder.climb()
    return conclude(ladder, cause, decided_by, ladder.find_remedy(cause))


def diagnosis_seeds(space: Space) -> tuple[int, ...]:
    """Return the seeds of a diagnosis, the same ones at every call."""
    return tuple(derive_seed(space.study.seed, "diagnose", k) for k in range(MOST_SEEDS))


def config_of_today(space: Space, *, seed: int) -> TrialConfig:
    """Return the configuration that counts as today's, over the steps of a search trial."""
    return space.trial_config(
        space.today_settings(), seed=seed, steps=space.study.trial_steps, device=device_of(space)
    )


def device_of(space: Space) -> Literal["cpu", "cuda"]:
    """Return where trials run: a GPU where torch has one and the space does not refuse it.

    Raises:
        UsageError: The space asks for a GPU, and there is none.
    """
    asked = space.study.search.resources.gpu
    has_gpu = torch.cuda.is_available()
    if asked and not has_gpu:
        raise UsageError(
            f"search.resources.gpu: a GPU is needed, but torch sees none; got {asked:g}.",
            hint="Set it to 0, or diagnose on a machine with a GPU.",
        )
    return "cuda" if has_gpu and asked != 0 else "cpu"


def load_space(
    name_or_path: str | Path, overrides: Sequence[str] = (), *, folder: Path | None = None
) -> Space:
    """Load a space to be diagnosed: `confirm.steps` follows `trial.steps`, for nobody confirms.

    Args:
        name_or_path: As in `space.load`.
        overrides: `key=value` of each `--set`, in order.
        folder: As in `space.load`.

    Raises:
        SpaceError: As in `space.load`.
    """
    keys = [override.partition("=")[0].strip() for override in overrides]
    if "trial.steps" in keys and not any(key.partition(".")[0] == "confirm" for key in keys):
        steps = overrides[len(keys) - 1 - keys[::-1].index("trial.steps")].partition("=")[2]
        others = [one for one, key in zip(overrides, keys, strict=True) if key != "trial.steps"]
        try:
            least = spaces.load(name_or_path, others, folder=folder).study.confirm.steps
            if int(steps) > least:
                overrides = (*overrides, f"confirm.steps={int(steps)}")
        except (UsageError, ValueError):  # said below, with every other problem
            pass
    return spaces.load(name_or_path, overrides, folder=folder)


def configuration_line(space: Space) -> str:
    """Say which configuration is diagnosed, and where it was taken from."""
    today = space.today_settings()
    words = " ".join(
        f"{name}={yaml_value(value)}" for name, value in today.items() if value is not None
    )
    source = "the file's one"
    if space.has_space:
        source = "defaults and middles of the ranges: no start_with"
        if space.start_with:
            source = "the first of start_with"
            missing = [
                parameter.name
                for parameter in space.parameters
                if parameter.name not in space.start_with[0] and today[parameter.name] is not None
            ]
            if missing:
                source += f"; default or middle of the range: {', '.join(missing)}"
    return f"configuration: {words} ({source})"


def command_with(space: Space, changes: Mapping[str, Json], given: Sequence[str] = ()) -> str:
    """Return the command that diagnoses again with changed settings; empty if none can.

    Args:
        space: What was diagnosed.
        changes: Settings and their new values.
        given: `key=value` of each `--set` that it was loaded with; they come first.
    """
    single = [f"{_key_of(space, name)}={yaml_value(value)}" for name, value in changes.items()]
    for overrides in (single, _whole_start(space, changes)):
        try:
            load_space(space.path, [*given, *overrides], folder=space.folder)
        except UsageError:
            continue
        words = ["stability-search", "diagnose", "--space", short_name(space)]
        for override in (*given, *overrides):
            words += ["--set", override]
        return shlex.join(words)
    return ""


def short_name(space: Space) -> str:
    """Return the space file as a person here would name it."""
    path, here = Path(space.path), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _key_of(space: Space, name: str) -> str:
    """Return the key of the space file under which a setting of today stands."""
    if name in space.varying:
        return f"start_with.0.{name}"
    return f"task_args.{name}" if name in space.task_args else f"fixed.{name}"


def _whole_start(space: Space, changes: Mapping[str, Json]) -> list[str]:
    """Return overrides with one `start_with`, for a change that turns other settings off."""
    today = {**space.today_settings(), **changes}
    values = {
        parameter.name: today[parameter.name]
        for parameter in space.parameters
        if space.is_active(parameter, today)
    }
    flow = ", ".join(f"{name}: {yaml_value(value)}" for name, value in values.items())
    others = [
        f"{_key_of(space, name)}={yaml_value(value)}"
        for name, value in changes.items()
        if name not in space.varying
    ]
    return [f"start_with=[{{{flow}}}]", *others]


def open_directory(output: Path | None, name: str, now: datetime) -> Path:
    """Make the directory of the files, or take an empty one.

    Raises:
        UsageError: It holds anything, or cannot be made.
    """
    directory = default_path(name, now) if output is None else output
    if directory.is_dir() and any(directory.iterdir()):
        raise UsageError(
            f"{directory}: --output must be empty or not there, but it holds files.",
            hint="Choose another with --output.",
        )
    make_folder(directory)
    return directory


def remove_if_empty(directory: Path) -> None:
    """Remove a directory that nothing was written to."""
    if not any(directory.iterdir()):
        directory.rmdir()


def _write(directory: Path, diagnosis: Diagnosis) -> None:
    write_whole(directory / "diagnosis.json", as_json(diagnosis))
    write_whole(directory / "diagnosis.md", as_markdown(diagnosis))
