"""What the page for users says holds: its commands, its tables, and the pages it leads to."""

import re
import shlex
from pathlib import Path

import pytest

from stability_search.cli.commands import parse
from stability_search.cluster import kuberay, naming, parcel, submitting

PAGE = Path(parcel.__file__).with_name("README.md")
TEXT = PAGE.read_text()
COMMANDS = sorted(set(re.findall(r"^(stability-search .*?)(?: > .*)?$", TEXT, re.MULTILINE)))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_is_one_of_ours(command: str) -> None:
    assert callable(parse(shlex.split(command)[1:]))


def test_the_page_shows_every_step() -> None:
    assert {command.split()[1] for command in COMMANDS} == {"submit", "status", "fetch"}
    for scheduler, handed_over in (("kuberay", "kubectl apply -f"), ("slurm", "sbatch")):
        assert f"--emit {scheduler}" in TEXT
        assert f"\n{handed_over} study." in TEXT
    for command in ("logs", "stop"):
        assert f"`{command} NAME" in TEXT


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_a_link_leads_somewhere(link: str) -> None:
    assert (PAGE.parent / link).is_file()


@pytest.mark.parametrize("link", re.findall(r"\]\(#([^)]+)\)", TEXT))
def test_a_link_within_the_page_leads_to_a_heading(link: str) -> None:
    headings = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    assert link in {heading.lower().replace(" ", "-") for heading in headings}


def test_the_pages_beside_it_are_led_to() -> None:
    assert {"SCALING.md", "SECURITY.md"} <= set(re.findall(r"\]\(([^)#]+)\)", TEXT))


def test_the_numbers_of_the_page_are_those_of_the_code() -> None:
    assert f"At most {parcel.MAX_MIB} MiB may be sent" in TEXT
    assert f"up to {kuberay.MAX_INPUT_BYTES // 10**6} MB" in TEXT
    assert f"`{submitting.RUNS_FOLDER}/NAME/`" in TEXT
    assert f"`{naming.attempt_id('NAME', 2)}`" in TEXT
