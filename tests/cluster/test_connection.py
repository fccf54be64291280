"""One request to a cluster, and what can go wrong; the cluster is a server of the test's own."""

import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from stability_search.cluster import connection as connecting
from stability_search.cluster.address import ClusterAddress
from stability_search.cluster.connection import (
    AgentUnreachableError,
    Connection,
    NotThereError,
)
from stability_search.cluster.jobs import Job, JobRequest, JobState, RayJobs
from stability_search.errors import InfrastructureError, UsageError

DEEP = "[" * 5000  # more than a reader of JSON goes down
Answer = tuple[int, bytes]
Heard = list[tuple[str, str, str, bytes]]  # method, path, Authorization, body


@contextmanager
def served(answer: Callable[[str, str], Answer]) -> Iterator[tuple[str, Heard]]:
    """Serve what `answer` says of method and path; yield the URL and what was asked."""
    heard: Heard = []

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = self.headers.get("Authorization", "")
            heard.append((self.command, self.path, token, body))
            code, content = answer(self.command, self.path)
            self.send_response(code)
            if code == 302:
                self.send_header("Location", content.decode())
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def __getattr__(self, name: str) -> Callable[[], None]:
            if name.startswith("do_"):
                return self._serve
            raise AttributeError(name)

        def log_message(self, *_: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", heard
        finally:
            server.shutdown()
            thread.join()


def connection(url: str, token: str = "") -> Connection:
    return Connection(ClusterAddress(url=url, is_loopback=True, token=token), timeout_s=60)


def test_the_token_goes_along_with_every_request() -> None:
    with served(lambda *_: (200, b"{}")) as (url, heard):
        cluster = connection(url, "canary")
        cluster.get_json("/a", {"b": "c d"})
        cluster.post_json("/e", {"f": 1})
        cluster.put("/g", b"\0\1")
        cluster.delete("/h")

    assert heard == [
        ("GET", "/a?b=c+d", "Bearer canary", b""),
        ("POST", "/e", "Bearer canary", b'{"f": 1}'),
        ("PUT", "/g", "Bearer canary", b"\0\1"),
        ("DELETE", "/h", "Bearer canary", b""),
    ]


def test_no_proxy_gets_the_token_of_a_plain_address(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo

    def looked_up(host: str, *more: Any, **options: Any) -> list[Any]:  # noqa: ANN401 - as it takes
        if host == "far.invalid":
            raise socket.gaierror(-2, "unknown")
        return look_up(host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    with served(lambda *_: (200, b"{}")) as (proxy, heard):
        monkeypatch.setenv("http_proxy", proxy)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        far = ClusterAddress(url="http://far.invalid:8265", is_loopback=False, token="canary")  # noqa: S106 - no secret

        with pytest.raises(InfrastructureError, match="does not answer"):
            Connection(far, timeout_s=60).get("/a")

    assert heard == []


def test_without_a_token_none_is_sent() -> None:
    with served(lambda *_: (200, b"{}")) as (url, heard):
        connection(url).get_json("/a")

    assert heard == [("GET", "/a", "", b"")]


def test_a_redirect_is_not_followed_so_the_token_goes_nowhere_else() -> None:
    with served(lambda *_: (200, b"{}")) as (elsewhere, heard):
        with (
            served(lambda *_: (302, f"{elsewhere}/steal".encode())) as (url, _),
            pytest.raises(InfrastructureError, match="HTTP 302"),
        ):
            connection(url, "canary").get_json("/a")
        assert heard == []


@pytest.mark.parametrize(
    ("code", "body", "kind", "message"),
    [
        (401, b"who?", UsageError, "the cluster wants a token, and there is none"),
        (403, b"no", UsageError, "the cluster wants a token, and there is none"),
        (404, b"Job x does not exist", NotThereError, "not found: Job x does not exist"),
        (
            500,
            b"Traceback (most recent call last):\n  ...\nRuntimeError: no agent.\n",
            InfrastructureError,
            r"HTTP 500: RuntimeError: no agent\.$",
        ),
        (500, b"", InfrastructureError, "HTTP 500: Internal Server Error"),
        (
            500,
            b"Traceback\n...InvalidUrlClientError: http://192.0.2.2:-1/api/job_agent/jobs/s/logs\n",
            AgentUnreachableError,
            "cannot reach the agent of the study's node.*--dashboard-agent-listen-port 52366",
        ),
        (
            500,
            b"Agent for node id: c0ffee doesn't exist.",
            AgentUnreachableError,
            "cannot reach the agent of the study's node.*--dashboard-agent-listen-port 52366",
        ),
    ],
)
def test_every_refusal_is_one_line(
    code: int, body: bytes, kind: type[Exception], message: str
) -> None:
    with (
        served(lambda *_: (code, body)) as (url, _),
        pytest.raises(kind, match=message) as caught,
    ):
        connection(url).get_json("/a")
    assert "\n" not in str(caught.value)


def test_a_wrong_token_is_told_from_a_missing_one_and_not_repeated() -> None:
    with (
        served(lambda *_: (403, b"")) as (url, _),
        pytest.raises(UsageError, match="another token than ours") as caught,
    ):
        connection(url, "canary").get_json("/a")
    assert "canary" not in str(caught.value)


def test_a_cluster_that_is_not_there_is_one_line() -> None:
    with served(lambda *_: (200, b"")) as (url, _):
        pass  # its port is free again

    with pytest.raises(InfrastructureError, match="does not answer: Connection refused") as caught:
        connection(url).get_json("/a")
    assert caught.value.exit_code == 4


def test_a_cluster_that_falls_silent_is_given_up() -> None:
    done = threading.Event()
    with served(lambda *_: (200, b"{}") if done.wait(60) else (500, b"")) as (url, _):
        address = ClusterAddress(url=url, is_loopback=True)
        with pytest.raises(InfrastructureError, match="timed out"):
            Connection(address, timeout_s=0.1).get_json("/a")
        done.set()


def test_an_answer_that_comes_drop_by_drop_is_given_up() -> None:
    times = itertools.count(0, 301)
    with served(lambda *_: (200, b"x" * 10**6)) as (url, _):
        address = ClusterAddress(url=url, is_loopback=True)
        slow = Connection(address, timeout_s=5, clock=lambda: next(times))
        with pytest.raises(InfrastructureError, match="is not whole after 600 s"):
            slow.get("/a")
        quick = Connection(address, timeout_s=5, clock=lambda: 0.0)
        assert len(quick.get("/a")) == 10**6


def test_an_answer_that_is_too_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "MAX_BYTES", 2**20)
    with served(lambda *_: (200, b"x" * (2**20 + 1))) as (url, _):
        with pytest.raises(InfrastructureError, match=r"an answer is larger than 1 MiB"):
            connection(url).get("/a")
        assert sum(map(len, connection(url).get_blocks("/a"))) == 2**20 + 1  # not kept: no limit


@pytest.mark.parametrize("host", ["a" * 64, "a..b"])
def test_a_host_that_cannot_be_looked_up_is_one_line(host: str) -> None:
    with pytest.raises(InfrastructureError, match="the cluster does not answer"):
        connection(f"http://{host}:1").get_json("/a")


@pytest.mark.parametrize("port", ["6379", "10001"])
def test_a_port_of_ray_itself_is_told_from_a_dashboards(
    port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    cluster = connection(f"http://127.0.0.1:{port}")
    monkeypatch.setattr(cluster._opener, "open", refuse)  # noqa: SLF001 - that port is not ours
    with pytest.raises(InfrastructureError, match=f"{port} is a port of Ray itself; its dash"):
        cluster.get_json("/a")


def test_what_speaks_no_http_is_one_line_without_its_bytes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def speak() -> None:
            client, _ = server.accept()
            with client:
                client.sendall(b"\0\0\x18\x04\r\n")  # as gRPC begins
                client.recv(10**5)

        thread = threading.Thread(target=speak)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(InfrastructureError, match="what it sends is no HTTP"):
            connection(url).get_json("/a")
        thread.join()


@pytest.mark.parametrize("body", [b"<html>", b"", DEEP.encode(), b"\xff"])
def test_what_is_no_json_is_no_dashboard(body: bytes) -> None:
    with (
        served(lambda *_: (200, body)) as (url, _),
        pytest.raises(InfrastructureError, match="not JSON"),
    ):
        connection(url).get_json("/a")


# Ray's answers


def test_what_ray_says_of_a_job_is_read() -> None:
    answer = (
        b'{"status": "FAILED", "message": "m", "driver_node_id": "n", "driver_exit_code": 3,'
        b' "metadata": {"a": "b"}, "start_time": 1, "end_time": 2}'
    )
    with served(lambda *_: (200, answer)) as (url, heard):
        job = RayJobs(connection(url)).find("a b")

    assert heard[0][1] == "/api/jobs/a%20b"
    assert job == Job(
        id="a b",
        state=JobState.FAILED,
        message="m",
        node_id="n",
        exit_code=3,
        metadata={"a": "b"},
    )


def test_a_job_that_is_not_there_is_none() -> None:
    with served(lambda *_: (404, b"no such job")) as (url, _):
        assert RayJobs(connection(url)).find("x") is None


@pytest.mark.parametrize(
    "answer",
    [
        b'{"status": "LOST"}',
        b'{"status": []}',
        b"[]",
        b'{"status": "FAILED", "driver_node_id": "\\ud800"}',
        b'{"status": "FAILED", "driver_node_id": "n, m"}',
        b'{"status": "FAILED", "driver_exit_code": "0"}',
        b'{"status": "FAILED", "driver_exit_code": 0.5}',
        b'{"status": "FAILED", "metadata": [1]}',
    ],
)
def test_an_answer_that_is_not_clear_is_one_line(answer: bytes) -> None:
    with (
        served(lambda *_: (200, answer)) as (url, _),
        pytest.raises(InfrastructureError, match="not clear"),
    ):
        RayJobs(connection(url)).find("x")


REQUEST = JobRequest(id="x", command="true", num_cpus=1, node_id="n", package="p.zip")


def test_a_job_of_an_id_that_is_taken_is_not_started() -> None:
    def answer(method: str, _path: str) -> Answer:
        return (500, b"already exists") if method == "POST" else (200, b'{"status": "RUNNING"}')

    with served(answer) as (url, heard):
        assert not RayJobs(connection(url)).submit(REQUEST)
    assert b'"working_dir": "gcs://p.zip"' in heard[0][3]
    assert b'"entrypoint_num_cpus": 1' in heard[0][3]
    assert b'"entrypoint_label_selector": {"ray.io/node-id": "n"}' in heard[0][3]


def test_a_job_that_could_not_be_submitted_is_said() -> None:
    def answer(method: str, _path: str) -> Answer:
        return (500, b"no agent") if method == "POST" else (404, b"")

    with (
        served(answer) as (url, _),
        pytest.raises(InfrastructureError, match="HTTP 500: no agent"),
    ):
        RayJobs(connection(url)).submit(REQUEST)


def test_an_archive_that_is_there_is_not_sent_again() -> None:
    there: set[str] = set()

    def answer(method: str, path: str) -> Answer:
        if method == "PUT":
            there.add(path)
        return (200, b"") if path in there else (404, b"")

    with served(answer) as (url, heard):
        jobs = RayJobs(connection(url))
        jobs.upload("p.zip", b"data")
        jobs.upload("p.zip", b"data")

    assert [method for method, *_ in heard] == ["GET", "PUT", "GET"]
    assert heard[1][1] == "/api/packages/gcs/p.zip"


def test_a_node_is_alive_if_the_cluster_says_so() -> None:
    answer = b'{"data": {"result": {"result": [{"node_id": "n", "state": "ALIVE"}]}}}'
    with served(lambda *_: (200, answer)) as (url, _):
        assert RayJobs(connection(url)).has_node("n")
        assert not RayJobs(connection(url)).has_node("m")
    with (
        served(lambda *_: (200, b"[]")) as (url, _),
        pytest.raises(InfrastructureError, match="nodes cannot be read"),
    ):
        RayJobs(connection(url)).has_node("n")


@pytest.mark.parametrize("answer", [(200, b"{}"), (404, b"")])
def test_another_web_page_is_no_ray(answer: Answer) -> None:
    with (
        served(lambda *_: answer) as (url, _),
        pytest.raises(InfrastructureError, match="not that of a Ray dashboard"),
    ):
        RayJobs(connection(url)).ray_version()
