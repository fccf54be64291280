"""MLflow: a parent run per study and a nested run per trial.

Where to log, and as whom, is MLflow's own business: `MLFLOW_TRACKING_URI` and its other
variables. Only the client is used, so that no user, host or git commit is added.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from stability_search.records.trial import Outcome
from stability_search.records.values import Scalar
from stability_search.trackers.base import StudyEnd, StudyLog, TrialLog, shown

_TAG = "stability_search."
_MOST_METRICS = 1000  # of one batch, as MLflow allows
_MOST_PARAMS = 100
_PAGE = 1000
_STATUS = {Outcome.COMPLETED: "FINISHED", Outcome.PRUNED: "KILLED"}  # every other end: FAILED


class MlflowTracker:
    """Logs to the server, or the local files, that MLflow's own settings name."""

    def begin(self, study: StudyLog) -> frozenset[str]:
        """Open the study's parent run, and find the trials it has."""
        self._client = MlflowClient()
        self._experiment = self._experiment_id(study.name)
        self._open: dict[str, str] = {}
        found = list(self._runs(f"tags.`{_TAG}study` = '{study.study_id}'"))
        parents = [run for run in found if f"{_TAG}trial" not in run.data.tags]
        if parents:
            self._parent = parents[0].info.run_id
            self._client.update_run(self._parent, status="RUNNING")
        else:
            tags = {f"{_TAG}study": study.study_id}
            run = self._client.create_run(
                self._experiment, run_name=study.directory.name, tags=tags
            )
            self._parent = run.info.run_id
            self._log(self._parent, params=study.facts)
        self._study_id = study.study_id
        names = {run.data.tags[f"{_TAG}trial"]: run for run in found if run not in parents}
        # A process that was killed left a run open: logging the same again changes nothing.
        self._open = {
            name: run.info.run_id for name, run in names.items() if run.info.status == "RUNNING"
        }
        return frozenset(names.keys() - self._open.keys())

    def add_trial(self, trial: TrialLog) -> None:
        """Log one trial as a nested run."""
        tags = {f"{_TAG}{name}": value for name, value in trial.texts.items()}
        run_id = self._open.get(trial.name) or self._create(trial)
        ended_ms = _ms(trial.ended_s)
        metrics = [
            Metric(tag, value, _ms(point.time_s), point.step)
            for point in trial.curve
            for tag, value in point.values.items()
        ]
        metrics += [
            Metric(name, value, ended_ms, trial.num_steps) for name, value in trial.numbers.items()
        ]
        self._log(run_id, params=trial.settings, metrics=metrics, tags=tags)
        status = _STATUS.get(Outcome(trial.outcome), "FAILED")
        self._client.set_terminated(run_id, status=status, end_time=ended_ms)

    def finish(self, end: StudyEnd) -> None:
        """Log the verdict, the choice and the report to the parent run, and end it."""
        choice = {f"choice.{name}": shown(value) for name, value in end.settings.items()}
        texts = {"reason": end.reason, "choice": end.choice, "margin": end.margin}
        said = {"verdict": end.verdict, **texts, **choice}
        tags = {f"{_TAG}{name}": value for name, value in said.items() if value}
        numbers = {**end.numbers, "exit_code": float(end.exit_code)}
        now_ms = _ms(time.time())
        metrics = [Metric(name, value, now_ms, 0) for name, value in numbers.items()]
        self._log(self._parent, metrics=metrics, tags=tags)
        for path in end.files:
            self._client.log_artifact(self._parent, str(path))
        status = "KILLED" if end.verdict == "incomplete" else "FINISHED"
        self._client.set_terminated(self._parent, status=status)

    def stop(self) -> None:
        """End the parent run; `begin` opens it again."""
        self._client.set_terminated(self._parent, status="KILLED")

    def close(self) -> None:
        """Leave nothing open: every call has ended."""

    def _create(self, trial: TrialLog) -> str:
        tags = {
            "mlflow.parentRunId": self._parent,
            f"{_TAG}study": self._study_id,
            f"{_TAG}trial": trial.name,
        }
        run = self._client.create_run(
            self._experiment, start_time=_ms(trial.started_s), tags=tags, run_name=trial.name
        )
        run_id: str = run.info.run_id
        return run_id

    def _experiment_id(self, name: str) -> str:
        known = self._client.get_experiment_by_name(name)
        if known is None:
            try:
                made: str = self._client.create_experiment(name)
            except MlflowException:  # another study of this name was faster
                known = self._client.get_experiment_by_name(name)
                if known is None:
                    raise
            else:
                return made
        experiment_id: str = known.experiment_id
        return experiment_id

    def _runs(self, filter_string: str) -> Iterator[Any]:
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment],
                filter_string=filter_string,
                max_results=_PAGE,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            yield from page
            token = page.token
            if not token:
                return

    def _log(
        self,
        run_id: str,
        *,
        params: Mapping[str, Scalar] | None = None,
        metrics: Sequence[Metric] = (),
        tags: Mapping[str, str] | None = None,
    ) -> None:
        given = [Param(name, shown(value)) for name, value in (params or {}).items()]
        for start in range(0, len(given), _MOST_PARAMS):
            self._client.log_batch(run_id, params=given[start : start + _MOST_PARAMS])
        labels = [RunTag(name, value) for name, value in (tags or {}).items()]
        for start in range(0, len(labels), _MOST_PARAMS):
            self._client.log_batch(run_id, tags=labels[start : start + _MOST_PARAMS])
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(run_id, metrics=metrics[start : start + _MOST_METRICS])


def _ms(time_s: float) -> int:
    return round(1000 * time_s)
