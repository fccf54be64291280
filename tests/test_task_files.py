"""Which files of a task are sent, and that nothing else is."""

import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from stability_search import neighbours
from stability_search.errors import UsageError
from stability_search.ignoring import Why
from stability_search.neighbours import modules_around
from stability_search.settings.trial import TaskReference
from stability_search.task_files import (
    TaskFiles,
    content_of,
    files_of_installed,
    files_of_task,
    refuse_unsendable,
)


def write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def found_of(folder: Path, module: str = "") -> TaskFiles:
    """Return the files of `task.py` in a folder, or of a module there."""
    task = TaskReference(
        file="" if module else str(folder / "task.py"), module=module, class_name="T"
    )
    found = files_of_task(task, import_path=folder)
    assert found is not None
    return found


def test_a_file_needs_what_it_imports_from_beside_it(tmp_path: Path) -> None:
    needed = {
        "task.py": "import json, near\nfrom deep.inner import value\ndef f():\n    import late\n",
        "near.py": "import far\nimport torch\n",
        "far.py": "import task\n",
        "late.py": "",
        "both.py": "",
        "deep/__init__.py": "import both\n",
        "deep/inner.py": "value = 1\n",
        "deep/words.txt": "data of the package\n",
    }
    others = {
        "unused.py": "raise SystemExit\n",
        "json_like.py": "",
        "torch/weights.bin": "data that is called like a module\n",
        "both/script.py": "no package, and a module of that name",
        "deep/.hidden": "",
        "deep/__pycache__/x.pyc": "",
        "space.yaml": "",
    }
    write(tmp_path, needed | others)

    found = found_of(tmp_path)

    assert found.files == {name: tmp_path / name for name in needed}
    assert (found.folder, found.module, found.notes()) == (str(tmp_path), "", ())
    around = modules_around(tmp_path / "task.py", tmp_path)
    assert {"task.py": tmp_path / "task.py", **around} == found.files


def test_what_is_not_beside_a_task_is_taken_from_where_a_command_is_called(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "models/task.py": "import near\nfrom models.net import Net\nimport work.deep\n",
            "models/near.py": "import settings\n",
            "models/net.py": "",
            "models/secret.key": "",
            "near.py": "shadowed by the one beside the task",
            "settings.py": "",
            "work/deep.py": "",
            "unused.py": "",
        },
    )
    task = TaskReference(file=str(tmp_path / "models" / "task.py"), class_name="T")

    found = files_of_task(task, import_path=tmp_path)

    assert found is not None
    assert found.files == {
        "task.py": tmp_path / "models" / "task.py",
        "near.py": tmp_path / "models" / "near.py",
        **{
            name: tmp_path / name
            for name in (
                *("models/task.py", "models/near.py", "models/net.py"),
                *("settings.py", "work/deep.py"),
            )
        },
    }
    assert {"task.py", *modules_around(Path(task.file), tmp_path)} == {
        *(*found.files, "models/secret.key")
    }
    assert [*found.held_back] == ["models/secret.key"]


def test_what_is_kept_back_where_a_command_is_called_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"tasks/task.py": "import own.net", "own/net.py": "", ".gitignore": "/own\n"})
    (tmp_path / ".git").mkdir()
    task = TaskReference(file=str(tmp_path / "tasks" / "task.py"), class_name="T")

    found = files_of_task(task, import_path=tmp_path)

    assert found is not None
    assert [*found.files] == ["task.py"]
    assert found.notes()[0].startswith("imported, but not sent: own (git ignores it). ")


def test_what_is_imported_from_elsewhere_is_named_unless_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imports = "import acme_of_ours.net, json, torch, commn_of_ours, near, stability_search"
    write(tmp_path, {"here/task.py": imports, "here/near.py": "", "there/acme_of_ours/net.py": ""})
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "there")])

    found = found_of(tmp_path / "here")

    assert sorted(found.files) == ["near.py", "task.py"]
    nowhere, loose = found.notes()
    assert nowhere.startswith(
        "imported, but found neither beside it, in this folder nor installed:"
    )
    assert ": commn_of_ours. " in nowhere
    assert loose.startswith(
        f"imported from Python's path, and not sent: acme_of_ours ({tmp_path / 'there'}). Install"
    )


