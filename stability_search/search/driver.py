"""Ray Tune at work: asks for trials, runs them on reused workers, hands back what they became.

Nothing here decides anything about a study: a `TrialSource` says which trial comes next and is
told how each ended. Ray's own experiment state is disposable.
"""

import contextlib
import importlib
import json
import logging
import math
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from stability_search import ray_token
from stability_search.errors import InfrastructureError
from stability_search.interruption import Interrupted, Signals
from stability_search.search.desk import Desk
from stability_search.search.early import EarlyWorkers
from stability_search.search.idleness import IDLE_S, Idleness
from stability_search.search.joining import cannot_join
from stability_search.search.machine import Machine, Node, left_to_trials, num_cpus
from stability_search.search.nodes import Inspector, NodeFacts, facts_of_this_machine
from stability_search.search.remains import kill_group
from stability_search.search.scratch import Scratch
from stability_search.search.shipping import Cargo
from stability_search.search.source import TrialSource
from stability_search.search.worker import WorkerSettings

REPORT_S = 1.0  # a trial reports its progress about so often
MAX_REPORTS_PER_S = 25.0  # of the whole study
OBJECT_STORE_BYTES = 128 * 2**20  # step records are small, and containers have little of it

_ADDRESS = "RAY_ADDRESS"  # would be joined instead of a Ray of our own
_OVERRIDE = "RAY_OVERRIDE_JOB_RUNTIME_ENV"  # what a job brought along, by what its driver brings
_WAIT_S = 0.1  # signals are looked for so often
_LEAVE_S = 3.0  # what has not ended by then is killed
_IMPORT_S = 0.5  # an import of Ray cannot be broken off; the process ends with it
_JOIN_S = 10.0  # nor can joining, which takes a second: where its Ray dies, the process dies too
_HURRY_S = 1.0  # the same after a signal: SIGTERM leaves two seconds for everything

# What is needed once the first trial has ended, and Ray: three seconds of imports, during which
# the early workers load torch and begin. Later they would hold up trials that end.
_LOADED_AHEAD = (
    "optuna.storages",
    "scipy.special",
    "scipy.stats.qmc",
    "stability_search.step_files",
    "ray",
    "ray.tune",
    "stability_search.search.keep_workers",
)
_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
}


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Send what Ray and its workers print to a log: standard output and error are ours."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, target in zip(kept, (1, 2), strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)


