"""Whether what nodes are like can be compared, and how a difference is told."""

import sys
from dataclasses import replace

import pytest

from stability_search.search import nodes
from stability_search.search.machine import Machine, Node
from stability_search.search.nodes import (
    ANSWER_S,
    Difference,
    Inspector,
    as_table,
    differences,
    facts_here,
)
from stability_search.search.shipping import Cargo

HERE = replace(facts_here("abc"), torch="2.13.0+cpu", cuda="")


def test_this_machine_is_known_without_torch() -> None:
    import torch

    found = facts_here("abc")
    assert (found.torch, found.cuda) == (torch.__version__, torch.version.cuda or "")
    assert found.python == ".".join(map(str, sys.version_info[:3]))
    assert found.modules == "abc"
    assert found.stability_search.startswith("0.1.0 ")


@pytest.mark.parametrize(
    "changes",
    [
        {"python": "3.12.1"},
        {"stability_search": "0.1.0 other"},
        {"ray": ""},
        {"torch": "2.12.0+cpu"},
        {"modules": "missing"},
    ],
)
def test_every_version_is_compared_with_the_drivers(changes: dict[str, str]) -> None:
    (found,) = differences({"a": HERE, "b": replace(HERE, **changes)}, HERE, is_cuda=False)
    (name, value), *_ = changes.items()
    assert (found.node, found.there) == ("b", value.partition("+")[0] or "none")
    assert found.here == getattr(HERE, name).partition("+")[0]


def test_a_cpu_or_a_build_of_torch_of_its_own_is_no_difference_on_the_cpu() -> None:
    other = replace(HERE, cpu="another", torch="2.13.0+cu128", cuda="12.8", host="b")
    assert differences({"b": other}, HERE, is_cuda=False) == ()
    assert other.fingerprint("cpu") != HERE.fingerprint("cpu")  # but it is told


def test_cuda_is_compared_among_the_nodes_since_the_driver_may_have_none() -> None:
    usual = replace(HERE, torch="2.13.0+cu128", cuda="12.8")
    odd, bare = replace(usual, cuda="12.6"), replace(usual, cuda="")
    assert differences({"a": usual, "b": usual}, HERE, is_cuda=True) == ()
    found = differences({"a": usual, "b": odd, "c": usual, "d": bare}, HERE, is_cuda=True)
    assert [(one.node, one.there, one.here) for one in found] == [
        ("b", "12.6", "12.8"),
        ("d", "none", "12.8"),
    ]
    (alone,) = differences({"d": bare}, HERE, is_cuda=True)
    assert str(alone) == "CUDA of torch none there, needed here"


def test_a_fingerprint_tells_devices_and_modules_apart_but_not_hosts() -> None:
    assert replace(HERE, host="b").fingerprint("cpu") == HERE.fingerprint("cpu")
    assert HERE.fingerprint("NVIDIA H100") != HERE.fingerprint("cpu")
    assert replace(HERE, modules="x").fingerprint("cpu") != HERE.fingerprint("cpu")


def test_differences_are_a_table() -> None:
    rows = [
        Difference(node="node-1", what="torch", there="2.12.0", here="2.13.0"),
        Difference(node="b", what="the task's files", there="missing", here="abc"),
    ]
    assert as_table(rows).splitlines() == [
        "node    what              there    here",
        "node-1  torch             2.12.0   2.13.0",
        "b       the task's files  missing  abc",
    ]


def test_a_node_that_joins_later_and_is_silent_is_asked_again_and_not_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inspector = Inspector(Cargo(), is_cuda=False)
    waited = list[float]()
    answers = [({}, {"late": ""}), ({"late": facts_here("")}, {})]

    def ask(*_: object, answer_s: float) -> object:
        waited.append(answer_s)
        return answers.pop(0)

    monkeypatch.setattr(nodes, "ask_nodes", ask)
    with pytest.raises(TimeoutError, match="its node did not say within 10 s what it is like"):
        inspector.problem_of("late", lambda: None)
    assert inspector.facts_of("late") is None
    assert inspector.problem_of("late", lambda: None) == ""
    assert inspector.problem_of("late", lambda: None) == ""  # not asked again
    assert inspector.facts_of("late") == facts_here("")
    assert max(waited) < ANSWER_S / 5
    assert answers == []


@pytest.mark.parametrize(
    ("accelerator", "answer"), [(None, "GPU A100 there, H100 here"), ("*", "")]
)
def test_a_node_that_joins_later_has_the_gpus_of_those_at_the_start(
    accelerator: str | None, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def node(name: str, model: str) -> Node:
        resources = {"CPU": 1.0, "GPU": 1.0, f"accelerator_type:{model}": 1.0}
        if accelerator is not None:  # Ray brings trials to that model only
            resources[f"accelerator_type:{accelerator}"] = 1.0
        return Node(node_id=name, host=name, resources=resources)

    def ask(
        _question: object, _words: object, node_ids: list[str], *_: object, **__: object
    ) -> object:
        return dict.fromkeys(node_ids, replace(facts_here(""), cuda="12.8")), {}

    monkeypatch.setattr(nodes, "ask_nodes", ask)
    living = [node("a", "H100"), Node(node_id="head", host="head", resources={"CPU": 1.0})]
    inspector = Inspector(Cargo(), is_cuda=True)
    machine = Machine(
        device="cuda", num_slots=3, cpu_per_trial=1.0, gpu_per_trial=1.0, accelerator=accelerator
    )
    inspector.check_all(machine, lambda: living, lambda: None)
    living += [node("alike", "H100"), node("other", "A100")]
    assert inspector.problem_of("alike", lambda: None) == ""
    assert inspector.problem_of("other", lambda: None) == answer
