"""A whole study: from a space to a verdict, in a run directory that can be resumed.

    run_study     make the run directory, run pilot, search and confirm, write the report
    resume_study  go on from the ledger

The ledger is the only truth: a trial is finished once its row is on the disk.
"""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from stability_search import space as spaces
from stability_search.errors import (
    InfrastructureError,
    StabilitySearchError,
    StoppedEarlyError,
    UsageError,
)
from stability_search.events import Listener, ignore, message
from stability_search.files import write_whole
from stability_search.interruption import Interrupted, Signals
from stability_search.records.verdict import Verdict, VerdictKind
from stability_search.search import run_directory
from stability_search.search.closing import (
    Study,
    forget_verdict,
    keep_verdict,
    known_verdict,
    unfinished,
    write_all,
)
from stability_search.search.driver import Cluster, drive, output_to, worker_settings
from stability_search.search.early import EarlyWorkers, is_surely_cpu
from stability_search.search.environment import describe
from stability_search.search.head import HeadWatch
from stability_search.search.joining import refuse_unusable
from stability_search.search.ledger import Ledger
from stability_search.search.machine import (
    Machine,
    choose_machine,
    room_for_one,
    this_machine,
)
from stability_search.search.news import News
from stability_search.search.nodes import Inspector, facts_for
from stability_search.search.plan import planned_work
from stability_search.search.remains import ended_at_last
from stability_search.search.reopening import open_ledger
from stability_search.search.run_directory import RunDirectory
from stability_search.search.shipping import Cargo, pack
from stability_search.search.study_source import StudySource
from stability_search.space import Space
from stability_search.space_directory import default_path, refuse_changed_task
from stability_search.task_module import refuse_missing_module

_EXIT_TERMINATED = 143
_EXIT_ERRORS_WITH_REPORT = (4, 5, 6, 130, 143)

