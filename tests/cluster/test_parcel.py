"""What is sent to a cluster: the space file and the task's file or package, nothing else."""

import io
import os
import zipfile
from pathlib import Path

import pytest

from stability_search import space as spaces
from stability_search.cluster.ignoring import files_of
from stability_search.cluster.naming import attempt_id, checked_name, run_name
from stability_search.cluster.parcel import Parcel, make_parcel
from stability_search.errors import UsageError

SPACE = """\
name: small
task: {task}
space:
  learning_rate: {{loguniform: {{low: 1e-3, high: 0.1}}}}
"""
TASK = "class Mine:\n    def __init__(self, width: int = 4) -> None: ...\n"


def write_space(folder: Path, task: str = "./mine.py:Mine") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.py").write_text(TASK)
    path = folder / "small.yaml"
    path.write_text(SPACE.format(task=task))
    return path


def parcel_of(path: Path, *overrides: str, max_mib: float = 50) -> Parcel:
    return make_parcel(
        spaces.load(path, overrides), max_mib=max_mib, search_path=[str(path.parent)]
    )


def write_files(folder: Path, contents: dict[str, str]) -> None:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_a_task_in_a_file_is_sent_with_its_space_and_nothing_beside_it(tmp_path: Path) -> None:
    path = write_space(tmp_path)
    write_files(tmp_path, {"secret.env": "canary", "data/large.bin": "x", "other.py": ""})

    parcel = parcel_of(path, "trial.steps=40", "confirm.steps=50")

    assert sorted(parcel.files) == ["mine.py", "space.yaml"]
    assert parcel.files["mine.py"].decode() == TASK
    assert b"steps: 40" in parcel.files["space.yaml"]
    assert parcel.notes == ()
    assert parcel.num_bytes == sum(map(len, parcel.files.values()))


def test_the_archive_holds_just_that_and_is_the_same_whenever_it_is_made(tmp_path: Path) -> None:
    parcel = parcel_of(write_space(tmp_path))

    with zipfile.ZipFile(io.BytesIO(parcel.archive())) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == parcel.files
    os.utime(tmp_path / "mine.py", (1, 1))
    assert parcel_of(tmp_path / "small.yaml").archive() == parcel.archive()
    assert parcel_of(tmp_path / "small.yaml").package_name == parcel.package_name


def test_a_task_from_another_folder_is_named_as_its_copy(tmp_path: Path) -> None:
    write_space(tmp_path / "elsewhere")
    path = write_space(tmp_path / "here", task="../elsewhere/mine.py:Mine")

    parcel = parcel_of(path)

    assert sorted(parcel.files) == ["mine.py", "space.yaml"]
    assert b"task: ./mine.py:Mine" in parcel.files["space.yaml"]


def test_a_built_in_task_needs_its_space_file_only(tmp_path: Path) -> None:
    assert list(parcel_of(write_space(tmp_path, task="teacher")).files) == ["space.yaml"]


def test_a_file_that_imports_its_neighbour_is_warned_of(tmp_path: Path) -> None:
    path = write_space(tmp_path)
    (tmp_path / "layers.py").write_text("")
    (tmp_path / "mine.py").write_text(f"import math, layers\nfrom os import path\n{TASK}")

    (note,) = parcel_of(path).notes

    assert note.startswith("mine.py imports layers, which lies beside it and is not sent")


def test_a_package_is_sent_whole_without_what_gitignore_names(tmp_path: Path) -> None:
    path = write_space(tmp_path, task="pack.tasks:Mine")
    ignored = {"pack/data/a.bin": "x", "pack/sub/drop.log": "", "pack/__pycache__/a.pyc": ""}
    sent = {
        "pack/__init__.py": "",
        "pack/sub/.gitignore": "!keep.log\n",
        "pack/sub/a.py": "",
        "pack/sub/keep.log": "",
        "pack/tasks.py": TASK,
    }
    beside = {"other/a.py": "canary", ".gitignore": "data/\n*.log\n"}
    write_files(tmp_path, ignored | sent | beside)
    (tmp_path / "pack" / "link.py").symlink_to(tmp_path / "other" / "a.py")
    (tmp_path / ".git").mkdir()

    assert sorted(parcel_of(path).files) == [*sent, "space.yaml"]


