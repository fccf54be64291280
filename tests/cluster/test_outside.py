"""What a dashboard tells whoever looks at it; the cluster is a server of the test's own."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from stability_search.cluster.address import ClusterAddress
from stability_search.cluster.outside import Outside, OutsideNode, TokenUse, look_from_outside
from stability_search.errors import InfrastructureError
from tests.cluster.test_connection import Answer, Heard, served

CANARY = "canary"
VERSION = b'{"ray_version": "2.60.0"}'
NODE: dict[str, Any] = {
    "hostname": "gpu-1",
    "mem": [100, 40, 60.0, 60],
    "disk": {"/": {"free": 900}, "/tmp": {"free": 700}},  # noqa: S108 - a name
    "gpus": [{"name": "NVIDIA H100"}, {"name": "NVIDIA H100"}],
    "raylet": {"state": "ALIVE", "resourcesTotal": {"CPU": 8.0, "GPU": 2.0}},
}
TOLD = OutsideNode(
    name="gpu-1",
    is_alive=True,
    cpus=8.0,
    gpus=2.0,
    gpu_models=("NVIDIA H100",),
    memory_free_bytes=40.0,
    disk_free_bytes=700.0,
)


def summary(*nodes: object) -> bytes:
    return json.dumps({"data": {"summary": nodes}}).encode()


def look(
    answer: Callable[[str, str], Answer], *, token: str = "", is_loopback: bool = True
) -> tuple[Outside, Heard]:
    with served(answer) as (url, heard):
        address = ClusterAddress(url=url, is_loopback=is_loopback, token=token)
        return look_from_outside(address, timeout_s=60), heard


def test_an_open_dashboard_tells_everything_and_is_sent_no_token() -> None:
    def answer(_method: str, path: str) -> Answer:
        return (200, summary(NODE) if path.startswith("/nodes") else VERSION)

    found, heard = look(answer, token=CANARY)

    assert found == Outside(token=TokenUse.NOT_WANTED, ray_version="2.60.0", nodes=(TOLD,))
    assert [(method, path, token) for method, path, token, _ in heard] == [
        ("GET", "/api/version", ""),
        ("GET", "/nodes?view=summary", ""),
    ]


def test_a_dashboard_that_wants_a_token_is_asked_again_with_ours() -> None:
    turns = iter([(401, b""), (200, VERSION), (200, summary(NODE))])
    found, heard = look(lambda *_: next(turns), token=CANARY)
    assert found == Outside(token=TokenUse.ACCEPTED, ray_version="2.60.0", nodes=(TOLD,))
    assert [token for *_, token, _ in heard] == ["", f"Bearer {CANARY}", f"Bearer {CANARY}"]


@pytest.mark.parametrize(
    ("token", "is_loopback", "use", "num_asked"),
    [
        ("", True, TokenUse.MISSING, 1),
        ("canary", True, TokenUse.REFUSED, 2),
        ("canary", False, TokenUse.KEPT_BACK, 1),  # it could be read on the way
    ],
)
def test_what_becomes_of_a_token(
    token: str, is_loopback: bool, use: TokenUse, num_asked: int
) -> None:
    found, heard = look(lambda *_: (403, b""), token=token, is_loopback=is_loopback)
    assert found == Outside(token=use)
    assert len(heard) == num_asked
    assert heard[0][2] == ""


HOSTILE = [
    [],
    [1],
    [None],
    [{**NODE, "raylet": 3}],
    [{**NODE, "mem": "much", "disk": [1], "gpus": {"a": 1}}],
    [{**NODE, "mem": [1, float("inf")], "disk": {"/": {"free": -1}}}],
    [{**NODE, "mem": [1, float("nan")], "raylet": {"resourcesTotal": {"CPU": 10**400}}}],
    [{**NODE, "mem": [1, True], "hostname": {"a": "b"}}],
]


@pytest.mark.parametrize("nodes", HOSTILE)
def test_what_a_cluster_tells_wrongly_is_not_told(nodes: list[Any]) -> None:
    def answer(_method: str, path: str) -> Answer:
        return (200, summary(*nodes) if path.startswith("/nodes") else VERSION)

    found, _ = look(answer)
    for one in found.nodes or ():
        for number in (one.memory_free_bytes, one.disk_free_bytes, one.cpus, one.gpus):
            assert number is None or 0 <= number < 2**63
        assert isinstance(one.name, str)


@pytest.mark.parametrize("answer", [(404, b""), (500, b""), (200, b"[]"), (200, b"{}")])
def test_nodes_that_nobody_tells_are_none(answer: Answer) -> None:
    found, _ = look(lambda _, path: answer if path.startswith("/nodes") else (200, VERSION))
    assert (found.ray_version, found.nodes) == ("2.60.0", None)


@pytest.mark.parametrize("answer", [(404, b""), (200, b"{}"), (200, b"<html>"), (302, b"/login")])
def test_what_is_no_dashboard_is_said(answer: Answer) -> None:
    with pytest.raises(
        InfrastructureError, match=r"not that of a Ray dashboard|not JSON|HTTP 302"
    ):
        look(lambda *_: answer)
