"""A whole study: from a space to a verdict, in a run directory that can be resumed.

    run_study     make the run directory, run pilot, search and confirm, write the report
    resume_study  go on from the ledger
    render_run    write tables and report again from the ledger alone

The ledger is the only truth. Everything a trial was is on the disk before the plan hears of it.
"""

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stability_search import space as spaces
from stability_search.errors import InfrastructureError, StabilitySearchError, UsageError
from stability_search.events import Event, EventName
from stability_search.files import write_whole
from stability_search.records import (
    Json,
    Stage,
    StepRecord,
    TrialRow,
    TrialSummary,
    Verdict,
    VerdictKind,
)
from stability_search.search import run_directory
from stability_search.search.confirm import Confirmation, describe_cost
from stability_search.search.driver import Cluster, Machine, drive, num_cpus, output_to
from stability_search.search.ledger import DamagedLedgerError, Ledger
from stability_search.search.plan import StudyPlan, planned_work
from stability_search.search.request import TrialRequest
from stability_search.search.run_directory import RunDirectory
from stability_search.search.sampler import as_optuna, varying_values
from stability_search.search.source import Interrupted, Signals
from stability_search.seeding import derive_seed
from stability_search.space import Space
from stability_search.standing import score_trial
from stability_search.step_files import encode_steps, read_steps, write_steps

if TYPE_CHECKING:
    from stability_search.table import Tables

Listener = Callable[[Event], None]
Device = Literal["cpu", "cuda"]

