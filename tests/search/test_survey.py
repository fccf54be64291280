"""What a cluster's nodes are like, told without refusing anything."""

import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest

from stability_search.errors import InfrastructureError
from stability_search.search import survey as surveying
from stability_search.search.machine import Node
from stability_search.search.nodes import facts_here
from stability_search.search.survey import (
    NodeState,
    SurveyedNode,
    compared,
    memory_free_bytes,
    state_there,
    survey,
)

HERE = replace(facts_here(""), torch="2.13.0+cpu", cuda="")
ASKED = (1000.0, 1002.0)


def node(node_id: str, **resources: float) -> Node:
    return Node(node_id=node_id, host=f"host-{node_id}", resources={"CPU": 4.0, **resources})


def state(*, clock_s: float = 1001.0, **changes: str) -> NodeState:
    facts = replace(HERE, **changes)
    return NodeState(facts=facts, disk_free_bytes=1, memory_free_bytes=1, clock_s=clock_s)


def look(
    nodes: list[Node], answers: dict[str, NodeState], failures: dict[str, str] | None = None
) -> dict[str, SurveyedNode]:
    found = compared(nodes, answers, failures or {}, here=HERE, asked=ASKED)
    return {one.node.node_id: one for one in found}


def test_nodes_that_are_alike_have_no_problem_and_all_their_slots() -> None:
    found = look([node("b"), node("a")], {"a": state(), "b": state()})
    assert [(one.name, one.num_slots, one.problems) for one in found.values()] == [
        ("host-a", 4, ()),
        ("host-b", 4, ()),
    ]


def test_a_node_that_differs_or_is_silent_says_in_what() -> None:
    found = look(
        [node("a"), node("b"), node("c")],
        {"a": state(torch="2.12.0", python="3.12.1")},
        {
            "b": "ModuleNotFoundError: No module named 'stability_search'",
            "c": "ModuleNotFoundError: No module named 'stability_search.search.survey'",
            "gone": "",  # it has died meanwhile
        },
    )
    assert found["a"].problems == (
        f"Python 3.12.1 there, {HERE.python} here",
        "torch 2.12.0 there, 2.13.0 here",
    )
    assert found["b"].problems == (
        f"stability-search missing there, {HERE.stability_search} here",
    )
    assert (
        found["c"]
        .problems[0]
        .startswith("stability-search without stability_search.search.survey there")
    )
    assert (found["b"].state, found["b"].skew_s) == (None, None)
    assert set(found) == {"a", "b", "c"}


def test_where_there_are_gpus_trials_run_on_them_and_only_their_cuda_counts() -> None:
    cuda = state(torch="2.13.0+cu128", cuda="12.8")
    found = look([node("a", GPU=2.0), node("head")], {"a": cuda, "head": state()})
    assert {name: one.num_slots for name, one in found.items()} == {"a": 2, "head": 0}
    assert [one.problems for one in found.values()] == [(), ()]

    bare = look([node("a", GPU=1.0)], {"a": state()})
    assert bare["a"].problems == ("CUDA of torch none there, needed here",)


@pytest.mark.parametrize(
    ("clock_s", "skew_s"), [(1000.5, 0.0), (1000.0, 0.0), (999.0, -1.0), (1012.0, 10.0)]
)
def test_a_clock_is_off_by_what_asking_cannot_explain(clock_s: float, skew_s: float) -> None:
    assert look([node("a")], {"a": state(clock_s=clock_s)})["a"].skew_s == skew_s


def test_free_memory_is_that_of_the_machine_or_of_its_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    assert memory_free_bytes(meminfo, tmp_path) is None
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    4 kB\n")
    assert memory_free_bytes(meminfo, tmp_path) == 4096
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_free_bytes(meminfo, tmp_path) == 4096
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert memory_free_bytes(meminfo, tmp_path) == 2000
    (tmp_path / "memory.current").write_text("4000\n")
    assert memory_free_bytes(meminfo, tmp_path) == 0


def test_this_machine_says_what_it_is_like() -> None:
    found = state_there()
    assert found.facts == facts_here("")
    assert found.disk_free_bytes > 0
    assert found.clock_s > 0


class Joined:
    """A cluster without nodes; Ray sends a token as told, and says so while it is joined."""

    def __init__(self, mode: str | None) -> None:
        self._during = {} if mode is None else {"RAY_AUTH_MODE": mode}

    def __enter__(self) -> Self:
        return self

    def wait(self, _signals: object) -> None:
        self._before = dict(os.environ)
        os.environ.update(self._during)

    def nodes(self) -> list[Node]:
        return []

    def __exit__(self, *_: object) -> None:
        os.environ.clear()
        os.environ.update(self._before)


@pytest.mark.parametrize(
    ("here", "joined", "has_sent"),
    [
        (None, "token", True),  # Ray has found a token's file: `auto`
        (None, None, False),
        ("token", None, True),
        ("Token", None, True),
        ("disabled", None, False),
    ],
)
def test_whether_a_token_was_sent_is_noted_while_the_cluster_is_joined(
    here: str | None, joined: str | None, *, has_sent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if here is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", here)
    monkeypatch.setattr(surveying, "Cluster", lambda _address: Joined(joined))
    monkeypatch.setattr(surveying, "ask_nodes", lambda *_: ({}, {}))
    monkeypatch.setattr(surveying, "_dashboard", lambda: "")
    assert survey("auto").has_sent_token == has_sent
    assert os.environ.get("RAY_AUTH_MODE") == here


def test_a_cluster_that_is_not_there_is_said_at_once_and_leaves_nothing() -> None:
    with socket.socket() as taken:  # nobody listens there, and nobody else can
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InfrastructureError, match="does not answer: Connection ref") as caught:
            survey(address)
    assert str(caught.value).startswith(f"{address}: ")
