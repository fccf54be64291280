"""What the top README shows can be run as it stands."""

import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from stability_search import space as spaces

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


def test_its_own_task_has_what_a_task_needs() -> None:
    names: dict[str, Any] = {}
    exec(compile(blocks("python")[0], "my_task.py", "exec"), names)  # noqa: S102 - our own text
    task = names["MyTask"]()
    model = task.model()

    batches = list(islice(task.batches(4, torch.Generator().manual_seed(0)), 3))
    assert len(batches) == 3
    for batch in (*batches, *task.probe()):
        assert torch.isfinite(task.loss(model, batch))
    first, again = task.probe(), task.probe()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))


def test_its_own_space_is_valid(tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text(blocks("python")[0])
    (tmp_path / "my_space.yaml").write_text(blocks("yaml")[0])

    space = spaces.load(tmp_path / "my_space.yaml")

    assert space.study.name == "my_space"
    assert [parameter.name for parameter in space.parameters] == [
        *("learning_rate", "precision", "clip_norm")
    ]


def test_reading_a_run_compiles() -> None:
    assert len(blocks("python")[1].splitlines()) == 4
    compile(blocks("python")[1], "README.md", "exec")


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_every_link_leads_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_its_own_task_gets_a_verdict_and_its_tables_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_task.py").write_text(blocks("python")[0])
    (tmp_path / "my_space.yaml").write_text(blocks("yaml")[0])
    command = [sys.executable, "-m", "stability_search", "run", "--space", "my_space.yaml"]
    finished = subprocess.run(  # noqa: S603 - what the README says
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("Stable over 200 steps")
    run = next((tmp_path / "reports").iterdir())
    monkeypatch.chdir(tmp_path)
    reading = re.sub(r'"reports/[^"]+"', f'"reports/{run.name}"', blocks("python")[1])
    exec(compile(reading, "README.md", "exec"), {})  # noqa: S102 - our own text
    assert "margin_octaves" in capsys.readouterr().out
