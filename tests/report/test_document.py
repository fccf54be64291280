"""`report.json`: strict, complete, and true to its schema."""

import json
from collections.abc import Callable

import jsonschema
import pytest

from stability_search.report import json_schema, render_json
from tests.hostile_strings import HOSTILE_STRINGS
from tests.report.packed_reports import Pack
from tests.report.study_reports import report_of
from tests.study_rows import (
    StudyCase,
    empty_study,
    hopeless_study,
    interrupted_study,
    stable_study,
)

MAKERS = [stable_study, hopeless_study, interrupted_study, empty_study]


def check(document: object) -> None:
    jsonschema.Draft202012Validator(json_schema()).validate(document)
    json.dumps(document, allow_nan=False)


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_every_verdict_keeps_the_schema(make: Callable[[], StudyCase]) -> None:
    check(render_json(report_of(make())))


@pytest.mark.parametrize("make", [stable_study, hopeless_study], ids=lambda f: f.__name__)
def test_hostile_text_keeps_it_too(make: Callable[[], StudyCase]) -> None:
    document = render_json(Pack(make(), HOSTILE_STRINGS).report())
    check(document)
    assert json.dumps(document).isascii()


def test_the_schema_can_fail() -> None:
    document = render_json(report_of(stable_study()))
    del document["best"]["q_lower"]
    with pytest.raises(
        jsonschema.ValidationError, match="is not valid under any of the given schemas"
    ):
        check(document)


def test_the_choice_is_whole() -> None:
    document = render_json(report_of(stable_study()))
    best = document["best"]
    assert (document["verdict"], document["exit_code"]) == ("stable", 0)
    assert best["settings"]["learning_rate"] == 8e-3
    assert best["settings"]["init_scale"] is None
    assert (best["num_seeds"], best["num_bad_steps"], best["num_judged_steps"]) == (5, 0, 2000)
    assert best["score_version"] == "S-v1"
    assert len(document["tied"]) == 2
    assert document["files"]["best"] == "best.yaml"
    assert document["outcomes"]["diverged"] == 9
    assert document["study"]["run_directory"].startswith("~/")


def test_another_command_that_draws_the_report_is_not_the_one_that_made_the_run() -> None:
    made = {"command": "stability-search run --space /home/someone/a.yaml"}
    again = report_of(stable_study(), environment=made, command="stability-search report x")
    assert render_json(again)["study"]["command"] == "stability-search run --space ~/a.yaml"
    first = report_of(stable_study())
    assert render_json(first)["study"]["command"] == first.command


def test_without_a_choice_best_is_null() -> None:
    document = render_json(report_of(hopeless_study()))
    assert document["best"] is None
    assert document["files"]["best"] is None
    assert document["closest"]["config_id"] == hopeless_study().verdict.closest
    assert document["missed"]


def test_numbers_that_are_not_finite_become_null() -> None:
    report = report_of(stable_study(), environment={"load": float("nan"), "deep": [float("inf")]})
    assert render_json(report)["environment"] == {"load": None, "deep": [None]}
