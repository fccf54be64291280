"""What is sent to a cluster: the space file and what its task needs, nothing else."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from stability_search import space as spaces
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
METHODS = "    model = batches = probe = loss = __init__\n"


def write_space(folder: Path, task: str = "./mine.py:Mine") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.py").write_text(TASK)
    path = folder / "small.yaml"
    path.write_text(SPACE.format(task=task))
    return path


def parcel_of(path: Path, *overrides: str, max_mib: float = 50) -> Parcel:
    return make_parcel(spaces.load(path, overrides), max_mib=max_mib, import_path=path.parent)


def write_files(folder: Path, contents: dict[str, str]) -> None:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_a_task_is_sent_with_its_space_and_the_modules_beside_it(tmp_path: Path) -> None:
    path = write_space(tmp_path, task="./models/mine.py:Mine")
    beside = {"models/layers.py": "", "models/own/__init__.py": "", "models/own/words.txt": "a"}
    write_files(tmp_path, {"secret.env": "canary", "data/large.bin": "x", "layers.py": "other"})
    write_files(tmp_path, {"models/mine.py": f"import layers, own\n{TASK}", **beside})

    parcel = parcel_of(path, "trial.steps=40", "confirm.steps=50")

    assert sorted(parcel.files) == sorted([*beside, "models/mine.py", "space.yaml"])
    assert parcel.files["models/layers.py"] == b""
    assert parcel.files["models/mine.py"].decode().endswith(TASK)
    assert b"steps: 40" in parcel.files["space.yaml"]
    assert parcel.notes == ()
    assert parcel.num_bytes == sum(map(len, parcel.files.values()))


def test_what_git_ignores_or_is_named_like_a_secret_is_not_sent_and_said(tmp_path: Path) -> None:
    path = write_space(tmp_path, task="./models/mine.py:Mine")
    write_files(tmp_path, {"models/mine.py": f"import layers, own.a\n{TASK}"})
    write_files(tmp_path, {"models/layers.py": "", "models/own/a.py": "", "models/own/b.pem": ""})
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitignore").write_text("layers.py")

    parcel = parcel_of(path)

    assert sorted(parcel.files) == ["models/mine.py", "models/own/a.py", "space.yaml"]
    imported, secret = parcel.notes
    assert imported.startswith("imported, but not sent: models/layers.py (git ignores it). ")
    assert secret.startswith("not sent, as names of passwords and keys: models/own/b.pem. ")


def test_a_parcel_knows_what_makes_its_study_that_study(tmp_path: Path) -> None:
    path = write_space(tmp_path)
    far = tmp_path / "far" / "small.yaml"
    far.parent.mkdir()
    far.write_text(SPACE.format(task="../mine.py:Mine"))
    parcel, raised = parcel_of(path), parcel_of(path, "search.trials=99")
    (tmp_path / "mine.py").write_text(TASK + "# mended\n")
    mended = parcel_of(path)

    assert parcel.identity
    assert parcel.identity == raised.identity == mended.identity == parcel_of(far).identity
    assert parcel.identity != parcel_of(path, "trial.steps=40").identity
    assert parcel.task_sha256 == raised.task_sha256 != mended.task_sha256


def test_the_archive_holds_just_that_and_is_the_same_whenever_it_is_made(tmp_path: Path) -> None:
    parcel = parcel_of(write_space(tmp_path))

    with zipfile.ZipFile(io.BytesIO(parcel.archive())) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == parcel.files
    os.utime(tmp_path / "mine.py", (1, 1))
    assert parcel_of(tmp_path / "small.yaml").archive() == parcel.archive()
    assert parcel_of(tmp_path / "small.yaml").package_name == parcel.package_name


def test_a_task_from_another_folder_is_named_as_its_copy(tmp_path: Path) -> None:
    write_space(tmp_path / "elsewhere")
    write_files(tmp_path / "elsewhere", {"mine.py": f"import near\n{TASK}", "near.py": ""})
    path = write_space(tmp_path / "here", task="../elsewhere/mine.py:Mine")

    parcel = parcel_of(path)

    assert sorted(parcel.files) == ["mine.py", "near.py", "space.yaml"]
    assert b"task: ./mine.py:Mine" in parcel.files["space.yaml"]


def test_a_task_that_was_sent_finds_what_it_imports_from_the_whole_project(
    tmp_path: Path,
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    path = write_space(here, task="./models/mine.py:Mine")
    write_files(
        here,
        {
            "models/mine.py": f"from models.layers import WIDTH\nimport project\n{TASK}{METHODS}",
            "models/layers.py": "WIDTH = 4\n",
            "project/__init__.py": "import models.layers\n",
        },
    )

    parcel = make_parcel(spaces.load(path), import_path=here)
    write_files(there, {name: text.decode() for name, text in parcel.files.items()})

    code = "from stability_search import space; from stability_search.tasks import loading\n"
    code += "one = space.load('space.yaml'); loading.load_task(one.task, one.task_args)"
    for words in (("-c", code), ("-P", "-c", code)):  # this folder is a place to look, and is not
        built = subprocess.run(  # noqa: S603 - our own code
            [sys.executable, *words],
            cwd=there,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
            check=False,
            capture_output=True,
            text=True,
        )
        assert built.returncode == 0, built.stderr


def test_a_built_in_task_needs_its_space_file_only(tmp_path: Path) -> None:
    assert list(parcel_of(write_space(tmp_path, task="teacher")).files) == ["space.yaml"]


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


def test_a_package_is_sent_from_the_folder_that_holds_it(tmp_path: Path) -> None:
    path = write_space(tmp_path, task="pack.tasks:Mine")
    write_files(tmp_path, {"pack/tasks.py": TASK, "pack/words.txt": "a"})

    assert sorted(parcel_of(path).files) == ["pack/tasks.py", "pack/words.txt", "space.yaml"]


def test_an_installed_package_stays_and_is_named(tmp_path: Path) -> None:
    installed = tmp_path / "site-packages" / "pack"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    space = spaces.load(write_space(tmp_path, task="pack:Mine"))

    parcel = make_parcel(space, import_path=installed.parent)

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
    second = name_of(path)
    assert second != first
    (tmp_path / "near.py").write_text("")
    (tmp_path / "mine.py").write_text(f"import near\n{TASK}")
    third = name_of(path)
    assert third != second
    (tmp_path / "near.py").write_text("x = 1\n")
    assert name_of(path) != third


def test_what_a_task_imports_from_the_present_folder_is_part_of_its_name(tmp_path: Path) -> None:
    path = write_space(tmp_path / "configs")
    path.with_name("mine.py").write_text(f"import near\n{TASK}")
    (tmp_path / "near.py").write_text("")
    space = spaces.load(path)

    with_it = make_parcel(space, import_path=tmp_path)
    without = make_parcel(space, import_path=tmp_path / "configs")
    assert run_name(space, with_it) != run_name(space, without)
    (note,) = without.notes
    assert "imported, but found neither beside it" in note


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
