"""A study's directory: the name of every file in it, how it begins, and who may write to it."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stability_search.errors import StoppedEarlyError, UsageError
from stability_search.files import cannot_write, write_whole
from stability_search.privacy import Privacy
from stability_search.records.values import Json
from stability_search.space import Space
from stability_search.space_directory import (
    copy_task_file,
    make_folder,
    only_writer,
    task_facts,
    text_beside_task,
    text_difference,
)

_PACKAGES = (
    "stability-search", "torch", "ray", "optuna", "numpy", "scipy", "pandas", "pyarrow",
    "sqlalchemy", "plotly", "pydantic", "ruamel.yaml",
)  # fmt: skip

# Measured with every column in use: steps/ 160 bytes a step, the ledger 40 bytes a step and 5 KiB
# a trial; half as much again for tables, report and journal.
_BYTES_PER_TRIAL = 24 * 1024
_BYTES_PER_STEP = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class RunDirectory:
    """Where the files of one study are.

    Attributes:
        path: The directory.
    """

    path: Path

    @property
    def space(self) -> Path:
        """The space, with `--set` applied."""
        return self.path / "space.yaml"

    @property
    def ledger(self) -> Path:
        """The ledger, the only truth."""
        return self.path / "study.db"

    @property
    def steps(self) -> Path:
        """Folder of the step files."""
        return self.path / "steps"

    @property
    def trials_parquet(self) -> Path:
        """A row per trial."""
        return self.path / "trials.parquet"

    @property
    def report_html(self) -> Path:
        """The report as one page."""
        return self.path / "report.html"

    @property
    def report_json(self) -> Path:
        """The report for programs."""
        return self.path / "report.json"

    @property
    def best(self) -> Path:
        """The choice as a space file; only where there is one."""
        return self.path / "best.yaml"

    @property
    def environment(self) -> Path:
        """Versions, device, seeds and command."""
        return self.path / "environment.json"

    @property
    def log(self) -> Path:
        """What workers and Ray printed."""
        return self.path / "run.log"

    def step_file(self, trial_id: str, attempt: int = 1) -> Path:
        """Return the step file of one attempt of a trial.

        Args:
            trial_id: A plain file name.
            attempt: 1, or more after an `infrastructure` end.
        """
        from stability_search.step_files import step_file_name  # loads pyarrow

        return self.steps / step_file_name(trial_id, attempt)


def create(
    path: Path, space: Space, *, facts: Mapping[str, Json], environment: Mapping[str, Json]
) -> RunDirectory:
    """Begin a run directory: space, task file, environment; the ledger comes after.

    Args:
        path: The directory; made if missing, else it must be empty.
        space: The study's space.
        facts: What `study_facts` returned; kept in `environment.json` too, so that a lost ledger
            can be made again.
        environment: What `describe_environment` returned.

    Raises:
        UsageError: A study, or anything else, is there already; or the directory cannot be made.
        StoppedEarlyError: The disk is full.
    """
    run = RunDirectory(path=path)
    make_folder(path)
    with lock(run):
        refuse_used(run)
        write_whole(run.environment, as_json({**environment, "study": with_tilde(dict(facts))}))
        copy_task_file(run.path, space)
        write_whole(run.space, text_beside_task(space))
        try:
            run.steps.mkdir(exist_ok=True)  # a package of the task may be called so
        except OSError as error:
            raise cannot_write(run.steps, error) from error
    return run


def open_run(path: Path) -> RunDirectory:
    """Return the run directory at a path.

    Raises:
        UsageError: There is none.
    """
    run = RunDirectory(path=path)
    if not run.space.is_file():
        raise UsageError(
            f"{path}: no run directory: it must hold {run.space.name}.",
            hint="Give the directory that `run` printed.",
        )
    return run


def lock(run: RunDirectory) -> contextlib.AbstractContextManager[None]:
    """Be the only writer of a run directory; see `only_writer`."""
    return only_writer(run.path, run.steps)


def study_facts(space: Space) -> dict[str, Json]:
    """Return what the ledger keeps of a space: enough to refuse a changed one on resume.

    Raises:
        UsageError: The task's file cannot be read.
    """
    return {
        "name": space.study.name,
        "seed": space.study.seed,
        "space_text": text_beside_task(space),
        **task_facts(space),
        "versions": dict(_versions()),
    }


def space_of(run: RunDirectory, facts: Mapping[str, Json]) -> "Space":
    """Return the space a study began with, as its ledger keeps it.

    Args:
        run: The run directory.
        facts: The facts its ledger keeps.

    Raises:
        UsageError: `space.yaml` was changed by hand since.
    """
    from stability_search import space as spaces

    if run.space.read_text() != facts["space_text"]:
        difference = text_difference(
            str(facts["space_text"]),
            run.space.read_text(),
            name_before=f"{run.space} in the ledger",
            name_after=str(run.space),
        )
        raise UsageError(
            f"{run.space}: the space changed since the study began.\n{difference}",
            hint="Undo the change; budgets, confirm.top and confirm.seeds can be raised by --set, "
            "search.resources.labels and .custom changed.",
        )
    return spaces.load(run.space, folder=Path(str(facts["original_folder"])))


def facts_of_environment(run: RunDirectory) -> dict[str, Json] | None:
    """Return the facts as `environment.json` keeps them; None where it cannot be read."""
    try:
        facts = json.loads(run.environment.read_text())["study"]
        home = str(Path.home())
        full = {
            key: re.sub(r"^~(?=/|$)", lambda _: home, value) if isinstance(value, str) else value
            for key, value in facts.items()
        }
        # A home directory in the middle of a text cannot be told from a written `~`.
        return {**full, "space_text": run.space.read_text()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def describe_environment(
    *, command: Sequence[str], device: str, seeds: Mapping[str, int]
) -> dict[str, Json]:
    """Return what `environment.json` holds: no environment variables, home shown as `~`.

    Args:
        command: The command line, program first.
        device: Device of the trials, as reports name it.
        seeds: Every seed of the study by purpose.
    """
    description: dict[str, Json] = {
        "command": shlex.join(command),
        "device": device,
        "seeds": dict(seeds),
        "versions": dict(_versions()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
    }
    return with_tilde(description)


def with_tilde(values: Mapping[str, Json]) -> dict[str, Json]:
    """Show the home directory as `~` in every text of a flat mapping."""
    privacy = Privacy(home=str(Path.home()), aliases={})
    return {
        key: privacy.text(value) if isinstance(value, str) else value
        for key, value in values.items()
    }


def estimated_bytes(*, num_trials: int, num_steps: int) -> int:
    """Return what a study writes at most, roughly.

    Args:
        num_trials: Trials, all stages together.
        num_steps: Optimizer steps, all trials together.
    """
    return num_trials * _BYTES_PER_TRIAL + num_steps * _BYTES_PER_STEP


def require_free_space(run: RunDirectory, *, num_trials: int, num_steps: int) -> None:
    """Stop before the start if the disk cannot hold the study.

    Args:
        run: The run directory.
        num_trials: Trials to come, all stages together.
        num_steps: Optimizer steps to come, all trials together.

    Raises:
        StoppedEarlyError: Names what is free and what is needed.
    """
    needed = estimated_bytes(num_trials=num_trials, num_steps=num_steps)
    status = os.statvfs(run.path)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise StoppedEarlyError(
            f"{run.path}: {free / 2**20:.0f} MiB are free, but {num_trials} trials of together "
            f"{num_steps} steps need about {needed / 2**20:.0f} MiB.",
            hint="Free some space, or choose another disk with --output.",
        )


def refuse_used(run: RunDirectory) -> None:
    """Refuse a directory in which something is.

    Args:
        run: A directory that exists.

    Raises:
        UsageError: A study is there, or anything else.
    """
    if run.space.exists() or run.ledger.exists():
        raise UsageError(
            f"{run.path}: a study is there already.",
            hint=f"Go on with it by `stability-search resume {shlex.quote(str(run.path))}`.",
        )
    if any(run.path.iterdir()):
        raise UsageError(f"{run.path}: the directory is not empty.", hint="Choose another one.")


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield package, importlib.metadata.version(package)


def as_json(value: Mapping[str, Json]) -> str:
    """Return a mapping as `environment.json` holds it.

    Raises:
        ValueError: A number is not finite.
    """
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