def test_folders_without_init_files_may_lie_in_each_other(tmp_path: Path) -> None:
    write(tmp_path, {"task.py": "from outer.middle.inner.net import Net", "data/a/b.py": ""})
    write(tmp_path, {"outer/middle/inner/net.py": "import data", "outer/words.txt": ""})
    names = {"task.py", "outer/middle/inner/net.py", "outer/words.txt"}
    assert {*found_of(tmp_path).files} == names  # `data` holds no module that is imported


def test_of_modules_of_one_name_those_are_taken_that_python_takes(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "tasks/task.py": "import models.net, parts.one, parts.two",
            "tasks/models/plot.py": "no package: the one with `__init__.py` is taken",
            "models/__init__.py": "",
            "models/net.py": "",
            "tasks/parts/one.py": "",
            "parts/two.py": "",
        },
    )
    task = TaskReference(file=str(tmp_path / "tasks" / "task.py"), class_name="T")
    found = files_of_task(task, import_path=tmp_path)
    assert found is not None
    places = ["models/__init__.py", "models/net.py", "parts/two.py", "tasks/parts/one.py"]
    assert sorted(map(str, found.files.values())) == [
        str(tmp_path / name) for name in (*places, "tasks/task.py")
    ]


@pytest.mark.parametrize("marker", ["study.db", "train.json", "environment.json"])
def test_run_directories_are_no_part_of_a_package(tmp_path: Path, marker: str) -> None:
    write(tmp_path, {"task.py": "import pack.net", "pack/net.py": "", "pack/runs/1/task.py": ""})
    write(tmp_path, {f"pack/runs/1/{marker}": "", "pack/own/__init__.py": "", "pack/own/x.py": ""})
    write(tmp_path, {f"pack/own/{marker}": "a package may hold such a file"})
    assert sorted(found_of(tmp_path).files) == sorted(
        ["pack/net.py", "pack/own/__init__.py", f"pack/own/{marker}", "pack/own/x.py", "task.py"]
    )


@pytest.mark.parametrize("has_init", [True, False])
def test_a_folder_that_is_no_package_yields_to_an_installed_one(
    tmp_path: Path, has_init: bool
) -> None:
    write(tmp_path, {"task.py": "import optuna.trial", "optuna/kept.py": ""})
    if has_init:
        write(tmp_path, {"optuna/__init__.py": ""})

    names = {"optuna/__init__.py", "optuna/kept.py"} if has_init else set()
    assert {*found_of(tmp_path).files} == {"task.py", *names}


@pytest.mark.parametrize("text", ["import near(\n", "\0", "from . import near\n", "x = '\\d'\n"])
def test_a_file_that_imports_nothing_goes_alone(tmp_path: Path, text: str) -> None:
    write(tmp_path, {"task.py": text, "near.py": ""})
    assert [*found_of(tmp_path).files] == ["task.py"]


def test_a_file_that_is_too_large_to_be_source_is_not_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"task.py": "import near", "near.py": ""})
    monkeypatch.setattr(neighbours, "_MAX_SOURCE_BYTES", len("import near"))
    assert sorted(found_of(tmp_path).files) == ["near.py", "task.py"]
    monkeypatch.setattr(neighbours, "_MAX_SOURCE_BYTES", len("import near") - 1)
    assert [*found_of(tmp_path).files] == ["task.py"]


def test_a_module_or_package_goes_with_what_it_imports_from_beside_it(tmp_path: Path) -> None:
    pack = {
        "pack/__init__.py": "",
        "pack/tasks.py": "import near\nfrom .models import net\n",
        "pack/models/net.py": "",
        "pack/weights.bin": "data",
    }
    write(tmp_path, {**pack, "near.py": "", "alone.py": "import pack\n", "setup.py": ""})

    assert sorted(found_of(tmp_path, "pack.tasks").files) == sorted([*pack, "near.py"])
    assert sorted(found_of(tmp_path, "alone").files) == sorted([*pack, "near.py", "alone.py"])
    assert found_of(tmp_path, "pack.tasks").folder == str(tmp_path)


