"""A cluster that starts nodes when they are asked for, by Ray's own autoscaler."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from stability_search import read_run
from tests.cluster.ray_head import free_ports
from tests.search.inline_study import TINY
from tests.search.test_study_ray import environment, run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

STORE_BYTES = 80 * 2**20
WAIT_S = 90.0
MAX_NODES = 3

TASK = """\
import time
from pathlib import Path

from tiny_task import Tiny, _node_id

FOLDER = Path("{folder}")


class Held(Tiny):
    def batches(self, batch_size, generator):
        (FOLDER / f"ran on {{_node_id()}}").touch()
        while len(list(FOLDER.glob("ran on *"))) < {num_nodes}:
            time.sleep(0.05)
        yield from super().batches(batch_size, generator)
"""
SPACE = """\
name: growing
task: ./held.py:Held
trial: {steps: 20, timeout_s: 90}
fixed: {batch_size: 8}
space:
  learning_rate: {loguniform: {low: 1e-3, high: 0.1}}
search: {trials: 3, sampler: random}
confirm: {top: 1, seeds: 1, steps: 20, octaves: 0, min_margin: 0}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a task whose trials wait until one has begun on every node there can be."""
    (tmp_path / "held.py").write_text(TASK.format(folder=tmp_path, num_nodes=MAX_NODES))
    (tmp_path / TINY.name).write_text(TINY.read_text())
    (tmp_path / "space.yaml").write_text(SPACE)
    return tmp_path


def configuration(port: int) -> dict[str, object]:
    """Return the autoscaler's: nodes are raylets of this machine, and none is there at first."""
    lists = "cluster_synced_files initialization_commands setup_commands head_setup_commands"
    lists += " worker_setup_commands head_start_ray_commands worker_start_ray_commands"
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    resources = {"CPU": 1, "object_store_memory": STORE_BYTES}
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    return {
        "cluster_name": "growing",
        "max_workers": MAX_NODES,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external",
            "module": module,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "gcs_address": f"{get_node_ip_address()}:{port}",
        },
        "auth": {"ssh_user": "nobody"},
        "docker": {},
        "file_mounts": {},
        **{name: [] for name in lists.split()},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": head,
            "worker": {
                "resources": resources, "node_config": {}, "min_workers": 0,
                "max_workers": MAX_NODES,
            },
        },
    }  # fmt: skip


@pytest.fixture
def address() -> Iterator[str]:
    """Start a head that runs no trial, with an autoscaler."""
    (port,) = free_ports(1)
    folder = Path(tempfile.mkdtemp(prefix="grows-"))  # short: paths of sockets end at 107 bytes
    (folder / "cluster.json").write_text(json.dumps(configuration(port)))
    words = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
        "--port", str(port), "--num-cpus", "0", "--object-store-memory", str(STORE_BYTES),
        "--include-dashboard", "false", "--temp-dir", str(folder / "ray"),
        "--autoscaling-config", str(folder / "cluster.json"),
    ]  # fmt: skip
    settings = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    log = folder / "head.log"
    with log.open("wb") as output:
        head = subprocess.Popen(  # noqa: S603 - our own words
            words,
            env={**environment(), **settings},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(lambda: "Ray runtime started" in log.read_text(), head, log)
        yield f"{get_node_ip_address()}:{port}"
    finally:
        end(head, folder)


def wait_until(holds: Callable[[], bool], head: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert head.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def end(head: "subprocess.Popen[bytes]", folder: Path) -> None:
    """End a head and the nodes that its autoscaler has started: they know the folder."""
    head.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    head.wait()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def test_a_cluster_without_a_node_grows_to_what_a_study_asks_for(
    address: str, folder: Path
) -> None:
    code, _, err = run(
        folder, "run", "--space", "space.yaml", "--output", "out", "--address", address,
        "--set", f"search.max_concurrent={MAX_NODES}",
    )  # fmt: skip
    assert code == 0, err
    assert "no node has room for a trial: asked the cluster for 1 CPU" in err
    assert f"there is room for 1 of the {MAX_NODES} trials at once" in err
    assert len(list(folder.glob("ran on *"))) == MAX_NODES
    trials = read_run(folder / "out").trials
    assert set(trials["outcome"]) == {"completed"}
    assert trials["trial_id"].is_unique


@pytest.mark.slow
def test_a_cluster_is_not_asked_to_grow_unless_it_is_said_how_far(
    address: str, folder: Path
) -> None:
    words = ["run", "--space", "space.yaml", "--output", "out", "--address", address]
    code, _, err = run(folder, *words)
    assert code == 2, err
    assert (
        "a trial needs 1 CPU and 0 GPU, but there are 0 and 0. Lower search.resources, or" in err
    )
    assert "set search.max_concurrent" in err
