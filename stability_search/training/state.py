"""`train.json`: what a long training is, which phases it went through, and how it ended."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from stability_search.errors import UsageError
from stability_search.files import write_whole
from stability_search.records.values import Json
from stability_search.training.layout import TrainDirectory

_VERSION = 1


class EndKind(StrEnum):
    """How a long training ended, or paused."""

    DONE = "done"
    STOPPED = "stopped"  # by a rule, or for want of memory
    INTERRUPTED = "interrupted"
    FAILED = "failed"  # the task raised, or a file could not be written


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainEnd:
    """How a long training ended.

    Attributes:
        kind: In one word.
        exit_code: What the command returned.
        step: Attempted steps by then.
        outcome: The rule that stopped it, or `completed`.
        lines: The verdict as it was printed.
    """

    kind: EndKind
    exit_code: int
    step: int
    outcome: str
    lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A stretch of training with one set of settings.

    Attributes:
        number: From 1.
        first_step: The attempted step it begins with.
        num_planned_steps: Steps planned for the whole training, and for its schedule.
        from_checkpoint: The checkpoint it went on from; empty for the first phase.
        changes: Keys of the space file that changed, each with its old and new value as text.
        space_sha256: Hash of its space file, so that a change by hand is noticed.
        stream_seed: Seed of its data.
        device: `cpu` or `cuda`.
        started_at: UTC time.
    """

    number: int
    first_step: int
    num_planned_steps: int
    from_checkpoint: str
    changes: Mapping[str, tuple[str, str]]
    space_sha256: str
    stream_seed: int
    device: str
    started_at: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    """Changes that wait for calm.

    Attributes:
        overrides: `key=value` of each `--set`.
        num_calm_epochs: Epochs in a row without an alarm after which they are made.
    """

    overrides: tuple[str, ...]
    num_calm_epochs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """Everything `train.json` holds but the curves.

    Attributes:
        name: Name of the study.
        epoch_steps: Steps of an epoch, the same in every phase unless the space file says so.
        task: What `task_facts` returned.
        phases: In order; the last one is present.
        pending: Changes that wait for calm; None where there are none.
        num_tests: Tests of the kill rule that were begun, those of stretches given up included.
        end: How it ended; None while it runs, or after the process was killed.
    """

    name: str
    epoch_steps: int
    task: Mapping[str, Json]
    phases: tuple[Phase, ...]
    pending: Pending | None = None
    num_tests: int = 0
    end: TrainEnd | None = None

    @property
    def phase(self) -> Phase:
        """The present phase."""
        return self.phases[-1]


def write_state(
    directory: TrainDirectory, state: TrainState, epochs: list[dict[str, Any]] | None = None
) -> None:
    """Write `train.json`, whole or not at all.

    Args:
        directory: The run.
        state: What it is.
        epochs: A row for each finished epoch, for programs; None keeps those that are there.

    Raises:
        StoppedEarlyError: It could not be written.
    """
    if epochs is None:
        epochs = _read(directory)["epochs"] if directory.state.is_file() else []
    content = {"version": _VERSION, **asdict(state), "epochs": epochs}
    write_whole(directory.state, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_state(directory: TrainDirectory) -> TrainState:
    """Read `train.json`.

    Raises:
        UsageError: There is none, it is damaged, or another version wrote it.
    """
    try:
        data = _read(directory)
        pending, end = data["pending"], data["end"]
        return TrainState(
            name=data["name"],
            epoch_steps=data["epoch_steps"],
            task=data["task"],
            phases=tuple(_phase(row) for row in data["phases"]),
            pending=None if pending is None else _pending(pending),
            num_tests=data.get("num_tests", 0),  # older files have none
            end=None if end is None else _end(end),
        )
    except OSError as error:
        raise UsageError(
            f"{directory.path}: no training: it must hold {directory.state.name}.",
            hint="Give the directory that `train` printed.",
        ) from error
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UsageError(
            f"{directory.state}: damaged, or of another version: {error}.",
            hint="The checkpoints beside it are whole; start anew with `train --space`.",
        ) from error


def sha256_of_text(text: str) -> str:
    """Return the hash of a space file's text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _read(directory: TrainDirectory) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(directory.state.read_text())
    if data["version"] != _VERSION:
        raise ValueError(f"version {data['version']}, not {_VERSION}")
    return data


def _phase(row: Mapping[str, Any]) -> Phase:
    changes = {name: (was, now) for name, (was, now) in row["changes"].items()}
    return Phase(**{**row, "changes": changes})


def _pending(row: Mapping[str, Any]) -> Pending:
    return Pending(**{**row, "overrides": tuple(row["overrides"])})


def _end(row: Mapping[str, Any]) -> TrainEnd:
    return TrainEnd(**{**row, "kind": EndKind(row["kind"]), "lines": tuple(row["lines"])})
