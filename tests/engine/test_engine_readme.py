"""The engine's README does what it shows."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import stability_search.engine
from stability_search.records.step import StepLabel

FOLDER = Path(stability_search.engine.__file__).parent
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")
CODE = TEXT.split("```python\n")[1].split("```")[0]


@pytest.fixture
def loop() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(CODE, "README.md", "exec"), names)  # noqa: S102 - our own text
    return names


def windows(count: int) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        x = torch.randn(16, 8, generator=generator)
        made.append([(x, x.sum(1, keepdim=True))])
    return made


def test_the_loop_is_short() -> None:
    loop = CODE[CODE.index("def train(") :]
    assert sum(bool(line.strip()) for line in loop.splitlines()) <= 25


def test_the_loop_trains_and_resumes_bit_for_bit(loop: dict[str, Any], tmp_path: Path) -> None:
    data = windows(150)
    torch.manual_seed(0)
    whole = loop["train"](data, 150, tmp_path / "whole.pt")
    loop["train"](data, 120, tmp_path / "parts.pt")  # its last checkpoint is of step 100
    resumed = loop["train"](data, 150, tmp_path / "parts.pt")

    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))
    losses = [loop["loss_fn"](model, data[0][0]).item() for model in (loop["build"](), whole)]
    assert losses[1] < 0.3 * losses[0]


def test_the_loop_says_what_was_wrong_and_ends(
    loop: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = windows(5)
    data[2] = [(torch.full((16, 8), torch.nan), data[2][0][1])]
    loop["train"](data, 5, tmp_path / "state.pt")
    printed = capsys.readouterr().out
    assert printed == "WARNING step 3: data (NaN in batch[0])\n"

    broken = loop["build"]()
    with torch.no_grad():
        broken[0].weight.fill_(torch.nan)
    loop["build"] = lambda: broken
    with pytest.raises(SystemExit, match=r"CRITICAL .*nonfinite_parameters.*go back to"):
        loop["train"](data, 5, tmp_path / "other.pt")


def test_the_loop_prints_alarms_and_ends_the_run_where_an_epoch_is_lost(
    loop: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = windows(200)  # an epoch is 4 steps
    for step in (4, 5, 6):
        data[step] = [(torch.full((16, 8), torch.nan), data[step][0][1])]
    with pytest.raises(SystemExit, match=r"CRITICAL alarm; go back to"):
        loop["train"](data, 200, tmp_path / "state.pt")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == [
        "WARNING step 5",
        "WARNING step 6",
        "WARNING step 7",
        "CRITICAL step 7 epoch 2",
    ]


def test_a_checkpoint_is_whole_or_the_old_one(
    loop: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, checkpoint = windows(250), tmp_path / "state.pt"
    loop["train"](data, 150, checkpoint)
    before = checkpoint.read_bytes()

    def cut(_: Any, path: Path) -> None:
        path.write_bytes(before[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", cut)
        with pytest.raises(KeyboardInterrupt):
            loop["train"](data, 250, checkpoint)
    assert checkpoint.read_bytes() == before
    loop["train"](data, 250, checkpoint)


def test_every_label_is_explained() -> None:
    rows = TEXT.split("| label |")[1].split("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)`", rows, re.MULTILINE)) == sorted(StepLabel)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_every_link_leads_somewhere(link: str) -> None:
    assert (FOLDER / link).exists()
