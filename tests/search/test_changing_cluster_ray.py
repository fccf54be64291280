"""Nodes and workers come and go while a study runs, its driver and its whole cluster, too."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

import stability_search
from stability_search import read_run
from stability_search.search.ledger import Ledger
from tests.search.inline_study import TINY
from tests.search.killing import MARKER, STORE_BYTES, worker_pids
from tests.search.test_cluster_ray import environment_kept
from tests.search.test_study_ray import ROOT, command, count_rows, environment, finish, run, start

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]

WAIT_S = 120.0

TASK = """\
import os
import time
from pathlib import Path

from tiny_task import Tiny, _node_id

FOLDER = Path("{folder}")


class Held(Tiny):
    def __init__(self, behaviour="fine", batch_s=0.0):
        super().__init__(behaviour, batch_s=batch_s)
        if behaviour == "kill_when_built":
            os.kill(os.getpid(), 9)

    def batches(self, batch_size, generator):
        while (FOLDER / "hold").exists():
            (FOLDER / f"held on {{_node_id()}}").touch()
            time.sleep(0.05)
        (FOLDER / f"ran on {{_node_id()}}").touch()
        yield from super().batches(batch_size, generator)
"""
# Every Python of a node loads this first.
HOLD_STARTS = """\
import sys
import time
from pathlib import Path

HOLD = Path({path!r})


class Gate:
    def find_spec(self, name, *_):
        while name == "torch._C" and HOLD.exists():  # it is looked for without being loaded, too
            time.sleep(0.05)


sys.meta_path.insert(0, Gate())
"""
SPACE = """\
name: changing
task: ./held.py:Held
task_args: {batch_s: 0.02}
trial: {steps: 20, timeout_s: 200}
fixed: {batch_size: 8}
space:
  learning_rate: {loguniform: {low: 1e-3, high: 0.1}}
