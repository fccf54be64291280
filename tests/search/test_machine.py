"""How many trials run at once, and on what."""

from dataclasses import replace
from typing import Any

import pytest

from stability_search.errors import UsageError
from stability_search.search import machine
from stability_search.search.machine import (
    Machine,
    Node,
    choose_machine,
    left_to_trials,
    this_machine,
)
from stability_search.settings.study import Resources
from stability_search.space import Space
from tests.search.confirm_world import make_space

CORES = {"CPU": 8.0, "memory": 1e9, "node:10.0.0.1": 1.0}


def node(**resources: float) -> Node:
    """Return a node with eight cores, and what else it is said to have."""
    return Node(resources={**CORES, **resources})


def test_what_is_reserved_for_the_driver_is_no_slot() -> None:
    nodes = [Node(node_id=name, resources={"CPU": 2.0, "GPU": 1.0}) for name in ("a", "b")]
    reserved = {"STABILITY_SEARCH_DRIVER_CPUS": "1"}
    assert left_to_trials(nodes, "a", {}) == nodes
    assert left_to_trials(nodes, "gone", reserved) == nodes
    here, there = left_to_trials(nodes, "a", reserved)
    assert here.resources == {"CPU": 1.0, "GPU": 1.0}
    assert there == nodes[1]
    machine = choose_machine(space_with(gpu=0.0), here, there, is_joined=True)
    assert machine.num_slots == 3


def gpus(count: int, model: str | None = None) -> Node:
    named = {} if model is None else {f"accelerator_type:{model}": 1.0}
    return node(GPU=float(count), **named)


def space_with(*, max_concurrent: int | None = None, **resources: Any) -> Space:  # noqa: ANN401
    space = make_space()
    search = replace(
        space.study.search, resources=Resources(**resources), max_concurrent=max_concurrent
    )
    return replace(space, study=replace(space.study, search=search))


@pytest.fixture
def torch_with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_torch_has_gpu", lambda: True)


@pytest.mark.usefixtures("torch_with_gpu")
@pytest.mark.parametrize(
    ("resources", "num_gpus", "expected"),
    [
        ({"cpu": 1, "gpu": None}, 0, ("cpu", 8, 0.0)),
        ({"cpu": 1, "gpu": None}, 2, ("cuda", 2, 1.0)),
        ({"cpu": 1, "gpu": 0}, 2, ("cpu", 8, 0.0)),
        ({"cpu": 1, "gpu": 2}, 4, ("cuda", 2, 2.0)),
        ({"cpu": 1, "gpu": 0.5}, 2, ("cuda", 4, 0.5)),
        ({"cpu": 4, "gpu": 0.5}, 2, ("cuda", 2, 0.5)),
        # 2 trials on each GPU, not 5 on both together: a share never spans two.
        ({"cpu": 1, "gpu": 0.4}, 2, ("cuda", 4, 0.4)),
        ({"cpu": 0.1, "gpu": 0.1}, 1, ("cuda", 10, 0.1)),
        ({"cpu": 0.1, "gpu": 1 / 3}, 1, ("cuda", 3, 1 / 3)),
    ],
)
def test_slots_are_what_cores_and_whole_gpus_hold(
    resources: dict[str, Any], num_gpus: int, expected: tuple[str, int, float]
) -> None:
    chosen = choose_machine(space_with(**resources), gpus(num_gpus))
    assert (chosen.device, chosen.num_slots, chosen.gpu_per_trial) == expected


def test_auto_takes_no_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_torch_has_gpu", lambda: False)
    assert choose_machine(space_with(), gpus(2)).device == "cpu"


def test_no_more_trials_run_at_once_than_asked_for() -> None:
    assert choose_machine(space_with(max_concurrent=3), node()).num_slots == 3
    assert choose_machine(space_with(max_concurrent=30), node()).num_slots == 8


def test_a_cluster_may_grow_to_what_was_asked_for() -> None:
    def slots(max_concurrent: int | None) -> tuple[int, int]:
        space = space_with(max_concurrent=max_concurrent, gpu=0)
        chosen = choose_machine(space, node(), node(), is_joined=True)
        return chosen.num_slots, chosen.num_unplaced

    assert slots(None) == (16, 0)
    assert slots(3) == (3, 0)
    assert slots(30) == (30, 14)


def test_slots_are_counted_node_by_node() -> None:
    odd = Node(resources={"CPU": 3.0})
    assert choose_machine(space_with(cpu=2.0), odd, odd).num_slots == 2  # not 6 cores / 2


def test_a_trial_larger_than_every_node_is_refused() -> None:
    rule = r"a trial needs 9 CPU and 0 GPU, but there are 8 and 0\. Lower"
    with pytest.raises(UsageError, match=rule):
        choose_machine(space_with(cpu=9.0, gpu=0), node())
    rule = r"needs 1 CPU and 2 GPU, but there are 8 and 1 on the largest node"
    with pytest.raises(UsageError, match=rule):
        choose_machine(space_with(gpu=2), node(), gpus(1))


@pytest.mark.parametrize(
    ("max_concurrent", "way_out"),
    [(None, r"or set search\.max_concurrent: a cluster that grows"), (4, "was asked for such a")],
)
def test_a_cluster_without_room_is_said_how_to_ask_it_or_that_it_was_asked(
    max_concurrent: int | None, way_out: str
) -> None:
    space = space_with(gpu=2, max_concurrent=max_concurrent)
    with pytest.raises(UsageError, match=way_out):
        choose_machine(space, node(), is_joined=True)
    with pytest.raises(UsageError, match=r"Lower search\.resources\.$"):
        choose_machine(space, node())


