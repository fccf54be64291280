"""A Ray of the test's own, as a user would start one: by `ray start`, with a token."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from stability_search.cluster.address import ClusterAddress
from stability_search.cluster.connection import Connection
from stability_search.cluster.jobs import RayJobs
from stability_search.errors import InfrastructureError

ROOT = Path(__file__).resolve().parents[2]
STORE_BYTES = 80 * 2**20
START_S, END_S = 120.0, 20.0
_PORTS = range(20_000, 32_000)


@dataclass(frozen=True, kw_only=True, slots=True)
class RayHead:
    """A head node that runs.

    Attributes:
        url: Of its dashboard.
        token: What it wants.
        home: Home of whoever runs it, where run directories go.
        logs: Ray's log folder.
    """

    url: str
    token: str
    home: Path
    logs: Path


@contextlib.contextmanager
def started_ray(token: str) -> Iterator[RayHead]:
    """Start a head node with three cores on this machine, and end it by its process id."""
    folder = Path(tempfile.mkdtemp(prefix="ss-"))  # short: paths of sockets end at 107 bytes
    home = folder / "home"
    home.mkdir()
    dashboard, client = free_ports(2)
    words = {
        "port": 0,
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": 0,
        "ray-client-server-port": client,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "temp-dir": folder / "r",
        "num-cpus": 3,  # a driver, a trial, and one free
        "object-store-memory": STORE_BYTES,
    }
    options = [f"--{name}={value}" for name, value in words.items()]
    program = Path(sys.executable).with_name("ray")
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - Ray's own program
            [str(program), "start", "--head", "--block", "--disable-usage-stats", *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(home, token),
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_for(url, token, process, folder / "start.log")
        logs = (folder / "r" / "session_latest" / "logs").resolve()
        yield RayHead(url=url, token=token, home=home, logs=logs)
    finally:
        _end(process, folder)
        shutil.rmtree(folder, ignore_errors=True)


def _environment(home: Path, token: str) -> Mapping[str, str]:
    return {
        **os.environ,
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
    }


def free_ports(count: int) -> list[int]:
    """Return ports below those that the kernel hands out: Ray binds them seconds later."""
    free: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            free.append(port)
        if len(free) == count:
            return free
    raise AssertionError(f"fewer than {count} free ports from {_PORTS.start} on")


def _wait_for(url: str, token: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    jobs = RayJobs(Connection(ClusterAddress(url=url, is_loopback=True, token=token)))
    deadline = time.monotonic() + START_S
    while True:
        try:
            jobs.ray_version()
        except InfrastructureError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        else:
            return


def _end(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    deadline = time.monotonic() + END_S
    while left := _processes_of(folder):
        for pid in left:
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
    process.wait()


def _processes_of(folder: Path) -> list[int]:
    """Return the processes that name our folder; nobody else's do."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            if f"{folder}/".encode() in words and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found
