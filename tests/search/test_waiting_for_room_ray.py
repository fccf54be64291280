"""When a cluster is asked for a node, how long that is waited for, and what is told."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from stability_search.search import growing
from stability_search.search.growing import is_starting_nodes, wait_for_room
from stability_search.search.machine import Machine, Node

pytestmark = pytest.mark.ray

MACHINE = Machine(device="cuda", num_slots=0, cpu_per_trial=1.0, gpu_per_trial=1.0)
HEAD = Node(node_id="head", resources={"CPU": 8.0})
GPU_NODE = Node(node_id="late", resources={"CPU": 8.0, "GPU": 1.0})


class Cluster:
    """Starts a node some time after it was asked, and says so for a part of that time."""

    def __init__(self, *, node_after_s: float = 1e9, says_so_for_s: float = 0.0) -> None:
        self.now_s = 0.0
        self._node_after_s, self._says_so_for_s = node_after_s, says_so_for_s
        self.groups: list[object] = []
        self.notices: list[str] = []
        self.num_asked = 0

    def ask(self, bundles: list[dict[str, float]], **_: object) -> object:
        assert bundles == [{"CPU": 1.0, "GPU": 1.0}]
        self.num_asked += 1
        self.groups.append(bundles)
        return bundles

    def living(self) -> list[Node]:
        return [HEAD, GPU_NODE] if self.now_s >= self._node_after_s else [HEAD]

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def wait(self, look: Any = lambda: None) -> None:  # noqa: ANN401 - a function of no account
        wait_for_room(MACHINE, self.living, self.notices.append, look, lambda: self.now_s)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: ANN401 - a function
    def play(**times: float) -> Cluster:
        cluster = Cluster(**times)
        monkeypatch.setattr(growing, "placement_group", cluster.ask)
        monkeypatch.setattr(growing, "remove_placement_group", cluster.groups.remove)
        monkeypatch.setattr(growing, "time", SimpleNamespace(sleep=cluster.sleep))
        says_so = lambda: cluster.now_s < cluster._says_so_for_s  # noqa: E731, SLF001
        monkeypatch.setattr(growing, "is_starting_nodes", says_so)
        return cluster

    return play


def test_a_node_that_is_there_is_not_asked_for(play: Any) -> None:  # noqa: ANN401 - the fixture's
    cluster = play(node_after_s=0)
    cluster.wait()
    assert (cluster.num_asked, cluster.notices) == (0, [])


def test_a_cluster_that_starts_no_node_is_given_up_after_half_a_minute(play: Any) -> None:  # noqa: ANN401 - as above
    cluster = play()
    cluster.wait()
    assert cluster.now_s == 30.0
    assert (cluster.num_asked, cluster.groups) == (1, [])
    assert cluster.notices[0] == (
        "no node has room for a trial: asked the cluster for 1 CPU and 1 GPU"
    )


def test_a_node_that_is_being_started_is_waited_for_and_that_is_told(play: Any) -> None:  # noqa: ANN401 - as above
    cluster = play(node_after_s=200.0, says_so_for_s=190.0)
    cluster.wait()
    assert cluster.now_s == 200.0
    assert cluster.groups == []
    waits = [f"waiting for a node with 1 CPU and 1 GPU, {s} s" for s in range(30, 200, 30)]
    assert cluster.notices[1:] == waits


def test_who_gives_up_asks_for_nothing_any_more(play: Any) -> None:  # noqa: ANN401 - as above
    def look() -> None:
        raise InterruptedError

    cluster = play()
    with pytest.raises(InterruptedError):
        cluster.wait(look)
    assert (cluster.num_asked, cluster.groups) == (1, [])


@pytest.mark.parametrize(
    ("launches", "nodes", "report", "is_starting"),
    [
        ([], [], None, False),
        ([], [], {"pending_launches": {}, "pending_nodes": []}, False),
        (["worker"], [], None, True),
        ([], ["late"], None, True),
        ([], [], {"pending_launches": {"worker": 1}}, True),
        ([], [], {"pending_nodes": [["10.0.0.1", "worker", "setting-up"]]}, True),
    ],
)
def test_both_versions_of_rays_autoscaler_are_heard(
    launches: list[str],
    nodes: list[str],
    report: object,
    is_starting: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = None if report is None else json.dumps({"autoscaler_report": report})
    status = SimpleNamespace(pending_launches=launches, pending_nodes=nodes)
    context = SimpleNamespace(gcs_address="there:1")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(growing, "get_cluster_status", {"there:1": status}.__getitem__)
    monkeypatch.setattr(growing, "_internal_kv_get", {"__autoscaling_status": text}.__getitem__)
    assert is_starting_nodes() is is_starting
