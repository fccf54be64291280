"""The honest words: horizon, counts, bounds, ceilings, ties, ends of what was tried."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from stability_search.errors import StoppedEarlyError, UserCodeError
from stability_search.inert import plain
from stability_search.records.trial import Outcome, Stage, TrialRow
from stability_search.records.verdict import ChoiceReason, Verdict, VerdictKind
from stability_search.report import render_markdown, verdict_lines
from stability_search.report.context import View
from stability_search.report.parts import effects, outcomes, verdict_card
from stability_search.report.wording import (
    bad_steps_text,
    choice_details,
    choice_text,
    headline,
    margin_text,
    next_step,
    number,
    outcomes_text,
    part,
    percent_at_most,
    progress_text,
    score_text,
    seeds_text,
)
from tests.report.study_reports import HOSTILE, hostile_report, report_of
from tests.study_rows import (
    StudyCase,
    empty_study,
    hopeless_study,
    interrupted_study,
    stable_study,
)

RUN = "~/reports/teacher-20260301-0900"
AGAIN = f"stability-search run --space {RUN}/space.yaml"


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0015, "0.15 %"), (0.00151, "0.16 %"), (1.0, "100 %"), (0.5, "50 %"), (0.123, "13 %")],
)
def test_an_upper_bound_is_never_rounded_down(share: float, text: str) -> None:
    assert percent_at_most(share) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\u2013"),
        (0.0003, "0.0003"),
        (1e-5, "1e-5"),
        (2000, "2,000"),
        (0.63127, "0.631"),
        (65536.0, "65,536"),
        (10000.0, "10,000"),
        (48210.7, "48,200"),
        (1.07e6, "1.07e6"),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_a_score_below_one_half_learned_nothing() -> None:
    assert score_text(0.49) == "< 0.5"
    assert score_text(77.34) == "77.3"


def test_bad_steps_carry_their_bound() -> None:
    row = {"num_judged_steps": 2000, "num_bad_steps": 0, "bad_rate_bound": 0.0015}
    assert bad_steps_text(row) == "0 of 2,000 steps bad; at most 0.15 % at 95 % confidence"
    assert bad_steps_text({**row, "num_judged_steps": 0}) == "no step was judged"


@pytest.mark.parametrize(
    ("margin", "is_capped", "octaves", "text"),
    [
        (3, True, 3, "at least 3 doublings"),
        (1, False, 3, "1 doubling"),
        (0, False, 3, "no doubling"),
        (0, True, 0, "not measured"),
    ],
)
def test_a_margin_at_the_end_of_what_was_tried_is_at_least(
    margin: int, is_capped: bool, octaves: int, text: str
) -> None:
    row = {"margin_octaves": margin, "margin_is_capped": is_capped}
    assert margin_text(row, octaves) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (1.0, "all"), (0.9999, "more than 99 %"), (0.994, "99 %"), (0.769, "77 %"),
        (0.025, "2.5 %"), (0.0002, "less than 0.1 %"), (0.0, "none"),
    ],
)  # fmt: skip
def test_a_share_is_never_a_hundred_or_zero_per_cent(share: float, text: str) -> None:
    assert part(share) == text


def test_seeds_are_counted_never_a_percentage() -> None:
    assert seeds_text({"num_stable_seeds": 5, "num_seeds": 5}) == "5 of 5 seeds"


def test_the_horizon_stands_in_the_verdict() -> None:
    assert headline(View(report_of(stable_study()))) == "Stable over 400 steps"
    assert headline(View(report_of(hopeless_study()))) == "No stable configuration"
    assert headline(View(report_of(interrupted_study()))) == "Not finished: 40 of 48 trials"


def test_trials_that_say_nothing_do_not_count_as_progress() -> None:
    case = interrupted_study()
    view = View(report_of(case))
    assert len({row["index"] for row in view.in_stage("search")}) == 42
    lost = {Outcome.INFRASTRUCTURE, Outcome.USER_ERROR}
    confirmed = [r for r in stable_study().rows if r.stage == Stage.CONFIRM][:3]
    summary = replace(confirmed[0].summary, outcome=Outcome.INFRASTRUCTURE)
    confirmed[0] = replace(confirmed[0], summary=summary)
    further = replace(case, rows=(*case.rows, *confirmed))
    assert sum(view.outcomes[outcome] for outcome in lost) == 2
    assert progress_text(View(report_of(further))) == "40 of 48 trials, 2 trials of confirm"


def test_where_nothing_varies_no_search_is_spoken_of() -> None:
    rows = tuple(row for row in stable_study().rows if row.stage == Stage.CONFIRM)[:5]
    view = View(report_of(replace(interrupted_study(), rows=rows), varying=()))
    assert headline(view) == "Not finished: 5 trials of confirm"


@pytest.mark.parametrize(
    ("code", "more"),
    [(StoppedEarlyError.exit_code, " --set search.step_budget=10000"), (130, "")],
)
def test_a_run_named_like_a_budget_is_not_taken_for_one_that_ran_out(code: int, more: str) -> None:
    case = interrupted_study()
    verdict = replace(case.verdict, exit_code=code, reason="Go on with reports/budget-1.")
    study = replace(case.study, search=replace(case.study.search, step_budget=5000))
    stopped = replace(case, verdict=verdict, study=study)
    view = View(report_of(stopped, run_directory="reports/budget-1"))
    assert next_step(view) == f"stability-search resume reports/budget-1{more}"


def test_ties_are_shown_as_ties_and_few_seeds_name_no_winner() -> None:
    case = stable_study()
    assert "Tied with 1 other: no paired test" in choice_text(View(report_of(case)))
    rows = tuple(r for r in case.rows if r.stage != "confirm" or r.seed_index < 3)
    few = report_of(replace(case, rows=rows))
    assert "not enough seeds to name a winner" in choice_text(View(few))


@pytest.mark.parametrize(
    ("make", "command"),
    [
        (
            stable_study,
            f"stability-search train --space {RUN}/best.yaml --steps 10000  # your own length",
        ),
        (
            hopeless_study,
            f"{AGAIN}  # change it first, as the report says",
        ),
        (interrupted_study, f"stability-search resume {RUN}"),
    ],
)
def test_the_next_command_follows_the_verdict_and_hides_the_home(
    make: Callable[[], StudyCase], command: str
) -> None:
    assert next_step(View(report_of(make()))) == command


def test_a_path_with_a_space_is_quoted_for_the_shell() -> None:
    view = View(report_of(interrupted_study(), run_directory="/data/my runs/a"))
    assert next_step(view) == "stability-search resume '/data/my runs/a'"


def test_the_terminal_says_everything_that_must_stand_beside_a_score() -> None:
    text = "\n".join(verdict_lines(report_of(stable_study())))
    for words in (
        "Stable over 400 steps",
        "of at most 77.3 (A 1.00, B 1.00, C 1.00, P 1.00, Q 0.77, M 0.91)",
        "on cpu: 5 of 5 seeds stable over 400 steps, margin: at least 3 doublings",
        "0 of 2,000 steps bad; at most 0.15 % at 95 % confidence",
        "target word_error_rate <= 0.3: missed",
        "the fastest that meets the bar",
        "today's",
        "warning: fp16 was emulated on a CPU",
        "warning: TPE ran with trials in flight",
    ):
        assert words in text
    assert " 0 %" not in text
    assert "100 %" not in text


def test_no_stable_configuration_says_what_came_closest_and_what_broke() -> None:
    text = "\n".join(verdict_lines(report_of(hopeless_study())))
    assert "it missed: 0 of 5 seeds reached q >= 1/2" in text
    assert "first seen in fusion.attention" in text
    assert "caused by" not in text
    assert "Lower the upper end of learning_rate: above 0.0265, 19 of 19 trials" in text


def test_an_unfinished_study_names_no_winner() -> None:
    text = "\n".join(verdict_lines(report_of(interrupted_study())))
    assert "40 of 48 trials" in text
    assert "choice" not in text


@pytest.mark.parametrize(
    "make",
    [stable_study, hopeless_study, interrupted_study, empty_study],
    ids=lambda f: f.__name__,
)
def test_the_summary_has_at_most_sixty_lines_and_ends_with_the_command(
    make: Callable[[], StudyCase],
) -> None:
    lines = render_markdown(report_of(make())).splitlines()
    assert len(lines) <= 60
    assert lines[-1].startswith("Next: `stability-search ")


def test_the_summary_stays_short_and_whole_with_everything_at_its_longest() -> None:
    case = hopeless_study()
    verdict = replace(
        case.verdict,
        missed=tuple(f"missed {i}" for i in range(20)),
        warnings=tuple(f"Warning {i}." for i in range(30)),
    )
    names = tuple(f"s{i}" for i in range(40))
    confirmed = tuple(dict.fromkeys(r.config_id for r in case.rows if r.stage == Stage.CONFIRM))
    pilot = tuple(row.config_id for row in case.rows if row.stage == Stage.PILOT)
    verdict = replace(verdict, confirmed=(*confirmed, *pilot))
    study = replace(case.study, targets={f"m{i}": 0.1 for i in range(6)})
    full = report_of(replace(case, verdict=verdict, study=study), setting_names=names)
    configurations = full.tables.configurations.assign(score=50.0, ceiling=77.3, num_seeds=5)
    columns = dict.fromkeys(("num_planned_steps", "num_stable_seeds", "margin_octaves"), 1)
    configurations = configurations.assign(**columns, margin_is_capped=False, calm=1.0)
    trials = full.tables.trials.assign(control_q=0.1, control_outcome="completed")
    tables = replace(full.tables, configurations=configurations, trials=trials)
    lines = render_markdown(replace(full, tables=tables)).splitlines()
    assert len(lines) <= 60
    assert lines[-1].startswith("Next: ")
    kept = [line for line in lines if line.startswith("- Warning ")]
    [rest] = [line for line in lines if line.endswith("more in report.html")]
    left_out = int(rest.split()[2])
    assert len(kept) + left_out >= 30
    assert any("4 more stand in configurations.csv" in line for line in lines)
    print(len(lines), "lines,", len(kept), "warnings kept")


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("make", [stable_study, hopeless_study], ids=lambda f: f.__name__)
def test_hostile_text_is_inert_in_summary_and_terminal(
    make: Callable[[], StudyCase], text: str
) -> None:
    report = hostile_report(make, text)
    markdown = render_markdown(report)
    in_yaml = False
    for line in markdown.splitlines():
        in_yaml ^= line.startswith("```")
        if not in_yaml and not line.startswith("Next: `"):  # code is shown as it is
            assert not {"<", ">", "@"} & set(line)
            assert "://" not in line
            assert "![" not in line.replace("!\\[", "")
    for line in verdict_lines(report):
        assert plain(line) == line
        assert "\x1b" not in line


def test_a_winner_and_an_only_one_are_told_apart() -> None:
    case = stable_study()
    for reason, words in ((ChoiceReason.WINNER, "exact paired test"), (ChoiceReason.ONLY, "only")):
        verdict = replace(case.verdict, choice_reason=reason, tied=())
        assert words in choice_text(View(report_of(replace(case, verdict=verdict))))


def test_an_only_one_that_others_met_the_bar_beside_is_not_called_the_only_one() -> None:
    case = stable_study()
    verdict = replace(case.verdict, choice_reason=ChoiceReason.ONLY, tied=())
    view = View(report_of(replace(case, verdict=verdict)))
    met = [c for c in verdict.confirmed if view.by_id[c]["meets_bar"] and c != verdict.choice]
    assert met
    assert choice_text(view).startswith("Of the configurations that competed, only this one")
    assert choice_details(view).startswith(f"{len(met)} other")
    alone = replace(verdict, confirmed=(str(verdict.choice),))
    view = View(report_of(replace(case, verdict=alone)))
    assert choice_text(view).startswith("Of the configurations confirmed on every seed")
    assert choice_details(view) == ""


@pytest.mark.parametrize("num_spared", [1, 2])
def test_candidates_that_did_not_get_all_seeds_are_counted(num_spared: int) -> None:
    case = stable_study()
    begun = list(case.verdict.confirmed[1:])[:num_spared]
    verdict = replace(case.verdict, spared=tuple(begun))
    said = "\n".join(verdict_lines(report_of(replace(case, verdict=verdict))))
    noun = "candidate" if num_spared == 1 else "candidates"
    assert f"{num_spared} other {noun} did not get all seeds: with " in said
    assert "not tried" not in said


@pytest.mark.parametrize("num_spared", [1, 2])
def test_of_candidates_without_a_trial_in_confirm_no_seeds_are_claimed(num_spared: int) -> None:
    case = stable_study()
    tried = {row.config_id for row in case.rows if row.stage is Stage.CONFIRM}
    search = [row.config_id for row in case.rows if row.stage is Stage.SEARCH]
    spared = [config_id for config_id in search if config_id not in tried][:num_spared]
    verdict = replace(case.verdict, spared=tuple(spared))
    said = "\n".join(verdict_lines(report_of(replace(case, verdict=verdict))))
    was = "candidate was" if num_spared == 1 else "candidates were"
    assert f"{num_spared} other {was} not tried in confirm: no configuration could have" in said
    assert "first one" not in said


def test_a_tied_set_of_one_is_no_tie() -> None:
    case = stable_study()
    verdict = replace(case.verdict, tied=(str(case.verdict.choice),))
    said = choice_text(View(report_of(replace(case, verdict=verdict))))
    assert said.startswith("No winner: it has the highest score and no other reached 80 % of it")
    assert "0 others" not in said


def test_after_an_error_of_the_task_the_own_files_are_run_again() -> None:
    """The run directory holds the task as it was, with the error."""
    case = interrupted_study()
    verdict = replace(case.verdict, exit_code=UserCodeError.exit_code)
    failed = replace(case, verdict=verdict)
    made = "stability-search run --space my.yaml --output out --set seed=1"
    for command, again in (
        (made, "stability-search run --space my.yaml --set seed=1"),
        (
            "stability-search run --space 'my.yaml",
            f"stability-search run --space {RUN}/space.yaml",
        ),
    ):
        said = next_step(View(report_of(failed, command=command)))
        assert said == f"{again}  # mend the task first"


def failing(*reasons: str, where: Callable[[TrialRow], bool] | None = None) -> View:
    """Return a study whose task raised this, in the first search trials or where it is said.

    No other trial failed in its task or was lost to a machine.
    """
    found = stable_study()
    left = list(reasons)
    rows = []
    for row in found.rows:
        is_result = row.summary.outcome.is_result
        summary = row.summary if is_result else replace(row.summary, outcome=Outcome.PRUNED)
        if left and row.stage is Stage.SEARCH and (where is None or where(row)):
            summary = replace(summary, outcome=Outcome.USER_ERROR, reason=left.pop(0))
        rows.append(replace(row, summary=summary))
    return View(report_of(replace(found, rows=tuple(rows))))


def errors_told(view: View) -> str:
    failed = [row for row in view.trials if row["outcome"] == Outcome.USER_ERROR]
    return outcomes_text(view, failed)


@pytest.mark.parametrize(
    ("reasons", "told"),
    [
        (("KeyError: 'x'",), "1 error in the task (KeyError: 'x')"),
        (("KeyError: 'x'",) * 5, "5 errors in the task (KeyError: 'x')"),
        (
            ("IndexError: 7", "KeyError: 'x'", "KeyError: 'x'"),
            "3 errors in the task (2 of them KeyError: 'x')",
        ),
        (
            ("E: \x1b[31m" + "long " * 100,),
            f"1 error in the task (E: \\x1b[31m{'long ' * 13}l...)",
        ),
    ],
)
def test_errors_of_the_task_are_counted_with_the_most_frequent_reason(
    reasons: tuple[str, ...], told: str
) -> None:
    assert errors_told(failing(*reasons)) == told


def test_every_form_of_the_report_tells_what_the_task_raised() -> None:
    """Where nothing but the count stands, a reader looks for a fault of the search."""
    view = failing("KeyError: 'x'", "KeyError: 'x'")
    told = "2 errors in the task (KeyError: 'x')"
    assert any(told in line for line in verdict_lines(view.report))
    assert told in render_markdown(view.report)
    assert told in " ".join(verdict_card.build(view).broke)
    assert told in outcomes.build(view).figures[0].finding
    assert told in effects.build(view).figures[0].note


def is_capped(row: TrialRow) -> bool:
    return row.settings["attention_logit_cap"] is not None


def test_the_one_value_that_every_failing_trial_had_and_no_other_is_named() -> None:
    case = stable_study()
    num = sum(is_capped(row) for row in case.rows if row.stage is Stage.SEARCH)
    view = failing(*["KeyError: 'x'"] * num, where=is_capped)
    assert errors_told(view).endswith("in the task (KeyError: 'x')")  # confirm held with it
    alone = [
        row for row in view.trials if row["stage"] == "search" or not row["attention_logit_cap"]
    ]
    view.trials = alone
    assert errors_told(view).endswith("(KeyError: 'x'; each with attention_logit_cap=30)")
    for row in alone:  # as well told apart by another setting: nobody knows which one it was
        row["attention_clamp"] = 10.0 if row["attention_logit_cap"] else None
    assert errors_told(view).endswith("in the task (KeyError: 'x')")
    for row in alone:  # null there because of the other one: it tells nothing more
        row["attention_clamp"] = None if row["attention_logit_cap"] else 10.0
    assert errors_told(view).endswith("; each with attention_logit_cap=30)")


def test_one_failing_configuration_blames_none_of_its_settings() -> None:
    view = failing("KeyError: 'x'", "KeyError: 'x'")
    ids = {row["config_id"] for row in view.trials if row["outcome"] == Outcome.USER_ERROR}
    for row in view.trials:
        row["init_scale"] = 1 if row["config_id"] in ids else 2
    assert errors_told(view).endswith("; each with init_scale=1)")
    for row in view.trials:
        if row["config_id"] in ids:
            row["config_id"] = "the same"
    assert errors_told(view).endswith("in the task (KeyError: 'x')")


def test_a_verdict_about_nothing_still_has_words() -> None:
    verdict = Verdict(kind=VerdictKind.NONE, exit_code=3, reason="No candidate was left.")
    case: StudyCase = replace(empty_study(), verdict=verdict)
    lines = verdict_lines(report_of(case))
    assert lines[0] == "No stable configuration. No candidate was left."
