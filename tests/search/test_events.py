"""Every event of a study holds the fields that are declared for it, and the user's page has them.

The study is whole but for Ray: trials are made up here, one after the other.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from stability_search import events
from stability_search.cli import main
from stability_search.columns import COLUMNS
from stability_search.events import FIELDS, OWN_FIELDS, Event, EventName
from stability_search.interruption import Interrupted
from stability_search.records.step import StepRecord
from stability_search.search import study
from stability_search.search.machine import this_machine
from stability_search.search.nodes import NodeFacts
from stability_search.search.source import Place
from tests.search.inline_study import lost, pretend, write_space

README = Path(study.__file__).parent / "README.md"
COLUMN_NAMES = {column.name for column in COLUMNS if column.table == "trials"}
PROGRESS = {"step": 3, "num_bad_steps": 0, "scale": None, "grad_norm": 0.5, "loss": 1.5}
HERE = Place(
    host="here",
    facts=NodeFacts(
        host="here", python="", stability_search="", ray="", torch="", cuda="", cpu=""
    ),
)
WORDS = (
    *("--set", "search.trials=3", "--set", "confirm.octaves=0"),
    *("--set", "search.sampler=random", "--set", "search.resources.gpu=0"),
)


class NoCluster:
    """Stands in for Ray."""

    def __init__(self, *_: object) -> None:
        """Take what a cluster takes."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Have nothing to end."""

    def wait(self, _signals: object) -> None:
        """Be there at once."""

    def nodes(self) -> list[object]:
        return [this_machine()]


def drive(source: Any, **_: object) -> None:  # noqa: ANN401 - what a study is to its driver
    """Run the trials of a study; the first is lost once, and a node is left out."""
    has_lost = False
    while (request := source.next_trial()) is not None:
        source.trial_started(request, "here")
        source.trial_progressed(request, PROGRESS)
        summary = pretend(request) if has_lost else lost(request)
        source.trial_ended(request, summary, None, HERE)
        source.settle()
        if not has_lost:
            source.node_quarantined("there", "3 attempts in a row lost their worker")
        has_lost = True


class TerminatedError(Interrupted):
    """SIGTERM, without the signal."""

    exit_code = 143

    def __init__(self, text: str) -> None:
        Exception.__init__(self, text)
        self.message, self.hint = text, ""


Tell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Tell:
    """Return a function that runs the command with `--json-events`: code, output, messages."""

    def run(driver: Callable[..., None] = drive) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(study, "Cluster", NoCluster)
        monkeypatch.setattr(study, "is_surely_cpu", lambda _: False)  # no early workers
        monkeypatch.setattr(study, "drive", driver)
        monkeypatch.setattr(
            study,
            "write_all",
            lambda _space, directory, _rows, verdict, _command: SimpleNamespace(
                directory=directory.path, verdict=verdict, lines=("the verdict",)
            ),
        )
        words = ["run", "--space", str(write_space(tmp_path)), "--output", "out", *WORDS]
        code = main([*words, "--json-events"])
        return code, *capfd.readouterr()

    return run


def listening(heard: list[Event], then: Callable[..., None]) -> Callable[..., None]:
    """Return a driver that also notes what JSON lines leave out."""

    def run(source: Any, **options: object) -> None:  # noqa: ANN401 - as `drive`
        news = source._news  # noqa: SLF001 - the study's own mouth
        shown = news._listener  # noqa: SLF001
        news._listener = lambda event: (heard.append(event), shown(event))  # noqa: SLF001
        then(source, **options)

    return run


def terminate(*_: object, **__: object) -> None:
    """Be told to stop as soon as trials could run."""
    raise TerminatedError("terminated")


@pytest.mark.fault
def test_every_event_has_the_fields_that_are_declared_for_it_and_stdout_is_json_alone(
    tell: Tell,
) -> None:
    heard: list[Event] = []

    code, out, err = tell(listening(heard, drive))

    assert code == 0
    lines = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    assert {line["event"] for line in lines} == {*FIELDS} - {"message", "trial_progress"}
    for line in lines:
        assert tuple(line) == ("schema", "event", "time", *FIELDS[line["event"]])
    assert lines[-1]["event"] == "study_finished"
    assert (lines[-1]["verdict"], lines[-1]["exit_code"]) == ("stable", 0)
    assert lines[-1]["config_id"] in {line.get("config_id") for line in lines[:-1]}
    assert err.splitlines()[1] == "the verdict"
    [progress] = {tuple(e.fields) for e in heard if e.name == EventName.TRIAL_PROGRESS}
    assert set(progress) == set(FIELDS[EventName.TRIAL_PROGRESS])


def test_nothing_is_claimed_of_a_node_that_nobody_knows(tell: Tell, tmp_path: Path) -> None:
    fingerprints = list[str]()

    def run(source: Any, **_: object) -> None:  # noqa: ANN401 - as `drive`
        for place in (Place(host="late", facts=None), HERE):
            request = source.next_trial()
            source.trial_ended(request, lost(request), None, place)
        fingerprints.extend(row.fingerprint for row in source.plan.rows)
        terminate()

    tell(run)

    unknown, known = fingerprints
    assert not unknown
    (node,) = json.loads((tmp_path / "out" / "environment.json").read_text())["nodes"]
    assert (node["node"], node["fingerprint"]) == ("here", known)


def test_a_study_that_is_told_to_end_tells_its_end(tell: Tell) -> None:
    heard: list[Event] = []

    code, out, _ = tell(listening(heard, terminate))

    last = json.loads(out.splitlines()[-1])
    assert code == 143
    assert (last["event"], last["verdict"], last["report"]) == (
        *("study_finished", "incomplete"),
        None,
    )
    [message] = [event for event in heard if event.name == EventName.MESSAGE]
    assert tuple(message.fields) == FIELDS[EventName.MESSAGE]


def test_a_field_is_a_column_or_explained() -> None:
    steps = {field.name for field in dataclasses.fields(StepRecord)}
    known = COLUMN_NAMES | steps | {*OWN_FIELDS}

    assert set(FIELDS) == set(EventName)
    assert {name for names in FIELDS.values() for name in names} <= known
    assert not COLUMN_NAMES & {*OWN_FIELDS}  # the twin: no explanation hides a column


def test_the_page_for_users_lists_them() -> None:
    assert events.as_markdown() in README.read_text()
