"""A study through Ray Jobs: sent, left alone, stopped, gone on with, fetched - and the same."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from stability_search import read_run
from stability_search.cluster.address import ClusterAddress
from stability_search.cluster.outside import look_from_outside
from stability_search.cluster.result import record_name
from stability_search.search.ledger import Ledger
from tests.cluster.ray_head import ROOT, START_S, RayHead, started_ray
from tests.search.inline_study import TINY

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

CANARY = "canary5ca1ab1e5ca1ab1e5ca1ab1e5ca1ab1e5ca1ab1e5ca1ab1e5ca1ab1e5ca1"
OTHER_TOKEN = CANARY[::-1]
NUM_BEFORE_GATE = 3  # the first look at the task is one of them
# After a few trials of its process it waits for a file: a study that can be stopped in peace.
GATED = f"""
import os
import time
from collections.abc import Iterator

import torch
from tiny_task import Batch, Tiny


class Gated(Tiny):
    num_models = 0

    def __init__(self, gate: str) -> None:
        super().__init__()
        self.gate = gate

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        Gated.num_models += 1
        while Gated.num_models > {NUM_BEFORE_GATE} and not os.path.exists(self.gate):
            time.sleep(0.05)
        return super().batches(batch_size, generator)
"""
SPACE = """\
name: quick
task: ./gated.py:Gated
task_args: {{gate: {gate}}}
trial: {{steps: 20, timeout_s: 280}}
fixed: {{batch_size: 8}}
space:
  learning_rate: {{loguniform: {{low: 1e-3, high: 0.1}}}}
  clip_norm: {{choice: [null, 1.0]}}
