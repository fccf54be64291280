"""A whole study: from a space to a verdict, in a run directory that can be resumed.

    run_study     make the run directory, run pilot, search and confirm, write the report
    resume_study  go on from the ledger

The ledger is the only truth: a trial is finished once its row is on the disk.
"""

import contextlib
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from stability_search import space as spaces
from stability_search.errors import (
    InfrastructureError,
    StabilitySearchError,
    StoppedEarlyError,
    UsageError,
)
from stability_search.events import Event, EventName
from stability_search.files import write_whole
from stability_search.interruption import Interrupted, Signals
from stability_search.records import (
    Json,
    Stage,
    TrialRow,
    TrialSummary,
    Verdict,
    VerdictKind,
)
from stability_search.search import run_directory
from stability_search.search.breakers import Breakers, refuse_settings
from stability_search.search.closing import (
    Study,
    forget_verdict,
    keep_verdict,
    known_verdict,
    unfinished,
    write_all,
)
from stability_search.search.confirm import describe_cost
from stability_search.search.driver import Cluster, drive, output_to, worker_settings
from stability_search.search.early import EarlyWorkers, is_surely_cpu
from stability_search.search.environment import Environment, describe
from stability_search.search.ledger import Ledger
from stability_search.search.machine import Machine, choose_machine, this_machine
from stability_search.search.nodes import Inspector, facts_for
from stability_search.search.plan import StudyPlan, planned_work
from stability_search.search.remains import ended_at_last
from stability_search.search.reopening import open_ledger, parameters_of
from stability_search.search.request import TrialRequest
from stability_search.search.run_directory import RunDirectory
from stability_search.search.shipping import Cargo, pack
from stability_search.search.source import Place
from stability_search.space import Space
from stability_search.space_directory import default_path, refuse_changed_task
from stability_search.standing import score_trial

Listener = Callable[[Event], None]

_EXIT_TERMINATED = 143
_EXIT_ERRORS_WITH_REPORT = (4, 5, 6, 130, 143)


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
        on_event: Hears what happens. While it is called, standard output and standard error
            lead to the run's log; a listener that prints keeps a copy of them.

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
    path = output or default_path(space.study.name, datetime.now(UTC))
    directory = run_directory.create(
        path,
        space,
        facts=run_directory.study_facts(space),
        environment=describe(space, command, device="not known yet"),
    )
    with (
        run_directory.lock(directory),
        _signals_taken() as signals,
        ended_at_last(),
        _early_workers(space, directory, address) as early,
    ):
        ledger = Ledger.create(directory.ledger, run_directory.study_facts(space))
        study = _Running(
            space, directory, ledger, folder=space.folder, command=command, on_event=on_event
        )
        return study.run(address, early, signals)


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
    with run_directory.lock(directory), _signals_taken() as signals, ended_at_last():
        ledger = open_ledger(directory, lambda text: on_event(_message("warning", text)))
        facts = dict(ledger.facts())
        old = run_directory.space_of(directory, facts)
        new = spaces.load(directory.space, overrides, folder=old.folder)
        differences = spaces.resume_difference(old, new)
        if differences:
            raise UsageError(
                f"{path}: resume may only raise budgets, confirm.top and confirm.seeds, but: "
                f"{' '.join(differences)}",
                hint="Start a new study with `run` for any other change.",
            )
        refuse_changed_task(directory.path, facts)
        if new.text != facts["space_text"]:
            write_whole(directory.space, new.text)
            forget_verdict(ledger, {**facts, "space_text": new.text})
        study = _Running(
            new, directory, ledger, folder=old.folder, command=command, on_event=on_event
        )
        return study.run(address, None, signals)


@contextlib.contextmanager
def _signals_taken() -> Iterator[Signals]:
    """Note signals from the first moment on; they are looked at where nothing is half done."""
    signals = Signals()
    signals.install()
    try:
        yield signals
    finally:
        signals.restore()