_EXIT_INTERRUPTED = 130
_EXIT_TERMINATED = 143
_EXIT_ERRORS_WITH_REPORT = (4, 5, 6, 130, 143)


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A study that has ended, or stopped early.

    Attributes:
        directory: Its run directory.
        verdict: How it ended.
        lines: The verdict as plain text for a terminal.
    """

    directory: Path
    verdict: Verdict
    lines: tuple[str, ...]

    def tables(self) -> "Tables":
        """Return its trials and configurations as pandas tables."""
        from stability_search.table import read_run

        return read_run(self.directory)


def ignore(_event: Event) -> None:
    """Listen to nothing."""


def run(
    space: Space | str | Path,
    *,
    output: Path | None = None,
    address: str | None = None,
    on_event: Listener = ignore,
) -> Study:
    """Run a study from Python, as `stability-search run` does.

    Args:
        space: A loaded space, or the path or name of a space file.
        output: Run directory to make; default `reports/<name>-<UTC time>`.
        address: Ray cluster to join; None starts one on this machine.
        on_event: Hears what happens.

    Raises:
        UsageError: The space cannot be honoured.
    """
    loaded = space if isinstance(space, Space) else spaces.load(space)
    return run_study(
        loaded, output=output, address=address, command=shlex.join(sys.argv), on_event=on_event
    )


def run_study(
    space: Space,
    *,
    output: Path | None,
    address: str | None,
    command: str,
    on_event: Listener,
) -> Study:
    """Make a run directory and run a study in it.

    Args:
        space: What to search.
        output: Run directory to make; None for `reports/<name>-<UTC time>`.
        address: Ray cluster to join; None starts one on this machine.
        command: The command line, for the record.
        on_event: Hears what happens.

    Returns:
        The study, finished or stopped early; its verdict has the exit code.

    Raises:
        UsageError: The space, the model or the directory does not allow it.
    """
    _refuse_what_is_not_there(space)
    path = output or run_directory.default_path(space.study.name, datetime.now(UTC))
    directory = run_directory.create(
        path,
        space,
        facts=run_directory.study_facts(space),
        environment=_environment(space, command, device="not known yet"),
    )
    with run_directory.lock(directory):
        ledger = Ledger.create(directory.ledger, run_directory.study_facts(space))
        study = _Running(
            space, directory, ledger, folder=space.folder, command=command, on_event=on_event
        )
        return study.run(address)


def resume_study(
    path: Path,
    overrides: Sequence[str],
    *,
    address: str | None,
    command: str,
    on_event: Listener,
) -> Study:
    """Go on with a run where its ledger ends.

    Args:
        path: The run directory.
        overrides: `key=value`; budgets, `confirm.top` and `confirm.seeds` may rise.
        address: As in `run_study`.
        command: The command line, for the record.
        on_event: Hears what happens.

    Raises:
        UsageError: No run directory, another process writes to it, the task changed, or an
            override changes more than it may.
    """
    directory = run_directory.open_run(path)
    with run_directory.lock(directory):
        old = spaces.load(directory.space)
        new = spaces.load(directory.space, overrides)
        differences = spaces.resume_difference(old, new)
        if differences:
            raise UsageError(
                f"{path}: resume may only raise budgets, confirm.top and confirm.seeds, but: "
                f"{'; '.join(differences)}.",
                hint="Start a new study with `run` for any other change.",
            )
        ledger = _open_ledger(directory, new, on_event)
        facts = dict(ledger.facts())
        run_directory.refuse_changed_task(directory, facts)
        if overrides:
            write_whole(directory.space, new.text)
            ledger.put_facts({**facts, "space_text": new.text})
        folder = Path(str(facts["original_folder"]))
        study = _Running(new, directory, ledger, folder=folder, command=command, on_event=on_event)
        return study.run(address)


def render_run(path: Path) -> Study:
    """Write tables and report of a run again, from its ledger alone.

    Raises:
        UsageError: No run directory, or its ledger is damaged.
    """
    directory = run_directory.open_run(path)
    space = spaces.load(directory.space)
    ledger = Ledger(directory.ledger)
    rows = ledger.rows()
    verdict = _verdict_of(space, rows) or _unfinished(
        space, rows, path, exit_code=_EXIT_INTERRUPTED, reason="It has not ended."
    )
    command = f"stability-search report {shlex.quote(str(path))}"
    return _write_report(space, directory, rows, verdict, command)


def plan_study(space: Space) -> tuple[str, ...]:
    """Say what `run` would do, and start nothing."""
    study, cost = space.study, describe_cost(space)
    num_slots = study.search.max_concurrent or _num_slots(
        {"CPU": float(num_cpus())}, space, gpu_per_trial=0.0
    )
    plan = StudyPlan(space, device="cpu", num_slots=num_slots)
    horizon = max(study.trial_steps, study.confirm.steps)
    trials, steps = planned_work(space)
    rates = space.pilot_learning_rates()
    lines = [
        spaces.describe(space),
        f"pilot: {len(rates)} trials of {horizon} steps in fp32, learning rates "
        + ", ".join(f"{rate:.3g}" for rate in rates),
    ]
    if space.has_space:
        lines.append(f"search: {study.search.trials} trials of {study.trial_steps} steps")
    lines.append(
        f"confirm: {cost.min_trials} to {cost.max_trials} trials of {cost.steps} steps "
        f"on {study.confirm.seeds} seeds, {cost.num_ladders} ladders"
    )
    lines.append(f"at most {trials} trials, {steps} optimizer steps; {num_slots} trials at once")
    lines += [
        f"proposal {index}: {_one_line(space.settings(values))}"
        for index, values in enumerate(plan.first_proposals(5))
    ]
    where = run_directory.default_path(study.name, datetime.now(UTC))
    lines.append(f"files would go to {where}")
    return tuple(lines)


def _one_line(settings: Mapping[str, Json]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in settings.items()
        if value is not None
    )


# ---------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class _Started:
    at: str
    node: str


class _Running:
    """One study while it runs: between the plan, the ledger and whoever watches."""

    def __init__(  # noqa: PLR0913 - what a study is made of
        self,
        space: Space,
        directory: RunDirectory,
        ledger: Ledger,
        *,
        folder: Path,
        command: str,
        on_event: Listener,
    ) -> None:
        self._space = space
        self._directory = directory
        self._ledger = ledger
        self._folder = folder
        self._command = command
        self._on_event = on_event
        self._stage: Stage | None = None
        self._started: dict[str, _Started] = {}
        self._plan: StudyPlan

    def run(self, address: str | None) -> Study:
        """Run until there is a verdict or a reason to stop early."""
        try:
            verdict = self._run_trials(address)
        except StabilitySearchError as error:
            if error.exit_code not in _EXIT_ERRORS_WITH_REPORT:
                raise
            verdict = self._stopped(error)
        finally:
            self._ledger.close()
        if verdict.exit_code == _EXIT_TERMINATED:  # two seconds are left, the report takes one
            lines = (f"Incomplete. {verdict.reason}",)
            return Study(directory=self._directory.path, verdict=verdict, lines=lines)
        study = _write_report(
            self._space, self._directory, self._ledger.rows(), verdict, self._command
        )
        self._tell(
            EventName.STUDY_FINISHED,
            verdict=verdict.kind.value,
            exit_code=verdict.exit_code,
            report=str(self._directory.report_html),
        )
        return study

    def _run_trials(self, address: str | None) -> Verdict:
        known = _verdict_of(self._space, self._ledger.rows())
        if known is not None:  # a finished run, resumed: nothing is left to do
            return known
        trials, steps = planned_work(self._space)
        run_directory.require_free_space(self._directory, num_trials=trials, num_steps=steps)
        signals = Signals()
        signals.install()
        try:
            with output_to(self._directory.log), Cluster(address) as cluster:
                signals.install()  # Ray has taken SIGTERM
                machine = choose_machine(self._space, cluster.resources())
                self._begin(machine)
                signals.check()
                drive(
                    self,
                    cluster=cluster,
                    machine=machine,
                    folder=self._folder,
                    signals=signals,
                )
        finally:
            signals.restore()
        if self._plan.verdict is None:
            raise InfrastructureError("ray: it ended before the study did; see run.log.")
        return self._plan.verdict

    def _begin(self, machine: Machine) -> None:
        device: Device = "cuda" if machine.device == "cuda" else "cpu"
        self._plan = StudyPlan(
            self._space,
            device=device,
            num_slots=machine.num_slots,
            rows=self._ledger.rows(),
        )
        environment = _environment(self._space, self._command, device=device)
        facts = run_directory.with_tilde(dict(self._ledger.facts()))
        text = run_directory.as_json({**environment, "study": facts})
        write_whole(self._directory.environment, text)
        self._tell(
            EventName.STUDY_STARTED,
            run_directory=str(self._directory.path),
            device=device,
            trials=self._plan.num_planned(Stage.SEARCH) if self._space.has_space else 0,
            slots=machine.num_slots,
            space=str(self._space.path),
        )

    # -- what the driver asks and tells --------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """True once the plan has a verdict."""
        return self._plan.verdict is not None

    def next_trial(self) -> TrialRequest | None:
        """Return the plan's next trial."""
        stage = self._plan.stage
        request = self._plan.next_trial()
        if request is not None and stage is not self._stage:
            self._stage = stage
            planned = self._plan.num_planned(stage)
            self._tell(EventName.STAGE_STARTED, stage=stage.value, planned=planned)
        return request

    def trial_started(self, request: TrialRequest, node: str) -> None:
        """Note when and where a trial began."""
        self._started[request.trial_id] = _Started(at=_now(), node=node)
        self._tell(
            EventName.TRIAL_STARTED,
            trial_id=request.trial_id,
            stage=request.stage.value,
            settings=dict(request.settings),
        )

    def trial_progressed(self, request: TrialRequest, progress: Mapping[str, Any]) -> None:
        """Pass on how far a trial is."""
        self._tell(
            EventName.TRIAL_PROGRESS,
            trial_id=request.trial_id,
            num_planned_steps=request.config.num_planned_steps,
            **progress,
        )

    def trial_ended(
        self, request: TrialRequest, summary: TrialSummary, steps: bytes | None, node: str
    ) -> None:
        """Write down how a trial ended: its steps, then the ledger, then the news."""
        started = self._started.pop(request.trial_id, _Started(at=_now(), node=node))
        row = self._plan.finish(request, summary, started_at=started.at, node=node or started.node)
        blob = encode_steps(()) if steps is None else steps
        write_steps(self._directory.step_file(row.trial_id, row.attempt), blob, row)
        self._ledger.add(row, *parameters_of(self._space, row))
        self._announce(row)
        self._plan.refuse_to_go_on(row)

    def _announce(self, row: TrialRow) -> None:
        summary = row.summary
        score = score_trial(row, self._plan.measure_of(row))
        self._tell(
            EventName.TRIAL_FINISHED,
            trial_id=row.trial_id,
            stage=row.stage.value,
            outcome=summary.outcome.value,
            reason=summary.reason,
            q=None if score is None else score.q,
            num_steps=summary.num_steps,
            num_planned_steps=summary.num_planned_steps,
            wall_s=summary.wall_s,
            settings=dict(row.settings),
        )
        if self._plan.will_retry(row):
            self._tell(
                EventName.TRIAL_RETRIED,
                trial_id=row.trial_id,
                attempt=row.attempt + 1,
                reason=summary.reason,
            )

    def _stopped(self, error: StabilitySearchError) -> Verdict:
        level = "info" if isinstance(error, Interrupted) else "error"
        self._tell(EventName.MESSAGE, level=level, text=str(error))
        return _unfinished(
            self._space,
            self._ledger.rows(),
            self._directory.path,
            exit_code=error.exit_code,
            reason=f"{str(error).splitlines()[0].rstrip('.')}.",
        )

    def _tell(self, name: EventName, **fields: Json) -> None:
        self._on_event(Event(name=name, time=_now(), fields=fields))