def write_package(folder: Path, *names: str) -> Path:
    package = folder / "pack"
    write_files(package, dict.fromkeys(names, ""))
    (folder / ".git" / "info").mkdir(parents=True)
    return package


def sent_of(package: Path) -> list[str]:
    return [path.relative_to(package).as_posix() for path in files_of(package).sent]


def test_what_a_checkout_leaves_out_for_itself_is_not_sent(tmp_path: Path) -> None:
    package = write_package(tmp_path, "a.py", "local.txt", "notes/b.md", "kept.txt")
    (tmp_path / ".git" / "info" / "exclude").write_text("# mine\nlocal.txt\n/pack/notes/\n*.txt\n")
    (tmp_path / ".gitignore").write_text("!kept.txt\n")  # has the last word

    assert sent_of(package) == ["a.py", "kept.txt"]


def test_a_worktree_has_what_its_repository_leaves_out(tmp_path: Path) -> None:
    package = write_package(tmp_path / "repository", "x").parent / ".." / "tree" / "pack"
    package = package.resolve()
    write_files(package, {"a.py": "", "local.txt": ""})
    git = tmp_path / "repository" / ".git"
    write_files(git, {"info/exclude": "local.txt\n", "worktrees/tree/commondir": "../..\n"})
    (package.parent / ".git").write_text(f"gitdir: {git}/worktrees/tree\n")

    assert sent_of(package) == ["a.py"]


SECRETS = (".env", ".env.local", "prod.env", "key.pem", "sub/id_rsa", ".netrc", ".aws/config")


def test_files_of_secrets_are_not_sent_and_named(tmp_path: Path) -> None:
    path = write_space(tmp_path, task="pack.tasks:Mine")
    write_files(
        tmp_path / "pack", {"tasks.py": TASK, "environment.py": "", **dict.fromkeys(SECRETS, "x")}
    )

    parcel = parcel_of(path)

    assert sorted(parcel.files) == ["pack/environment.py", "pack/tasks.py", "space.yaml"]
    (note,) = parcel.notes
    assert note.startswith("not sent, as names of passwords and keys: pack/.aws, pack/.env, ")
    assert " and 2 more" in note


def test_a_secret_that_git_ignores_is_not_worth_a_note(tmp_path: Path) -> None:
    path = write_space(tmp_path, task="pack.tasks:Mine")
    write_files(tmp_path, {"pack/tasks.py": TASK, "pack/.env": "x", "pack/.gitignore": ".env\n"})

    assert parcel_of(path).notes == ()


def test_a_line_that_git_does_not_understand_leaves_out_nothing(tmp_path: Path) -> None:
    package = write_package(tmp_path, "a.py", "b.log")
    (tmp_path / ".gitignore").write_bytes(b"!\n[z-a]\na\\\n\xff\n*.log\n")

    assert sent_of(package) == ["a.py"]


def test_a_file_that_cannot_be_sent_is_one_line(tmp_path: Path) -> None:
    path = write_space(tmp_path, task="pack.tasks:Mine")
    write_files(tmp_path, {"pack/tasks.py": TASK})
    with open(os.fsencode(tmp_path) + b"/pack/\xff.py", "wb"):  # noqa: PTH123 - no text
        pass

    with pytest.raises(UsageError, match="a name in UTF-8 is needed"):
        parcel_of(path)


def test_a_file_that_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_space(tmp_path, task="pack.tasks:Mine")
    write_files(tmp_path, {"pack/tasks.py": TASK})
    original = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.parent.name == "pack":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(UsageError, match=r"tasks\.py: it cannot be sent: Permission denied"):
        parcel_of(path)


def test_what_is_too_large_is_not_even_read(tmp_path: Path) -> None:
    path = write_space(tmp_path, task="pack.tasks:Mine")
    write_files(tmp_path, {"pack/tasks.py": TASK})
    os.truncate(tmp_path / "pack" / "tasks.py", 2**40)  # a hole: it would fill any memory

    with pytest.raises(UsageError, match=r"at most 50 MiB .*largest: pack/tasks\.py"):
        parcel_of(path)


