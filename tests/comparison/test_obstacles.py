"""Why two runs cannot be compared: every reason, all at once; and what to bear in mind."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stability_search import space as spaces
from stability_search.comparison.obstacles import caveats, reasons
from stability_search.comparison.sides import Side, read_side
from stability_search.space_directory import task_facts
from tests.comparison.run_files import VERSIONS, edit_json, edit_space, edit_table, write_run
from tests.study_rows import interrupted_study

Copied = Callable[[str], Path]
TASK = "class Tiny:\n    def __init__(self, hidden=8):\n        pass\n"
BATCH = "  batch_size: 2\n"


def reasons_of(first: Side | Path, second: Path) -> tuple[str, ...]:
    return reasons(first if isinstance(first, Side) else read_side(first), read_side(second))


def caveats_of(first: Side | Path, second: Path) -> tuple[str, ...]:
    return caveats(first if isinstance(first, Side) else read_side(first), read_side(second))


def test_a_run_can_be_compared_with_itself(stable_side: Side) -> None:
    assert reasons(stable_side, stable_side) == ()
    assert caveats(stable_side, stable_side) == ()


def another_task(run: Path) -> None:  # whose arguments are then no further reason
    edit_space(run, "task: teacher", "task: detector\ntask_args: {data_dir: scenes}")


def another_argument(run: Path) -> None:
    edit_space(run, "task: teacher", "task: teacher\ntask_args: {hidden: 64, dropout: 0.1}")


def another_device(run: Path) -> None:
    edit_table(run, "trials", "device", lambda _: "NVIDIA H100")


def another_score(run: Path) -> None:
    edit_json(run / "report.json", {"best.score_version": "S-v2"})


def another_baseline(run: Path) -> None:
    edit_json(run / "report.json", {"study.yardsticks.400.e0": 1.85})


def no_baseline(run: Path) -> None:
    edit_json(run / "report.json", {"study.yardsticks.400.e0_source": "blind"})


def another_metric(run: Path) -> None:
    path = run / "trials.parquet"
    names = [name.replace("word_error", "letter_error") for name in pq.read_schema(path).names]
    pq.write_table(pq.read_table(path).rename_columns(names), path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (another_task, "task: teacher in A, detector in B"),
        (another_argument, "task: hidden is null in A, 64 in B"),
        (another_device, "device: cpu in A, NVIDIA H100 in B"),
        (another_score, "score version: S-v1 in A, S-v2 in B"),
        (another_baseline, "baseline: its loss is 1.84 in A, 1.85 in B: other data"),
        (no_baseline, "baseline: the task has a `baseline()` in only one of the two"),
        (another_metric, "metrics: word_error_rate in A, letter_error_rate in B"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_differs_is_the_one_reason(
    stable_side: Side, copied: Copied, spoil: Callable[[Path], None], words: str
) -> None:
    other = copied("other")
    spoil(other)
    assert reasons_of(stable_side, other) == (words,)


def test_all_reasons_are_given_at_once(stable_side: Side, copied: Copied) -> None:
    other = copied("other")
    for spoil in (another_task, another_device, another_score, another_baseline, another_metric):
        spoil(other)
    append(other, "confirm: {steps: 600}\n")
    edit_json(
        other / "report.json",
        {"study.yardsticks": {"600": {"e0": 1.5, "e0_source": "baseline", "has_signal": True}}},
    )
    found = reasons_of(stable_side, other)
    assert [text.partition(":")[0] for text in found] == [
        *("task", "horizon", "device", "score version", "baseline", "metrics")
    ]
    assert found[1] == "horizon: confirmed over 400 steps in A, 600 in B"


def test_a_version_of_the_score_that_this_program_does_not_know_is_a_reason(
    copied: Copied,
) -> None:
    other = copied("other")
    another_score(other)
    (found,) = reasons_of(other, other)
    assert found == "score version: S-v2 in both, of which this program knows only S-v1"


def test_rounding_of_one_baseline_is_no_reason(stable_side: Side, copied: Copied) -> None:
    other = copied("other")
    edit_json(other / "report.json", {"study.yardsticks.400.e0": 1.84 * (1 + 1e-9)})
    assert reasons_of(stable_side, other) == ()


@pytest.mark.parametrize("source", ["start", "blind"])
def test_a_start_or_blind_run_may_differ_since_it_depends_on_the_pilot(
    copied: Copied, source: str
) -> None:
    first, second = copied("first"), copied("second")
    for run, e0 in ((first, 1.84), (second, 1.9)):
        place = "study.yardsticks.400."
        edit_json(run / "report.json", {f"{place}e0": e0, f"{place}e0_source": source})
    assert reasons_of(first, second) == ()


def test_fp16_that_was_computed_otherwise_is_another_device(copied: Copied) -> None:
    first, second = copied("first"), copied("second")
    edit_table(first, "trials", "fp16_kind", lambda _: "emulated")
    edit_table(second, "trials", "fp16_kind", lambda _: "native")
    assert reasons_of(first, second) == ("device: fp16 is emulated in A, native in B",)


def file_run(run: Path, name: str, sha256: str | None, modules: object = None) -> Path:
    """Make a run one of a task in a file, and of modules beside it, by their hashes."""
    (run / name).write_text(TASK)
    edit_space(run, "task: teacher", f"task: ./{name}:Tiny")
    facts = {"study.task_sha256": sha256, "study.task_modules": modules}
    edit_json(run / "environment.json", facts)
    return run


def test_a_task_in_a_file_is_the_same_by_its_hash_whatever_the_file_is_called(
    copied: Copied,
) -> None:
    first = file_run(copied("first"), "one.py", "aa" * 32)
    assert reasons_of(first, file_run(copied("same"), "two.py", "aa" * 32)) == ()
    more = file_run(copied("more"), "one.py", "aa" * 32)
    edit_space(more, "one.py:Tiny", "one.py:Tiny\ntask_args: {hidden: 9}")
    assert reasons_of(first, more) == ("task: hidden is 8 in A, 9 in B",)
    (found,) = reasons_of(first, file_run(copied("other"), "one.py", "bb" * 32))
    assert found == "task: the file of Tiny is another, sha256 aaaaaaaaaa and bbbbbbbbbb"


MODULES = {"net.py": "aa" * 32, "parts/loss.py": "bb" * 32}


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (MODULES, None),
        ({**MODULES, "net.py": "cc" * 32}, "net.py is another"),
        ({"net.py": "aa" * 32}, "parts/loss.py is only in A"),
        ({**MODULES, "new.py": "dd" * 32}, "new.py is only in B"),
        (
            dict.fromkeys(("a.py", "b.py", "net.py"), "ee" * 32),
            "a.py is only in B, b.py is only in B, net.py is another, parts/loss.py is only in A",
        ),
        (
            {**MODULES, **{f"{i}.py": "ff" * 32 for i in range(7)}},
            f"{', '.join(f'{i}.py is only in B' for i in range(5))}, and 2 more",
        ),
        (None, None),  # an earlier version kept none: said, and no reason
        (["net.py"], None),
    ],
)
def test_a_module_beside_the_task_that_differs_is_another_task_and_named(
    copied: Copied, modules: object, words: str | None
) -> None:
    first = file_run(copied("first"), "one.py", "aa" * 32, MODULES)
    second = file_run(copied("second"), "one.py", "aa" * 32, modules)
    wanted = () if words is None else (f"task: the task's code differs: {words}",)
    assert reasons_of(first, second) == wanted


def test_a_file_and_a_module_that_differ_are_two_reasons(copied: Copied) -> None:
    first = file_run(copied("first"), "one.py", "aa" * 32, MODULES)
    second = file_run(copied("second"), "one.py", "bb" * 32, {})
    found = reasons_of(first, second)
    assert [text.partition(",")[0] for text in found] == [
        "task: the file of Tiny is another",
        "task: the task's code differs: net.py is only in A",
    ]


def test_a_run_keeps_the_modules_that_are_compared(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(f"import net\n{TASK}")
    (tmp_path / "net.py").write_text("")
    (tmp_path / "space.yaml").write_text("task: ./one.py:Tiny\nfixed: {learning_rate: 1e-3}\n")
    facts = task_facts(spaces.load(tmp_path / "space.yaml"))
    assert facts["task_modules"] == {"net.py": hashlib.sha256(b"").hexdigest()}


def test_what_a_task_of_your_own_imports_is_taken_to_be_the_same_and_said(copied: Copied) -> None:
    first = file_run(copied("first"), "one.py", "aa" * 32, MODULES)
    (found,) = caveats_of(first, first)
    assert found.startswith("What ./one.py:Tiny reads, and what it imports from elsewhere, is")
    earlier = file_run(copied("earlier"), "one.py", "aa" * 32)
    (found,) = caveats_of(first, earlier)
    assert found.startswith("What ./one.py:Tiny imports from beside it is not known of both")
    unknown = file_run(copied("unknown"), "one.py", None)
    (found,) = caveats_of(first, unknown)
    assert found.startswith("Whether the task's code is the same is not known")


def append(run: Path, block: str) -> None:
    path = run / "space.yaml"
    path.write_text(path.read_text() + block)


def with_environment(run: Path, versions: Mapping[str, Any]) -> None:
    document = {"study": {"task_sha256": "", "versions": {**VERSIONS, **versions}}}
    (run / "environment.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: with_environment(run, {"torch": "2.14.0"}), "torch is 2.13.0 in A, 2.14.0"),
        (
            lambda run: append(run, "prune: {bad_rate: 0.2}\n"),
            "The kill rule differs (prune)",
        ),
        (
            lambda run: append(run, "confirm: {octaves: 4}\n"),
            "The ladders or the bar differ (confirm.octaves",
        ),
        (
            lambda run: edit_json(run / "report.json", {"study.yardsticks.400.delta": 1.0}),
            "stand on a yardstick of its own (Delta 1.204 in A, Delta 1 in B)",
        ),
        (
            lambda run: edit_json(run / "report.json", {"study.yardsticks.400.has_signal": False}),
            "(Delta 1.204 in A, no signal in B)",
        ),
    ],
    ids=["versions", "kill rule", "ladders", "yardsticks", "no signal"],
)
def test_what_to_bear_in_mind_is_said_and_is_no_reason(
    stable_side: Side, copied: Copied, spoil: Callable[[Path], None], words: str
) -> None:
    other = copied("other")
    spoil(other)
    theirs = read_side(other)
    (found,) = caveats(stable_side, theirs)
    assert words in found
    assert reasons(stable_side, theirs) == ()


def test_trials_of_other_machines_are_said_where_both_are_known(copied: Copied) -> None:
    first, second = copied("first"), copied("second")
    edit_table(first, "trials", "fingerprint", lambda _: "one")
    assert caveats_of(first, second) == ()
    edit_table(second, "trials", "fingerprint", lambda _: "other")
    (found,) = caveats_of(first, second)
    assert "on other versions, machines or files" in found


def test_settings_that_go_to_the_task_may_change_the_probe(
    stable_side: Side, copied: Copied
) -> None:
    other = copied("other")
    path = other / "configurations.parquet"
    table = pq.read_table(path)
    pq.write_table(table.append_column("hidden", [["64"] * len(table)]), path)
    edit_space(other, BATCH, f"{BATCH}  hidden: 64\n")
    (found,) = caveats_of(stable_side, other)
    assert found.startswith("hidden goes to the task")


def test_a_run_that_has_not_finished_is_named(stable_side: Side, tmp_path: Path) -> None:
    (found,) = caveats_of(stable_side, write_run(tmp_path / "other", interrupted_study()))
    assert found == "B has not finished: what it would have chosen is not known."
