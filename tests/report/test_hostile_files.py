"""Hostile text in the files of a run: Markdown without form, cells without formulas."""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from stability_search import space as spaces
from stability_search import spreadsheet
from stability_search.inert import is_in_sight, markdown, markdown_code
from stability_search.report import render_markdown
from stability_search.space import SpaceError, writing
from stability_search.space.tree import UNPRINTABLE
from stability_search.table import to_csv
from tests.hostile_strings import HOSTILE_STRINGS, tame_strings
from tests.report.packed_reports import Pack
from tests.study_rows import StudyCase, hopeless_study, interrupted_study, stable_study

MAKERS = [stable_study, hopeless_study, interrupted_study]
FORMULA = re.compile("[\\s\x00\u200b\ufeff]*[=+@|%\t\r\\-\uff0b\uff0d\uff1d\uff20]")


def structure(text: str) -> Counter[str]:
    """Return what a renderer makes of Markdown, without its texts."""
    renderer = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    return Counter(
        part.type
        for token in renderer.parse(text)
        for part in ([token] if token.children is None else token.children)
        if part.type not in {"text", "text_special", "softbreak", "hardbreak"}
    )


@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_markdown_gives_no_text_form(make: Callable[[], StudyCase]) -> None:
    hostile = render_markdown(Pack(make(), HOSTILE_STRINGS).report())
    tame = render_markdown(Pack(make(), tame_strings()).report())
    assert structure(hostile) == structure(tame)
    assert is_in_sight(hostile.replace("\n", ""))


@pytest.mark.parametrize("before", ["", "- ", "## ", "| a |\n|---|\n| "], ids=ascii)
def test_each_text_is_only_text_wherever_it_stands(before: str) -> None:
    with_text = structure(f"{before}x")
    for text in HOSTILE_STRINGS:
        assert structure(f"{before}x {markdown(text)}") == with_text, ascii(text)
        assert structure(before + markdown(text)) <= with_text, ascii(text)


def test_no_text_leaves_its_code_span() -> None:
    for text in HOSTILE_STRINGS:
        found = structure(f"x {markdown_code(text)} y")
        assert set(found) <= {"paragraph_open", "paragraph_close", "code_inline"}, ascii(text)
        assert found["code_inline"] == bool(text.strip()), ascii(text)


def test_the_twin_text_as_it_is_takes_form() -> None:
    formed = [text for text in HOSTILE_STRINGS if structure(f"x {text}") != structure("x")]
    assert len(formed) > 40


def cells(text: str) -> list[str]:
    return [cell for row in csv.reader(io.StringIO(text, newline="")) for cell in row]


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_no_cell_of_a_spreadsheet_is_a_formula(make: Callable[[], StudyCase]) -> None:
    tables = Pack(make(), HOSTILE_STRINGS).report().tables
    for frame in (tables.trials, tables.configurations):
        text = to_csv(frame)
        assert is_in_sight(text.replace("\n", ""))
        assert text.count("\n") == len(frame) + 1
        found = cells(text)
        assert [c for c in found if FORMULA.match(c) and not is_number(c)] == []
        assert len(found) % len(frame.columns) == 0  # no text opened a cell or a row


def test_the_twin_a_formula_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreadsheet, "_FORMULA_START", re.compile("(?!)"))
    tables = Pack(stable_study(), HOSTILE_STRINGS).report().tables
    found = cells(to_csv(tables.trials))
    assert len({c for c in found if FORMULA.match(c) and not is_number(c)}) > 8


def test_a_space_file_with_hostile_values_is_written_and_read_back(tmp_path: Path) -> None:
    texts = [text for text in HOSTILE_STRINGS if not UNPRINTABLE.search(text)]  # refused
    names = [text for text in texts if len(text) < 1000]  # YAML's longest key is of 1,024
    values = {f"note{i}": text for i, text in enumerate(texts)}
    given = {
        "task": "package.module:Class",
        "task_args": {"texts": texts, "names": dict.fromkeys(names, 1)},
        "fixed": {"learning_rate": 1e-3, **values},
    }
    path, best = tmp_path / "hostile.yaml", tmp_path / "best.yaml"
    path.write_text(writing.to_yaml(given), encoding="utf-8")
    first = spaces.load(str(path), ())
    comment = "\n".join(f"{text}\nfixed: {text}" for text in HOSTILE_STRINGS)
    written = spaces.best_yaml(first, first.fixed, comment)
    assert is_in_sight(written.replace("\n", ""))
    best.write_text(written, encoding="utf-8")
    again = spaces.load(str(best), ())
    assert {name: again.fixed[name] for name in values} == values
    assert again.task_args == first.task_args == given["task_args"]


def test_the_twin_values_that_are_not_quoted_do_not_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_word", lambda text: text)
    values = {"learning_rate": 1e-3, "note": "!!python/object/apply:os.system [id]"}
    path = tmp_path / "bare.yaml"
    path.write_text(writing.to_yaml({"task": "package.module:Class", "fixed": values}))
    with pytest.raises(SpaceError, match="tag"):
        spaces.load(str(path), ())
