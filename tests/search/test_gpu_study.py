"""The quickstart by command on a real GPU: every trial is on it, alone or two at once."""

import json
from datetime import datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
import torch

from stability_search import read_run
from tests.search.test_study_ray import start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def quickstart(folder: Path, *overrides: str) -> tuple[list[dict[str, object]], pd.DataFrame]:
    """Run the quickstart; return its events and its trials."""
    words = [word for override in overrides for word in ("--set", override)]
    process = start(
        folder, "run", "--space", "quickstart", "--output", "out", "--json-events", *words
    )
    out, err = process.communicate(timeout=600)
    assert process.returncode in {0, 3}, err
    return [json.loads(line) for line in out.splitlines()], read_run(folder / "out").trials


def most_at_once(trials: pd.DataFrame) -> int:
    """Return how many trials ran at the same moment, at most."""
    changes = []
    for at, seconds in zip(trials["started_at"], trials["wall_s"], strict=True):
        start = datetime.fromisoformat(at)
        changes += [(start, 1), (start + timedelta(seconds=float(seconds)), -1)]
    running, most = 0, 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return most


def test_every_trial_of_the_quickstart_runs_on_cuda(tmp_path: Path) -> None:
    events, trials = quickstart(tmp_path)
    began = next(event for event in events if event["event"] == "study_started")
    assert (began["device"], began["slots"]) == ("cuda", torch.cuda.device_count())
    assert set(trials["device"]) == {torch.cuda.get_device_name()}
    assert (trials["outcome"] == "completed").sum() >= 7  # the pilot's fp32 runs, most of them
    assert set(trials.loc[trials["precision"] == "fp16", "fp16_kind"]) == {"cuda"}
    assert not {"user_error", "infrastructure"} & set(trials["outcome"])
    assert (trials["peak_memory_mib"] > 0).all()


def test_half_a_gpu_each_lets_two_trials_share_it(tmp_path: Path) -> None:
    events, trials = quickstart(
        tmp_path, "search.resources.gpu=0.5", "search.max_concurrent=2", "search.trials=8"
    )
    began = next(event for event in events if event["event"] == "study_started")
    assert (began["device"], began["slots"]) == ("cuda", 2)
    assert set(trials["device"]) == {torch.cuda.get_device_name()}
    assert not {"user_error", "infrastructure"} & set(trials["outcome"])
    assert most_at_once(trials) == 2


def test_trials_at_once_are_counted() -> None:
    starts = [f"2026-01-01T00:00:{second:02d}Z" for second in (0, 4, 10)]
    for seconds, expected in (([5.0, 5.0, 5.0], 2), ([3.0, 3.0, 3.0], 1), ([20.0, 20.0, 1.0], 3)):
        frame = pd.DataFrame({"started_at": starts, "wall_s": seconds})
        assert most_at_once(frame) == expected
