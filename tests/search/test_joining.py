"""A cluster that cannot be joined: told at once, in one line, and before anything is written."""

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from stability_search import ray_token, run
from stability_search.errors import InfrastructureError
from stability_search.search import joining
from stability_search.search.joining import Reach, cannot_join, reach, refuse_unusable
from tests.search.inline_study import write_space

NO_RAY = "Could not find any running Ray instance. Please specify the one to connect to."


@pytest.fixture
def silent() -> Iterator[str]:
    """Return an address at which nobody listens, and nobody else can."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_a_head_that_does_not_answer_is_named_with_what_the_system_says(silent: str) -> None:
    with pytest.raises(InfrastructureError, match="does not answer: Connection ref") as caught:
        refuse_unusable(silent)
    assert str(caught.value).startswith(f"{silent}: ")


def test_a_port_that_cannot_be_is_an_error_of_the_same_kind() -> None:
    with pytest.raises(InfrastructureError, match="the cluster does not answer"):
        refuse_unusable("127.0.0.1:99999")


class Head:
    """Stands in for a cluster's head: says what a real one says to who asks if it is alive."""

    def __init__(self, token: str = "", pause_s: float = 0.0, host: str = "127.0.0.1") -> None:
        self._expected = f"Bearer {token}" if token else None
        self._pause_s = pause_s
        self.server = grpc.server(ThreadPoolExecutor(1))
        service, method = "ray.rpc.NodeInfoGcsService", "CheckAlive"
        handler = grpc.unary_unary_rpc_method_handler(self._answer)
        handlers = grpc.method_handlers_generic_handler(service, {method: handler})
        self.server.add_generic_rpc_handlers((handlers,))
        self.port = self.server.add_insecure_port(f"{host}:0")
        self.address = f"{host}:{self.port}"
        self.server.start()

    def _answer(self, _request: bytes, context: grpc.ServicerContext) -> bytes:
        time.sleep(self._pause_s)
        sent = dict(context.invocation_metadata()).get("authorization")
        if self._expected not in {None, sent}:
            words = "InvalidAuthToken: Authentication token is missing or incorrect"
            context.abort(grpc.StatusCode.UNAUTHENTICATED, words)
        return b""


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Head]]:
    """Return what starts heads; none of this machine's tokens is used."""
    for name in (ray_token.MODE, ray_token.TOKEN, ray_token.TOKEN_PATH, "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    started: list[Head] = []

    def start(token: str = "", pause_s: float = 0.0, host: str = "127.0.0.1") -> Head:
        started.append(Head(token, pause_s, host))
        return started[-1]

    yield start
    for head in started:
        head.server.stop(None).wait()


def test_a_head_that_lets_us_in_is_let_through_and_auto_is_left_to_ray(
    heads: Callable[..., Head], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_unusable("auto")
    refuse_unusable(heads().address)
    monkeypatch.setenv(ray_token.MODE, "token")
    monkeypatch.setenv(ray_token.TOKEN, "secret")
    refuse_unusable(heads(token="secret").address)  # noqa: S106 - no secret
    refuse_unusable(heads().address)


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, "it asks for a token, and none was sent"),
        ({"RAY_AUTH_TOKEN": "secret"}, "it asks for a token, and none was sent"),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "old"},
            "it asks for another token than the",
        ),
    ],
)
def test_a_head_that_would_not_let_us_in_is_told_before_ray_asks(
    heads: Callable[..., Head],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    told: str,
) -> None:
    head = heads(token="secret")  # noqa: S106 - no secret
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InfrastructureError, match=told) as caught:
        refuse_unusable(head.address)
    assert str(caught.value).startswith(f"{head.address}: it cannot be joined: ")
    assert "secret" not in str(caught.value)


def test_a_token_that_is_asked_for_here_and_not_there_is_told_likewise(
    heads: Callable[..., Head], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InfrastructureError, match="be joined: RAY_AUTH_MODE=token needs a token"):
        refuse_unusable(heads().address)


