"""What a user would pick instead: Ray Tune with its OptunaSearch, without and with ASHA.

The trainable is a class with reused actors, as Ray advises for short trials, one at a time so
that a run can be repeated. Without a scheduler it reports once, at the end; with ASHA after each
tenth. Budget, space and engine as in `rivals`.
"""

import contextlib
import itertools
import logging
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from optuna import Trial
from optuna.samplers import TPESampler
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from stability_search.search.driver import output_to
from stability_search.space import Space
from tests.benchmarks.race.ours import Finished
from tests.benchmarks.race.rivals import NUM_REPORTS, Meter, rival_training, suggest_values
from tests.benchmarks.race.store import Reading, Store
from tests.benchmarks.race.tracks import TRACKS

TUNE_RIVALS = ("tune", "asha")
METRIC = "probe_loss"
OBJECT_STORE_BYTES = 100 * 2**20

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
}


class ProbeTrainable(tune.Trainable):
    """Trains one configuration; a user's script with a report every tenth, or one at the end.

    Besides the values of the space its `config` holds `race`: track, study seed, store, and how
    many tenths pass between two reports.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial."""
        import torch

        torch.set_num_threads(1)
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        self._take(new_config)
        return True

    def _take(self, config: dict[str, Any]) -> None:
        race = config["race"]
        folder = Path(race["store"])
        space = TRACKS[race["track"]].space(race["seed"], folder / "spaces")
        self._tenths = race["tenths"]
        values = {name: config[name] for name in space.varying if name in config}
        self._readings = Store(folder).follow(rival_training(space, values))

    def step(self) -> dict[str, Any]:
        """Train until the next report."""
        last = Reading(step=0, loss=math.nan, wall_s=0.0)
        for last in itertools.islice(self._readings, self._tenths):
            if last.is_last:
                break
        return {
            METRIC: last.loss,
            "steps": last.step,
            "train_s": last.wall_s,
            "done": last.is_last,
        }

    def cleanup(self) -> None:
        """Stop the training where it is."""
        self._readings.close()  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class _DefineByRun:
    """The space as a function of an Optuna trial; a class because Ray pickles it."""

    space: Space
    race: Mapping[str, Any]

    def __call__(self, trial: Trial) -> dict[str, Any]:
        suggest_values(self.space, trial)
        return {"race": dict(self.race)}


class BudgetedOptunaSearch(OptunaSearch):
    """Ray's OptunaSearch, which proposes nothing more once the steps are spent."""

    def __init__(self, meter: Meter, **kwargs: Any) -> None:  # noqa: ANN401 - handed on
        super().__init__(**kwargs)
        self.meter = meter

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Propose a trial while there is budget."""
        if not self.meter.may_launch:
            return Searcher.FINISHED  # type: ignore[return-value]  # Ray types it as text
        return super().suggest(trial_id)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Charge what the trial executed, then hand on."""
        if result is None or error:
            raise RuntimeError(f"a trial of the race failed in Ray: {trial_id}")
        self.meter.charge(int(result["steps"]), float(result["train_s"]))
        super().on_trial_complete(trial_id, result, error)


def run_tune(method: str, space: Space, store: Store, *, budget: int) -> Finished:
    """Run Ray Tune.

    Args:
        method: One of `TUNE_RIVALS`.
        space: The study's space; its name is the track's.
        store: Where trainings come from.
        budget: Optimizer steps it may launch trials for.
    """
    tenths = 1 if method == "asha" else NUM_REPORTS
    race = {
        "track": space.study.name,
        "seed": space.study.seed,
        "store": str(store.folder.resolve()),
        "tenths": tenths,
    }

    meter = Meter(budget)
    searcher = BudgetedOptunaSearch(
        meter,
        space=_DefineByRun(space=space, race=race),
        metric=METRIC,
        mode="min",
        sampler=TPESampler(seed=space.study.seed),
        points_to_evaluate=[dict(start) for start in space.start_with],
    )
    scheduler: TrialScheduler = FIFOScheduler()  # type: ignore[no-untyped-call]
    if method == "asha":
        scheduler = AsyncHyperBandScheduler(metric=METRIC, mode="min", max_t=NUM_REPORTS)
    log = store.folder / "ray.log"
    with output_to(log), _local_ray() as storage:
        results = tune.run(
            ProbeTrainable,
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=1,
            reuse_actors=True,
            resources_per_trial={"cpu": 1},
            storage_path=str(storage),
            name="race",
            verbose=0,
            raise_on_failed_trial=False,
            trial_dirname_creator=lambda trial: trial.trial_id,
        )
        best = tune.ResultGrid(results).get_best_result
        try:
            found = best(METRIC, "min")
            values = {k: v for k, v in (found.config or {}).items() if k in space.varying}
            choice, loss = space.settings(values), (found.metrics or {})[METRIC]
            note = f"probe loss {loss:.4g} in its last report"
        except RuntimeError as error:
            choice, note = None, f"{type(error).__name__}: {error}"
    return Finished(
        method=method,
        seed=space.study.seed,
        choice=choice,
        note=note,
        trials=meter.trials,
        steps=meter.steps,
        train_s=meter.train_s,
    )


@contextlib.contextmanager
def _local_ray() -> Iterator[Path]:
    """Start a Ray of our own in a short private folder, and end it."""
    before = {name: os.environ.get(name) for name in (*_ENVIRONMENT, "PYTHONPATH")}
    root = str(Path(__file__).resolve().parents[3])
    os.environ.update(_ENVIRONMENT)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [before["PYTHONPATH"]])])
    folder = Path(tempfile.mkdtemp(prefix="race-"))
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=1,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(folder),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        yield folder / "tune"
    finally:
        ray.shutdown()
        sys.stdout.flush()
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
