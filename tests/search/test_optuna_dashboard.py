"""The real optuna-dashboard reads a ledger as it stands, and changes nothing in it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stability_search import space as spaces
from stability_search.records.trial import Outcome, Stage, TrialRow, TrialSummary
from stability_search.search.ledger import Ledger
from stability_search.search.plan import StudyPlan
from stability_search.search.reopening import parameters_of
from stability_search.search.request import TrialRequest
from tests.search.inline_study import SPACE, lost, pretend, run_all, write_space

pytestmark = [
    pytest.mark.fault,
    pytest.mark.filterwarnings("ignore"),  # of the dashboard's own imports and of Optuna's
]
NUM_TRIALS = 12

Get = Callable[[str], Any]


def first_is_lost(request: TrialRequest) -> TrialSummary:
    """Lose the first attempt of the first search trial."""
    is_first = request.stage is Stage.SEARCH and request.index == 0 and request.attempt == 1
    return lost(request) if is_first else pretend(request)


@pytest.fixture(name="study", scope="module")
def _study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TrialRow]]:
    """Write the ledger of a whole study."""
    folder = tmp_path_factory.mktemp("dashboard")
    text = SPACE.replace("trials: 6", f"trials: {NUM_TRIALS}")
    space = spaces.load(write_space(folder, sampler="random", text=text))
    rows = run_all(StudyPlan(space, device="cpu"), first_is_lost)
    path = folder / "study.db"
    ledger = Ledger.create(path, {"name": "tiny"})
    for row in rows:
        ledger.add(row, *parameters_of(space, row))
    ledger.close()
    shutil.copy(path, folder / "as_written.db")
    return path, rows


@pytest.fixture(name="get")
def _get(study: tuple[Path, list[TrialRow]]) -> Get:
    """Ask the dashboard's own application, as a browser would."""
    import optuna_dashboard
    from werkzeug.test import Client

    client = Client(optuna_dashboard.wsgi(f"sqlite:///{study[0]}"))

    def get(path: str) -> Any:  # noqa: ANN401 - JSON
        answer = client.get(path)
        assert answer.status_code == 200, answer.get_data(as_text=True)
        return json.loads(answer.get_data())

    return get


def trials_of(get: Get, name: str) -> list[dict[str, Any]]:
    listed = get("/api/studies")["study_summaries"]
    (number,) = (one["study_id"] for one in listed if one["study_name"] == name)
    trials: list[dict[str, Any]] = get(f"/api/studies/{number}")["trials"]
    return trials


def attributes(trial: dict[str, Any]) -> dict[str, str]:
    return {one["key"]: one["value"] for one in trial["user_attrs"]}


def test_the_dashboard_lists_the_three_stages_as_studies(get: Get) -> None:
    listed = get("/api/studies")["study_summaries"]

    assert sorted(one["study_name"] for one in listed) == ["confirm", "pilot", "search"]


@pytest.mark.parametrize("stage", list(Stage))
def test_every_trial_is_there_with_how_it_ended(
    get: Get, study: tuple[Path, list[TrialRow]], stage: Stage
) -> None:
    shown = [
        (attributes(one)["trial_id"], attributes(one)["outcome"], attributes(one)["attempt"])
        for one in trials_of(get, stage.value)
    ]

    rows = [row for row in study[1] if row.stage is stage]
    assert shown == [(row.trial_id, row.summary.outcome.value, str(row.attempt)) for row in rows]


def test_search_trials_have_their_parameters_and_ranges(
    get: Get, study: tuple[Path, list[TrialRow]]
) -> None:
    rows = [row for row in study[1] if row.stage is Stage.SEARCH]

    for row, trial in zip(rows, trials_of(get, "search"), strict=True):
        params = {one["name"]: one for one in trial["params"]}
        assert set(params) == {"learning_rate", "clip_norm"}
        rate = params["learning_rate"]
        assert float(rate["param_external_value"]) == row.settings["learning_rate"]
        assert (rate["distribution"]["low"], rate["distribution"]["high"]) == (1e-4, 1.0)
        assert rate["distribution"]["log"] is True
        assert params["clip_norm"]["param_external_value"] == str(row.settings["clip_norm"])


def test_ends_of_search_trials_have_the_states_that_the_page_describes(
    get: Get, study: tuple[Path, list[TrialRow]]
) -> None:
    seen: dict[str, set[str]] = {}
    for trial in trials_of(get, "search"):
        seen.setdefault(attributes(trial)["outcome"], set()).add(trial["state"])

    assert {row.summary.outcome for row in study[1]} == {
        Outcome.COMPLETED,
        Outcome.PRUNED,
        Outcome.INFRASTRUCTURE,
    }
    assert seen == {"completed": {"Complete"}, "pruned": {"Complete"}, "infrastructure": {"Fail"}}


def test_a_killed_trial_looks_feasible_so_that_its_outcome_must_be_read(get: Get) -> None:
    """Optuna 5 keeps constraints where this dashboard does not look; else the page is wrong."""
    killed = [
        one for one in trials_of(get, "search") if attributes(one)["outcome"] == Outcome.PRUNED
    ]

    assert killed
    assert all(one["constraints"] == [] for one in killed)


def test_reading_changes_no_byte_of_the_ledger(
    study: tuple[Path, list[TrialRow]], get: Get
) -> None:
    for name in Stage:
        trials_of(get, name.value)

    assert study[0].read_bytes() == study[0].with_name("as_written.db").read_bytes()
    assert [path.name for path in study[0].parent.glob("study.db*")] == ["study.db"]
    assert tuple(study[1]) == Ledger(study[0]).rows()