class Cluster:
    """A Ray to run trials on: one of our own on this machine, or one that is there already.

    Args:
        address: Address of a cluster; None starts a local one and ends it afterwards.
        cargo: Files that every node of a cluster that is joined needs; None for a local one.
    """

    def __init__(self, address: str | None, cargo: Cargo | None = None) -> None:
        self._address = address
        self.cargo = cargo
        self._scratch = Scratch()
        self._environment_before: dict[str, str | None] = {}
        self._host: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None
        self._turn = threading.Lock()
        self._is_joining = False
        self._is_left = False

    def __enter__(self) -> Self:
        """Set what Ray reads from the environment."""
        names = (*_ENVIRONMENT, _ADDRESS, ray_token.MODE, _OVERRIDE)
        self._environment_before = {name: os.environ.get(name) for name in names}
        os.environ.update(_ENVIRONMENT)
        if self._address is None:  # Ray reads it when it is imported
            os.environ.setdefault(ray_token.MODE, "token")
            os.environ.pop(_ADDRESS, None)
        else:
            os.environ[_OVERRIDE] = "1"
        return self

    def start(self) -> None:
        """Begin to start or join it, and return at once; a second call does nothing."""
        if self._thread is not None:
            return
        if self._address is None:
            self._start_host()
        self._thread = threading.Thread(target=self._join_keeping_problems, daemon=True)
        self._thread.start()

    @property
    def is_settled(self) -> bool:
        """True once it has started, or has failed to: `wait` will not wait."""
        return self._thread is not None and not self._thread.is_alive()

    def wait(self, signals: Signals) -> None:
        """Start it where nobody has, and wait until trials can run.

        Raises:
            InfrastructureError: Ray does not start or does not answer.
            Interrupted: A signal arrived.
        """
        self.start()
        while not self.is_settled:
            signals.check()
            assert self._thread is not None  # noqa: S101 - for ourselves: it was started
            self._thread.join(_WAIT_S)
        if self._problem is not None:
            cause = self._problem.__cause__
            reason = f"{self._problem}: {cause}" if cause else f"{self._problem}"
            if self._address is not None:
                raise cannot_join(self._address, reason) from self._problem
            raise InfrastructureError(
                f"ray: it did not start on this machine: {reason}",
                hint="`stability-search doctor` checks what it needs.",
            ) from self._problem

    def __exit__(self, _kind: object, error: object, _trace: object) -> None:
        """Leave it; end it and remove its files where it was ours."""
        patience_s = _HURRY_S if isinstance(error, Interrupted) else _JOIN_S
        try:
            if self._thread is not None:
                self._leave(self._thread, patience_s)
        finally:
            self._restore_environment()
            if not self._is_still_joining:  # else it needs its files; the next driver removes them
                self.remove_folder()

    @property
    def _is_still_joining(self) -> bool:
        return self._is_joining and not self.is_settled

    def _restore_environment(self) -> None:
        for name, value in self._environment_before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def _leave(self, thread: threading.Thread, patience_s: float) -> None:
        with self._turn:
            self._is_left = True
        if self._is_joining:
            thread.join(patience_s)
            if self._is_still_joining:  # its Ray ends with this process
                return
        elif thread.is_alive():  # nobody needs it any more
            self._kill_host()
            thread.join(_IMPORT_S)
        if not thread.is_alive():
            import ray

            ray.shutdown()
        if self._host is not None and self._socket is not None:
            self._socket.close()  # by which the host ends
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._host.wait(_LEAVE_S)
            self._kill_host()

    def _start_host(self) -> None:
        kwargs = {
            "include_dashboard": False,
            "_temp_dir": str(self._scratch.path),
            "object_store_memory": OBJECT_STORE_BYTES,
            "num_cpus": num_cpus(),
            "logging_level": logging.ERROR,
        }
        self._socket, theirs = socket.socketpair()
        module = "stability_search.search.ray_host"
        words = [str(theirs.fileno()), json.dumps(kwargs)]
        path = os.pathsep.join(path for path in sys.path if path)
        with theirs:
            self._host = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-P", "-m", module, *words],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C is for the driver
            )

    def _kill_host(self) -> None:
        if self._host is not None:
            kill_group(self._host.pid)
            self._host.wait()

    def _join_keeping_problems(self) -> None:
        try:
            self._join()
        except Exception as problem:  # noqa: BLE001 - raised again by `wait`
            self._problem = problem

    def _join(self) -> None:
        """Import Ray, which takes a second, and connect to it unless it was left meanwhile."""
        import ray

        import stability_search.search.keep_workers  # noqa: F401 - loaded ahead

        address = self._host_address() if self._address is None else self._address
        with self._turn:
            if self._is_left:
                return
            self._is_joining = True
        if self._address is not None:
            ray.init(
                address=address,
                runtime_env=self._runtime_env(),
                log_to_driver=True,
                logging_level=logging.ERROR,
            )
            return
        ray._raylet.Config.initialize("")  # type: ignore[attr-defined]  # noqa: SLF001 - imported before?
        # By its own address: "auto" takes whichever Ray it finds first on the machine.
        ray.init(address=address, log_to_driver=True, logging_level=logging.ERROR)

    def _runtime_env(self) -> dict[str, Any] | None:
        """Let Ray bring the task's files to every node."""
        if self.cargo is None or not self.cargo.files:
            return None
        return {"py_modules": [str(self.cargo.write(self._scratch.path))]}

    def _host_address(self) -> str:
        assert self._socket is not None  # noqa: S101 - for ourselves: the host was started
        with self._socket.makefile("rb") as stream:
            line = stream.readline()
        answer: dict[str, str] = json.loads(line or b"{}")
        if "address" not in answer:
            raise RuntimeError(answer.get("error", "its process died; see run.log"))
        return answer["address"]

    def remove_folder(self) -> None:
        """Remove Ray's files; nothing in them is needed again.

        Once more those of killed drivers, too: their last processes may have written since.
        """
        self._scratch.close()

    @property
    def storage(self) -> Path:
        """Where Ray Tune may keep what nobody reads."""
        return self._scratch.path / "tune"

    @property
    def head(self) -> str:
        """`HOST:PORT` of its head, once `wait` has returned."""
        import ray

        return str(ray.get_runtime_context().gcs_address)

    def nodes(self) -> list[Node]:
        """Return what each node offers to trials, once `wait` has returned."""
        import ray

        from stability_search.search.quarantine import living_nodes

        here = ray.get_runtime_context().get_node_id()
        return left_to_trials(living_nodes(), here, os.environ)


