"""Hostile text in every place of every event and command: a terminal cannot act on any of it."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from stability_search.cli import doctor, main
from stability_search.cli.board import Board
from stability_search.cli.formats import Format, print_formatted
from stability_search.cli.live import view
from stability_search.cli.next_step import next_step
from stability_search.cli.outlets import JsonLines, PlainLines, Sink
from stability_search.events import Event, EventName
from stability_search.inert import is_in_sight
from stability_search.records.values import Json
from stability_search.report import verdict_lines
from tests.hostile_strings import HOSTILE_STRINGS, TERMINAL, UNSEEN
from tests.report.packed_reports import Pack
from tests.study_rows import hopeless_study, stable_study

FIELDS = (
    "run_directory", "device", "space", "stage", "trial_id", "outcome", "reason", "node", "text",
    "level", "verdict", "report", "settings",
)  # fmt: skip


def text(position: int) -> str:
    return HOSTILE_STRINGS[position % len(HOSTILE_STRINGS)]


def events() -> Iterator[Event]:
    """Return an event of every kind for each text; all of its fields hold another one."""
    for i in range(len(HOSTILE_STRINGS)):
        fields: dict[str, Json] = {name: text(i + 11 * k) for k, name in enumerate(FIELDS)}
        fields |= {"settings": {text(i + 5): text(i), text(i + 6): [text(i)]}, "q": 0.5}
        fields["trial_id"] = f"trial-{i}-{text(i)}"
        for name in EventName:
            yield Event(name=name, time=text(i), fields=fields)


def check_inert(shown: str) -> None:
    """Check that text can be put on a terminal: letters and line ends, nothing else."""
    assert [c for c in set(shown) if c != "\n" and not is_in_sight(c)] == []
    shown.encode()  # no lone surrogate


def test_no_event_reaches_a_terminal_as_anything_but_letters() -> None:
    out, err, board = io.StringIO(), io.StringIO(), Board()
    plain, strict = PlainLines(Sink(err), clock=lambda: 0.0), JsonLines(Sink(out), Sink(err))
    screen = io.StringIO()
    console = Console(file=screen, width=120, markup=False, emoji=False, highlight=False)
    for number, event in enumerate(events()):
        plain.show(event)
        strict.show(event)
        board.apply(event, 0.0)
        if number % 20 == 0:
            console.print(view(board, 1.0, width=120, height=60))
    plain.beat()
    check_inert(err.getvalue())
    check_inert(screen.getvalue())
    lines = out.getvalue().splitlines()
    assert out.getvalue().isascii()
    assert len(lines) == len(HOSTILE_STRINGS) * (len(EventName) - 2)  # no message, no progress
    for line in lines:
        json.loads(line, parse_constant=pytest.fail)
    print(f"\n{len(HOSTILE_STRINGS)} strings x {len(FIELDS)} fields of {len(EventName)} events")


def test_the_twin_an_event_that_is_not_spelled_out_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from stability_search.cli import lines

    monkeypatch.setattr(lines, "inert", lambda raw, **_: raw)
    err = io.StringIO()
    plain = PlainLines(Sink(err))
    for event in events():
        plain.show(event)
    with pytest.raises(AssertionError):
        check_inert(err.getvalue())


@pytest.mark.parametrize("make", [stable_study, hopeless_study], ids=lambda f: f.__name__)
def test_the_last_lines_of_a_study_are_inert(make: type) -> None:
    pack = Pack(make(), HOSTILE_STRINGS)
    lines = verdict_lines(pack.report())
    check_inert("\n".join(lines))
    assert all("\n" not in line for line in lines)
    for name in (*TERMINAL, *UNSEEN):
        check_inert(next_step(Path(name.replace("\x00", "")), pack.case.verdict))


@pytest.mark.parametrize("chosen", list(Format))
def test_what_reading_commands_print_is_inert(
    chosen: Format, capfd: pytest.CaptureFixture[str]
) -> None:
    print_formatted(
        chosen,
        lines=HOSTILE_STRINGS,
        rows=[{text(1): one, text(2): [one]} for one in HOSTILE_STRINGS],
        document={"texts": list(HOSTILE_STRINGS), "names": dict.fromkeys(HOSTILE_STRINGS, 1)},
    )
    check_inert(capfd.readouterr().out)


def test_the_lines_of_doctor_are_inert() -> None:
    checks = [
        doctor.Check(name=text(i), state=doctor.State.WARN, found=text(i + 1), fix=text(i + 2))
        for i in range(len(HOSTILE_STRINGS))
    ]
    check_inert("\n".join(doctor.lines(checks)))


def test_errors_about_a_space_file_and_its_name_are_inert(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = [one for one in (*TERMINAL, *UNSEEN) if "\x00" not in one]
    for number, one in enumerate(names):
        path = tmp_path / f"{number}.yaml"
        path.write_bytes(f"task: {one}\n{one}: [{one}\n# {one}".encode("utf-8", "surrogatepass"))
        assert main(["validate", "--space", str(path)]) == 2
        assert main(["validate", "--space", one]) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    check_inert(shown.err)
