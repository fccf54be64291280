"""The README of `train` says what is there, and its commands do what it says."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import stability_search.training
from stability_search.cli import main
from stability_search.settings.engine import ENGINE_SETTING_NAMES
from stability_search.settings.trial import TRIAL_SETTING_NAMES
from stability_search.tasks.loading import forget_tasks
from stability_search.training import changes
from stability_search.training.layout import TrainDirectory
from tests.training.world import json_of, write_space

FOLDER = Path(stability_search.training.__file__).parent
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)[1:]
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    if not language
    for line in block.splitlines()
]


@pytest.mark.fault
def test_its_commands_do_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_space(tmp_path)
    begin, go_on, longer, from_best, wait = (
        [str(int(word) // 2500) if word.isdecimal() and int(word) > 2500 else word for word in one]
        for one in COMMANDS
    )
    assert main(begin) == 0
    run = tmp_path / "my_training"
    assert main(go_on) == 2, "nothing is left to do"
    assert "all 20 steps have been taken" in capsys.readouterr().err
    assert main(longer) == 0
    assert main([*from_best, "--steps", "40"]) == 0
    wait[wait.index("--advance-after") + 1] = "1"
    assert main([*wait, "--steps", "50"]) == 0
    firsts = [phase["first_step"] for phase in json_of(run)["phases"]]
    assert firsts[:2] == [1, 21]
    assert firsts[3:] == [41, 46], "longer at once, another rate after a calm epoch"

    code = TEXT.split("```python\n")[1].split("```")[0]
    name = max(path.name for path in (run / "checkpoints").iterdir())
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
    )
    exec(compile(code, "README.md", "exec"), {"name": name, "model": model})  # noqa: S102 - ours
    forget_tasks()


def test_every_file_is_named() -> None:
    directory = TrainDirectory(path=Path("x"))
    for path in (
        directory.state,
        directory.log,
        directory.curves,
        directory.checkpoints,
        directory.steps,
        directory.scalars,
        directory.space(1),
        directory.space(2),
    ):
        assert f"`{path.name}" in TEXT


def test_what_may_not_change_is_what_is_refused() -> None:
    table = TEXT.split("| may change | may not |")[1].split("\n\n")[0]
    refused = table.replace("| ", "|").splitlines()[2:]
    words = {word for row in refused for word in re.findall(r"`(\w+)`", row.split("|")[2])}
    assert words & {*ENGINE_SETTING_NAMES, *TRIAL_SETTING_NAMES} == set(changes._WHY_FIXED)  # noqa: SLF001 - the table is held to it


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT))
def test_every_link_leads_somewhere(link: str) -> None:
    assert (FOLDER / link).exists()
