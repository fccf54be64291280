"""One finished run that every comparison begins with, and copies of it to spoil."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stability_search.comparison.sides import Side, read_side
from tests.comparison.run_files import with_lower_floor, write_run
from tests.study_rows import stable_study


@pytest.fixture(scope="session")
def stable_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with a choice, its five seeds and their step files; nobody writes to it."""
    return write_run(tmp_path_factory.mktemp("stable") / "run", stable_study())


@pytest.fixture(scope="session")
def stable_side(stable_run: Path) -> Side:
    """Return what is read of that run."""
    return read_side(stable_run)


@pytest.fixture(scope="session")
def lower_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same run, but that one trial of another configuration got much further."""
    case = with_lower_floor(stable_study())
    return write_run(tmp_path_factory.mktemp("lower") / "run", case)


@pytest.fixture(scope="session")
def lower_side(lower_run: Path) -> Side:
    """Return what is read of that one."""
    return read_side(lower_run)


@pytest.fixture
def copied(stable_run: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return what makes a copy of that run under a name."""
    return lambda name: Path(shutil.copytree(stable_run, tmp_path / name))
