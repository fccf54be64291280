"""Machines of the test's own that share nothing but what is installed, with a Ray among them.

Each has its own network address, host name, processes, `/tmp` and shared memory: namespaces of
Linux, joined by a switch in one of its own. The network outside is neither seen nor changed. All
ends with the processes that hold it.
"""

import contextlib
import functools
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STORE_BYTES = 80 * 2**20
START_S = 120.0
PORT, DASHBOARD_PORT = 6379, 8265
HOME = Path("/tmp/home")  # noqa: S108 - every machine has a /tmp of its own

_NET = "10.77.0"
_UNSHARE = [
    "unshare",
    "--net",
    "--mount",
    "--uts",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
]
# What is installed below /tmp stays visible there; then it waits, and buries what died.
_MACHINE = """
set -e
hostname {name}
mount -t tmpfs none {stage}
for kept in {kept}; do mkdir -p {stage}/$kept; mount --bind /tmp/$kept {stage}/$kept; done
mount --move {stage} /tmp
mount -t tmpfs none /dev/shm
mkdir -p {home}/.ray
ip link set lo up
echo ready
while :; do sleep 3600 & wait $!; done
"""


@functools.cache
def why_not() -> str:
    """Return why there can be no such machines here; empty where there can."""
    link = "nsenter --target=1 --all ip link add veth0 type veth peer name veth1"
    try:
        done = subprocess.run(  # noqa: S603 - fixed words
            [*_UNSHARE, "sh", "-c", link], capture_output=True, text=True, check=False
        )
    except OSError as error:
        return f"machines of their own need Linux with util-linux and iproute2: {error}"
    return f"no namespaces are permitted here: {done.stderr.strip()}" if done.returncode else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Separate:
    """One machine.

    Attributes:
        name: Its host name.
        address: Its address.
        pid: Its first process, as seen from outside.
        link: Its plug in the switch.
    """

    name: str
    address: str
    pid: int
    link: str

    def words(self, *words: str) -> list[str]:
        """Return the command that runs another there."""
        return ["nsenter", f"--target={self.pid}", "--all", f"--wdns={HOME}", *words]

    def start(
        self, *words: str, environment: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        """Start a program there, in its home."""
        return subprocess.Popen(  # noqa: S603 - the test's own words
            self.words(*words),
            env={**_environment(), **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, *words: str, timeout_s: float = 240.0) -> tuple[int, str, str]:
        """Run a program there to its end; return its exit code, its output and its messages."""
        process = self.start(*words)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            err += "\n(killed: it did not end)\n"
        print(f"{self.name}$ {shlex.join(words)}\n{err}{out}", flush=True)
        return process.returncode, out, err

    def tool(self, *words: str) -> "subprocess.Popen[str]":
        """Start a command of ours there."""
        return self.start(sys.executable, "-m", "stability_search", *words)

    def ask(self, *words: str, timeout_s: float = 240.0) -> tuple[int, str, str]:
        """Run a command of ours there to its end."""
        return self.call(sys.executable, "-m", "stability_search", *words, timeout_s=timeout_s)

    def path(self, inside: Path | str) -> Path:
        """Return where a path of it is seen from outside."""
        return Path(f"/proc/{self.pid}/root", *(HOME / inside).parts[1:])

    def processes(self) -> dict[int, str]:
        """Return the command lines of all its processes, by their numbers outside."""
        here = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (entry / "ns" / "pid").readlink() == here:
                    words = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(entry.name)] = words.decode(errors="replace").strip()
        return found


@dataclass(kw_only=True, slots=True)
class Switch:
    """What machines are plugged into; a machine of its own.

    Attributes:
        pid: The process that holds its network.
        stage: An empty folder.
        machines: What was started.
    """

    pid: int
    stage: Path
    machines: list["subprocess.Popen[str]"] = field(default_factory=list)

    def ip(self, *words: str, pid: int = 0) -> None:
        """Change the network of the switch, or of the machine of a process."""
        words = ("nsenter", f"--target={pid or self.pid}", "--net", "ip", *words)
        subprocess.run(words, check=True, capture_output=True)  # noqa: S603 - as above

    def add(self, name: str) -> Separate:
        """Start a machine, and plug it in."""
        number = len(self.machines) + 1
        outer = self._start(name)
        self.machines.append(outer)
        (pid,) = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        link, address = f"port{number}", f"{_NET}.{number}"
        self.ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", pid)
        self.ip("link", "set", link, "master", "hub", "up")
        inside = int(pid)
        self.ip("address", "add", f"{address}/24", "dev", "eth0", pid=inside)
        self.ip("link", "set", "eth0", "up", pid=inside)
        self.ip("route", "add", "default", "via", f"{_NET}.254", pid=inside)
        return Separate(name=name, address=address, pid=inside, link=link)

    def _start(self, name: str) -> "subprocess.Popen[str]":
        below = [Path(place) for place in (sys.prefix, sys.base_prefix, ROOT)]
        kept = {str(one.relative_to("/tmp")) for one in below if one.is_relative_to("/tmp")}  # noqa: S108
        script = _MACHINE.format(
            name=name, stage=self.stage, kept=" ".join(sorted(kept)) or "''", home=HOME
        )
        process = subprocess.Popen(  # noqa: S603 - as above
            [*_UNSHARE, "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    def cut(self, machine: Separate) -> None:
        """Pull a machine's plug."""
        self.ip("link", "set", machine.link, "down")

    def join(self, machine: Separate) -> None:
        """Put it in again."""
        self.ip("link", "set", machine.link, "up")


@contextlib.contextmanager
def switched() -> Iterator[Switch]:
    """Hold a switch; with it all its machines end."""
    with (
        tempfile.TemporaryDirectory(prefix="ss-") as stage,
        subprocess.Popen(["unshare", "--net", "sleep", "infinity"]) as holder,  # noqa: S607 - of the system
    ):
        switch = Switch(pid=holder.pid, stage=Path(stage))
        try:
            _wait(lambda: _network(holder.pid) != _network(os.getpid()))
            switch.ip("link", "add", "hub", "type", "bridge")
            switch.ip("address", "add", f"{_NET}.254/24", "dev", "hub")
            switch.ip("link", "set", "hub", "up")
            yield switch
        finally:
            for machine in switch.machines:
                machine.kill()  # and with it the machine's first process, and so all of them
                machine.communicate()
            holder.kill()


def start_ray(machine: Separate, token: str, *words: str) -> None:
    """Start Ray on a machine, as a user would: the token lies in its file."""
    path = machine.path(".ray/auth_token")
    path.write_text(token)
    path.chmod(0o600)
    options = ["--disable-usage-stats", f"--object-store-memory={STORE_BYTES}"]
    program = str(Path(sys.executable).with_name("ray"))
    code, _, err = machine.call(program, "start", *words, *options)
    assert code == 0, err


def start_head(machine: Separate, token: str, *, num_cpus: int) -> None:
    """Start a head there, its dashboard for itself alone."""
    words = ("--head", "--dashboard-host=127.0.0.1", f"--num-cpus={num_cpus}")
    start_ray(machine, token, *words)


def start_node(machine: Separate, token: str, head: Separate, *, num_cpus: int) -> None:
    """Start a further node there."""
    start_ray(machine, token, f"--address={head.address}:{PORT}", f"--num-cpus={num_cpus}")


def _network(pid: int) -> Path:
    return Path(f"/proc/{pid}/ns/net").readlink()


def _wait(is_so: Callable[[], bool], timeout_s: float = START_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _environment() -> Mapping[str, str]:
    kept: Sequence[str] = [name for name in os.environ if not name.startswith(("RAY_", "PYTEST_"))]
    return {
        **{name: os.environ[name] for name in kept},
        "HOME": str(HOME),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
    }
