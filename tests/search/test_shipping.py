"""Which files of a task travel to other machines, and that nothing else does."""

import json
import sys
from pathlib import Path

import pytest

from stability_search.errors import UsageError
from stability_search.search import shipping
from stability_search.search.shipping import Cargo, digest_of, folder_files, pack, travelled
from stability_search.settings import TaskReference


def write(folder: Path, **files: str) -> None:
    """Write files; two underscores in a name stand for a folder."""
    for name, text in files.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def packed(folder: Path, task: TaskReference | None = None) -> Cargo:
    file = TaskReference(file=str(folder / "task.py"), class_name="T")
    return pack(task or file, import_path=folder)


def test_a_task_file_travels_with_what_it_imports_from_beside_it(tmp_path: Path) -> None:
    write(
        tmp_path,
        task="import json, near\nfrom deep.inner import value\ndef f():\n    import late\n",
        near="import far\nimport torch\n",
        far="",
        late="",
        deep__inner="value = 1\n",
        unused="raise SystemExit\n",
        json_like="",
    )
    (tmp_path / "deep" / "__init__.py").touch()
    (tmp_path / "deep" / "words.txt").write_text("data of the package\n")
    (tmp_path / "deep" / ".secret").touch()
    (tmp_path / "deep" / "__pycache__").mkdir()
    (tmp_path / "deep" / "__pycache__" / "x.pyc").touch()
    cargo = packed(tmp_path)
    expected = ["deep/__init__.py", "deep/inner.py", "deep/words.txt"]
    assert sorted(cargo.files) == [*expected, "far.py", "late.py", "near.py", "task.py"]
    assert cargo.folder == str(tmp_path)
    assert cargo.name == f"stability_search_task_{cargo.digest}"


def test_the_digest_follows_names_and_content_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, task="import near\n", near="")
    first = packed(tmp_path)
    write(tmp_path, other="1\n")
    assert packed(tmp_path).digest == first.digest
    write(tmp_path, near="1\n")
    assert packed(tmp_path).digest != first.digest
    (tmp_path / "near.py").unlink()
    assert packed(tmp_path).digest != first.digest


def test_the_copy_is_whole_and_has_the_same_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, task="import deep\n", deep__inner="1\n")
    (tmp_path / "deep" / "__init__.py").touch()
    cargo = packed(tmp_path)
    there = tmp_path / "there"
    root = cargo.write(there)
    assert digest_of(folder_files(root)) == cargo.digest
    assert travelled(cargo.name) is None
    monkeypatch.setattr(sys, "path", [*sys.path, str(there)])
    assert travelled(cargo.name) == root


def test_a_package_that_is_not_installed_travels_whole(tmp_path: Path) -> None:
    write(tmp_path, mine__tasks="class T: ...\n", mine__models__net="")
    (tmp_path / "mine" / "__init__.py").touch()
    cargo = packed(tmp_path, TaskReference(module="mine.tasks", class_name="T"))
    assert sorted(cargo.files) == ["mine/__init__.py", "mine/models/net.py", "mine/tasks.py"]
    assert cargo.folder == str(tmp_path)
    write(tmp_path, alone="class T: ...\n")
    alone = packed(tmp_path, TaskReference(module="alone", class_name="T"))
    assert list(alone.files) == ["alone.py"]


def test_what_is_installed_or_built_in_does_not_travel(tmp_path: Path) -> None:
    installed = packed(tmp_path, TaskReference(module="optuna.trial", class_name="T"))
    assert (dict(installed.files), installed.module) == ({}, "optuna")
    assert installed.digest == shipping.installed_digest("optuna")
    built_in = TaskReference(module="stability_search.tasks.teacher", class_name="Teacher")
    assert packed(tmp_path, built_in) == Cargo()
    missing = TaskReference(module="no_such_module_anywhere", class_name="T")
    assert packed(tmp_path, missing) == Cargo()
    assert shipping.installed_digest("no_such_module_anywhere") == ""


def test_more_than_the_limit_is_refused_with_the_largest_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "MAX_BYTES", 2**20)
    write(tmp_path, task="import deep\n", deep__inner="")
    (tmp_path / "deep" / "weights.bin").write_bytes(b"x" * (2**20 + 1))
    rule = (
        r"at most 1 MiB of a task's files travel to the nodes, but its 3 files have 1\.0 MiB; "
        r"the largest: .*weights\.bin \(1\.0 MiB\).*Move data out"
    )
    with pytest.raises(UsageError, match=rule):
        packed(tmp_path).refuse_large()
    (tmp_path / "deep" / "weights.bin").write_bytes(b"x")
    packed(tmp_path).refuse_large()
    assert str(packed(tmp_path)) == "3 files (0.0 KiB)"


def test_a_file_that_is_no_python_travels_alone(tmp_path: Path) -> None:
    write(tmp_path, task="import near(\n", near="")
    assert list(packed(tmp_path).files) == ["task.py"]


def test_a_worker_reads_the_task_where_it_is_and_reports_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stability_search.search.worker import WorkerSettings, _unloaded

    write(tmp_path, task="")
    origin = 'a "home"'
    cargo = packed(tmp_path)
    settings = WorkerSettings(
        folder=str(tmp_path), import_path="", num_threads=1, report_s=1.0,
        cargo=cargo.name, cargo_from=origin,
    )  # fmt: skip
    with pytest.raises(FileNotFoundError, match="have not come to this node"):
        _unloaded(settings)
    root = cargo.write(tmp_path / "there")
    monkeypatch.setattr(sys, "path", [*sys.path, str(root.parent)])
    unloaded = _unloaded(settings)
    order = {"config": {"task": {"file": "/a/task.py"}}, "preflight": [{"task": {"file": ""}}]}
    here = json.loads(unloaded.here(json.dumps(order)))
    assert here["config"]["task"]["file"] == str(root / "task.py")
    assert here["preflight"] == order["preflight"]
    text = json.dumps({"error_place": f"{root}/task.py:3"})
    assert json.loads(unloaded.there(text)) == {"error_place": f"{origin}/task.py:3"}
