"""What a diagnosis is written as: strict JSON, inert Markdown, a table for the terminal."""

import json
from dataclasses import replace

import pytest

from stability_search.diagnose.batch_statistics import BatchSieve
from stability_search.diagnose.conclusion import Verdict, conclude, incomplete
from stability_search.diagnose.document import (
    Diagnosis,
    as_json,
    as_markdown,
    terminal_lines,
    yaml_value,
)
from stability_search.diagnose.ends import TrialEnd
from stability_search.diagnose.ladder import Ladder, RungResult
from stability_search.diagnose.rungs import AS_GIVEN, BF16, BYPASSED, FP32, GROUP_NORM, Rung
from stability_search.diagnose.verdict import Cause
from stability_search.inert import is_in_sight
from stability_search.tasks.loading import load_task
from tests.diagnose.cases import small
from tests.diagnose.test_verdict import CLEAN, fails, holds
from tests.hostile_strings import HOSTILE_STRINGS
from tests.report.test_hostile_files import structure


def ladder_of(
    *results: tuple[Rung, list[TrialEnd]], left_out: tuple[tuple[Rung, str], ...] = ()
) -> Ladder:
    case = small("", Cause.HEALTHY, "Recall", {"learning_rate": 0.1, "precision": "fp16"})
    config = case.recipe.config(0)
    sieve = BatchSieve(load_task(config.task, config.task_args), {}, frozenset())
    ladder = Ladder(
        config,
        seeds=range(5),
        data=CLEAN,
        sieve=sieve,
        say=lambda _: None,
        check=lambda: None,
    )
    for rung, ends in results:
        changes = {"precision": rung.name.value}
        ladder.results[rung.name] = RungResult(rung=rung, ends=ends, changes=changes)
    for rung, reason in left_out:
        ladder.results[rung.name] = RungResult(rung=rung, left_out=reason)
    return ladder


def broken(seed: int) -> TrialEnd:
    return fails(seed, module="fusion.attention", phase="forward", last_finite_max=7.1e4)


@pytest.fixture
def mixed() -> Diagnosis:
    ladder = ladder_of(
        (AS_GIVEN, [broken(0), broken(1), holds(2)]),
        (FP32, [holds(0), holds(1)]),
        (BF16, [holds(0), holds(1)]),
        (BYPASSED, [holds(0)]),
        left_out=((GROUP_NORM, "the model has no BatchNorm"),),
    )
    verdict = conclude(ladder, Cause.MIXED_PRECISION, FP32.name, ladder.results[BF16.name])
    return Diagnosis(
        name="a|b",
        task="./task.py:Task",
        device="cpu",
        created="2026-01-01T00:00:00Z",
        settings={"precision": "fp16"},
        verdict=verdict,
        command="stability-search diagnose --space x.yaml --set fixed.precision=bf16",
        ladder=ladder,
    )


def test_a_verdict_says_how_sure_where_first_seen_and_what_else_helps(mixed: Diagnosis) -> None:
    verdict = mixed.verdict
    assert verdict.headline == "Mixed precision: in fp16 it fails, in fp32 it holds."
    assert verdict.sureness == (
        "As given it failed on 2 of 3 seeds; the deciding rung held on 2 of 2 of them; the remedy "
        "held on 2 of 2 of them."
    )
    assert verdict.first_seen.startswith("NaN or Inf was first seen in fusion.attention, forward")
    assert "not necessarily caused there" in verdict.first_seen
    assert verdict.also_helped == ("attention bypassed (1 of 2 seeds tried)",)
    assert verdict.changes == {"precision": "bf16"}


def test_the_terminal_shows_a_row_per_rung_and_a_column_per_seed(mixed: Diagnosis) -> None:
    lines = terminal_lines(mixed)
    table = [line.split("  ") for line in lines if line.startswith(("rung", "as given", "fp32"))]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in table]
    assert cells == [
        ["rung", "seed 1", "seed 2", "seed 3", "what was seen"],
        ["as given", "fails at 7", "fails at 7", "holds 100",
         "the loss is NaN, first in fusion.attention"],
        ["fp32 instead", "holds 100", "holds 100", "-", "probe 1, untrained 5"],
    ]  # fmt: skip
    assert "left out: GroupNorm instead of BatchNorm: the model has no BatchNorm" in lines
    assert "verdict: mixed precision" in lines
    assert "change: precision: bf16  (bf16 instead of fp16)" in lines
    assert lines[-1] == f"next: {mixed.command}"


