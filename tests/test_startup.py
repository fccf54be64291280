"""Reading commands start fast because they load nothing heavy: seen in a fresh process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "ray", "pandas", "optuna", "plotly")
OF_SPACES = ("pydantic", "ruamel.yaml")  # what reads a space file
OF_PACKAGES = ("importlib.metadata",)  # what tells versions
SPACE = """
task: teacher
space:
  learning_rate: {loguniform: {low: 1e-4, high: 0.3}}
  precision: {choice: [fp32, fp16]}
"""
PROBE = """
import json, sys
from stability_search.cli import main
code = main(sys.argv[2:])
loaded = [name for name in sys.argv[1].split(",") if name in sys.modules]
print(json.dumps({"code": code, "loaded": loaded}), file=sys.stderr)
"""


def heavy_modules_of(
    *words: str,
    cwd: Path,
    before: str = "",
    path: str = "",
    code: int | None = 0,
    heavy: tuple[str, ...] = HEAVY,
) -> list[str]:
    done = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-c", before + PROBE, ",".join(heavy), *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (path, str(ROOT))))},
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stderr.splitlines()[-1])
    assert code is None or result["code"] == code, done.stderr
    assert done.stdout or code is None
    loaded: list[str] = result["loaded"]
    return loaded


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["run", "--help"],
        ["--version"],
        ["validate", "--space", "space.yaml"],
        ["schema"],
    ],
    ids=" ".join,
)
def test_reading_commands_load_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)

    assert heavy_modules_of(*words, cwd=tmp_path) == []


def test_help_needs_nothing_that_reads_space_files(tmp_path: Path) -> None:
    heavy = (*OF_SPACES, *OF_PACKAGES)

    assert heavy_modules_of("--help", cwd=tmp_path, heavy=heavy) == []


def test_the_twin_what_reads_a_space_file_is_seen(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)

    loaded = heavy_modules_of("validate", "--space", "space.yaml", cwd=tmp_path, heavy=OF_SPACES)

    assert loaded == list(OF_SPACES)


def run_directory_of(folder: Path) -> Path:
    """Make a run whose first trial has not ended, as the driver does."""
    from stability_search import space as spaces  # pydantic is for this test alone
    from stability_search.search import run_directory
    from stability_search.search.ledger import Ledger

    (folder / "space.yaml").write_text(SPACE)
    space = spaces.load(folder / "space.yaml")
    facts = run_directory.study_facts(space)
    run = run_directory.create(folder / "run", space, facts=facts, environment={})
    Ledger.create(run.ledger, facts).close()
    return run.path


def test_status_loads_nothing_heavy(tmp_path: Path) -> None:
    run = run_directory_of(tmp_path)

    assert heavy_modules_of("status", str(run), cwd=tmp_path) == []


@pytest.mark.fault
def test_comparing_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    run = str(run_directory_of(tmp_path))

    loaded = heavy_modules_of("compare", run, run, cwd=tmp_path, code=None)

    assert {"torch", "ray", "optuna", "plotly"}.isdisjoint(loaded)


@pytest.mark.fault
def test_reporting_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    run = str(run_directory_of(tmp_path))

    assert {"torch", "ray"}.isdisjoint(heavy_modules_of("report", run, cwd=tmp_path))


def test_completing_loads_nothing_heavy(tmp_path: Path) -> None:
    asked = {
        "_STABILITY_SEARCH_COMPLETE": "complete_bash",
        "COMP_WORDS": "stability-search run --space te",
        "COMP_CWORD": "3",
    }
    before = f"import os; os.environ.update({asked!r})\n"

    assert heavy_modules_of("run", cwd=tmp_path, before=before) == []


@pytest.mark.parametrize("name", HEAVY)
def test_the_twin_a_heavy_module_is_seen_when_it_is_loaded(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text("")

    loaded = heavy_modules_of(
        "--version", cwd=tmp_path, before=f"import {name}", path=str(tmp_path)
    )

    assert loaded == [name]
