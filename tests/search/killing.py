"""Kill workers, raylets and drivers of a study on a cluster, and count what came of it."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ray.cluster_utils import Cluster

from stability_search import read_run
from stability_search.search.request import MAX_ATTEMPTS
from tests.search.inline_study import write_space
from tests.search.test_study_ray import command, count_rows, environment

Kind = Literal["worker", "raylet", "driver"]

Found = TypeVar("Found")
MARKER = f"cluster of {os.getpid()}"  # no other Ray on the machine is to be hurt
# The class of a worker's actor, and between two calls that of what it trains.
WORKER_NAMES = (b"ray::ResourceTrainable", b"ray::TrialTrainable")
STORE_BYTES = 80 * 2**20
WAIT_S = 200.0
GAP = 6  # trials that end between two kills, or too many attempts would be lost
FEW = 3  # the same where there are only a few kills

SPACE = """\
name: killed
task: {task}:Tiny
task_args: {{batch_s: 0.03}}
trial: {{steps: 20, timeout_s: 60}}
fixed: {{batch_size: 8}}
space:
  learning_rate: {{loguniform: {{low: 1e-3, high: 0.1}}}}
search: {{trials: NUM, sampler: random}}
confirm: {{top: 1, seeds: 1, steps: 20, octaves: 0, min_margin: 0}}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """What kills did.

    Attributes:
        kills: How many there were of each kind.
        finished: Trials with an end that says something.
        attempts: Attempts that are in the ledger.
        lost: Trials that are missing, or were told of and are not in the ledger.
        repeated: Trials that ended more than once.
        blamed: Trials that ended in any way but completed, or lost attempts with a score.
        given_back: Workers that were gone before their trial had begun, which is no attempt.
    """

    kills: Counter[str]
    finished: int
    attempts: int
    lost: int
    repeated: int
    blamed: int
    given_back: int

    def __str__(self) -> str:
        """Give the figures in one line."""
        kinds = ", ".join(f"{count} {kind}s" for kind, count in sorted(self.kills.items()))
        return (
            f"{self.kills.total()} kills ({kinds}): {self.attempts} attempts, {self.finished} "
            f"trials finished, {self.given_back} lost before they had begun, lost {self.lost}, "
            f"run twice {self.repeated}, configurations blamed {self.blamed}"
        )