def test_a_package_may_lack_its_init_file(tmp_path: Path) -> None:
    write(tmp_path, {"task.py": "import pack.sub.a", "pack/sub/__init__.py": "", "b/c.py": ""})
    write(tmp_path, {"pack/sub/a.py": "import b.c"})
    names = ["b/c.py", "pack/sub/__init__.py", "pack/sub/a.py"]

    assert sorted(found_of(tmp_path).files) == [*names, "task.py"]
    assert sorted(found_of(tmp_path, "pack.sub.a").files) == names


def test_what_is_installed_or_built_in_is_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"site-packages/other/tasks.py": ""})
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site-packages")])

    for module in ("optuna.trial", "json", "other.tasks"):
        assert found_of(tmp_path, module) == TaskFiles(module=module.partition(".")[0])
    assert found_of(tmp_path, "stability_search.tasks.teacher") == TaskFiles()
    assert [*files_of_installed("other")] == ["tasks.py"]
    monkeypatch.setitem(sys.modules, "made_by_hand", ModuleType("made_by_hand"))
    for module in ("sys", "no_such_module", "made_by_hand"):
        task = TaskReference(module=module, class_name="T")
        assert files_of_task(task, import_path=tmp_path) is None
    assert files_of_installed("no_such_module") == {}


def test_a_module_that_only_a_hook_of_python_finds_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Find a package as installed by `pip install --editable`."""
    write(tmp_path, {"checkout/pack/__init__.py": "", "checkout/pack/tasks.py": ""})
    package = tmp_path / "checkout" / "pack"

    class Hook:
        @staticmethod
        def find_spec(name: str, *_: object) -> ModuleSpec | None:
            init = package / "__init__.py"
            return spec_from_file_location(name, init) if name == "pack" else None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Hook])
    assert sorted(found_of(tmp_path, "pack.tasks").files) == ["pack/__init__.py", "pack/tasks.py"]


def test_what_is_imported_and_stays_is_named_with_the_reason(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            ".gitignore": "local.py\n/own/data/\n/private/\nfast.*\nunused.py\n",
            "task.py": "import own, local, link, private.a, id_rsa_x\nfrom own import words\n",
            "local.py": "import far\n",
            "far.py": "",
            "unused.py": "",
            "id_rsa_x.py": "",
            "elsewhere/x.py": "",
            "private/__init__.py": "",
            "private/a.py": "",
            "own/__init__.py": "from .fast import f\nfrom . import data\n",
            "own/fast.abi3.so": "",
            "own/data/large.bin": "data",
            "own/token.key": "",
            "own/words.txt": "",
        },
    )
    (tmp_path / "link.py").symlink_to(tmp_path / "elsewhere" / "x.py")

    found = found_of(tmp_path)

    assert sorted(found.files) == ["own/__init__.py", "own/words.txt", "task.py"]
    assert found.held_back["own/data"] is Why.IGNORED
    imported, secret = found.notes()
    assert imported.startswith("imported, but not sent: id_rsa_x.py (it is named like a password ")
    for name in (
        "link.py (it is a link)",
        "local.py (git ignores it)",
        "private (git ignores it)",
    ):
        assert name in imported
    assert "own/fast.abi3.so" in imported
    assert "data" not in imported
    assert "unused" not in imported
    assert secret.startswith("not sent, as names of passwords and keys: own/token.key. ")
    assert "models/local.py (git ignores it)" in found.notes(Path("models"))[0]

    (tmp_path / ".gitignore").unlink()  # the twin
    assert {"local.py", "far.py", "private/a.py", "own/data/large.bin"} <= {
        *found_of(tmp_path).files
    }


def test_a_long_list_of_secrets_is_cut(tmp_path: Path) -> None:
    write(tmp_path, {"pack/tasks.py": "", **{f"pack/{n}.pem": "" for n in range(7)}})
    (note,) = found_of(tmp_path, "pack.tasks").notes()
    assert "keys: pack/0.pem, pack/1.pem, pack/2.pem, pack/3.pem, pack/4.pem and 2 more." in note


def test_a_secret_that_git_ignores_is_not_worth_a_note(tmp_path: Path) -> None:
    write(tmp_path, {"pack/tasks.py": "", "pack/.env": "x", "pack/.gitignore": ".env\n"})
    assert found_of(tmp_path, "pack.tasks").notes() == ()


def test_the_tasks_own_file_is_sent_whatever_git_ignores(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    write(
        tmp_path, {".gitignore": "task.py\n/pack/exp/\n", "task.py": "import near", "near.py": ""}
    )
    write(tmp_path, {"pack/exp/task.py": "import near", "pack/exp/a.py": "", "pack/b.py": ""})
    write(tmp_path, {"other/__init__.py": "from . import task", "other/task.py": ""})

    for module, own, rest in (
        ("", "task.py", ["near.py"]),
        ("pack.exp.task", "pack/exp/task.py", ["near.py", "pack/b.py"]),
        ("other.task", "other/task.py", ["other/__init__.py"]),
    ):
        found = found_of(tmp_path, module)
        assert sorted(found.files) == sorted([own, *rest])
        (note,) = found.notes()
        assert note == f"{own} is sent although git ignores it: it is the task's own file."


def test_a_package_that_git_ignores_is_sent_if_it_is_the_tasks_own(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    write(tmp_path, {".gitignore": "/pack/\n", "pack/task.py": "", "pack/a.py": ""})
    write(tmp_path, {"task.py": "import pack.a", "pack/.gitignore": "*.bin", "pack/x.bin": ""})

    assert sorted(found_of(tmp_path, "pack.task").files) == ["pack/a.py", "pack/task.py"]
    assert sorted(found_of(tmp_path).files) == ["task.py"]
    assert (
        found_of(tmp_path).notes()[0].startswith("imported, but not sent: pack (git ignores it)")
    )


def test_a_run_directory_that_git_ignores_is_sent_as_it_is(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    run = tmp_path / "reports" / "run"
    write(tmp_path, {".gitignore": "/reports/*/\n"})
    write(run, {"task.py": "import near, local", "near.py": "", "local.py": ""})
    assert sorted(found_of(run).files) == ["local.py", "near.py", "task.py"]
    assert found_of(run).notes() == ()

    write(run, {".gitignore": "/local.py\n"})  # as it was where the copies come from
    assert sorted(found_of(run).files) == ["near.py", "task.py"]


def test_a_task_file_may_be_a_link(tmp_path: Path) -> None:
    write(tmp_path, {"v3.py": "import near", "near.py": ""})
    (tmp_path / "task.py").symlink_to(tmp_path / "v3.py")
    assert sorted(found_of(tmp_path).files) == ["near.py", "task.py"]
    assert found_of(tmp_path).notes() == ()


def test_too_much_is_refused_with_the_largest_files_and_the_way_out(tmp_path: Path) -> None:
    write(tmp_path, {"task.py": "import pack", "pack/__init__.py": ""})
    os.truncate(tmp_path / "pack" / "__init__.py", 3 * 2**19)  # a hole
    files = found_of(tmp_path).files
    rule = (
        r"at most 1 MiB of a task's files may be sent, but it is 1\.5 MiB in 2 files "
        r"\(largest: pack/__init__\.py 1\.5 MiB, task\.py .*Leave it"
    )
    with pytest.raises(UsageError, match=rule):
        refuse_unsendable(files, max_mib=1, way_out="Leave it.")
    refuse_unsendable(files, max_mib=2, way_out="")


def test_a_file_that_cannot_be_sent_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"pack/tasks.py": ""})
    with open(os.fsencode(tmp_path) + b"/pack/\xff.py", "wb"):  # noqa: PTH123 - no text
        pass
    files = found_of(tmp_path, "pack.tasks").files
    with pytest.raises(UsageError, match="a name in UTF-8 is needed"):
        refuse_unsendable(files, max_mib=1, way_out="")
    gone = tmp_path / "gone.py"
    with pytest.raises(UsageError, match=r"gone\.py: .*cannot be read: No such file"):
        refuse_unsendable({"gone.py": gone}, max_mib=1, way_out="")
    with pytest.raises(UsageError, match=r"gone\.py: .*cannot be read: No such file"):
        content_of(gone)

    def iterdir(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(UsageError, match=r"pack: .*cannot be read: Permission denied"):
        found_of(tmp_path, "pack.tasks")