def parameters_of(space: Space, row: TrialRow) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return values and distributions of a search trial, as the ledger keeps them."""
    if row.stage is not Stage.SEARCH:
        return {}, {}
    return as_optuna(space, varying_values(space, row.settings))


def choose_machine(space: Space, offered: Mapping[str, float]) -> Machine:
    """Decide the device and how many trials run at once.

    Args:
        space: Its `search.resources` and `search.max_concurrent` are used.
        offered: What Ray offers: `CPU`, and `GPU` where there is one.

    Raises:
        UsageError: A trial needs more than there is.
    """
    resources = space.study.search.resources
    num_gpus = offered.get("GPU", 0.0)
    gpu = resources.gpu
    if gpu is None:
        gpu = 1.0 if num_gpus >= 1 and _torch_has_gpu() else 0.0
    slots = _num_slots(offered, space, gpu_per_trial=gpu)
    if slots < 1:
        raise UsageError(
            f"search.resources: a trial needs {resources.cpu:g} CPU and {gpu:g} GPU, but there "
            f"are {offered.get('CPU', 0.0):g} and {num_gpus:g}.",
            hint="Lower search.resources.",
        )
    wanted = space.study.search.max_concurrent
    return Machine(
        device="cuda" if gpu > 0 else "cpu",
        num_slots=slots if wanted is None else min(wanted, slots),
        cpu_per_trial=resources.cpu,
        gpu_per_trial=gpu,
    )


def _num_slots(offered: Mapping[str, float], space: Space, *, gpu_per_trial: float) -> int:
    slots = int(offered.get("CPU", 1.0) / space.study.search.resources.cpu)
    if gpu_per_trial > 0:
        slots = min(slots, int(offered.get("GPU", 0.0) / gpu_per_trial))
    return slots


def _torch_has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _refuse_what_is_not_there(space: Space) -> None:
    study = space.study
    if study.control > 0:
        raise UsageError(
            f"prune.control: 0 must hold in this version, but got {study.control:g}.",
            hint="Leave it out: every killed trial ends at its kill.",
        )
    if study.search.resources.accelerator is not None:
        raise UsageError(
            "search.resources.accelerator: choosing a GPU model is not possible in this version, "
            f"but got {study.search.resources.accelerator!r}.",
            hint="Leave it out, on machines with one model of GPU.",
        )


def _environment(space: Space, command: str, *, device: str) -> dict[str, Json]:
    study = space.study
    seeds = {"study": study.seed, "search": derive_seed(study.seed, "search")} | {
        f"confirm {i}": derive_seed(study.seed, "confirm", i) for i in range(study.confirm.seeds)
    }
    return run_directory.describe_environment(
        command=shlex.split(command), device=device, seeds=seeds
    )


def _open_ledger(directory: RunDirectory, space: Space, on_event: Listener) -> Ledger:
    """Open the ledger; where it is damaged, make it again from the step files."""
    try:
        return Ledger(directory.ledger)
    except DamagedLedgerError as error:
        facts = run_directory.facts_of_environment(directory)
        if facts is None:
            raise
        ledger, aside, unreadable = Ledger.rebuild(
            directory.ledger,
            directory.steps,
            facts=facts,
            parameters_of=lambda row: parameters_of(space, row),
        )
        text = (
            f"{error.message} It was made again from {len(ledger.rows())} step files"
            f"{f'; the old one is kept as {aside.name}' if aside else ''}."
        )
        for line in (text, *unreadable):
            fields: dict[str, Json] = {"level": "warning", "text": line}
            on_event(Event(name=EventName.MESSAGE, time=_now(), fields=fields))
        return ledger


def _verdict_of(space: Space, rows: Sequence[TrialRow]) -> Verdict | None:
    """Return the verdict of a finished study; None where trials are missing."""
    plan = StudyPlan(space, device="cpu", num_slots=1, rows=rows)
    if plan.stage is not Stage.CONFIRM:
        return None
    need = Confirmation(space).next_need(rows, can_afford=lambda _: True)
    return need if isinstance(need, Verdict) else None


def _unfinished(
    space: Space, rows: Sequence[TrialRow], path: Path, *, exit_code: int, reason: str
) -> Verdict:
    plan = StudyPlan(space, device="cpu", num_slots=1, rows=rows)
    done = sum(row.stage is Stage.SEARCH and row.summary.outcome.is_result for row in rows)
    planned = plan.num_planned(Stage.SEARCH) if space.has_space else 0
    where = f"{done} of {planned} search trials and the {plan.stage.value} stage reached"
    return Verdict(
        kind=VerdictKind.INCOMPLETE,
        exit_code=exit_code,
        reason=f"{reason} {where}; go on with `stability-search resume {shlex.quote(str(path))}`.",
    )


def _write_report(
    space: Space,
    directory: RunDirectory,
    rows: Sequence[TrialRow],
    verdict: Verdict,
    command: str,
) -> Study:
    from stability_search.report import Report, verdict_lines, write_report
    from stability_search.table import build_tables, study_yardsticks, write_tables

    yardsticks = study_yardsticks(rows, space.study)
    names = _setting_names(space)
    tables = build_tables(
        rows, space_settings=names, study=space.study, yardsticks=yardsticks, verdict=verdict
    )
    step_files = {row.trial_id: directory.step_file(row.trial_id, row.attempt) for row in rows}

    def read(trial_id: str) -> Sequence[StepRecord]:
        return read_steps(step_files[trial_id])

    report = Report(
        tables=tables,
        verdict=verdict,
        study=space.study,
        yardsticks=yardsticks,
        space_text=space.text,
        task_name=space.task_name,
        device=_device_of(rows),
        environment=_written_environment(directory),
        start_config_ids=_start_config_ids(space, rows),
        setting_names=names,
        varying=space.varying,
        command=command,
        run_directory=str(directory.path),
        read_steps=read,
    )
    write_tables(tables, directory.path)
    write_report(report, directory.path)
    lines = tuple(verdict_lines(report))
    _write_best(space, directory, rows, verdict, lines)
    return Study(directory=directory.path, verdict=verdict, lines=lines)


def _write_best(
    space: Space,
    directory: RunDirectory,
    rows: Sequence[TrialRow],
    verdict: Verdict,
    lines: Sequence[str],
) -> None:
    if verdict.choice is None:
        directory.best.unlink(missing_ok=True)
        return
    settings = next(row.settings for row in rows if row.config_id == verdict.choice)
    text = spaces.best_yaml(space, settings, "\n".join(lines))
    write_whole(directory.best, text)


def _setting_names(space: Space) -> tuple[str, ...]:
    return (*space.fixed, *(name for name in space.varying if name not in space.fixed))


def _start_config_ids(space: Space, rows: Sequence[TrialRow]) -> tuple[str, ...]:
    first = {
        row.index: row.config_id
        for row in rows
        if row.stage is Stage.SEARCH and row.index < len(space.start_with)
    }
    return tuple(first[index] for index in sorted(first))


def _device_of(rows: Sequence[TrialRow]) -> str:
    return next((row.summary.device for row in reversed(rows)), "cpu")


def _written_environment(directory: RunDirectory) -> Mapping[str, Json]:
    try:
        read: dict[str, Json] = json.loads(directory.environment.read_text())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in read.items() if key != "study"}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