MIXED = (gpus(4, "A100"), gpus(2, "H100"), node())


@pytest.mark.parametrize("gpu", [None, 1.0])
def test_only_nodes_with_the_gpu_model_asked_for_are_counted(gpu: float | None) -> None:
    chosen = choose_machine(space_with(gpu=gpu, accelerator="H100"), *MIXED)
    assert chosen == Machine(
        device="cuda", num_slots=2, cpu_per_trial=1.0, gpu_per_trial=1.0, accelerator="H100"
    )
    assert chosen.share == {"CPU": 1.0, "GPU": 1.0, "accelerator_type:H100": 0.001}


@pytest.mark.parametrize("gpu", [None, 0.5, 2.0])
def test_gpu_models_are_never_pooled(gpu: float | None) -> None:
    rule = (
        r"all trials must run on one GPU model, but got A100 on 2, H100 on 1 of the nodes\. Name "
        r"one, as by `--set search\.resources\.accelerator=A100`"
    )
    with pytest.raises(UsageError, match=rule):
        choose_machine(space_with(gpu=gpu), *MIXED, gpus(2, "A100"), is_joined=True)
    with pytest.raises(UsageError, match="an unnamed model on 1"):
        choose_machine(space_with(gpu=1.0), gpus(2, "A100"), gpus(2))
    alike = choose_machine(space_with(gpu=gpu), gpus(4, "A100"), node(), is_joined=True)
    assert alike.device == "cuda"
    assert choose_machine(space_with(gpu=0), *MIXED).device == "cpu"  # where no trial sees one
    # A node that no trial fits onto is not asked for its model.
    assert choose_machine(space_with(gpu=3.0), *MIXED).num_slots == 1


def test_a_joined_cluster_has_gpus_though_the_drivers_torch_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "_torch_has_gpu", lambda: False)
    assert choose_machine(space_with(), gpus(2), is_joined=True).device == "cuda"
    assert choose_machine(space_with(), gpus(2)).device == "cpu"


def test_slots_are_bounded_by_custom_resources_and_named_where_none_is_large_enough() -> None:
    disk = {"fast_disk": 1.0}
    chosen = choose_machine(space_with(custom=disk), node(fast_disk=3.0), node())
    assert (chosen.num_slots, chosen.share) == (3, {"CPU": 1.0, "fast_disk": 1.0})
    assert (
        choose_machine(space_with(custom={"fast_disk": 0.5}), node(fast_disk=3.0)).num_slots == 6
    )
    rule = r"a trial needs 1 CPU, 0 GPU and 1 fast_disk, but there are 8, 0 and 0\.5\. Lower"
    with pytest.raises(UsageError, match=rule):
        choose_machine(space_with(custom=disk, gpu=0), node(fast_disk=0.5))


def test_a_custom_resource_that_no_node_has_is_refused_with_those_there_are() -> None:
    both = {"disk": 1.0, "card": 1.0}
    here = replace(node(tape=2.0, disk=0.0), node_id="a")
    rule = (
        r"search\.resources\.custom: a node must have card and disk, but there is tape\. Ask for "
        r"what a node has, or ask for nothing by `--set search\.resources\.custom=\{\}`"
    )
    with pytest.raises(UsageError, match=rule):
        choose_machine(space_with(custom=both), here, gpus(1))
    rule = r"a node must have card, but no node has a resource of its own\. Join a cluster"
    with pytest.raises(UsageError, match=rule):
        choose_machine(space_with(custom={"card": 1.0}), this_machine())
    labelled = replace(here, labels={"pool": "a"})
    rule = r"a node with these labels must have card, but there is tape\."
    with pytest.raises(UsageError, match=rule):
        choose_machine(
            space_with(custom={"card": 1.0}, labels={"pool": ("a",)}), labelled, node(card=1.0)
        )


def test_only_nodes_with_the_labels_asked_for_are_counted() -> None:
    spot, reserved, bare = (
        replace(node(), node_id="a", labels={"pool": "spot", "ray.io/node-id": "x"}),
        replace(node(), labels={"pool": "reserved", "zone": "a"}),
        node(),
    )
    chosen = choose_machine(space_with(labels={"pool": ("spot",)}), spot, reserved, bare)
    assert (chosen.num_slots, chosen.label_selector) == (8, {"pool": "spot"})
    either = choose_machine(space_with(labels={"pool": ("spot", "reserved")}), spot, reserved)
    assert (either.num_slots, either.label_selector) == (16, {"pool": "in(spot,reserved)"})
    rule = r"a node must have pool: b or c, but there is pool: reserved; pool: spot; zone: a\. Ask"
    with pytest.raises(UsageError, match=rule):
        choose_machine(space_with(labels={"pool": ("b", "c")}), spot, reserved, bare)
    with pytest.raises(UsageError, match=r"no node has a label of its own\. Join a cluster"):
        choose_machine(space_with(labels={"pool": ("spot",)}), this_machine())


def test_a_gpu_model_that_no_node_has_is_refused_with_those_there_are() -> None:
    rule = "a node has must be named, but got 'H200', and there is A100, H100. Name one of these"
    with pytest.raises(UsageError, match=rule):
        choose_machine(space_with(accelerator="H200"), *MIXED)
    with pytest.raises(UsageError, match=r"but got 'H200', and no node names any\. Leave it out"):
        choose_machine(space_with(accelerator="H200"), node())