search: {trials: 24, sampler: random}
confirm: {top: 1, seeds: 1, steps: 20, octaves: 0, min_margin: 0}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a task that trains as long as nothing holds it."""
    (tmp_path / "held.py").write_text(TASK.format(folder=tmp_path))
    (tmp_path / TINY.name).write_text(TINY.read_text())
    (tmp_path / "space.yaml").write_text(SPACE)
    return tmp_path


@pytest.fixture
def clusters() -> Iterator[Callable[[int], Cluster]]:
    """Return a function that starts a cluster of so many nodes with one core each."""
    found = []

    def begin(num_nodes: int, **each: Any) -> Cluster:  # noqa: ANN401 - what Ray takes
        each = {"num_cpus": 1, "object_store_memory": STORE_BYTES, **each}
        cluster = Cluster(
            initialize_head=True, head_node_args={"include_dashboard": False, **each}
        )
        found.append(cluster)
        for _ in range(num_nodes - 1):
            cluster.add_node(**each)
        cluster.wait_for_nodes()
        return cluster

    with environment_kept():
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ["PLANTED_CLUSTER"] = MARKER
        yield begin
        for cluster in found:
            cluster.shutdown()


def words(cluster: Cluster) -> list[str]:
    there = ["--address", cluster.address, "--json-events"]
    return ["run", "--space", "space.yaml", "--output", "out", *there]


class Study:
    """A study that writes its events into a file, ended when it is left."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self._folder = folder
        self._events = folder / "events"
        with self._events.open("wb") as events, (folder / "errors").open("wb") as errors:
            self.process = subprocess.Popen(  # noqa: S603 - our own command
                command(*words(cluster)),
                cwd=folder,
                env=environment(),
                stdout=events,
                stderr=errors,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def wait_until(self, holds: Callable[[], Any]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not holds():
            assert self.process.poll() is None, self.errors
            assert time.monotonic() < deadline, self.errors
            time.sleep(0.02)

    def wait_for_rows(self, count: int) -> None:
        self.wait_until(lambda: count_rows(self._folder / "out" / "study.db") >= count)

    def end(self) -> int:
        return self.process.wait(WAIT_S)

    @property
    def errors(self) -> str:
        return (self._folder / "errors").read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = self._events.read_text().splitlines(keepends=True)
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in found if event["event"] == name]


def test_a_node_that_joins_late_gets_trials_and_one_that_differs_is_left_alone(
    clusters: Callable[..., Cluster], folder: Path
) -> None:
    ours = Path(stability_search.__file__).parent
    shutil.copytree(ours, folder / "planted" / ours.name)
    with (folder / "planted" / ours.name / "errors.py").open("a") as file:
        file.write("# another version\n")
    cluster = clusters(3)
    nodes = cluster.list_all_nodes()
    with Study(folder, cluster) as study:
        study.wait_for_rows(9)
        (folder / "hold").touch()
        study.wait_until(lambda: all(held_on(folder, node) for node in nodes))
        cluster.remove_node(nodes[2], allow_graceful=False)
        other = cluster.add_node(
            num_cpus=1,
            object_store_memory=STORE_BYTES,
            env_vars={"PYTHONPATH": str(folder / "planted")},
        )
        study.wait_until(lambda: study.events("node_quarantined"))
        alike = cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        study.wait_until(lambda: held_on(folder, alike))
        (folder / "hold").unlink()
        assert study.end() == 0, study.errors
        (quarantined,) = study.events("node_quarantined")
    assert "not like the others: stability-search " in quarantined["reason"]
    assert (folder / f"ran on {alike.node_id}").exists()
    assert not held_on(folder, other)
    trials = read_run(folder / "out").trials
    lost = trials[trials["outcome"] == "infrastructure"]
    assert len(lost) == 1  # of the node that died; the one that differs has cost no attempt
    final = trials.drop_duplicates("trial_id", keep="last")
    assert set(final["outcome"]) == {"completed"}


def held_on(folder: Path, node: Any) -> bool:  # noqa: ANN401 - Ray's
    return (folder / f"held on {node.node_id}").exists()


def test_a_worker_that_never_gets_ready_holds_nobody_up(
    clusters: Callable[..., Cluster], folder: Path
) -> None:
    hold_starts, planted = folder / "hold starts", folder / "planted" / "sitecustomize.py"
    planted.parent.mkdir()
    planted.write_text(HOLD_STARTS.format(path=str(hold_starts)))
    hold_starts.touch()
    cluster = clusters(1)
    slow = cluster.add_node(
        num_cpus=1,
        object_store_memory=STORE_BYTES,
        env_vars={"PYTHONPATH": f"{planted.parent}{os.pathsep}{ROOT}"},
    )
    cluster.wait_for_nodes()
    (ready,) = (one for one in cluster.list_all_nodes() if one.node_id != slow.node_id)
    with Study(folder, cluster) as study:
        assert study.end() == 0, study.errors
    assert (folder / f"ran on {ready.node_id}").exists()
    assert not (folder / f"ran on {slow.node_id}").exists()
    trials = read_run(folder / "out").trials
    assert set(trials["outcome"]) == {"completed"}
    assert trials["trial_id"].is_unique


def test_where_the_rest_of_the_cluster_is_busy_for_good_a_lost_worker_is_replaced(
    clusters: Callable[..., Cluster], folder: Path
) -> None:
    once = f"""\
        once = FOLDER / "killed once"
        if not once.exists():
            once.touch()
            os.kill(os.getpid(), {signal.SIGKILL:d})
"""
    task = folder / "held.py"
    before, after = task.read_text().split('        (FOLDER / f"ran on')
    task.write_text(f'{before}{once}        (FOLDER / f"ran on{after}')
    cluster = clusters(3)
    ray.init(address=cluster.address, logging_level="ERROR")
    try:
        others = [ray.remote(num_cpus=1)(Other).remote() for _ in range(2)]
        ray.get([other.is_there.remote() for other in others])
        with Study(folder, cluster) as study:
            assert study.end() == 0, study.errors
    finally:
        ray.shutdown()
    outcomes = read_run(folder / "out").trials["outcome"].value_counts()
    assert outcomes["infrastructure"] == 1
    assert set(outcomes.index) == {"infrastructure", "completed"}


class Other:
    """Holds what somebody else needs."""

    def is_there(self) -> bool:
        return True


def test_workers_that_are_killed_while_they_start_cost_their_trial_no_attempt(
    clusters: Callable[..., Cluster], folder: Path
) -> None:
    """It loses as many as it has attempts: their node is held, and the trial runs elsewhere."""
    hold_starts, planted = folder / "hold starts", folder / "planted" / "sitecustomize.py"
    planted.parent.mkdir()
    planted.write_text(HOLD_STARTS.format(path=str(hold_starts)))
    cluster = clusters(2, env_vars={"PYTHONPATH": f"{planted.parent}{os.pathsep}{ROOT}"})
    with Study(folder, cluster) as study:
        study.wait_for_rows(9)
        (folder / "hold").touch()
        study.wait_until(lambda: len(list(folder.glob("held on *"))) == 2)
        hold_starts.touch()  # no new worker begins a trial before it is killed
        known = set(worker_pids())
        os.kill(min(known), signal.SIGKILL)  # its trial had begun
        for _ in range(2):
            study.wait_until(lambda: set(worker_pids()) - known)
            for pid in set(worker_pids()) - known:
                os.kill(pid, signal.SIGKILL)
                known.add(pid)
        study.wait_until(lambda: study.events("node_quarantined"))
        hold_starts.unlink()
        (folder / "hold").unlink()
        assert study.end() == 0, study.errors
    trials = read_run(folder / "out").trials
    lost = trials[trials["outcome"] == "infrastructure"]
    assert len(lost) == 1
    final = trials.drop_duplicates("trial_id", keep="last")
    assert set(final["outcome"]) == {"completed"}
    assert " was gone before search-" in (folder / "out" / "run.log").read_text()


def test_where_no_worker_can_start_the_study_ends_with_exit_4_and_says_so(
    clusters: Callable[..., Cluster], folder: Path
) -> None:
    planted = folder / "planted" / "torch"
    planted.mkdir(parents=True)
    (planted / "__init__.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    (planted / "version.py").write_text(f"__version__ = {torch.__version__!r}\n")
    cluster = clusters(1, env_vars={"PYTHONPATH": f"{planted.parent}{os.pathsep}{ROOT}"})
    process = start(folder, *words(cluster))
    code, _, err = finish(process)
    assert code == 4, err
    said = [line for line in err.splitlines() if "no usable node is left" in line]
    print(said[0])
    assert "(before a trial began 3 times; last: its worker died)" in said[0]
    assert len(read_run(folder / "out").trials) == 0


def test_a_trial_that_kills_its_worker_while_its_task_is_built_has_three_attempts(
    clusters: Callable[..., Cluster], folder: Path
) -> None:
    """The twin of the tests above: these trials had begun."""
    fatal = SPACE.replace("{batch_s: 0.02}", "{behaviour: kill_when_built}")
    (folder / "space.yaml").write_text(fatal)
    code, _, err = run(folder, *words(clusters(1)))
    assert code == 4, err
    assert "(pilot-00 3 times, pilot-01 once; last: its worker died)" in err
    trials = read_run(folder / "out").trials
    assert list(trials["trial_id"]) == ["pilot-00"] * 3 + ["pilot-01"]
    assert set(trials["outcome"]) == {"infrastructure"}
    assert " was gone before " not in (folder / "out" / "run.log").read_text()


def test_a_study_goes_on_on_another_cluster_once_its_own_and_its_driver_are_gone(
    clusters: Callable[..., Cluster], folder: Path
) -> None:
    first = clusters(2)
    with Study(folder, first) as study:
        study.wait_for_rows(12)
    ids = {node.node_id for node in first.list_all_nodes()}
    first.shutdown()
    ledger = folder / "out" / "study.db"
    before = Ledger(ledger).rows()
    second = clusters(2)
    assert not ids & {node.node_id for node in second.list_all_nodes()}
    code, _, err = run(folder, "resume", "out", "--address", second.address)
    assert code == 0, err
    after = Ledger(ledger).rows()
    assert len(before) < len(after)
    assert after[: len(before)] == before
    ends = [row.trial_id for row in after]
    lost = {f"search-{index:04d}" for index in range(24)} - set(ends)
    print(f"finished before {len(before)}, after {len(after)}, lost {len(lost)}, "
          f"repeated {len(ends) - len(set(ends))}")  # fmt: skip
    assert len(ends) == len(set(ends))
    assert not lost
    assert {row.summary.outcome.value for row in after} == {"completed"}


def test_a_driver_on_a_cluster_that_is_terminated_ends_at_once_and_leaves_no_worker(
    clusters: Callable[..., Cluster], folder: Path
) -> None:
    """SIGTERM reaches it while every trial is inside a long step; `resume` works afterwards."""
    cluster = clusters(2)
    with Study(folder, cluster) as study:
        study.wait_for_rows(9)
        (folder / "hold").touch()
        study.wait_until(lambda: len(list(folder.glob("held on *"))) == 2)
        sent = time.time()
        study.process.send_signal(signal.SIGTERM)
        code = study.end()
        took_s = (folder / "errors").stat().st_mtime - sent  # until its last line
    print(f"SIGTERM on a cluster: its last line after {took_s:.1f} s")
    assert code == 143, study.errors
    assert took_s < 2 * 2  # the promise, doubled for a busy machine
    assert "resume out" in study.errors
    deadline = time.monotonic() + WAIT_S
    while worker_pids() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert worker_pids() == []
    (folder / "hold").unlink()
    assert run(folder, "resume", "out", "--address", cluster.address)[0] == 0
    assert read_run(folder / "out").trials["trial_id"].is_unique
