"""Whom a GPU is given to, on a Ray that says it has two: the allocation needs no real one."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from stability_search.interruption import Signals
from stability_search.records.trial import Outcome, Stage, TrialSummary
from stability_search.search.driver import Cluster, drive
from stability_search.search.machine import Node, choose_machine
from stability_search.search.request import TrialRequest
from stability_search.search.source import Place
from stability_search.settings.engine import EngineSettings
from stability_search.settings.trial import TaskReference, TrialConfig, TrialConstants
from tests.search.test_machine import space_with

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

NUM_CPUS, NUM_GPUS = 4, 2
MODEL = {"accelerator_type:H100": 1.0}

# Trains on the CPU, waits until as many trials run as there should be, and tells what it saw.
TASK = """\
import os
import time
from pathlib import Path

import torch


class Telling:
    def __init__(self, folder: str, wave: int, num_slots: int) -> None:
        self.folder = Path(folder) / f"wave-{wave}"
        self.num_slots = num_slots

    def model(self):
        self.folder.mkdir(exist_ok=True)
        (self.folder / str(os.getpid())).touch()
        end = time.monotonic() + 60
        while self.num_together() < self.num_slots and time.monotonic() < end:
            time.sleep(0.01)
        return torch.nn.Linear(1, 1)

    def num_together(self):
        return len(list(self.folder.iterdir()))

    def batches(self, batch_size, generator):
        while True:
            yield torch.ones(batch_size, 1)

    def probe(self):
        return [torch.ones(2, 1)]

    def loss(self, model, batch):
        return model(batch).square().mean()

    def metrics(self, model, batch):
        visible = os.environ["CUDA_VISIBLE_DEVICES"]
        return {
            "gpu": float(visible) if visible.isdigit() else -1.0,
            "num_together": float(self.num_together()),
        }
"""


class Waves:
    """Asks for two waves of trials that fill the slots, on the CPU, and keeps what they say."""

    def __init__(self, folder: Path, num_slots: int) -> None:
        self.summaries: dict[str, TrialSummary] = {}
        self._waiting = [
            self._request(folder, wave, num_slots, k) for wave in (1, 2) for k in range(num_slots)
        ]
        self._num_slots = num_slots
        self._num_running = 0

    def _request(self, folder: Path, wave: int, num_slots: int, k: int) -> TrialRequest:
        config = TrialConfig(
            task=TaskReference(file=str(folder / "telling.py"), class_name="Telling"),
            task_args={"folder": str(folder), "wave": wave, "num_slots": num_slots},
            engine=EngineSettings(learning_rate=0.1, num_planned_steps=1),
            num_planned_steps=1,
            device="cpu",
        )
        return TrialRequest(
            trial_id=f"search-{wave}-{k}",
            stage=Stage.SEARCH,
            index=k,
            config_id="c",
            settings={},
            config=config,
            constants=TrialConstants(probe_steps=(0, 1)),
        )

    def next_trial(self) -> TrialRequest | None:
        if not self._waiting or (self._num_running and len(self._waiting) == self._num_slots):
            return None  # the second wave waits for the first
        self._num_running += 1
        return self._waiting.pop(0)

    @property
    def is_over(self) -> bool:
        return not self._waiting and not self._num_running

    def trial_started(self, request: TrialRequest, node: str) -> None:
        """Hear nothing."""

    def trial_progressed(self, request: TrialRequest, progress: Mapping[str, Any]) -> None:
        """Hear nothing."""

    def trial_ended(
        self,
        request: TrialRequest,
        summary: TrialSummary,
        steps: bytes | None,  # noqa: ARG002 - the protocol's
        place: Place,  # noqa: ARG002 - the protocol's
    ) -> None:
        self._num_running -= 1
        self.summaries[request.trial_id] = summary

    def node_quarantined(self, node: str, reason: str) -> None:
        raise AssertionError(f"{node}: {reason}")

    def noticed(self, text: str) -> None:
        """Hear nothing."""

    def settle(self) -> None:
        """Write nothing."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Start a node that says it has GPUs, as another program would."""
    from ray.cluster_utils import Cluster as Nodes

    folder = tempfile.mkdtemp(prefix="gpu-")  # short: paths of sockets end at 107 bytes
    nodes = Nodes(
        initialize_head=True,
        head_node_args={
            "num_cpus": NUM_CPUS,
            "num_gpus": NUM_GPUS,
            "resources": MODEL,
            "object_store_memory": 80 * 2**20,
            "include_dashboard": False,
            "temp_dir": folder,
        },
    )
    try:
        yield nodes.address
    finally:
        nodes.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(("gpu", "num_slots"), [(1.0, 2), (0.5, 4)])
def test_every_trial_sees_one_gpu_and_no_more_trials_than_it_has_room_for(
    gpu: float,
    num_slots: int,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONBREAKPOINT", "")  # Ray sets it for good when it connects
    (tmp_path / "telling.py").write_text(TASK)
    node = Node(resources={"CPU": float(NUM_CPUS), "GPU": float(NUM_GPUS), **MODEL})
    machine = choose_machine(space_with(gpu=gpu, accelerator="H100"), node)
    assert machine.num_slots == num_slots
    waves = Waves(tmp_path, num_slots)
    signals = Signals()
    try:
        with Cluster(address) as cluster:
            drive(waves, cluster=cluster, machine=machine, folder=tmp_path, signals=signals)
    finally:
        signals.restore()
    ends = waves.summaries
    assert len(ends) == 2 * num_slots
    assert {end.outcome for end in ends.values()} == {Outcome.COMPLETED}, ends
    for wave in (1, 2):  # the second on workers that ran the first
        told = [end.metrics_last for name, end in ends.items() if f"-{wave}-" in name]
        gpus = Counter(metrics["gpu"] for metrics in told)
        print(f"gpu {gpu:g}, wave {wave}: trials on each GPU {dict(gpus)}")
        assert gpus == {0.0: num_slots // NUM_GPUS, 1.0: num_slots // NUM_GPUS}
        assert {metrics["num_together"] for metrics in told} == {float(num_slots)}
