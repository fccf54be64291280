"""The files of a task on their way to other machines."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from stability_search.errors import UsageError
from stability_search.neighbours import files_in
from stability_search.search import shipping
from stability_search.search.shipping import Cargo, digest_of, pack, travelled
from stability_search.settings.trial import TaskReference


def write(folder: Path, **files: str) -> None:
    """Write files; two underscores in a name stand for a folder."""
    for name, text in files.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def packed(folder: Path, task: TaskReference | None = None) -> Cargo:
    file = TaskReference(file=str(folder / "task.py"), class_name="T")
    return pack(task or file, import_path=folder)


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
    assert digest_of(files_in(root)) == cargo.digest
    assert travelled(cargo.name) is None
    monkeypatch.setattr(sys, "path", [*sys.path, str(there)])
    assert travelled(cargo.name) == root


def test_what_is_installed_or_built_in_does_not_travel(tmp_path: Path) -> None:
    installed = packed(tmp_path, TaskReference(module="optuna.trial", class_name="T"))
    assert (dict(installed.files), installed.module) == ({}, "optuna")
    assert installed.digest == shipping.installed_digest("optuna") != ""
    built_in = TaskReference(module="stability_search.tasks.teacher", class_name="Teacher")
    assert packed(tmp_path, built_in) == Cargo()
    missing = TaskReference(module="no_such_module_anywhere", class_name="T")
    assert packed(tmp_path, missing) == Cargo()
    assert shipping.installed_digest("no_such_module_anywhere") == ""


def test_what_git_ignores_does_not_travel_and_is_said(tmp_path: Path) -> None:
    write(tmp_path, task="import near, deep.inner\n", near="", deep__inner="")
    whole = packed(tmp_path)
    (tmp_path / "deep" / "token.key").touch()
    (tmp_path / ".gitignore").write_text("near.py\n")
    cargo = packed(tmp_path)
    assert sorted(cargo.files) == ["deep/inner.py", "task.py"]
    imported, secret = cargo.notes
    assert "near.py (git ignores it)" in imported
    assert "deep/token.key" in secret
    assert (whole.notes, whole.digest == cargo.digest) == ((), False)


def test_more_than_the_limit_is_refused(tmp_path: Path) -> None:
    write(tmp_path, task="import deep\n", deep__inner="")
    large = tmp_path / "deep" / "weights.bin"
    large.touch()
    assert str(packed(tmp_path)) == "3 files (0.0 KiB)"
    packed(tmp_path).refuse_unsendable()
    os.truncate(large, 2**40)  # a hole
    with pytest.raises(UsageError, match=r"at most 50 MiB .*weights\.bin .*Move data out"):
        packed(tmp_path).refuse_unsendable()


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


def test_a_study_says_what_goes_to_every_node_and_what_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stability_search.search import study

    class Inspector:
        def __init__(self, *_: object, **__: object) -> None: ...

        def check_all(self, *_: object) -> str:
            return "alike"

    monkeypatch.setattr(study, "Inspector", Inspector)
    write(tmp_path, task="import near\n", near="")
    (tmp_path / ".gitignore").write_text("near.py\n")
    said: list[str] = []
    fake = SimpleNamespace(device="cpu", num_unplaced=0, nodes=None, check=None)
    inspect = study._inspect  # noqa: SLF001 - the rest of it needs a cluster
    inspect(fake, packed(tmp_path), fake, said.append, fake)  # type: ignore[arg-type]
    assert [text.partition(" (")[0] for text in said] == [
        "1 file", "imported, but not sent: near.py", "alike",
    ]  # fmt: skip
