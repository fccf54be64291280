"""Ray Tune at work: asks for trials, runs them on reused workers, hands back what they became.

Nothing here decides anything about a study: a `TrialSource` says which trial comes next and is
told how each ended. Ray's own experiment state is disposable.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from stability_search.errors import InfrastructureError
from stability_search.search.machine import Machine, num_cpus
from stability_search.search.source import Signals, TrialSource

REPORT_S = 1.0  # a trial reports its progress about so often
MAX_REPORTS_PER_S = 25.0  # of the whole study
OBJECT_STORE_BYTES = 128 * 2**20  # step records are small, and containers have little of it

_FOLDER_PREFIX = "stability-"  # followed by the driver's process id

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


def remove_stale_folders() -> None:
    """Remove what drivers left behind that were killed and could not do it themselves."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER_PREFIX}*-*"):
        pid = folder.name.removeprefix(_FOLDER_PREFIX).partition("-")[0]
        if pid.isdigit() and not _is_running(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


class Cluster:
    """A Ray to run trials on: one of our own on this machine, or one that is there already.

    Args:
        address: Address of a cluster; None starts a local one and ends it afterwards.
    """

    def __init__(self, address: str | None) -> None:
        self._address = address
        remove_stale_folders()
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER_PREFIX}{os.getpid()}-"))
        self._environment_before: dict[str, str | None] = {}

    def __enter__(self) -> Self:
        """Start or join it.

        Raises:
            InfrastructureError: Ray does not start or does not answer.
        """
        self._environment_before = {name: os.environ.get(name) for name in _ENVIRONMENT}
        os.environ.update(_ENVIRONMENT)
        import ray

        kwargs: dict[str, Any] = {"log_to_driver": True, "logging_level": "error"}
        if self._address is None:
            kwargs |= {
                "address": "local",
                "include_dashboard": False,
                "_temp_dir": str(self._folder),
                "object_store_memory": OBJECT_STORE_BYTES,
                "num_cpus": num_cpus(),
            }
        else:
            kwargs["address"] = self._address
        try:
            ray.init(**kwargs)
        except Exception as error:
            self.remove_folder()
            where = self._address or "this machine"
            raise InfrastructureError(
                f"ray: it did not start on {where}: {error}",
                hint="`stability-search doctor` checks what it needs.",
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        """Leave it; end it and remove its files where it was ours."""
        import ray

        ray.shutdown()
        for name, value in self._environment_before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self.remove_folder()

    def remove_folder(self) -> None:
        """Remove Ray's files; nothing in them is needed again."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def storage(self) -> Path:
        """Where Ray Tune may keep what nobody reads."""
        return self._folder / "tune"

    def resources(self) -> Mapping[str, float]:
        """Return what all nodes together offer."""
        import ray

        offered: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        return offered


def drive(
    source: TrialSource,
    *,
    cluster: Cluster,
    machine: Machine,
    folder: Path,
    signals: Signals,
) -> None:
    """Run trials until the source is over.

    Args:
        source: Says what to run.
        cluster: Where; entered.
        machine: What a trial occupies and how many run at once.
        folder: Where relative paths of the task start from.
        signals: Checked several times a second.

    Raises:
        Interrupted: A signal arrived.
        Exception: Whatever the source raises.
    """
    from ray import tune

    from stability_search.search.trainable import TrialTrainable
    from stability_search.search.tune_bridge import Bridge, KeepWorkers, Leave, SourceSearcher

    bridge = Bridge(source, signals)
    searcher = SourceSearcher(
        bridge,
        common={
            "folder": str(folder),
            "import_path": str(Path.cwd()),
            "num_threads": max(1, int(machine.cpu_per_trial)),
            "report_s": max(REPORT_S, machine.num_slots / MAX_REPORTS_PER_S),
        },
    )
    with contextlib.suppress(Leave):
        tune.run(
            tune.with_resources(
                TrialTrainable, {"cpu": machine.cpu_per_trial, "gpu": machine.gpu_per_trial}
            ),
            name="trials",
            storage_path=str(cluster.storage),
            search_alg=searcher,
            scheduler=KeepWorkers(machine.num_slots),
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
    bridge.raise_problem()
    signals.check()