def test_an_address_of_ipv6_is_asked_like_any_other(heads: Callable[..., Head]) -> None:
    port = heads(host="[::1]").port
    for address in (f"[::1]:{port}", f"::1:{port}"):
        refuse_unusable(address)


def test_a_head_that_hangs_is_told_from_one_that_is_gone(
    heads: Callable[..., Head], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "ANSWER_S", 0.2)
    address = heads(pause_s=1.0).address
    with pytest.raises(InfrastructureError, match=r"takes connections, but does not answer with"):
        refuse_unusable(address)
    assert reach(address) is Reach.HANGS


def test_how_much_of_a_head_is_reached_is_no_matter_of_tokens(
    heads: Callable[..., Head], silent: str
) -> None:
    assert reach(silent) is Reach.GONE
    assert reach(heads().address) is Reach.ANSWERS
    assert reach(heads(token="secret").address) is Reach.ANSWERS  # noqa: S106 - no secret


@pytest.mark.usefixtures("heads")
def test_what_is_no_head_is_told_as_such() -> None:
    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    with pytest.raises(
        InfrastructureError, match="head of a Ray cluster is needed, but something"
    ):
        refuse_unusable(f"127.0.0.1:{port}")
    other.stop(None).wait()


def test_a_head_with_certificates_is_left_to_ray(
    heads: Callable[..., Head], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = heads(token="secret")  # noqa: S106 - no secret
    monkeypatch.setenv("RAY_USE_TLS", "1")
    refuse_unusable(head.address)


def test_a_study_for_a_cluster_that_is_not_there_leaves_no_run_directory(
    silent: str, tmp_path: Path
) -> None:
    space = write_space(tmp_path)
    with pytest.raises(InfrastructureError, match="the cluster does not answer"):
        run(space, output=tmp_path / "out", address=silent)
    assert not (tmp_path / "out").exists()


def test_what_ray_says_becomes_one_line_with_the_way_out() -> None:
    assert str(cannot_join("head:6379", "Version mismatch:\n    Ray: 2.59.\n")) == (
        "head:6379: it cannot be joined: Version mismatch: Ray: 2.59. "
        "Every machine needs the same versions of Ray and Python; `stability-search doctor "
        "--address http://HEAD:8265` tells what can be seen from outside."
    )
    assert len(str(cannot_join("head:6379", "x" * 5000))) < 600


RAISED = """\
Failed to connect to Ray cluster at head:6379: Failed to connect to GCS. Last connection error: \
Traceback (most recent call last):
  File "ray/_private/node.py", line 996, in _init_gcs_client
    client = GcsClient(
{}

"""
MISSING = (
    "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: Authentication token is "
    "missing or incorrect. "
)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            RAISED.format(f"{MISSING}Note: RAY_AUTH_MODE is currently 'disabled' (not 'token')."),
            "it asks for a token, and none was sent",
        ),
        (RAISED.format(MISSING), "it asks for another token than the one here"),
        (
            "Token authentication is enabled but no authentication token was found. Ensure that",
            "RAY_AUTH_MODE is token, and there is no token here",
        ),
    ],
)
def test_a_token_that_is_missing_or_another_is_told_with_the_way_to_it(
    said: str, told: str
) -> None:
    assert str(cannot_join("auto", said)) == (
        f"auto: it cannot be joined: {told}. "
        "Set RAY_AUTH_MODE=token here, too, and name a copy of the cluster's token, mode 600, in "
        "RAY_AUTH_TOKEN_PATH; it is what `ray get-auth-token` prints on the head."
    )


def test_of_a_traceback_only_what_was_raised_is_told() -> None:
    told = str(cannot_join("head:6379", RAISED.format("ray.exceptions.RpcError: no way")))
    assert told.startswith("head:6379: it cannot be joined: ray.exceptions.RpcError: no way. ")
    assert "Traceback" not in told


def test_where_no_ray_runs_that_is_what_is_said() -> None:
    assert "auto: no Ray runs on this machine" in str(cannot_join("auto", NO_RAY))
