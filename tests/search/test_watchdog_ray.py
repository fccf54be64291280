"""A hung trial ends within its limit and 20 s, whatever it hangs in, and its children with it."""

import json
import time
from pathlib import Path

import pytest

from stability_search import read_run
from tests.search.inline_study import write_space
from tests.search.test_study_ray import outcomes, run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

TIMEOUT_S = 3.0
PROMISED_S = 20.0
DRIVER_S = 15.0

SPACE = """\
name: hung
task: {task}:Tiny
trial: {{steps: 20, timeout_s: TIMEOUT}}
fixed: {{batch_size: 8}}
space:
  learning_rate: {{loguniform: {{low: 1e-3, high: 0.1}}}}
  behaviour: {{choice: BEHAVIOURS}}
start_with: START
search: {{trials: COUNT, sampler: random}}
confirm: {{top: 1, seeds: 1, steps: 20, octaves: 0, min_margin: 0}}
"""


def write_behaviours(folder: Path, behaviours: tuple[str, ...]) -> Path:
    """Write a space whose first configuration is sound and whose others misbehave in order."""
    starts = [{"learning_rate": 0.01, "behaviour": name} for name in behaviours]
    text = SPACE.replace("TIMEOUT", str(TIMEOUT_S)).replace("COUNT", str(len(behaviours)))
    text = text.replace("BEHAVIOURS", json.dumps(behaviours))
    text = text.replace("START", json.dumps(starts).replace("{", "{{").replace("}", "}}"))
    return write_space(folder, text=text)


def processes_with(variable: str) -> list[str]:
    """Return what still runs with a variable of the environment: nobody sheds it by `setsid`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(f"{path.name} {(path / 'cmdline').read_bytes()!r}")
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


HANGS = ("hang", "hang_in_c", "hang_deaf", "hang_loader", "hang_parent", "stop", "hang_unwatched")


def test_a_trial_that_hangs_is_timed_out_in_time_and_takes_its_children_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = f"PLANTED_RUN={tmp_path}"
    monkeypatch.setenv(*marker.split("=", 1))
    space = write_behaviours(tmp_path, ("fine", *HANGS))
    code, _, err = run(tmp_path, "run", "--space", str(space), "--output", "out")
    ended = time.monotonic()
    assert code == 0, err
    assert outcomes(tmp_path / "out")["search-0000"] == ["completed"]
    rows = read_run(tmp_path / "out").trials.set_index("trial_id")
    overruns = {}
    for index, behaviour in enumerate(HANGS, start=1):
        trial_id = f"search-{index:04d}"
        assert outcomes(tmp_path / "out")[trial_id] == ["timed_out"], behaviour
        overruns[behaviour] = float(rows.loc[trial_id, "wall_s"]) - TIMEOUT_S
    while (left := processes_with(marker)) and time.monotonic() - ended < 5:
        time.sleep(0.1)
    seconds = time.monotonic() - ended
    print(", ".join(f"{name} {over:.1f} s" for name, over in overruns.items()))
    print(
        f"worst overrun {max(overruns.values()):.1f} s; leaked {len(left)} after {seconds:.1f} s"
    )
    assert max(overruns.values()) < PROMISED_S
    assert left == []
    # The twins: what no watchdog could end lasted until the driver's own clock.
    for behaviour in ("stop", "hang_unwatched"):
        assert overruns[behaviour] >= DRIVER_S
    log = (tmp_path / "out" / "run.log").read_text()
    assert log.count("Timeout (0:00:08)!") == len(HANGS) - 2  # each with every thread's stack