def test_the_json_is_strict_versioned_and_holds_every_trial(mixed: Diagnosis) -> None:
    document = json.loads(as_json(mixed), parse_constant=pytest.fail)
    assert document["schema"] == "stability-search/diagnosis/1"
    assert document["verdict"]["cause"] == "mixed precision"
    assert [rung["rung"] for rung in document["ladder"]] == [
        "as_given", "fp32", "bf16", "attention_bypassed", "group_norm",
    ]  # fmt: skip
    assert document["ladder"][0]["trials"][0]["failed_at"] == 7
    assert document["ladder"][4]["left_out"] == "the model has no BatchNorm"


def test_markdown_shows_strings_of_others_as_they_are(mixed: Diagnosis) -> None:
    page = as_markdown(mixed)
    assert page.startswith("# Diagnosis of a\\|b: mixed precision\n")
    assert "| as given | fails at 7 | fails at 7 | holds 100 |" in page


def test_no_text_of_a_diagnosis_takes_form_or_hides_on_its_page(mixed: Diagnosis) -> None:
    def page_of(text: str) -> str:
        verdict = replace(mixed.verdict, headline=text, notes=(text,))
        named = replace(mixed, name=text, configuration=text, command=text)
        return as_markdown(replace(named, verdict=verdict))

    tame = structure(page_of("tame"))
    for text in filter(str.strip, HOSTILE_STRINGS):
        page = page_of(text)
        assert structure(page) == tame, ascii(text)
        assert is_in_sight(page.replace("\n", "")), ascii(text)


def test_what_is_incomplete_says_so_and_keeps_what_is_known(mixed: Diagnosis) -> None:
    ladder = mixed.ladder
    partial = replace(mixed, verdict=incomplete(ladder, "stopped by SIGINT"), command="")
    document = json.loads(as_json(partial))
    assert document["verdict"]["cause"] == "incomplete"
    assert document["verdict"]["headline"] == "Incomplete: stopped by SIGINT"
    assert len(document["ladder"]) == 5
    empty = replace(partial, verdict=incomplete(None, "stopped"), ladder=None)
    assert json.loads(as_json(empty))["ladder"] == []
    assert "Incomplete" in as_markdown(empty)


@pytest.mark.parametrize(
    ("cause", "exit_code"),
    [(Cause.HEALTHY, 0), (Cause.DATA, 0), (Cause.NOT_FOUND, 3)],
)
def test_only_a_cause_that_was_not_found_is_exit_3(
    mixed: Diagnosis, cause: Cause, exit_code: int
) -> None:
    assert replace(mixed, verdict=Verdict(cause=cause, headline="")).exit_code == exit_code


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (Cause.HEALTHY, "Healthy: 2 of 2 seeds held 200 steps"),
        (Cause.NOT_FOUND, "Not found"),
        (Cause.ATTENTION, "Attention: without it the training holds; in fp32 it fails as well"),
        (Cause.BATCH_NORM, "BatchNorm at batch size 16"),
        (Cause.DATA, "5 of 200 steps broke for their batch (NaN in batch)"),
    ],
)
def test_every_cause_has_a_sentence(cause: Cause, words: str) -> None:
    ladder = ladder_of(
        (AS_GIVEN, [holds(0, num_data_steps=5, data_reason="NaN in batch"), holds(1)])
    )
    assert words in conclude(ladder, cause, None, None).headline


@pytest.mark.parametrize(
    ("value", "text"),
    [("bf16", "bf16"), (2e-5, "2e-05"), (None, "null"), (True, "true"), (3, "3"), ([], "[]")],
)
def test_values_are_written_as_yaml_reads_them(value: object, text: str) -> None:
    assert yaml_value(value) == text  # type: ignore[arg-type]
