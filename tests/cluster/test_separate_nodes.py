"""A cluster of machines that share nothing but what is installed: all comes home all the same."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import pandas as pd
import pytest

from stability_search import read_run
from tests.cluster.separate_nodes import (
    DASHBOARD_PORT,
    PORT,
    Separate,
    Switch,
    start_head,
    start_node,
    switched,
    why_not,
)

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

TOKEN = "7e57" * 16
URL = f"http://localhost:{DASHBOARD_PORT}"
TUNNEL = Path(__file__).with_name("tunnel.py")
TINY = Path(__file__).resolve().parents[1] / "tiny_task.py"
TIMEOUT_S, PROMISED_S = 4.0, 20.0
PATIENCE_S = 150.0
MUCH_BYTES = 200 * 2**20

TASK = """\
import ctypes
import faulthandler
import os
import re
import shlex
import signal
import subprocess

from beside import Tiny


class Apart(Tiny):
    \"\"\"Tiny, but on one machine it hangs in C, deaf and unwatched, with a child.\"\"\"

    def __init__(self, deaf_on: str = "", batch_s: float = 0.0) -> None:
        super().__init__(batch_s=batch_s)
        self.is_deaf = deaf_on == os.uname().nodename

    def batches(self, batch_size, generator):
        for number, batch in enumerate(super().batches(batch_size, generator)):
            if number == 5 and self.is_deaf and not os.path.exists("/tmp/was_deaf"):
                open("/tmp/was_deaf", "w").close()
                faulthandler.cancel_dump_traceback_later()
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                subprocess.Popen(["/bin/sleep", "611"])
                ctypes.PyDLL(None).sleep(600)  # unlike CDLL it keeps the interpreter's lock
            yield batch
"""
SPACE = """\
name: apart
task: ./task.py:Apart
task_args: {ARGS}
trial: {steps: 20, timeout_s: TIMEOUT}
fixed: {batch_size: 8}
space:
  learning_rate: {loguniform: {low: 1e-3, high: 0.1}}
search: {trials: TRIALS, sampler: random}
confirm: {top: 1, seeds: 1, steps: 20, octaves: 0, min_margin: 0}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Nodes:
    """A cluster: a head that runs no trials, two nodes with a core each, and a machine outside."""

    switch: Switch
    head: Separate
    nodes: tuple[Separate, Separate]
    outside: Separate

    def address(self) -> str:
        return f"{self.head.address}:{PORT}"


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    if reason := why_not():
        pytest.skip(reason)
    with switched() as switch:
        head, alpha, beta, outside = map(switch.add, ("head", "alpha", "beta", "outside"))
        switch.cut(outside)  # it has a tunnel and nothing else
        start_head(head, TOKEN, num_cpus=0)
        words = {"token": TOKEN, "head": head, "num_cpus": 1}
        starts = [Thread(target=start_node, args=[one], kwargs=words) for one in (alpha, beta)]
        for start in starts:
            start.start()
        for start in starts:
            start.join()
        yield Nodes(switch=switch, head=head, nodes=(alpha, beta), outside=outside)


def write_study(
    machine: Separate,
    *,
    trials: int,
    timeout_s: float = 60.0,
    deaf_on: str = "",
    batch_s: float = 0.0,
) -> None:
    arguments = json.dumps({"deaf_on": deaf_on, "batch_s": batch_s})
    space = SPACE.replace("{ARGS}", arguments).replace("TIMEOUT", f"{timeout_s}")
    machine.path("apart.yaml").write_text(space.replace("TRIALS", f"{trials}"))
    machine.path("task.py").write_text(TASK)
    machine.path("beside.py").write_text(TINY.read_text())


def rows(machine: Separate, run: str) -> pd.DataFrame:
    return read_run(machine.path(run)).trials


def num_ended(machine: Separate, run: str) -> int:
    return len(list(machine.path(run).glob("steps/*.parquet")))