@pytest.mark.parametrize("max_mib", [0, -1, 101, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(tmp_path: Path, max_mib: float) -> None:
    with pytest.raises(UsageError, match="--max-upload-mib: more than 0 and at most 100"):
        parcel_of(write_space(tmp_path), max_mib=max_mib)


def test_a_package_may_lack_its_init_file(tmp_path: Path) -> None:
    path = write_space(tmp_path, task="pack.tasks:Mine")
    write_files(tmp_path, {"pack/tasks.py": TASK})

    assert sorted(parcel_of(path).files) == ["pack/tasks.py", "space.yaml"]


def test_without_a_checkout_no_folder_above_the_package_is_asked(tmp_path: Path) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    (package / "a.py").write_text("")
    (tmp_path / ".gitignore").write_text("*.py\n")
    assert [path.name for path in files_of(package).sent] == ["a.py"]

    (tmp_path / ".git").mkdir()  # the twin

    assert files_of(package).sent == ()


def test_a_module_without_a_package_is_one_file(tmp_path: Path) -> None:
    path = write_space(tmp_path, task="mine:Mine")

    assert sorted(parcel_of(path).files) == ["mine.py", "space.yaml"]


def test_an_installed_package_stays_and_is_named(tmp_path: Path) -> None:
    installed = tmp_path / "site-packages" / "pack"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    space = spaces.load(write_space(tmp_path, task="pack:Mine"))

    parcel = make_parcel(space, search_path=[str(installed.parent)])

    assert list(parcel.files) == ["space.yaml"]
    assert parcel.notes == (
        "pack is installed here and not sent: it must be installed on the cluster, too.",
    )


def test_a_package_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no package nowhere for nowhere:Mine"):
        parcel_of(write_space(tmp_path, task="nowhere:Mine"))


def test_too_large_an_upload_is_refused_with_the_largest_files_and_the_ways_out(
    tmp_path: Path,
) -> None:
    path = write_space(tmp_path, task="pack.tasks:Mine")
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "__init__.py").write_text("")
    (pack / "weights.bin").write_bytes(bytes(2 * 2**20))

    with pytest.raises(UsageError, match=r"at most 1 MiB .*largest: pack/weights\.bin 2\.0 MiB"):
        parcel_of(path, max_mib=1)
    with pytest.raises(UsageError, match=r"\.gitignore.*--max-upload-mib"):
        parcel_of(path, max_mib=1)
    assert "pack/weights.bin" in parcel_of(path, max_mib=3).files


# Names


def name_of(path: Path, *overrides: str) -> str:
    return run_name(spaces.load(path, overrides), parcel_of(path, *overrides))


def test_a_name_is_made_from_the_content_and_not_from_the_place(tmp_path: Path) -> None:
    here, there = write_space(tmp_path / "a"), write_space(tmp_path / "b")

    assert name_of(here) == name_of(there)
    assert name_of(here).startswith("small-")
    assert checked_name(name_of(here)) == name_of(here)


def test_another_space_or_task_is_another_name_and_a_larger_budget_is_not(
    tmp_path: Path,
) -> None:
    path = write_space(tmp_path)
    first = name_of(path)

    assert name_of(path, "search.trials=99", "confirm.seeds=9") == first
    assert name_of(path, "seed=1") != first
    (tmp_path / "mine.py").write_text(f"{TASK}    x = 1\n")
    assert name_of(path) != first


@pytest.mark.parametrize("own", ["my study", "\u00fcber", "a" * 100, "_x.", "\u6c49\u5b57"])
def test_any_name_of_a_study_becomes_one_that_commands_take(tmp_path: Path, own: str) -> None:
    path = write_space(tmp_path)
    path.write_text(f"name: {own}\n{SPACE.format(task='./mine.py:Mine').partition(chr(10))[2]}")

    assert checked_name(name_of(path)) == name_of(path)


def test_later_attempts_are_numbered() -> None:
    assert [attempt_id("a", number) for number in (1, 2, 12)] == ["a", "a.2", "a.12"]


@pytest.mark.parametrize("name", ["", "a/b", "../a", "-a", "a b", "a.2", "a" * 101, "a\n"])
def test_a_name_that_is_no_plain_one_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="NAME: letters, digits"):
        checked_name(name)


@pytest.mark.parametrize("name", ["a", "v1.2-b", "a.2b", "teacher-on-a100", "a" * 100])
def test_a_plain_name_is_taken(name: str) -> None:
    assert checked_name(name) == name
