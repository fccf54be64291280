"""How a run directory begins, who may write to it, and what a resume refuses."""

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from stability_search import files, space_directory
from stability_search.errors import StoppedEarlyError, UsageError
from stability_search.search.run_directory import (
    RunDirectory,
    create,
    describe_environment,
    facts_of_environment,
    lock,
    open_run,
    require_free_space,
    study_facts,
)
from stability_search.search.shipping import pack
from stability_search.space import Space, load
from stability_search.space_directory import default_path, refuse_changed_task
from stability_search.tasks.loading import load_task

TASK = "class Tiny:\n    def __init__(self, width: int = 4) -> None:\n        self.width = width\n"
SPACE = """\
# what we train today
task: {task}
fixed: {{learning_rate: 1e-3}}  # task: {task}
"""


def make_space(folder: Path, task: str = "./tiny.py:Tiny") -> Space:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "space.yaml").write_text(SPACE.format(task=task))
    return load(folder / "space.yaml")


def begin(path: Path, space: Space) -> RunDirectory:
    environment = describe_environment(
        command=["stability-search", "run"], device="cpu", seeds={"study": 0}
    )
    return create(path, space, facts=study_facts(space), environment=environment)


@pytest.fixture
def space(tmp_path: Path) -> Space:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "tiny.py").write_text(TASK)
    return make_space(folder)


@pytest.fixture
def run(tmp_path: Path, space: Space) -> RunDirectory:
    return begin(tmp_path / "run", space)