search: {{trials: 5, max_concurrent: 1}}
confirm: {{top: 1, seeds: 2, steps: 20, octaves: 1, min_margin: 0}}
"""
# What a clock, a machine or the way there decides.
NOT_COMPARED = ["train_s", "wall_s", "peak_memory_mib", "started_at", "node"]


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with started_ray(CANARY) as found:
        yield found


class Client:
    """A user's machine: a folder, an environment, and all that commands have printed there."""

    def __init__(self, folder: Path, head: RayHead) -> None:
        self.folder, self.url, self.printed = folder, head.url, ""
        (folder / "home").mkdir()
        self.environment = {
            **os.environ,
            "HOME": str(folder / "home"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": head.token,
        }

    def start(self, *words: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-m", "stability_search", *words],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, *words: str) -> tuple[int, str]:
        """Run a command to its end; return its exit code and its standard output."""
        process = self.start(*words)
        out, err = process.communicate(timeout=240)
        self.printed += out + err
        print(f"$ {' '.join(words)}\n{err}{out}")
        return process.returncode, out

    def ask(self, *words: str) -> tuple[int, str]:
        return self.call(*words, "--address", self.url)

    def watch_until(self, text: str, *words: str) -> None:
        """Run a command until it prints something, and kill it."""
        process = self.start(*words, "--address", self.url)
        assert process.stderr is not None
        for line in process.stderr:
            self.printed += line
            if text in line:
                break
        process.send_signal(signal.SIGKILL)
        rest, last = process.communicate()
        self.printed += rest + last
        assert process.returncode == -signal.SIGKILL, self.printed


@pytest.fixture
def client(tmp_path: Path, head: RayHead) -> Client:
    (tmp_path / "gated.py").write_text(GATED)
    (tmp_path / TINY.name).write_text(TINY.read_text())
    (tmp_path / "quick.yaml").write_text(SPACE.format(gate=tmp_path / "gate"))
    (tmp_path / "open.yaml").write_text(SPACE.format(gate=tmp_path))  # the same without a stop
    return Client(tmp_path, head)


def rows(directory: Path) -> pd.DataFrame:
    trials = read_run(directory).trials
    return trials.drop(columns=NOT_COMPARED).sort_values("trial_id", ignore_index=True)


def verdict(text: str) -> list[str]:
    elsewhere = ("report: ", "next: ", "files: ")
    return [line for line in text.splitlines() if not line.startswith(elsewhere)]


def test_a_study_that_is_left_stopped_and_gone_on_with_comes_home_as_if_it_had_run_here(
    client: Client, head: RayHead, tmp_path: Path
) -> None:
    submit = ("submit", "--space", "quick.yaml")
    _, name = client.ask(*submit, "--dry-run")
    name = name.strip()

    client.watch_until("pilot-01 completed", *submit)
    local = client.start("run", "--space", "open.yaml", "--output", "local")  # meanwhile
    assert "running, stage pilot" in client.ask("status", name)[1]
    assert client.ask("fetch", name) == (0, f"reports/{name}\n")
    early = Ledger(tmp_path / "reports" / name / "study.db").rows()
    assert len(early) >= 2
    assert client.ask("stop", name)[0] == 0
    assert "interrupted, reached stage pilot" in client.ask("status", name)[1]

    (tmp_path / "gate").touch()
    code, said = client.ask(*submit)
    assert client.ask("fetch", name) == (0, f"reports/{name}\n")
    again, said_again = client.ask(*submit)  # it has ended: nothing runs
    said_here, _ = local.communicate(timeout=240)

    assert (code, again) == (local.returncode, local.returncode)
    assert verdict(said) == verdict(said_again) == verdict(said_here)
    home, here = rows(tmp_path / "reports" / name), rows(tmp_path / "local")
    pd.testing.assert_frame_equal(home, here)
    assert set(home["attempt"]) == {1}
    final = Ledger(tmp_path / "reports" / name / "study.db").rows()
    assert final[: len(early)] == early  # kept, and not run again
    assert len({row.trial_id for row in final}) == len(final)
    print(f"rows {len(home)}, different 0; kept from before the stop {len(early)}, repeated 0")
    works_at_home(client, tmp_path / "reports" / name, verdict(said))
    leaves_no_token(client, head, name)


def works_at_home(client: Client, home: Path, expected: list[str]) -> None:
    """Read a fetched run directory, and go on with it: `resume` wants the module, too."""
    assert (home / TINY.name).read_bytes() == TINY.read_bytes()
    assert client.call("report", str(home))[0] == 0
    code, said = client.call("resume", str(home))
    assert (code, verdict(said)) == (0, expected)


def leaves_no_token(client: Client, head: RayHead, name: str) -> None:
    """Search for the token in every file that we caused, and in all that was printed."""
    folders = [client.folder, head.home, head.logs / Path(record_name(name)).parent.parent]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += head.logs.glob("job-driver-*")
    files += (head.home / ".stability-search").rglob("*.db")
    hits = [path for path in files if CANARY.encode() in path.read_bytes()]
    assert CANARY not in client.printed
    assert hits == []
    (client.folder / "planted").write_text(f"x{CANARY}y")  # the twin: it would be found
    assert CANARY.encode() in (client.folder / "planted").read_bytes()
    print(f"files searched {len(files)}, characters printed {len(client.printed)}, hits 0")


def test_another_token_is_refused_in_one_line(client: Client) -> None:
    client.environment["RAY_AUTH_TOKEN"] = OTHER_TOKEN

    assert client.ask("submit", "--space", "quick.yaml", "--no-wait") == (2, "")
    assert "the cluster wants another token than ours" in client.printed
    assert OTHER_TOKEN not in client.printed


def wait_until_its_node_is_told(url: str) -> None:
    """Wait for the first report of a head that has just started."""
    address = ClusterAddress(url=url, is_loopback=True, token=CANARY)
    deadline = time.monotonic() + START_S
    while not any(one.disk_free_bytes for one in look_from_outside(address).nodes or ()):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_doctor_sees_what_there_is_from_outside_and_shows_no_token(client: Client) -> None:
    wait_until_its_node_is_told(client.url)
    code, said = client.ask("doctor", "--format", "json")
    document = json.loads(said)
    checks = {check["name"]: check for check in document["checks"]}
    assert code == 0
    assert checks["dashboard"]["found"].endswith("asks for a token")
    assert checks["token"]["found"] == "ours is accepted"
    assert checks["nodes"]["found"] == "1 of 1 alive; CPU cores 3, GPUs 0"
    (node,) = document["nodes"]
    assert (node["state"], node["cpus"]) == ("alive", 3.0)
    assert min(node["memory_free_mib"], node["disk_free_mib"]) > 0
    assert CANARY not in client.printed


def test_a_python_without_the_tool_is_one_line(client: Client, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o700)

    words = ("submit", "--space", "quick.yaml", "--name", "bare", "--python", str(bare))
    assert client.ask(*words) == (4, "")
    assert "bare: its node has no stability-search that its Python finds" in client.printed
    assert "Traceback" not in client.printed


def test_nothing_of_a_stopped_study_is_left(head: RayHead) -> None:
    """Run last: no process of an attempt lives on in the cluster."""
    left = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            is_ours = f"HOME={head.home}".encode() in (folder / "environ").read_bytes()
            if is_ours and any(word.startswith(b"stability_search") for word in words):
                left.append(words)
    assert left == []