def worker_pids() -> list[int]:
    """Return the workers of our raylets that train; the oldest first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_worker = (folder / "cmdline").read_bytes().startswith(WORKER_NAMES)
            if is_worker and MARKER.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return sorted(found)


def run_and_kill(cluster: Cluster, folder: Path, kinds: Sequence[Kind], *, seed: int = 0) -> Tally:
    """Run a study to its end though something of it is killed after every few trials.

    A trial is tried again twice, so that one is spared that lost two attempts after it had begun:
    that it does not outlive a third is no fault. What had not begun when it was hit is not spared.

    Args:
        cluster: Its nodes were started with `MARKER` in their environment; the head is spared.
        folder: Empty; gets the space and the run directory.
        kinds: What to kill, one after the other.
        seed: Decides which worker or raylet it is.
    """
    gap = FEW if len(kinds) <= FEW else GAP
    num_trials = (gap + 1) * (len(kinds) + 1)  # more than the kills wait for: some wait longer
    write_space(folder, text=SPACE.replace("NUM", str(num_trials)))
    study = _Study(cluster, folder, random.Random(seed))  # noqa: S311 - no secret
    try:
        for kind in kinds:
            study.wait_for_rows(gap)
            study.wait_for_last_attempts()
            study.kill(kind)
        code, err = study.end()
    except BaseException:
        study.abandon()
        raise
    assert code == 0, err
    return _tally(folder / "out", study.told, Counter(kinds), num_trials)


class _Study:
    def __init__(self, cluster: Cluster, folder: Path, generator: random.Random) -> None:
        self._cluster, self._folder, self._random = cluster, folder, generator
        self._ledger = folder / "out" / "study.db"
        self._num_drivers = 0
        self._process = self._start("run", "--space", "tiny.yaml", "--output", "out")

    def _start(self, *words: str) -> "subprocess.Popen[bytes]":
        """Start a driver that writes into files: nobody reads a pipe while it runs."""
        self._num_drivers += 1
        with self._events.open("wb") as events, self._errors.open("wb") as errors:
            return subprocess.Popen(  # noqa: S603 - our own command
                command(*words, "--json-events", "--address", self._cluster.address),
                cwd=self._folder,
                env=environment(),
                stdout=events,
                stderr=errors,
                start_new_session=True,
            )

    @property
    def _events(self) -> Path:
        return self._folder / f"events-{self._num_drivers}"

    @property
    def _errors(self) -> Path:
        return self._folder / f"errors-{self._num_drivers}"

    def wait_for_rows(self, count: int) -> None:
        wanted = count_rows(self._ledger) + count
        self._wait_until(lambda: count_rows(self._ledger) >= wanted)

    def wait_for_last_attempts(self) -> None:
        """Wait while a trial has no attempt left but the one that runs, or is about to."""
        self._wait_until(lambda: not self._on_last_attempt())

    def _on_last_attempt(self) -> set[str]:
        """Return the trials that lost all attempts but one after they had begun."""
        hits: Counter[str] = Counter()
        begun = set()
        for event in self._heard():
            attempt = event.get("trial_id"), event.get("attempt")
            if event["event"] == "trial_started":
                begun.add(attempt)
            elif event["event"] == "trial_finished":
                if event["outcome"] != "infrastructure":
                    del hits[event["trial_id"]]
                elif attempt in begun:
                    hits[event["trial_id"]] += 1
        return {name for name, count in hits.items() if count == MAX_ATTEMPTS - 1}

    @property
    def told(self) -> Counter[str]:
        """Which trials were said to have ended, and how often."""
        return Counter(
            event["trial_id"]
            for event in self._heard()
            if event["event"] == "trial_finished" and event["outcome"] != "infrastructure"
        )

    def _heard(self) -> Iterator[dict[str, Any]]:
        for number in range(1, self._num_drivers + 1):
            for line in (self._folder / f"events-{number}").read_text().splitlines():
                with contextlib.suppress(ValueError):  # a killed driver's last line may be cut
                    yield json.loads(line)

    def _wait_until(self, holds: Callable[[], Found]) -> Found:
        deadline = time.monotonic() + WAIT_S
        while not (found := holds()):
            assert self._process.poll() is None, self._errors.read_text()
            assert time.monotonic() < deadline, "the study does not go on"
            time.sleep(0.05)
        return found

    def kill(self, kind: Kind) -> None:
        if kind == "worker":
            workers = self._wait_until(worker_pids)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._random.choice(workers), signal.SIGKILL)
        elif kind == "raylet":
            nodes = sorted(self._cluster.worker_nodes, key=lambda node: node.node_id)
            self._cluster.remove_node(self._random.choice(nodes), allow_graceful=False)
            self._cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        else:
            self.abandon()
            self._process = self._start("resume", "out")

    def end(self) -> tuple[int, str]:
        code = self._process.wait(WAIT_S)
        return code, self._errors.read_text()

    def abandon(self) -> None:
        self._process.kill()
        self._process.wait()


def _tally(output: Path, told: Counter[str], kills: Counter[str], num_trials: int) -> Tally:
    rows = read_run(output).trials
    is_lost = rows["outcome"] == "infrastructure"
    ends = Counter(rows.loc[~is_lost, "trial_id"])
    planned = {f"search-{index:04d}" for index in range(num_trials)}
    scored = rows.loc[is_lost, ["q", "is_stable"]].notna().any(axis=1)
    return Tally(
        kills=kills,
        finished=len(ends),
        attempts=len(rows),
        lost=len((planned | set(told)) - set(ends)),
        repeated=sum(max(ends[name], told[name]) > 1 for name in ends),
        blamed=int(scored.sum() + (rows.loc[~is_lost, "outcome"] != "completed").sum()),
        given_back=(output / "run.log").read_text().count(" was gone before search-"),
    )