def num_lost(machine: Separate, run: str) -> int:
    return len(list(machine.path(run).glob("steps/*-attempt2.parquet")))


def is_half_there(copy: Path) -> bool:
    """Say whether some of the large file has come."""
    for part in copy.glob(".*.part"):
        with contextlib.suppress(FileNotFoundError):  # it is whole
            if part.stat().st_size > MUCH_BYTES / 10:
                return True
    return False


def wait(is_so: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    print(err + out)
    return process.returncode, out, err


def test_trials_run_on_every_node_and_all_of_it_comes_home(nodes: Nodes) -> None:
    here = nodes.nodes[0]
    write_study(here, trials=8)
    words = ("run", "--space", "apart.yaml", "--address", nodes.address(), "--output", "all")
    code, _, err = here.ask(*words)
    assert code == 0, err
    trials = rows(here, "all")
    assert set(trials["outcome"]) == {"completed"}
    assert set(trials["node"]) == {"alpha", "beta"}
    assert num_ended(here, "all") == len(trials) == len(set(trials["trial_id"]))
    names = json.loads(here.path("all/environment.json").read_text())["nodes"]
    assert {one["node"] for one in names} == {"alpha", "beta"}
    assert not nodes.nodes[1].path("all").exists()


def test_a_trial_that_is_deaf_on_another_machine_is_ended_in_time_and_its_node_goes_on(
    nodes: Nodes,
) -> None:
    here, there = nodes.nodes
    write_study(here, trials=24, timeout_s=TIMEOUT_S, deaf_on=there.name, batch_s=0.1)
    words = ("run", "--space", "apart.yaml", "--address", "auto", "--output", "deaf")
    process = here.tool(*words)
    wait(lambda: "/bin/sleep 611" in there.processes().values(), process)  # it hangs there
    code, _, err = finish(process)
    assert code == 0, err
    trials = rows(here, "deaf")
    (hung,) = trials[trials["outcome"] == "timed_out"].itertuples()
    assert hung.node == there.name
    limit_s = float(re.search(r"over (\S+) s;", hung.reason)[1])  # a study's first trial has more
    overrun = hung.wall_s - limit_s
    after = trials[(trials["node"] == there.name) & (trials["started_at"] > hung.started_at)]
    print(f"overrun {overrun:.1f} s; trials there afterwards {len(after)}")
    assert overrun < 2 * PROMISED_S
    assert set(after["outcome"]) == {"completed"}
    assert "/bin/sleep 611" not in there.processes().values()


@contextlib.contextmanager
def tunnel(nodes: Nodes) -> Iterator[None]:
    """Lead the dashboard's port of the machine outside to the head, and nothing else."""
    words = [str(nodes.outside.pid), str(nodes.head.pid), str(DASHBOARD_PORT)]
    with subprocess.Popen(  # noqa: S603 - the test's own words
        [sys.executable, str(TUNNEL), *words], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield
        finally:
            process.kill()


def test_through_a_tunnel_alone_a_study_is_sent_watched_stopped_and_fetched(
    nodes: Nodes,
) -> None:
    """Its driver takes one node whole, its trials run on the other; the tunnel breaks twice."""
    here = nodes.outside
    here.path(".ray/auth_token").write_text(TOKEN)
    write_study(here, trials=6, batch_s=0.1)
    there = ("--address", URL)
    with tunnel(nodes):
        code, out, err = here.ask("submit", "--space", "apart.yaml", "--no-wait", *there)
        assert code == 0, err
        name = out.strip()
        run = f".stability-search/runs/{name}"
        words = shlex.join(
            [sys.executable, "-m", "stability_search", "logs", name, "--follow", *there]
        )
        log = here.start("sh", "-c", f"exec {words} > log 2>&1")
        wait(lambda: max(num_ended(one, run) for one in nodes.nodes) >= 2, log)
        (driver,) = [one for one in nodes.nodes if one.path(run).exists()]
        assert ": running, stage " in here.ask("status", name, *there)[1]
    wait(lambda: "Trying again" in here.path("log").read_text(), log)
    with tunnel(nodes):
        wait(lambda: num_ended(driver, run) >= 5, log)
        assert here.ask("fetch", name, *there)[0] == 0
        early = {path.stem for path in here.path(f"reports/{name}").glob("steps/*.parquet")}
        assert here.ask("stop", name, *there)[0] == 0
        assert finish(log)[0] == 143
        followed = here.path("log").read_text()
        print(followed)
        assert "connected again" in followed
        ended = re.findall(r"^\S+ (\S+) completed, q", followed, re.MULTILINE)
        assert len(ended) == len(set(ended)) == num_ended(driver, run)
        code, _, err = here.ask("submit", "--space", "apart.yaml", *there)
        assert code == 0, err
        with driver.path(f"{run}/run.log").open("ab") as file:
            file.write(os.urandom(MUCH_BYTES))
        fetching = here.tool("fetch", name, *there)
        home = here.path(f"reports/{name}")
        wait(lambda: is_half_there(home), fetching)
    assert finish(fetching)[0] == 4
    with tunnel(nodes):
        assert here.ask("fetch", name, *there)[0] == 0
    trials = rows(here, f"reports/{name}")
    assert set() < early < set(trials["trial_id"])
    assert set(trials["attempt"]) == {1}
    assert len(trials) == len(set(trials["trial_id"]))
    assert {*trials["node"], driver.name} == {one.name for one in nodes.nodes}


def test_trials_of_a_node_that_is_cut_off_run_elsewhere_and_no_configuration_is_blamed(
    nodes: Nodes,
) -> None:
    """Last but one: the node that is cut is lost, also once its link is there again."""
    here, there = nodes.nodes
    write_study(here, trials=10, timeout_s=5.0, batch_s=0.1)
    words = ("run", "--space", "apart.yaml", "--address", "auto", "--output", "cut")
    process = here.tool(*words)
    wait(lambda: num_ended(here, "cut") >= 9, process)
    nodes.switch.cut(there)
    cut = time.monotonic()
    wait(lambda: num_lost(here, "cut") > 0, process)
    print(f"noticed after {time.monotonic() - cut:.1f} s")
    nodes.switch.join(there)
    code, _, err = finish(process)
    assert code == 0, err
    trials = rows(here, "cut")
    (lost,) = trials[trials["outcome"] != "completed"].itertuples()
    assert (lost.outcome, lost.reason, lost.node) == ("infrastructure", "its node died", "beta")
    again = trials[(trials["trial_id"] == lost.trial_id) & (trials["attempt"] == 2)]
    assert list(again["node"]) == ["alpha"]
    assert len(trials) == len(set(trials["trial_id"])) + 1
    assert pd.isna(lost.q)


def test_where_the_head_is_cut_off_the_study_ends_with_exit_4_and_goes_on_without_it(
    nodes: Nodes,
) -> None:
    """Last: no cluster is left."""
    here = nodes.nodes[0]
    write_study(here, trials=6, batch_s=0.1)
    words = ("run", "--space", "apart.yaml", "--address", "auto", "--output", "headless")
    process = here.tool(*words)
    wait(lambda: num_ended(here, "headless") >= 3, process)
    nodes.switch.cut(nodes.head)
    cut = time.monotonic()
    code, _, err = finish(process)
    print(f"ended after {time.monotonic() - cut:.1f} s")
    assert code == 4
    assert "has not answered for 15 s" in err
    assert "go on with `stability-search resume headless`" in err
    assert here.path("headless/report.html").is_file()
    early = rows(here, "headless")
    code, _, err = here.ask("resume", "headless")
    assert code == 0, err
    trials = rows(here, "headless")
    assert len(trials) == len(set(trials["trial_id"])) > len(early)
    again = trials.set_index("trial_id").loc[early["trial_id"], "started_at"]
    assert list(again) == list(early["started_at"])  # kept, and not run again
