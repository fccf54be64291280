"""What the page for users says holds: its commands, its tables, and the pages it leads to."""

import re
import shlex
from pathlib import Path

import pytest

from stability_search.cli.commands import parse
from stability_search.cluster import naming, parcel, submitting

PAGE = Path(parcel.__file__).with_name("README.md")
TEXT = PAGE.read_text()
COMMANDS = sorted(set(re.findall(r"^stability-search .*$", TEXT, re.MULTILINE)))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_one_of_ours(command: str) -> None:
    assert callable(parse(shlex.split(command)[1:]))


def test_the_page_shows_every_step() -> None:
    assert {command.split()[1] for command in COMMANDS} == {"submit", "status", "fetch"}
    for command in ("logs", "stop"):
        assert f"`{command} NAME" in TEXT


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_a_link_leads_somewhere(link: str) -> None:
    assert (PAGE.parent / link).is_file()


def test_the_numbers_of_the_page_are_those_of_the_code() -> None:
    assert f"At most {parcel.MAX_MIB} MiB may be sent" in TEXT
    assert f"`{submitting.RUNS_FOLDER}/NAME/`" in TEXT
    assert f"`{naming.attempt_id('NAME', 2)}`" in TEXT