def worker_settings(
    machine: Machine, folder: Path, cargo: Cargo | None = None, *, num_at_once: int | None = None
) -> WorkerSettings:
    """Return what every worker is told.

    Args:
        machine: What a trial occupies and how many run at once.
        folder: Where relative paths of the task start from.
        cargo: The task's files where they came to the node with the worker.
        num_at_once: How many workers report; None for one on each slot.
    """
    share = machine.gpu_per_trial
    return WorkerSettings(
        folder=str(folder),
        import_path=str(Path.cwd()),
        num_threads=max(1, int(machine.cpu_per_trial)),
        report_s=max(REPORT_S, (num_at_once or machine.num_slots) / MAX_REPORTS_PER_S),
        gpu_memory_fraction=share if 0 < share < 1 else None,
        cargo=cargo.name if cargo else "",
        cargo_from=cargo.folder if cargo else "",
    )


def drive(  # noqa: PLR0913 - where, with what, and for whom
    source: TrialSource,
    *,
    cluster: Cluster,
    machine: Machine,
    folder: Path,
    signals: Signals,
    early: EarlyWorkers | None = None,
    facts_of: Callable[[str], NodeFacts | None] = facts_of_this_machine,
    inspector: Inspector | None = None,
    num_ahead: int | None = None,
) -> None:
    """Run trials until the source is over.

    Args:
        source: Says what to run.
        cluster: Where; entered. It is started here where it is not yet.
        machine: What a trial occupies and how many run at once.
        folder: Where relative paths of the task start from.
        signals: Checked several times a second.
        early: Workers that train until those of the cluster are ready.
        facts_of: Says what a node is like, by Ray's id of it; None where nobody knows.
        inspector: Asks nodes that join later what they are like; None where all trials run on
            this machine.
        num_ahead: Workers that start at once, >= 1, where there are so many slots; None for one
            on each slot.

    Raises:
        Interrupted: A signal arrived.
        InfrastructureError: Ray did not start.
        Exception: Whatever the source raises.
    """
    desk = Desk(source, signals, facts_of)
    try:
        if early is not None:
            _train_early(desk, early, cluster, signals)
        if not desk.must_leave:
            cluster.wait(signals)
            signals.install()  # Ray takes SIGTERM
            num_ahead = min(machine.num_slots, num_ahead or machine.num_slots)
            settings = worker_settings(machine, folder, cluster.cargo, num_at_once=num_ahead)
            _tune(desk, cluster, machine, settings, signals, early, inspector, num_ahead)
    finally:
        desk.kill_running()  # a stopped process would never hear that the driver has gone
        if early is not None:
            early.close()
        desk.settle()
    desk.raise_problem()
    signals.check()


def _train_early(desk: Desk, early: EarlyWorkers, cluster: Cluster, signals: Signals) -> None:
    """Let early workers train until Ray is there, or nothing is left to do."""
    early.feed(desk)
    for module in _LOADED_AHEAD:
        signals.check()
        importlib.import_module(module)
        early.turn(desk, timeout_s=0)
    while early.num_workers and not desk.must_leave and not cluster.is_settled:
        if early.has_begun:  # before, every core is needed to begin
            cluster.start()
        early.turn(desk)


def _tune(  # noqa: PLR0913, PLR0917 - as `drive`
    desk: Desk,
    cluster: Cluster,
    machine: Machine,
    settings: WorkerSettings,
    signals: Signals,
    early: EarlyWorkers | None,
    inspector: Inspector | None,
    num_ahead: int,
) -> None:
    from ray import tune

    from stability_search.search.keep_workers import KeepWorkers
    from stability_search.search.quarantine import Quarantine
    from stability_search.search.trainable import TrialTrainable
    from stability_search.search.tune_bridge import Bridge, Leave, SourceSearcher
    from stability_search.search.waiting import Waiting

    bridge = Bridge(
        desk,
        signals,
        num_slots=machine.num_slots,
        num_ahead=num_ahead,
        early=early,
        quarantine=Quarantine(machine),
        inspector=inspector,
        waiting=Waiting(machine),
        # A Ray of our own has nobody else to give a place to.
        idleness=Idleness(math.inf if inspector is None else IDLE_S),
    )
    resources = tune.PlacementGroupFactory(
        [machine.share], bundle_label_selector=[machine.label_selector]
    )
    with contextlib.suppress(Leave):
        tune.run(
            tune.with_resources(TrialTrainable, resources),
            name="trials",
            storage_path=str(cluster.storage),
            search_alg=SourceSearcher(bridge, worker=asdict(settings)),
            scheduler=KeepWorkers(machine.num_slots, bridge),
            num_samples=-1,
            max_concurrent_trials=machine.num_slots,
            reuse_actors=True,
            callbacks=[bridge],
            max_failures=0,
            raise_on_failed_trial=False,
            verbose=0,
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        )