@contextlib.contextmanager
def _early_workers(
    space: Space, directory: RunDirectory, address: str | None
) -> Iterator[EarlyWorkers | None]:
    """Start workers that need no Ray, where that can be done before Ray says what there is."""
    if address is not None or not is_surely_cpu(space.study.search.resources):
        yield None
        return
    machine = choose_machine(space, this_machine())
    settings = worker_settings(machine, space.folder)
    with contextlib.closing(EarlyWorkers(machine.num_slots, settings, directory.log)) as early:
        yield early


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
        self._is_task_known = False  # to be built by what this command has started
        self._unwritten: list[tuple[TrialRow, bytes | None]] = []
        self._machine: Machine
        self._environment = Environment(directory, space, command)
        self._plan: StudyPlan
        self._breakers: Breakers

    def run(self, address: str | None, early: EarlyWorkers | None, signals: Signals) -> Study:
        """Run until there is a verdict or a reason to stop early."""
        try:
            verdict = self._run_trials(address, early, signals)
            keep_verdict(self._ledger, verdict)
        except StabilitySearchError as error:
            if error.exit_code not in _EXIT_ERRORS_WITH_REPORT:
                raise
            verdict = self._stopped(error)
            if not isinstance(error, StoppedEarlyError):  # a full disk takes no verdict either
                keep_verdict(self._ledger, verdict)
        finally:
            self._ledger.close()
        if verdict.exit_code == _EXIT_TERMINATED:  # two seconds are left, the report takes one
            lines = (f"Incomplete. {verdict.reason}",)
            self._tell_end(verdict, report=None)
            return Study(directory=self._directory.path, verdict=verdict, lines=lines)
        study = write_all(
            self._space, self._directory, self._ledger.rows(), verdict, self._command
        )
        self._tell_end(verdict, report=str(self._directory.report_html))
        return study

    def _tell_end(self, verdict: Verdict, *, report: str | None) -> None:
        self._tell(
            EventName.STUDY_FINISHED,
            verdict=verdict.kind.value,
            exit_code=verdict.exit_code,
            config_id=verdict.choice or verdict.closest,
            reason=verdict.reason,
            report=report,
        )

    def _run_trials(
        self, address: str | None, early: EarlyWorkers | None, signals: Signals
    ) -> Verdict:
        known = known_verdict(self._ledger)
        if known is not None and known.kind is not VerdictKind.INCOMPLETE:
            return known  # a finished run, resumed: nothing is left to do
        trials, steps = planned_work(self._space)
        run_directory.require_free_space(self._directory, num_trials=trials, num_steps=steps)
        cargo = None
        if address is not None:
            cargo = pack(self._space.task, import_path=Path.cwd())
            cargo.refuse_large()
        with output_to(self._directory.log), Cluster(address, cargo) as cluster:
            signals.last_words = lambda: self._leave_at_once(cluster)
            if early is None:
                cluster.wait(signals)
                signals.install()  # Ray has taken SIGTERM
                nodes, is_joined = cluster.nodes(), address is not None
                machine = choose_machine(self._space, *nodes, is_joined=is_joined)
            else:
                machine = choose_machine(self._space, this_machine())
            self._begin(machine)
            inspector = self._inspect(cluster, cargo, signals) if cargo is not None else None
            signals.check()
            drive(
                self,
                cluster=cluster,
                machine=machine,
                folder=self._folder,
                signals=signals,
                early=early,
                facts_of=inspector.facts_of if inspector else facts_for(self._space.task),
                inspector=inspector,
            )
        if self._plan.verdict is None:
            raise InfrastructureError("ray: it ended before the study did; see run.log.")
        return self._plan.verdict

    def _inspect(self, cluster: Cluster, cargo: Cargo, signals: Signals) -> Inspector:
        """Compare the nodes before anything starts.

        Raises:
            InfrastructureError: One of them cannot take part.
        """
        inspector = Inspector(cargo, is_cuda=self._machine.device == "cuda")
        if cargo.files:
            self.noticed(f"{cargo} of the task go to every node")
        self.noticed(inspector.check_all(self._machine, cluster.nodes, signals.check))
        return inspector

    def _leave_at_once(self, cluster: Cluster) -> None:
        run = shlex.quote(str(self._directory.path))
        text = f"Interrupted twice; go on with `stability-search resume {run}`."
        self._tell(EventName.MESSAGE, level="warning", text=text)
        cluster.remove_folder()

    def _begin(self, machine: Machine) -> None:
        self._machine = machine
        self._plan = StudyPlan(
            self._space,
            device=machine.device,
            num_slots=machine.num_slots,
            rows=self._ledger.rows(),
        )
        self._breakers = Breakers(self._plan.rows)
        self._environment.write(self._ledger.facts(), device=machine.device)
        self._tell(
            EventName.STUDY_STARTED,
            run_directory=str(self._directory.path),
            device=machine.device,
            trials=self._plan.num_planned(Stage.SEARCH) if self._space.has_space else 0,
            slots=machine.num_slots,
            space=str(self._space.path),
            outcomes=dict(Counter(row.summary.outcome.value for row in self._plan.rows)),
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
            self._tell(
                EventName.STAGE_STARTED,
                stage=stage.value,
                planned=planned,
                planned_at_most=describe_cost(self._space).max_trials
                if planned is None
                else planned,
                finished=sum(
                    row.stage is stage and not self._plan.will_retry(row)
                    for row in self._plan.rows
                ),
            )
        return request

    def trial_started(self, request: TrialRequest, node: str) -> None:
        """Note when and where a trial began."""
        self._started[request.trial_id] = _Started(at=_now(), node=node)
        self._tell(
            EventName.TRIAL_STARTED,
            trial_id=request.trial_id,
            stage=request.stage.value,
            config_id=request.config_id,
            seed=request.config.seed,
            attempt=request.attempt,
            node=node,
            num_planned_steps=request.config.num_planned_steps,
            settings=self._shown(request.settings),
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
        self, request: TrialRequest, summary: TrialSummary, steps: bytes | None, place: Place
    ) -> None:
        """Take in how a trial ended, so that the next one can be chosen."""
        now = datetime.now(UTC)
        started = self._started.pop(request.trial_id, _Started(at=stamp(now), node=place.host))
        node = place.host or started.node
        is_known = node and summary.device != "cuda"  # else it was lost before it named the GPU
        fingerprint = place.facts.fingerprint(summary.device) if is_known else ""
        started_at = earlier_start(started.at, ended=now, wall_s=summary.wall_s)
        row = self._plan.finish(
            request, summary, started_at=started_at, node=node, fingerprint=fingerprint
        )
        refuse_settings(row, is_first=not self._is_task_known)  # nobody's trial leaves no row
        self._is_task_known |= summary.outcome.is_result
        self._note_node(row, place)
        self._unwritten.append((row, steps))

    def _note_node(self, row: TrialRow, place: Place) -> None:
        """Keep what a fingerprint stands for, the first time that it is seen."""
        if self._environment.knows(row):
            return
        difference = self._environment.note(row, place.facts)
        if difference:
            text = f"trials on {row.node} differ from the first in {difference}"
            self._tell(EventName.MESSAGE, level="warning", text=text)
        self._environment.write(self._ledger.facts(), device=self._machine.device)

    def node_quarantined(self, node: str, reason: str) -> None:
        """Pass on that a node gets no further trials."""
        self._tell(EventName.NODE_QUARANTINED, node=node, reason=reason)

    def noticed(self, text: str) -> None:
        """Pass on what somebody who watches should know; the log has it, too."""
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
        self._tell(EventName.MESSAGE, level="info", text=text)

    def settle(self) -> None:
        """Write down what has ended: its steps, then the ledger, then the news."""
        while self._unwritten:
            row, steps = self._unwritten.pop(0)
            self._write_steps(row, steps)
            self._ledger.add(row, *parameters_of(self._space, row))
            self._announce(row)
            self._breakers.take(row)

    def _write_steps(self, row: TrialRow, steps: bytes | None) -> None:
        from stability_search.step_files import encode_steps, write_steps  # loads pyarrow

        blob = encode_steps(()) if steps is None else steps
        write_steps(self._directory.step_file(row.trial_id, row.attempt), blob, row)

    def _announce(self, row: TrialRow) -> None:
        summary = row.summary
        score = score_trial(row, self._plan.measure_of(row))
        self._tell(
            EventName.TRIAL_FINISHED,
            trial_id=row.trial_id,
            stage=row.stage.value,
            config_id=row.config_id,
            seed=row.seed,
            attempt=row.attempt,
            node=row.node,
            outcome=summary.outcome.value,
            reason=summary.reason,
            q=None if score is None else score.q,
            num_planned_steps=summary.num_planned_steps,
            num_steps=summary.num_steps,
            num_bad_steps=summary.num_bad_steps,
            wall_s=summary.wall_s,
            settings=self._shown(row.settings),
        )
        if self._plan.will_retry(row):
            self._tell(
                EventName.TRIAL_RETRIED,
                trial_id=row.trial_id,
                attempt=row.attempt + 1,
                reason=summary.reason,
            )

    def _shown(self, settings: Mapping[str, Json]) -> dict[str, Json]:
        """Return what tells one trial from another: the settings that vary."""
        names = self._space.varying or tuple(settings)
        return {name: settings[name] for name in names}

    def _stopped(self, error: StabilitySearchError) -> Verdict:
        level = "info" if isinstance(error, Interrupted) else "error"
        self._tell(EventName.MESSAGE, level=level, text=str(error))
        return unfinished(
            self._space,
            self._ledger.rows(),
            self._directory.path,
            exit_code=error.exit_code,
            reason=_sentence(str(error).splitlines()[0]),
        )

    def _tell(self, name: EventName, **fields: Json) -> None:
        self._on_event(Event(name=name, time=_now(), fields=fields))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.:')}."


def _message(level: str, text: str) -> Event:
    return Event(name=EventName.MESSAGE, time=_now(), fields={"level": level, "text": text})


def _now() -> str:
    return stamp(datetime.now(UTC))


def stamp(when: datetime) -> str:
    """Return a time in UTC as the ledger and the events write it."""
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def earlier_start(heard: str, *, ended: datetime, wall_s: float) -> str:
    """Return when a trial started, as well as the study knows.

    It hears late of a start and of an end while it is busy with other trials. A trial began no
    later than either says; of two in one slot the later then starts after the end of the first.

    Args:
        heard: When the study heard of the start, as `stamp` writes it.
        ended: When it heard of the end, in UTC.
        wall_s: What the trial took, by its worker's clock, in seconds.
    """
    return min(heard, stamp(ended - timedelta(seconds=wall_s)))
