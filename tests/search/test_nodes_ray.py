"""A cluster whose nodes see neither the driver's files nor always its versions."""

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from stability_search import read_run
from stability_search.errors import InfrastructureError
from stability_search.search.desk import RunningTrial
from stability_search.search.machine import Machine, Node
from stability_search.search.nodes import Inspector
from stability_search.search.quarantine import living_nodes
from stability_search.search.shipping import Cargo
from stability_search.search.tune_bridge import kill_there
from tests.search.inline_study import TINY
from tests.search.test_cluster_ray import environment_kept
from tests.search.test_study_ray import environment, finish, run, start

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

STORE_BYTES = 80 * 2**20
WAIT_S = 90.0
TORCH = importlib.metadata.version("torch").partition("+")[0]

TASK = """\
from pathlib import Path

import beside
from tiny_task import Tiny


class Shipped(Tiny):
    def metrics(self, model, batch):
        return {{
            "is_original": float(__file__.startswith("{folder}")),
            "sees_original": float(Path("{folder}", "shipped.py").exists()),
            "beside": beside.VALUE,
        }}
"""
SPACE = """\
name: shipped
task: ./shipped.py:Shipped
trial: {steps: 20, timeout_s: 60}
fixed: {batch_size: 8}
space:
  learning_rate: {loguniform: {low: 1e-3, high: 0.1}}
search: {trials: 2, sampler: random, resources: {custom: {fast_disk: 1}}}
confirm: {top: 1, seeds: 1, steps: 20, octaves: 0, min_margin: 0}
"""


@pytest.fixture(scope="module")
def driver_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a task of three files."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "shipped.py").write_text(TASK.format(folder=folder))
    (folder / "beside.py").write_text("VALUE = 3.0\n")
    (folder / "tiny_task.py").write_text(TINY.read_text())
    (folder / "space.yaml").write_text(SPACE)
    return folder


def can_hide() -> bool:
    """Return True where a process may have its own mounts."""
    tool = shutil.which("unshare")
    return tool is not None and not subprocess.run([tool, "-m", "true"], check=False).returncode  # noqa: S603


