"""Loading a task: what is found, what is kept, and what each mistake is told."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stability_search.errors import UsageError
from stability_search.settings.trial import TaskReference
from stability_search.tasks import loading
from stability_search.tasks.loading import forget_tasks, load_task
from stability_search.tasks.teacher import Teacher

TEACHER = TaskReference(module="stability_search.tasks.teacher", class_name="Teacher")

WHOLE = """
from dataclasses import dataclass
from pathlib import Path
import beside

@dataclass
class Batch:
    x: int

class Mine:
    def __init__(self, *, width=3, data="numbers.txt"):
        self.width = width
        self.text = Path(data).read_text()
        self.beside = beside.VALUE

    def model(self): ...
    def batches(self, batch_size, generator): ...
    def probe(self): ...
    def loss(self, model, batch): ...

class Half:
    def model(self): ...
    def loss(self, model, batch): ...

class Picky(Mine):
    def __init__(self):
        raise RuntimeError("no camera")

value = 3
"""


@pytest.fixture(autouse=True)
def _clean_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    forget_tasks()
    yield
    forget_tasks()
    for name in set(sys.modules) - before:
        if name == "beside" or name.startswith("stability_search_task_"):
            del sys.modules[name]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    (tmp_path / "numbers.txt").write_text("1 2 3")
    path = tmp_path / "mine.py"
    path.write_text(WHOLE)
    return path


def in_file(path: Path, name: str = "Mine") -> TaskReference:
    return TaskReference(file=str(path), class_name=name)


def test_a_built_in_task_is_a_class_of_a_module() -> None:
    assert isinstance(load_task(TEACHER, {"hidden": 16}), Teacher)


def test_a_file_finds_its_neighbours_and_its_data(file: Path) -> None:
    cwd = Path.cwd()
    task = load_task(in_file(file), {"width": 5})
    assert (task.width, task.text, task.beside) == (5, "1 2 3", 7)  # type: ignore[attr-defined]
    assert Path.cwd() == cwd


def test_relative_paths_may_be_relative_to_another_folder(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "of_the_space_file"
    folder.mkdir()
    (folder / "numbers.txt").write_text("other")
    reference = TaskReference(file=str(file), class_name="Mine", folder=str(folder))
    assert load_task(reference, {}).text == "other"  # type: ignore[attr-defined]


def test_only_the_folder_joins_the_search_path_and_only_at_its_end(file: Path) -> None:
    before = list(sys.path)
    load_task(in_file(file), {})
    load_task(in_file(file), {"width": 9})
    assert sys.path == [*before, str(file.parent)]


def test_the_last_task_is_kept_while_nothing_changes(file: Path) -> None:
    first = load_task(in_file(file), {"width": 5})
    assert load_task(in_file(file), {"width": 5}) is first
    assert load_task(in_file(file), {"width": 6}) is not first
    assert load_task(in_file(file), {"width": 5}) is not first


def test_two_files_of_one_name_are_two_modules(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "mine.py"
    other.parent.mkdir()
    other.write_text(WHOLE.replace("import beside", "beside = type('B', (), {'VALUE': 8})"))
    (other.parent / "numbers.txt").write_text("4")
    assert load_task(in_file(file), {}).beside == 7  # type: ignore[attr-defined]
    assert load_task(in_file(other), {}).beside == 8  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "task_args", "message"),
    [
        ("Mime", {}, r"has no class `Mime`\. Did you mean `Mine`\?"),
        ("value", {}, r"has no class `value`\. Its classes: Batch, Half, Mine, Path, Picky"),
        ("Mine", {"widht": 4}, r"takes width, data, but got widht .*Did you mean `width`\?"),
        ("Half", {}, r"must have the methods .*, but batches, probe are missing"),
        ("Picky", {}, r"constructor raised RuntimeError: no camera"),
        ("Mine", {"data": "gone.txt"}, r"raised FileNotFoundError: .*gone\.txt"),
    ],
)
def test_each_mistake_is_told_with_its_way_out(
    file: Path, name: str, task_args: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load_task(in_file(file, name), task_args)


def test_a_file_that_fails_to_import_keeps_the_original_error_as_cause(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise ZeroDivisionError('by zero')\n")
    with pytest.raises(UsageError, match=r"broken\.py must be importable.*by zero") as caught:
        load_task(in_file(path), {})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert not [name for name in sys.modules if name.startswith("stability_search_task_broken")]


def test_a_missing_file_and_a_file_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.py is not there"):
        load_task(in_file(tmp_path / "gone.py"), {})
    text = tmp_path / "task.txt"
    text.write_text("class Mine: ...")
    with pytest.raises(UsageError, match=r"Python file \(\.py\) is needed"):
        load_task(in_file(text), {})


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("stability_search.tasks.robot", r"no module `stability_search\.tasks\.robot`"),
        ("no_such_package.tasks", r"no module `no_such_package`\. Call this from the folder"),
    ],
)
def test_a_missing_module(module: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_task(TaskReference(module=module, class_name="Anything"), {})


def test_a_module_whose_own_import_is_missing_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_more.py").write_text("import not_installed_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"needs_more must be importable.*not_installed_at_all"):
        load_task(TaskReference(module="needs_more", class_name="Anything"), {})


def test_a_value_a_constructor_refuses_names_the_rule() -> None:
    with pytest.raises(UsageError, match=r"hidden: a multiple of 4 .* must hold, but got 30"):
        load_task(TEACHER, {"hidden": 30})


def test_one_slot_only() -> None:
    load_task(TEACHER, {"hidden": 16})
    load_task(TEACHER, {"hidden": 32})
    assert len(loading._kept) == 1  # noqa: SLF001 - the slot itself is what is shown
