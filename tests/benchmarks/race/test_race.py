"""The race's own bookkeeping: what is run twice, what is charged, how no choice reads."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from stability_search.settings.engine import EngineSettings
from stability_search.settings.trial import TaskReference, TrialConfig, TrialConstants
from stability_search.yardstick import probe_steps
from tests.benchmarks.race import rivals
from tests.benchmarks.race.adopting import adopt
from tests.benchmarks.race.judging import Evaluated, GridPoint, survival_interval
from tests.benchmarks.race.ours import Finished
from tests.benchmarks.race.store import Reading, Store, Training
from tests.benchmarks.race.tables import Line, track_table
from tests.benchmarks.race.tracks import TRACKS

OWN = TaskReference(module="tests.benchmarks.race.tasks", class_name="HeavyTails")


def _training(*, rate: float = 0.01, steps: int = 20) -> Training:
    engine = EngineSettings(learning_rate=rate, num_planned_steps=steps, optimizer="sgd")
    return Training(
        config=TrialConfig(
            task=OWN, engine=engine, num_planned_steps=steps, kill_rule=rivals.NO_KILL
        ),
        constants=TrialConstants(probe_steps=probe_steps(steps)),
    )


@pytest.mark.fault
def test_a_training_is_run_once_and_another_one_anew(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.run(_training())
    assert store.num_run == 1
    assert store.run(_training()) == first
    assert store.num_run == 1
    assert store.run(_training(rate=0.02)) != first
    assert store.num_run == 2


@pytest.mark.fault
def test_a_training_followed_reads_what_a_whole_one_reads(tmp_path: Path) -> None:
    store = Store(tmp_path)
    whole = store.run(_training())
    readings = list(store.follow(_training()))
    assert [reading.loss for reading in readings] == list(whole.probe_losses[1:])
    assert [reading.step for reading in readings] == list(whole.probe_steps[1:])
    assert [reading.is_last for reading in readings] == [False] * 9 + [True]
    num_run = store.num_run
    assert list(store.follow(_training())) == readings
    assert store.num_run == num_run


@pytest.mark.fault
def test_a_training_broken_off_costs_what_it_ran_and_goes_on_later(tmp_path: Path) -> None:
    store = Store(tmp_path)
    steps = store.follow(_training())
    part = [next(steps), next(steps)]
    steps.close()  # type: ignore[attr-defined]
    assert store.num_steps_run == 4
    again = store.follow(_training())
    assert [next(again), next(again)] == part
    assert store.num_steps_run == 4
    assert [reading.step for reading in again] == [*range(6, 21, 2)]


@pytest.mark.fault
def test_a_training_that_the_engine_ends_reads_nan_last(tmp_path: Path) -> None:
    training = _training(rate=1e30)
    engine = replace(training.config.engine, max_bad_steps=3)
    ended = replace(training, config=replace(training.config, engine=engine))
    last = list(Store(tmp_path).follow(ended))[-1]
    assert math.isnan(last.loss)
    assert last.is_last
    assert last.step < 20


@pytest.mark.fault
@pytest.mark.parametrize("method", ["random", "threshold"])
def test_a_rival_launches_trials_until_the_budget_is_spent(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(_store: Store, training: Training) -> list[Reading]:
        steps = training.config.num_planned_steps
        return [Reading(step=steps, loss=1.0, wall_s=0.5, is_last=True)]

    monkeypatch.setattr(Store, "follow", lambda *given: iter(_Closing(read(*given))))
    monkeypatch.setattr(rivals, "untrained_loss", lambda *_: 2.0)
    space = TRACKS["own"].space(0, tmp_path)
    finished = rivals.run_optuna(method, space, Store(tmp_path), budget=401)
    assert (finished.trials, finished.steps, finished.train_s) == (3, 600, 1.5)
    assert finished.choice is not None
    assert finished.choice["learning_rate"] == 0.01  # what is trained today comes first


@pytest.mark.fault
def test_trainings_pass_on_to_sources_that_train_alike_and_to_no_others(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.run(_training())
    kept = store.note_path()
    kept.rename(tmp_path / "before")
    assert "1 kinds" in adopt(store, "before")
    assert store.run(_training()).num_steps == 20
    (path,) = (kept / "trial").iterdir()
    path.write_text(path.read_text().replace('"probe_losses": [1', '"probe_losses": [2'))
    kept.rename(tmp_path / "before")
    with pytest.raises(ValueError, match="ends otherwise now: probe_losses"):
        adopt(store, "before")


class _Closing:
    """A list whose iterator can be closed, as a generator's can."""

    def __init__(self, items: list[Reading]) -> None:
        self._items = iter(items)

    def __iter__(self) -> "_Closing":
        return self

    def __next__(self) -> Reading:
        return next(self._items)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("survived", "low", "high"), [(10, 0.6915, 1.0), (0, 0.0, 0.3085), (5, 0.1871, 0.8129)]
)
def test_survival_has_an_exact_interval(survived: int, low: float, high: float) -> None:
    assert survival_interval(survived, 10) == pytest.approx((low, high), abs=1e-4)


def test_a_study_without_a_choice_is_a_line_like_any_other() -> None:
    ours = Finished(
        method="ours",
        seed=0,
        choice=None,
        note="none. Nothing met the bar.",
        trials=50,
        steps=1000,
        train_s=2.0,
        parts={"pilot": 200, "confirm": 800, "confirm: rungs above": 800},
    )
    rival = replace(ours, method="random", choice={"learning_rate": 0.5}, note="", parts={})
    fared = Evaluated(losses=(1.0,) * 5, num_seeds=10)
    text = track_table(
        [
            Line(name="ours", finished=ours, choice=None, evaluated=None),
            Line(name="random", finished=rival, choice=rival.choice, evaluated=fared),
        ],
        (
            GridPoint(settings={"learning_rate": 0.1}, losses=(0.8, 0.8)),
            replace(fared, losses=(0.8,) * 10),
        ),
        ["learning_rate"],
    )
    assert "| ours (0 of 1 chose) | no choice |  |  |  | 50 | 1,000 | 2 |" in text
    assert "| random | 5/10 | [0.19, 0.81] | 1 | +25.0 % | 50 | 1,000 | 2 |" in text
    assert "| ours | 0 | none | - | - | none. Nothing met the bar. |" in text
    assert "| 0 | 1,000 | 0.80 | pilot 200, confirm 800, confirm: rungs above 800 |" in text