def start_node(address: str, hidden: Path, log: Path, *words: str) -> "subprocess.Popen[bytes]":
    """Start a node as on another machine: one that does not see a folder of this one."""
    node = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--address", address,
        "--num-cpus", "2", "--object-store-memory", str(STORE_BYTES), *words,
    ]  # fmt: skip
    hide = ["unshare", "-m", "/bin/sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(hidden)]
    with log.open("wb") as output:
        return subprocess.Popen(  # noqa: S603 - our own words
            [*hide, *node] if can_hide() else node,
            env={**environment(), "RAY_USAGE_STATS_ENABLED": "0"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def has_joined(cluster: Cluster, node: "subprocess.Popen[bytes]", log: Path) -> bool:
    assert node.poll() is None, log.read_text()
    return sum(one["Alive"] for one in cluster.global_state.node_table()) == 3


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def nodes(driver_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start a head that runs no trial, a node elsewhere, and one with another torch."""
    planted = tmp_path_factory.mktemp("planted")
    (planted / "torch").mkdir()
    (planted / "torch" / "__init__.py").touch()
    (planted / "torch" / "version.py").write_text("__version__ = '2.0.1+cpu'\n")
    folder = tempfile.mkdtemp(prefix="nodes-")  # short: paths of sockets end at 107 bytes
    with environment_kept(), contextlib.ExitStack() as stack:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        head = {
            "num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False,
            "temp_dir": folder,
        }  # fmt: skip
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        found = Cluster(initialize_head=True, head_node_args=head)
        stack.callback(found.shutdown)
        found.add_node(
            num_cpus=1,
            object_store_memory=STORE_BYTES,
            resources={"fast_disk": 1},
            labels={"pool": "bad"},
            env_vars={"PYTHONPATH": str(planted)},
        )
        # After the other has joined: two that start on one machine at once take the same socket.
        log = Path(folder, "there.log")
        there = start_node(
            found.address, driver_folder, log, "--labels", "pool=good",
            "--resources", '{"fast_disk": 2}',
        )  # fmt: skip
        stack.callback(end, there)
        wait_until(lambda: has_joined(found, there, log))
        yield found


def end(node: "subprocess.Popen[bytes]") -> None:
    node.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        node.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()


@pytest.fixture
def joined(nodes: Cluster) -> Iterator[None]:
    with environment_kept():
        ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
        yield
        ray.shutdown()


def node_with(pool: str) -> str:
    (found,) = [
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and node["Labels"].get("pool") == pool
    ]
    return str(found)


def words(nodes: Cluster, output: Path, *more: str) -> list[str]:
    return [
        "run",
        "--space",
        "space.yaml",
        "--output",
        str(output),
        "--address",
        nodes.address,
        *more,
    ]


def test_a_node_that_differs_is_named_in_a_table_before_anything_starts(
    nodes: Cluster, driver_folder: Path, tmp_path: Path
) -> None:
    code, _, err = run(driver_folder, *words(nodes, tmp_path / "out"))
    assert code == 4, err
    assert "1 of 2 nodes cannot take part" in err
    (row,) = [line.split() for line in err.splitlines() if " torch " in line and "2.0.1" in line]
    assert row[-3:] == ["torch", "2.0.1", TORCH]
    assert "search.resources.labels" in err
    assert "pilot-00" not in err
    assert len(read_run(tmp_path / "out").trials) == 0


def test_doctor_tells_what_every_node_is_like_and_leaves_nothing_running(
    nodes: Cluster, tmp_path: Path
) -> None:
    code, out, err = run(tmp_path, "doctor", "--address", nodes.address, "--format", "json")
    document = json.loads(out)
    checks = {check["name"]: check for check in document["checks"]}
    assert (code, err) == (4, "")
    assert checks["nodes"]["found"].startswith("1 of 3 could run trials, 2 at once with a CPU")
    assert checks["token"]["found"].startswith("OPEN: it let us in without a token")
    assert checks["versions"]["found"].endswith(f": torch 2.0.1 there, {TORCH} here")
    found = {one["torch"].partition("+")[0]: one for one in document["nodes"] if one["trials"]}
    assert [*found] == [TORCH]
    assert sorted(one["state"] for one in document["nodes"]) == ["alike", "alike", "differs"]
    assert all(one["disk_free_mib"] > 0 for one in document["nodes"])
    assert list(tmp_path.iterdir()) == []


def test_a_trial_waits_for_what_is_busy_and_then_runs_where_the_drivers_files_are_not(
    nodes: Cluster,
    driver_folder: Path,
    tmp_path: Path,
    joined: None,  # noqa: ARG001
) -> None:
    @ray.remote(num_cpus=0, resources={"fast_disk": 1}, label_selector={"pool": "good"})
    class Busy:
        def ready(self) -> None: ...

    others = [Busy.remote(), Busy.remote()]
    ray.get([other.ready.remote() for other in others])
    process = start(
        driver_folder,
        *words(nodes, tmp_path / "out", "--set", "search.resources.labels.pool=good"),
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "waiting for" in line:
            break
    ray.kill(others[0])  # the other stays: one of two slots is never free
    code, _, err = finish(process)
    err = "".join(said) + err
    assert code == 0, err
    assert "waiting for 1 fast_disk: 0 of 2 free, " in err
    assert "3 files (" in err
    assert "1 of 3 nodes can run trials" in err
    trials = read_run(tmp_path / "out").trials
    assert set(trials["outcome"]) == {"completed"}
    assert set(trials["metric_is_original_last"]) == {0.0}
    assert set(trials["metric_beside_last"]) == {3.0}
    assert set(trials["metric_sees_original_last"]) == {0.0 if can_hide() else 1.0}
    (fingerprint,) = set(trials["fingerprint"])
    (place,) = json.loads((tmp_path / "out" / "environment.json").read_text())["nodes"]
    assert place["fingerprint"] == fingerprint
    assert place["torch"].startswith(TORCH)
    ray.kill(others[1])
    assert "can run trials" in (tmp_path / "out" / "run.log").read_text()


@pytest.mark.usefixtures("joined")
def test_a_node_that_joins_later_is_asked_before_it_may_run_a_trial() -> None:
    inspector = Inspector(Cargo(), is_cuda=False)
    problem = inspector.problem_of(node_with("bad"), lambda: None)
    assert problem == f"torch 2.0.1 there, {TORCH} here"
    assert inspector.problem_of(node_with("bad"), pytest.fail) == problem  # not asked again
    assert inspector.problem_of(node_with("good"), lambda: None) == ""
    facts = inspector.facts_of(node_with("bad"))
    assert facts is not None
    assert facts.torch == "2.0.1+cpu"
    unknown = inspector.problem_of("e" * 56, lambda: None)
    assert unknown.startswith("an answer ")


@pytest.mark.usefixtures("joined")
def test_a_node_that_dies_while_it_is_asked_stops_no_study() -> None:
    dead = Node(node_id="e" * 56, host="dead", resources={"CPU": 1.0, "fast_disk": 1.0})
    good = next(node for node in living_nodes() if node.labels.get("pool") == "good")
    listed = deque([[dead, good], [good], [dead], [], [dead], [dead]])
    machine = Machine(device="cpu", num_slots=1, cpu_per_trial=1.0, gpu_per_trial=0.0)
    inspector = Inspector(Cargo(), is_cuda=False)
    said = inspector.check_all(machine, listed.popleft, lambda: None)
    assert said.startswith("1 of 2 nodes can run trials and are alike: ")
    with pytest.raises(InfrastructureError, match="every node that could run a trial has died"):
        Inspector(Cargo(), is_cuda=False).check_all(machine, listed.popleft, lambda: None)
    with pytest.raises(InfrastructureError, match=r"dead +an answer"):
        Inspector(Cargo(), is_cuda=False).check_all(machine, listed.popleft, lambda: None)


def ask_for_a_while(actor: Any) -> None:  # noqa: ANN401 - Ray's handle has no public type
    """Ask an actor again and again: Ray only sends word that it is to end."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        ray.get(actor.ready.remote())


@pytest.mark.usefixtures("joined")
def test_a_worker_on_another_node_is_killed_there_with_what_it_started() -> None:
    @ray.remote(num_cpus=0)
    class Idle:
        def ready(self) -> None: ...

    hung = subprocess.Popen(["/bin/sleep", "600"], start_new_session=True)
    actor: Any = Idle.remote()
    request: Any = None  # of no account here
    kill_there(RunningTrial(request=request, node_id=node_with("good"), pid=hung.pid), actor)
    assert hung.wait(WAIT_S) == -signal.SIGKILL
    ray.get(actor.ready.remote())  # Ray would have ended it though the node had not answered
    kill_there(RunningTrial(request=request), actor)  # nobody knows where: Ray does it
    with pytest.raises(ray.exceptions.RayActorError):
        ask_for_a_while(actor)
