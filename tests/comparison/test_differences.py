"""Settings that differ: one line each, defaults counted, whatever form they stand in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stability_search.comparison.differences import (
    Difference,
    setting_differences,
    space_differences,
)
from stability_search.comparison.sides import Side, read_side
from stability_search.space import load
from tests.comparison.run_files import edit_json, write_run
from tests.study_rows import interrupted_study, stable_study

SPACE = """\
name: {name}
task: teacher
seed: 0
fixed: {{batch_size: 2}}
space:
  learning_rate: {{loguniform: {{low: 1e-4, high: 0.3}}}}
  precision: {{choice: [fp32, fp16]}}
  init_scale: {{choice: [1024, 65536], when: {{precision: fp16}}}}
"""


def differences(tmp_path: Path, second: str) -> dict[str, Difference]:
    (tmp_path / "first.yaml").write_text(SPACE.format(name="first"))
    (tmp_path / "second.yaml").write_text(second)
    found = space_differences(load(tmp_path / "first.yaml"), load(tmp_path / "second.yaml"))
    return {one.name: one for one in found}


def test_a_name_a_comment_and_a_written_default_are_no_difference(tmp_path: Path) -> None:
    text = SPACE.format(name="another").replace("fixed: {", "fixed: {accumulation_steps: 1, ")
    text = f"# by hand\n{text}confirm: {{steps: 400}}\n"
    assert differences(tmp_path, text) == {}


def test_every_block_is_compared(tmp_path: Path) -> None:
    text = f"{SPACE.format(name='b')}confirm: {{seeds: 8}}\nprune: {{bad_rate: 0.2}}\n"
    found = differences(tmp_path, text.replace("seed: 0", "seed: 1"))
    assert {name: (one.first, one.second) for name, one in found.items()} == {
        "seed": (0, 1),
        "confirm.seeds": (5, 8),
        "prune.bad_rate": (0.05, 0.2),
    }


def test_a_setting_is_one_line_whether_it_varies_or_not(tmp_path: Path) -> None:
    text = SPACE.format(name="b").replace("batch_size: 2", "batch_size: 2, learning_rate: 0.01")
    text = text.replace("  learning_rate: {loguniform: {low: 1e-4, high: 0.3}}\n", "")
    text = text.replace("choice: [1024, 65536]", "choice: [1024]")
    found = differences(tmp_path, f"{text}  clip_norm: {{choice: [null, 1.0]}}\n")
    assert {name: (one.first, one.second) for name, one in found.items()} == {
        "learning_rate": ({"loguniform": {"low": 1e-4, "high": 0.3}}, 0.01),
        "init_scale": (
            {"choice": [1024, 65536], "when": {"precision": ["fp16"]}},
            {"choice": [1024], "when": {"precision": ["fp16"]}},
        ),
        "clip_norm": (None, {"choice": [None, 1.0]}),
    }
    assert not found["clip_norm"].is_in_first
    assert found["clip_norm"].is_in_second


def test_the_two_configurations_differ_in_what_they_do_not_share(
    stable_side: Side, copied: Callable[[str], Path]
) -> None:
    case, other = stable_study(), copied("other")
    edit_json(other / "report.json", {"best.config_id": case.verdict.confirmed[1]})
    found = setting_differences(stable_side, read_side(other))
    assert {one.name: (one.first, one.second) for one in found} == {
        "learning_rate": (8e-3, 7e-3),
        "precision": ("bf16", "fp32"),
        "clip_norm": (1.0, 0.5),
        "attention_logit_cap": (30.0, None),
    }
    assert setting_differences(stable_side, stable_side) == ()


def test_a_setting_that_one_space_does_not_name_has_its_default_there(
    stable_side: Side, copied: Callable[[str], Path]
) -> None:
    other = copied("other")
    path = other / "configurations.parquet"
    kept: Any = pq.read_table(path).drop_columns(["accumulation_steps", "attention_clamp"])
    pq.write_table(kept, path)
    (one,) = setting_differences(stable_side, read_side(other))
    assert (one.name, one.first, one.second) == ("accumulation_steps", 2, 1)
    assert (one.is_in_first, one.is_in_second) == (True, False)


def test_without_a_configuration_nothing_differs(stable_side: Side, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", interrupted_study())
    assert setting_differences(stable_side, read_side(other)) == ()
