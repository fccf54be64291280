"""Three forms of one finding: nothing in them acts on a terminal or runs in a spreadsheet."""

import csv
import io
import json
import math

import pytest

from stability_search.cli.formats import Format, print_formatted
from stability_search.records.values import Json
from tests.hostile_strings import HOSTILE_STRINGS

ROWS: list[dict[str, Json]] = [
    {"name": "q", "value": 0.5, "count": 3, "is_stable": True, "more": [1, {"a": None}]},
    {"name": "none", "value": None, "count": 0, "is_stable": False, "more": {}},
]


def printed(
    capfd: pytest.CaptureFixture[str],
    chosen: Format,
    *,
    lines: tuple[str, ...] = (),
    rows: list[dict[str, Json]] | None = None,
    document: Json = None,
) -> str:
    print_formatted(chosen, lines=lines, rows=rows or [], document=document)
    out, err = capfd.readouterr()
    assert err == ""
    return out


def test_a_table_is_the_lines(capfd: pytest.CaptureFixture[str]) -> None:
    out = printed(capfd, Format.TABLE, lines=("one", "two"), rows=ROWS, document=1)
    assert out == "one\ntwo\n"


def test_json_is_the_document(capfd: pytest.CaptureFixture[str]) -> None:
    document: Json = {"a": [1, None, 0.1], "b": "caf\u00e9"}
    out = printed(capfd, Format.JSON, lines=("one",), rows=ROWS, document=document)
    assert json.loads(out) == document
    assert out.startswith('{\n  "a": [')


def test_csv_is_the_rows_with_their_keys_on_top(capfd: pytest.CaptureFixture[str]) -> None:
    out = printed(capfd, Format.CSV, lines=("one",), rows=ROWS, document=1)
    assert list(csv.reader(io.StringIO(out))) == [
        ["name", "value", "count", "is_stable", "more"],
        ["q", "0.5", "3", "True", '[1, {"a": null}]'],
        ["none", "", "0", "False", "{}"],
    ]


def test_csv_of_nothing_is_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert printed(capfd, Format.CSV, rows=[]) == ""
    assert printed(capfd, Format.TABLE) == ""


@pytest.mark.parametrize("chosen", Format)
def test_no_text_acts_on_a_terminal(chosen: Format, capfd: pytest.CaptureFixture[str]) -> None:
    texts = [*HOSTILE_STRINGS, *map(chr, (*range(32), *range(127, 160))), "\ud800", "a\u202eb"]
    rows: list[dict[str, Json]] = [
        {"value": text, text: text, "list": [text, {text: text}]} for text in texts
    ]
    for row, text in zip(rows, texts, strict=True):
        out = printed(capfd, chosen, lines=(text,), rows=[row], document=dict(row))
        assert all(character.isprintable() or character == "\n" for character in out), text
        if chosen is Format.TABLE:
            assert out.count("\n") == 1
        if chosen is Format.JSON:
            assert json.loads(out) == row
        if chosen is Format.CSV:
            assert len(list(csv.reader(io.StringIO(out)))) == 2


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", " =1", "|cmd", "%x"])
def test_no_cell_is_a_formula(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    out = printed(capfd, Format.CSV, rows=[{text: text}])
    assert list(csv.reader(io.StringIO(out))) == [[f"'{text}"], [f"'{text}"]]


def test_a_negative_number_is_no_formula(capfd: pytest.CaptureFixture[str]) -> None:
    assert printed(capfd, Format.CSV, rows=[{"value": -1.5, "n": -2}]) == "value,n\n-1.5,-2\n"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("chosen", [Format.JSON, Format.CSV])
def test_a_number_that_is_not_finite_is_refused_before_anything_is_printed(
    chosen: Format, number: float, capfd: pytest.CaptureFixture[str]
) -> None:
    for value in (number, [number], {"a": number}):
        rows: list[dict[str, Json]] = [{"value": 1.0}, {"value": value}]  # type: ignore[dict-item]
        with pytest.raises(ValueError, match="Out of range float values"):
            print_formatted(chosen, lines=(), rows=rows, document=value)  # type: ignore[arg-type]
    assert capfd.readouterr().out == ""
