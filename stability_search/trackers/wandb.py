"""Weights & Biases: a run per trial, grouped by study, and one for the study itself.

Mode, project, entity and key are W&B's own business: `WANDB_MODE`, `wandb login` and so on.
"""

import os
from collections.abc import Mapping

import wandb

from stability_search.records.values import Scalar
from stability_search.scalars import safe_name
from stability_search.trackers.base import StudyEnd, StudyLog, TrialLog

FOLDER = "wandb"
LOGGED = "logged.txt"  # names of the trials that are there, a line each


class WandbTracker:
    """Logs to W&B, or to its offline files below the run directory."""

    def begin(self, study: StudyLog) -> frozenset[str]:
        """Note the study, and find the trials that were logged."""
        self._study = study
        self._settings = wandb.Settings(
            console="off",
            silent=True,  # and so it never asks for a key
            disable_git=True,
            disable_job_creation=True,
            host="node",  # no name of a machine
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        wandb.setup(settings=self._settings)
        folder = study.directory / FOLDER
        folder.mkdir(exist_ok=True)
        self._logged = folder / LOGGED
        if not self._logged.is_file():
            return frozenset()
        return frozenset(self._logged.read_text(encoding="utf-8").splitlines())

    def add_trial(self, trial: TrialLog) -> None:
        """Log one trial as a run."""
        with self._run(trial.name, trial.stage, trial.settings) as run:
            for point in trial.curve:
                run.log(dict(point.values), step=point.step)
            run.summary.update({**trial.texts, **trial.numbers})
        with self._logged.open("a", encoding="utf-8") as file:
            file.write(f"{trial.name}\n")

    def finish(self, end: StudyEnd) -> None:
        """Log the verdict, the choice and the report to the study's own run."""
        choice = {f"choice.{name}": value for name, value in end.settings.items()}
        with self._run("study", "study", self._study.facts) as run:
            run.summary.update(
                {
                    "verdict": end.verdict,
                    "exit_code": end.exit_code,
                    "reason": end.reason,
                    "choice": end.choice,
                    "margin": end.margin,
                    **choice,
                    **end.numbers,
                }
            )
            artifact = wandb.Artifact(f"report-{self._study.study_id[:8]}", type="report")
            for path in end.files:
                artifact.add_file(str(path))
            run.log_artifact(artifact)

    def stop(self) -> None:
        """Log nothing: between two trials no run is open."""

    def close(self) -> None:
        """End W&B's own process, once it has sent what it holds."""
        wandb.teardown()

    def _run(self, name: str, kind: str, config: Mapping[str, Scalar]) -> wandb.Run:
        study = self._study
        group = f"{study.name}-{study.study_id[:8]}"
        return wandb.init(
            # None leaves the project to W&B's own variable
            project=None if os.environ.get("WANDB_PROJECT") else safe_name(study.name),
            group=group,
            job_type=kind,
            name=f"{group} {name}" if kind == "study" else name,
            id=f"{study.study_id[:8]}-{name}",
            resume="allow",
            config=dict(config),
            dir=str(study.directory.absolute()),
            settings=self._settings,
        )
