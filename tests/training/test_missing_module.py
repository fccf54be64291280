"""A task in a package: a training is begun and goes on only where the package is found."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stability_search.errors import UsageError
from stability_search.space import load
from stability_search.tasks.loading import forget_tasks
from stability_search.training.command import begin, go_on
from tests.training.world import TINY

SPACE = """
task: trained_lm.tiny:Tiny
trial: {steps: 20}
fixed: {learning_rate: 0.01, batch_size: 8, precision: fp32, clip_norm: 1.0}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a folder that holds a package; the present folder is another one."""
    package = tmp_path / "home" / "trained_lm"
    package.mkdir(parents=True)
    (package / "tiny.py").write_text(TINY.read_text())
    (package / "__init__.py").write_text("")
    (package.parent / "one.yaml").write_text(SPACE)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setattr(sys, "path", [*sys.path])
    forget_tasks()
    yield package.parent
    forget_tasks()
    forget_package()


def forget_package() -> None:
    for name in ("trained_lm.tiny", "trained_lm"):
        sys.modules.pop(name, None)


def test_nothing_is_begun_where_the_package_is_not_found(home: Path) -> None:
    with pytest.raises(UsageError, match=rf"Call this from {home}, which holds `trained_lm`"):
        begin(load(home / "one.yaml"), num_steps=4)
    assert [*Path.cwd().iterdir()] == []


@pytest.mark.fault
def test_a_training_does_not_go_on_where_the_package_is_not_found(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.chdir(home)
    sys.path.append(str(home))
    begin(load("one.yaml"), num_steps=4, output=out)
    sys.path.remove(str(home))
    forget_package()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(UsageError, match=rf"Call this from {home}, which holds `trained_lm`"):
        go_on(out, num_steps=6)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    sys.path.append(str(home))  # the twin
    assert go_on(out, num_steps=6).exit_code == 0