class TestCreate:
    def test_it_holds_space_task_environment_and_a_folder_for_steps(
        self, run: RunDirectory, space: Space
    ) -> None:
        assert sorted(path.name for path in run.path.iterdir()) == [
            "environment.json",
            "space.yaml",
            "steps",
            "tiny.py",
        ]
        assert run.space.read_text() == space.text
        assert (run.path / "tiny.py").read_text() == TASK

    def test_the_copied_space_loads_with_the_copied_task(
        self, run: RunDirectory, space: Space
    ) -> None:
        shutil.rmtree(space.folder)
        again = load(run.space, folder=space.folder)
        assert again.task.file == str(run.path / "tiny.py")

    @pytest.mark.parametrize("is_absolute", [True, False])
    def test_a_task_from_outside_the_folder_is_copied_beside_and_named_there(
        self, tmp_path: Path, is_absolute: bool
    ) -> None:
        (tmp_path / "tiny.py").write_text(TASK)
        written = f"{tmp_path if is_absolute else '..'}/tiny.py:Tiny"
        space = make_space(tmp_path / "inner", written)
        run = begin(tmp_path / "run", space)
        assert load(run.space).task.file == str(run.path / "tiny.py")
        assert f"# task: {written}" in run.space.read_text()
        assert study_facts(space)["space_text"] == run.space.read_text()

    def test_a_task_in_a_subfolder_keeps_it(self, tmp_path: Path) -> None:
        (tmp_path / "project" / "tasks").mkdir(parents=True)
        (tmp_path / "project" / "tasks" / "tiny.py").write_text(TASK)
        run = begin(tmp_path / "run", make_space(tmp_path / "project", "./tasks/tiny.py:Tiny"))
        assert load(run.space).task.file == str(run.path / "tasks" / "tiny.py")

    def test_a_built_in_task_is_not_copied(self, tmp_path: Path) -> None:
        space = make_space(tmp_path / "project", "teacher")
        run = begin(tmp_path / "run", space)
        assert not list(run.path.glob("*.py"))
        refuse_changed_task(run.path, study_facts(space))

    def test_an_existing_run_is_refused_with_the_resume_command(
        self, run: RunDirectory, space: Space
    ) -> None:
        with pytest.raises(UsageError, match=rf"already.*stability-search resume {run.path}"):
            begin(run.path, space)

    def test_a_directory_with_other_files_is_refused(self, tmp_path: Path, space: Space) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.tex").touch()
        with pytest.raises(UsageError, match="run: the directory is not empty"):
            begin(tmp_path / "run", space)

    def test_a_path_that_cannot_be_a_directory_is_refused(
        self, tmp_path: Path, space: Space
    ) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(UsageError, match=r"cannot be made: Not a directory.*--output"):
            begin(tmp_path / "file" / "run", space)

    def test_a_full_disk_is_exit_6(
        self, tmp_path: Path, space: Space, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(files, "_write_synced", fail)
        with pytest.raises(StoppedEarlyError, match="No space left on device"):
            begin(tmp_path / "run", space)


class TestLock:
    def test_a_second_writer_is_refused(self, run: RunDirectory) -> None:
        with (
            lock(run),
            pytest.raises(UsageError, match="locked run: another process is writing") as caught,
            lock(run),
        ):
            pytest.fail("two writers")
        assert caught.value.exit_code == 2

    def test_it_is_free_again_afterwards_and_leaves_no_file(self, run: RunDirectory) -> None:
        before = sorted(run.path.iterdir())
        for _ in range(2):
            with lock(run):
                pass
        assert sorted(run.path.iterdir()) == before

    def test_it_ends_with_the_process_that_held_it(self, run: RunDirectory) -> None:
        program = (
            "import os, sys, signal; from pathlib import Path;"
            "from stability_search.search.run_directory import *;"
            "held = lock(RunDirectory(path=Path(sys.argv[1]))); held.__enter__();"
            "print('held', flush=True); signal.pause()"
        )
        command = [sys.executable, "-c", program, str(run.path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:  # noqa: S603
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(UsageError, match="locked run"), lock(run):
                pytest.fail("two writers")
            other.kill()
        with lock(run):
            pass

    def test_leftovers_of_a_killed_writer_are_removed(self, run: RunDirectory) -> None:
        leftovers = (run.path / ".report.html.1.part", run.steps / ".a.parquet.1.part")
        for leftover in leftovers:
            leftover.touch()
        with lock(run):
            assert not any(leftover.exists() for leftover in leftovers)

    def test_a_missing_directory_is_named(self, tmp_path: Path) -> None:
        with (
            pytest.raises(UsageError, match="gone: no run directory"),
            lock(RunDirectory(path=tmp_path / "gone")),
        ):
            pytest.fail("no directory")


class TestChangedTask:
    def test_an_unchanged_task_passes_with_and_without_its_original(
        self, run: RunDirectory, space: Space
    ) -> None:
        facts = study_facts(space)
        assert facts["task_sha256"], "there must be something to compare with"
        refuse_changed_task(run.path, facts)
        shutil.rmtree(space.folder)
        refuse_changed_task(run.path, facts)

    @pytest.mark.parametrize("is_copy", [True, False])
    def test_a_changed_file_is_refused_with_the_difference(
        self, run: RunDirectory, space: Space, is_copy: bool
    ) -> None:
        facts = study_facts(space)
        changed = (run.path if is_copy else space.folder) / "tiny.py"
        changed.write_text(TASK.replace("width: int = 4", "width: int = 8"))
        with pytest.raises(UsageError, match="the task changed since the study began") as caught:
            refuse_changed_task(run.path, facts)
        assert str(changed) in caught.value.message
        sign = "-" if is_copy else "+"
        assert f"{sign}    def __init__(self, width: int = 8)" in caught.value.message

    def test_a_missing_copy_is_refused(self, run: RunDirectory, space: Space) -> None:
        facts = study_facts(space)
        (run.path / "tiny.py").unlink()
        with pytest.raises(UsageError, match=r"tiny\.py: the task's file cannot be read"):
            refuse_changed_task(run.path, facts)


@pytest.fixture
def social(tmp_path: Path) -> Space:
    """Return the space of a task that imports what lies beside it."""
    folder = tmp_path / "social"
    (folder / "own").mkdir(parents=True)
    (folder / "tiny.py").write_text(f"import near_tiny\nfrom own.part import P\n{TASK}")
    (folder / "near_tiny.py").write_text("WIDTH = 4\n")
    (folder / "own" / "__init__.py").touch()
    (folder / "own" / "part.py").write_text("P = 1\n")
    (folder / "own" / "words.txt").write_text("data\n")
    (folder / "unused.py").touch()
    return make_space(folder)


class TestModulesBesideATask:
    def test_they_are_copied_and_are_the_same_task_to_whoever_compares(
        self, tmp_path: Path, social: Space
    ) -> None:
        run = begin(tmp_path / "run", social)
        names = {path.relative_to(run.path).as_posix() for path in run.path.rglob("*.*")}
        beside = {"near_tiny.py", "own/__init__.py", "own/part.py", "own/words.txt"}
        assert names == {"space.yaml", "environment.json", "tiny.py", *beside}
        resumed = load(run.space, folder=social.folder)
        assert resumed.task.file == str(run.path / "tiny.py")
        digests = {pack(s.task, import_path=tmp_path).digest for s in (social, resumed)}
        assert len(digests) == 1
        (run.path / "near_tiny.py").unlink()  # the twin: as it was without the copies
        assert pack(resumed.task, import_path=tmp_path).digest not in digests

    def test_a_copy_that_is_kept_here_alone_is_still_not_sent(
        self, tmp_path: Path, social: Space
    ) -> None:
        private = {"near_tiny.py", "own/words.txt"}
        (social.folder / ".gitignore").write_text("/near_tiny.py\n*.txt\n/unused.py\n")
        (social.folder / "own" / "token.key").touch()
        run = begin(tmp_path / "run", social)
        assert all((run.path / name).is_file() for name in (*private, "own/token.key"))
        cargoes = [
            pack(load(path, folder=social.folder).task, import_path=tmp_path)
            for path in (social.path, run.space)
        ]
        assert [sorted(cargo.files) for cargo in cargoes] == [
            ["own/__init__.py", "own/part.py", "tiny.py"]
        ] * 2
        assert cargoes[0].digest == cargoes[1].digest
        assert cargoes[0].notes == cargoes[1].notes
        (run.path / ".gitignore").unlink()  # the twin
        assert private < {*pack(load(run.space).task, import_path=tmp_path).files}

    def test_the_copy_is_built_from_what_lies_beside_it(
        self, tmp_path: Path, social: Space, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = begin(tmp_path / "run", social)
        shutil.rmtree(social.folder)
        for name in ("near_tiny", "own", "own.part"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(sys, "path", [*sys.path])
        resumed = load(run.space, folder=social.folder)
        with pytest.raises(UsageError, match="must have the methods"):  # so it was imported
            load_task(resumed.task, {})
        assert sys.modules["near_tiny"].__file__ == str(run.path / "near_tiny.py")
        for name in ("near_tiny", "own", "own.part"):
            del sys.modules[name]

    @pytest.mark.parametrize("is_copy", [True, False])
    @pytest.mark.parametrize("name", ["near_tiny.py", "own/part.py"])
    def test_a_changed_one_is_refused_as_a_changed_task(
        self, tmp_path: Path, social: Space, name: str, is_copy: bool
    ) -> None:
        run, facts = begin(tmp_path / "run", social), study_facts(social)
        refuse_changed_task(run.path, facts)
        changed = (run.path if is_copy else social.folder) / name
        changed.write_text("P = WIDTH = 8\n")
        with pytest.raises(UsageError, match="the task changed since the study began") as caught:
            refuse_changed_task(run.path, facts)
        assert str(changed) in caught.value.message
        del facts["task_modules"]  # an earlier version's ledger
        refuse_changed_task(run.path, facts)

    def test_one_from_where_the_study_was_begun_is_copied_and_watched_too(
        self, tmp_path: Path, social: Space, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here = tmp_path / "here"
        (here / "own_project").mkdir(parents=True)
        (here / "own_project" / "net.py").write_text("LAYERS = 2\n")
        file = Path(social.task.file)
        file.write_text(f"import own_project.net\n{file.read_text()}")
        monkeypatch.chdir(here)
        run, facts = begin(tmp_path / "run", social), study_facts(social)
        assert (run.path / "imported" / "own_project" / "net.py").is_file()
        monkeypatch.chdir(tmp_path)
        refuse_changed_task(run.path, facts)
        (here / "own_project" / "net.py").write_text("LAYERS = 3\n")
        with pytest.raises(UsageError, match=r"here/own_project/net\.py: the task changed since"):
            refuse_changed_task(run.path, facts)
        shutil.rmtree(here)
        refuse_changed_task(run.path, facts)
        (tmp_path / "own_project").mkdir()
        (tmp_path / "own_project" / "net.py").write_text("another project's\n")
        with pytest.raises(UsageError, match=r"/own_project/net\.py: the task changed since"):
            refuse_changed_task(run.path, facts)  # it would be found before the copy

    def test_what_is_kept_of_elsewhere_is_the_same_task_to_whoever_compares(
        self, tmp_path: Path, social: Space, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "here" / "own_project").mkdir(parents=True)
        (tmp_path / "here" / "own_project" / "net.py").write_text("LAYERS = 2\n")
        (tmp_path / "here" / "own_project" / "private.py").touch()
        (tmp_path / "here" / ".gitignore").write_text("private.py\n")
        file = Path(social.task.file)
        file.write_text(f"import own_project.net, own_project.private\n{file.read_text()}")
        monkeypatch.chdir(tmp_path / "here")
        run = begin(tmp_path / "run", social)
        assert (run.path / "imported" / "own_project" / "private.py").is_file()
        cargo = pack(social.task, import_path=tmp_path / "here")
        monkeypatch.chdir(tmp_path)
        resumed = pack(load(run.space, folder=social.folder).task, import_path=tmp_path)
        assert sorted(resumed.files) == sorted(cargo.files)
        assert "own_project/net.py" in resumed.files
        assert "own_project/private.py" not in resumed.files
        assert resumed.digest == cargo.digest

    def test_a_missing_copy_is_refused_and_a_missing_original_is_not(
        self, tmp_path: Path, social: Space
    ) -> None:
        run, facts = begin(tmp_path / "run", social), study_facts(social)
        shutil.rmtree(social.folder)
        refuse_changed_task(run.path, facts)
        (run.path / "near_tiny.py").unlink()
        with pytest.raises(UsageError, match=r"near_tiny\.py: the task's file cannot be read"):
            refuse_changed_task(run.path, facts)

    def test_a_data_set_in_a_package_stays_where_it_is(
        self, tmp_path: Path, social: Space, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(space_directory, "_MAX_COPIED_BYTES", 10)
        run = begin(tmp_path / "run", social)
        assert [path.name for path in (run.path / "own").iterdir() if path.suffix == ".txt"] == []
        assert (run.path / "own" / "part.py").is_file()
        refuse_changed_task(run.path, study_facts(social))

    def test_a_package_named_like_a_folder_of_the_run_is_no_obstacle(
        self, tmp_path: Path, social: Space
    ) -> None:
        (social.folder / "own").rename(social.folder / "steps")
        (social.folder / "tiny.py").write_text(f"import steps.part\n{TASK}")
        run = begin(tmp_path / "run", social)
        assert (run.steps / "part.py").is_file()


class TestEnvironment:
    def test_home_is_a_tilde_and_no_environment_variable_is_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: Space
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("CANARY_TOKEN", "canary-5d1f")
        with space.path.open("a") as file:
            file.write(f"# data in {tmp_path}/data, not in ~/data\n")
        space = load(space.path)
        command = ["stability-search", "run", "--space", f"{tmp_path}/a b.yaml"]
        described = describe_environment(command=command, device="cpu", seeds={"study": 0})
        run = create(tmp_path / "run", space, facts=study_facts(space), environment=described)
        text = run.environment.read_text()
        assert described["command"] == "stability-search run --space '~/a b.yaml'"
        assert str(tmp_path) not in text
        assert "canary-5d1f" not in text
        assert facts_of_environment(run) == study_facts(space)

    def test_a_folder_that_only_begins_like_home_keeps_its_name(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", "/home/ann")
        described = describe_environment(command=["/home/anna/x"], device="cpu", seeds={})
        assert described["command"] == "/home/anna/x"

    def test_versions_and_seeds_are_there(self, run: RunDirectory) -> None:
        environment = json.loads(run.environment.read_text())
        assert {"torch", "ray", "optuna"} <= environment["versions"].keys()
        assert environment["seeds"] == {"study": 0}
        assert environment["study"]["task_sha256"]

    @pytest.mark.parametrize("text", ["", "{}", "[1]", '{"study": 3}'])
    def test_unreadable_facts_are_none(self, run: RunDirectory, text: str) -> None:
        run.environment.write_text(text)
        assert facts_of_environment(run) is None


class TestPlaces:
    def test_the_default_is_named_after_study_and_utc_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
        assert default_path("teacher", now) == Path("reports/teacher-20260102T030405Z")
        default_path("teacher", now).mkdir(parents=True)
        assert default_path("teacher", now) == Path("reports/teacher-20260102T030405Z-2")

    def test_every_attempt_has_a_step_file_of_its_own(self) -> None:
        run = RunDirectory(path=Path("run"))
        assert run.step_file("search-0001") == Path("run/steps/search-0001.parquet")
        assert run.step_file("search-0001", 2) == Path("run/steps/search-0001-attempt2.parquet")

    def test_a_run_directory_is_known_by_its_space(self, run: RunDirectory) -> None:
        assert open_run(run.path) == run
        with pytest.raises(UsageError, match=r"no run directory: it must hold space\.yaml"):
            open_run(run.path.parent)


def test_a_study_that_does_not_fit_the_disk_does_not_start(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_free_space(run, num_trials=10, num_steps=2_000)
    monkeypatch.setattr(
        "os.statvfs", lambda _: os.statvfs_result((1, 1024, 0, 0, 500, 0, 0, 0, 0, 255))
    )
    with pytest.raises(
        StoppedEarlyError, match=r"0 MiB are free, but 10 trials.*need about 1 MiB"
    ):
        require_free_space(run, num_trials=10, num_steps=2_000)
