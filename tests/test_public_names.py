"""What `import stability_search` offers, and what it costs nothing to offer."""

import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

import stability_search
from stability_search.settings.engine import EngineSettings

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    "AlarmSettings",
    "AlarmWatch",
    "EngineSettings",
    "GuardedEngine",
    "cap_logits",
    "read_run",
    "run",
)


def test_the_public_names_are_these() -> None:
    assert sorted(stability_search.__all__) == sorted([*NAMES, "__version__"])
    assert set(stability_search.__all__) <= set(dir(stability_search))


def test_every_public_name_loads() -> None:
    for name in NAMES:
        assert callable(getattr(stability_search, name))
    assert stability_search.EngineSettings is EngineSettings


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"'stability_search' has no attribute 'guard'"):
        _ = stability_search.guard


def test_a_name_is_loaded_on_first_use_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("stability_search.run_tables")
    fake.read_run = lambda run: run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stability_search.run_tables", fake)
    monkeypatch.delitem(stability_search.__dict__, "read_run", raising=False)

    assert stability_search.read_run("a run") == "a run"
    monkeypatch.delitem(stability_search.__dict__, "read_run")


def test_importing_the_package_imports_nothing_else_of_ours() -> None:
    code = (
        "import sys, stability_search;"
        "print(*sorted(name for name in sys.modules if name.startswith('stability_search')))"
    )
    done = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["stability_search"]


def test_the_version_is_the_one_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert stability_search.__version__ == project["version"]


def test_the_distribution_ships_every_package() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    modules = (ROOT / "stability_search").rglob("*.py")
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in modules}
    assert sorted(setuptools["packages"]) == sorted({*folders, "stability_search.search_spaces"})
    assert setuptools["package-dir"]["stability_search.search_spaces"] == "search_spaces"
