import os

import pytest

from stability_search.cli.printing import folded

LONG = "warning: a typical update was 0.0137 of its weights in size (alarm at 0.01)"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_lines_are_broken_between_words_for_a_terminal_alone(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((40, 20)))

    lines = folded(["short", "", LONG])

    if not is_terminal:
        assert lines == ["short", "", LONG]
        return
    assert lines == [
        *("short", "", "warning: a typical update was 0.0137 of"),
        "  its weights in size (alarm at 0.01)",
    ]