Last = Callable[[Study], None]
"""Takes the end of a study that cannot be returned: the process ends after it."""


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
        address: Ray cluster to join; None starts one on this machine. Where its head cannot be
            reached any more, this process ends with exit code 4: nobody can leave such a Ray.
        on_event: Hears what happens. While it is called, standard output and standard error
            lead to the run's log; a listener that prints keeps a copy of them.

    Raises:
        UsageError: The space cannot be honoured.
    """
    loaded = space if isinstance(space, Space) else spaces.load(space)
    return run_study(
        loaded, output=output, address=address, command=shlex.join(sys.argv), on_event=on_event
    )


def _say_nothing(_study: Study) -> None:
    return


def run_study(  # noqa: PLR0913 - what, where, and who hears of it
    space: Space,
    *,
    output: Path | None,
    address: str | None,
    command: str,
    on_event: Listener,
    on_lost: Last = _say_nothing,
) -> Study:
    """Make a run directory and run a study in it.

    Args:
        space: What to search.
        output: Run directory to make; None for `reports/<name>-<UTC time>`.
        address: Ray cluster to join; None starts one on this machine.
        command: The command line, for the record.
        on_event: Hears what happens.
        on_lost: Called in another thread with the study where its cluster's head is gone, before
            the process ends with exit code 4.

    Returns:
        The study, finished or stopped early; its verdict has the exit code.

    Raises:
        UsageError: The space, the model or the directory does not allow it.
        InfrastructureError: Nothing answers at the address; nothing was written.
    """
    if address is not None:
        refuse_unusable(address)
    refuse_missing_module(space.task)
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
        news = News(space, on_event)
        study = _Running(space, directory, ledger, command=command, news=news, on_lost=on_lost)
        return study.run(address, early, signals)


def resume_study(  # noqa: PLR0913 - as above
    path: Path,
    overrides: Sequence[str],
    *,
    address: str | None,
    command: str,
    on_event: Listener,
    on_lost: Last = _say_nothing,
) -> Study:
    """Go on with a run where its ledger ends.

    Args:
        path: The run directory.
        overrides: `key=value`; budgets, `confirm.top` and `confirm.seeds` may rise, `labels` and
            `custom` of `search.resources` may change.
        address: As in `run_study`.
        command: The command line, for the record.
        on_event: Hears what happens.
        on_lost: As in `run_study`.

    Raises:
        UsageError: No run directory, another process writes to it, the task changed, or an
            override changes more than it may.
    """
    if address is not None:
        refuse_unusable(address)
    directory = run_directory.open_run(path)
    with run_directory.lock(directory), _signals_taken() as signals, ended_at_last():
        ledger = open_ledger(directory, lambda text: on_event(message("warning", text)))
        facts = dict(ledger.facts())
        old = run_directory.space_of(directory, facts)
        new = spaces.load(directory.space, overrides, folder=old.folder)
        differences = spaces.resume_difference(old, new)
        if differences:
            raise UsageError(
                f"{path}: resume may only raise budgets, confirm.top and confirm.seeds, and "
                f"change search.resources.labels and .custom, but: {' '.join(differences)}",
                hint="Start a new study with `run` for any other change.",
            )
        refuse_changed_task(directory.path, facts)
        refuse_missing_module(new.task, begun_in=str(facts.get("import_path", "")))
        if new.text != facts["space_text"]:
            write_whole(directory.space, new.text)
            forget_verdict(ledger, {**facts, "space_text": new.text})
        news = News(new, on_event)
        study = _Running(new, directory, ledger, command=command, news=news, on_lost=on_lost)
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


class _Running:
    """One study from its first trial, or the next, to a verdict or a reason to stop early."""

    def __init__(  # noqa: PLR0913 - what it works on, and who hears of it
        self,
        space: Space,
        directory: RunDirectory,
        ledger: Ledger,
        *,
        command: str,
        news: News,
        on_lost: Last,
    ) -> None:
        self._space = space
        self._directory = directory
        self._ledger = ledger
        self._command = command
        self._news = news
        self._on_lost = on_lost

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
            self._news.study_finished(verdict, report=None)
            return Study(directory=self._directory.path, verdict=verdict, lines=lines)
        study = write_all(
            self._space, self._directory, self._ledger.rows(), verdict, self._command
        )
        self._news.study_finished(verdict, report=self._directory.report_html)
        return study

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
            cargo.refuse_unsendable()
        with (
            output_to(self._directory.log),
            contextlib.ExitStack() as watch,  # also while the cluster is left
            Cluster(address, cargo) as cluster,
        ):
            signals.last_words = lambda: self._leave_at_once(cluster)
            if early is None:
                cluster.wait(signals)
                signals.install()  # Ray has taken SIGTERM
            if cargo is not None:
                watch.enter_context(self._watch_head(cluster))
            machine = self._choose_machine(cluster, address, early, signals)
            source = StudySource(
                self._space,
                self._directory,
                self._ledger,
                machine=machine,
                command=self._command,
                news=self._news,
            )
            source.begin()
            inspector = None
            if cargo is not None:
                inspector = _inspect(cluster, cargo, machine, source.noticed, signals)
            signals.check()
            drive(
                source,
                cluster=cluster,
                machine=machine,
                folder=self._space.folder,
                signals=signals,
                early=early,
                facts_of=inspector.facts_of if inspector else facts_for(self._space.task),
                inspector=inspector,
                num_ahead=source.plan.num_at_once if inspector else None,
            )
        if source.plan.verdict is None:
            raise InfrastructureError("ray: it ended before the study did; see run.log.")
        return source.plan.verdict

    def _choose_machine(
        self, cluster: Cluster, address: str | None, early: EarlyWorkers | None, signals: Signals
    ) -> Machine:
        if early is not None:
            return choose_machine(self._space, this_machine())
        is_joined = address is not None
        if is_joined and self._space.study.search.max_concurrent is not None:
            from stability_search.search.growing import wait_for_room

            one = room_for_one(self._space)
            wait_for_room(one, cluster.nodes, self._news.notice, signals.check)
        return choose_machine(self._space, *cluster.nodes(), is_joined=is_joined)

    def _leave_at_once(self, cluster: Cluster) -> None:
        run = shlex.quote(str(self._directory.path))
        text = f"Interrupted twice; go on with `stability-search resume {run}`."
        self._news.message("warning", text)
        cluster.remove_folder()

    def _watch_head(self, cluster: Cluster) -> HeadWatch:
        """Return what ends this process where the cluster's head is gone: Ray lets nobody go."""

        def end(text: str) -> None:
            try:
                run = shlex.quote(str(self._directory.path))
                hint = f"\nMend that, then go on with `stability-search resume {run}`."
                verdict = self._stopped(InfrastructureError(f"ray: {text}.", hint=hint))
                study = write_all(
                    self._space, self._directory, self._ledger.rows(), verdict, self._command
                )
                self._news.study_finished(verdict, report=self._directory.report_html)
                cluster.remove_folder()
                self._on_lost(study)
            finally:
                os._exit(InfrastructureError.exit_code)

        return HeadWatch(cluster.head, say=self._news.notice, give_up=end)

    def _stopped(self, error: StabilitySearchError) -> Verdict:
        level = "info" if isinstance(error, Interrupted) else "error"
        self._news.message(level, str(error))
        return unfinished(
            self._space,
            self._ledger.rows(),
            self._directory.path,
            exit_code=error.exit_code,
            reason=_sentence(str(error).splitlines()[0]),
        )


def _inspect(
    cluster: Cluster,
    cargo: Cargo,
    machine: Machine,
    notice: Callable[[str], None],
    signals: Signals,
) -> Inspector:
    """Compare the nodes before anything starts.

    Raises:
        InfrastructureError: One of them cannot take part.
    """
    inspector = Inspector(cargo, is_cuda=machine.device == "cuda")
    if cargo.files:
        notice(f"{cargo} of the task go to every node")
    for note in cargo.notes:
        notice(note)
    notice(inspector.check_all(machine, cluster.nodes, signals.check))
    if machine.num_unplaced:
        num_placed = machine.num_slots - machine.num_unplaced
        notice(
            f"there is room for {num_placed} of the {machine.num_slots} trials at once that "
            "search.max_concurrent names; others begin as there is more"
        )
    return inspector


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip(' .:')}."
