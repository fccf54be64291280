"""A long training in miniature: a space file beside the tiny task, and what to compare of it."""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stability_search.records.step import StepRecord
from stability_search.space import Space, load
from stability_search.training import checkpoint
from stability_search.training.command import begin, go_on
from stability_search.training.state import TrainEnd
from stability_search.training.step_parts import read_parts

TINY = Path(__file__).resolve().parents[1] / "tiny_task.py"

# Draws from every random state there is, so that a resumed run must put back all of them.
RANDOM_TASK = """
import os, random, time
import numpy as np, torch
from torch import nn

class Noisy:
    def __init__(self, nan_from: int = 0) -> None:
        self.nan_from = nan_from

    def model(self):
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))

    def batches(self, batch_size, generator):
        order, drawn = [], 0
        while True:
            if not order:  # a shuffled pass over 7 rows: what a generator's state does not hold
                order = torch.randperm(7, generator=generator).tolist()
            drawn += 1
            x = torch.randn(batch_size, 4, generator=generator) + 0.1 * order.pop()
            x = x + float(np.random.rand())
            at, signum, then = (os.environ.get("SIGNAL_AT", "").split() + [""] * 3)[:3]
            if at and drawn == int(at):
                print(f"signalled {time.monotonic()}", flush=True)
                os.kill(os.getpid(), int(signum))
                time.sleep(600 if then == "hang" else 0)
            y = x.sum(1, keepdim=True)
            if self.nan_from and drawn >= self.nan_from:
                x = x * float("nan") if drawn % 2 else x * 1e30
            yield x, y

    def probe(self):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(5))
        return [(x, x.sum(1, keepdim=True))] * 4

    def loss(self, model, batch):
        noise = random.random() if model.training else 0
        return (model(batch[0]) - batch[1] + noise).square().mean()

    def metrics(self, model, batch):
        return {"error": float((model(batch[0]) - batch[1]).abs().mean())}
"""

SPACE = """\
name: tiny
task: ./task.py:{task}
fixed: {{learning_rate: 0.01, batch_size: 4, accumulation_steps: 2}}
trial: {{steps: 20}}
confirm: {{steps: 20}}
alarms: {{epoch_steps: 5, clip_frac: 1, grad_norm_jump: 1e9, update_ratio: 1e9}}
"""


def write_space(folder: Path, *overrides: str, task: str = "Tiny", text: str = SPACE) -> Space:
    """Write a task and a space file of one configuration, and load it."""
    (folder / "task.py").write_text(TINY.read_text() if task == "Tiny" else RANDOM_TASK)
    (folder / "best.yaml").write_text(text.format(task=task))
    return load(folder / "best.yaml", overrides)


def state_of(run: Path, phase: int = 9) -> dict[str, Any]:
    """Return what the last checkpoint holds."""
    found = checkpoint.found_in(run / "checkpoints", up_to_phase=phase)
    return checkpoint.load(found[-1].path)


def fingerprint(run: Path) -> str:
    """Hash everything of the last checkpoint but what counts seconds: one bit off is another."""
    digest = hashlib.sha256()
    for part in _leaves(state_of(run)):
        digest.update(part)
    return digest.hexdigest()


def _leaves(nest: Any) -> Iterator[bytes]:  # noqa: ANN401 - any nest
    if isinstance(nest, torch.Tensor):
        yield str(nest.dtype).encode() + nest.contiguous().numpy().tobytes()
    elif isinstance(nest, dict):
        for key, value in nest.items():
            yield repr(key).encode()
            yield from _leaves(value)
    elif isinstance(nest, list | tuple):
        for value in nest:
            yield from _leaves(value)
    else:
        yield repr(nest).encode()


def steps_of(run: Path, phase: int = 1) -> list[StepRecord]:
    """Return the step records of a phase without the seconds they took."""
    return [replace(record, step_s=0.0) for record in read_parts(run / "steps", phase)]


def json_of(run: Path) -> dict[str, Any]:
    """Return what `train.json` holds."""
    content: dict[str, Any] = json.loads((run / "train.json").read_text())
    return content


def files_of(run: Path) -> set[str]:
    """Return every file of a run, hidden ones included."""
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def scramble_random_states() -> None:
    """Do what another process would have done to the random states."""
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002 - the state a task may use
    torch.manual_seed(99)
    nn.Linear(3, 3)


def run_of(
    folder: Path, *overrides: str, num_steps: int = 20, task: str = "Tiny", name: str = "run"
) -> tuple[TrainEnd, list[str]]:
    """Begin a training and return how it ended, with its lines."""
    lines: list[str] = []
    space = write_space(folder, *overrides, task=task)
    end = begin(space, num_steps=num_steps, output=folder / name, listener=lines.append)
    return end, lines


def resumed(run: Path, *overrides: str, **options: object) -> tuple[TrainEnd, list[str]]:
    """Go on with a training and return how it ended, with its lines."""
    lines: list[str] = []
    end = go_on(run, overrides, listener=lines.append, **options)  # type: ignore[arg-type]
    return end, lines


def without_evidence(record: StepRecord) -> StepRecord:
    """Return a record as it is whatever kill test judged it."""
    return replace(record, evidence=None)
