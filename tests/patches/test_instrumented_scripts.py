"""Scripts of other people, run as they run them: with the line, with the command, and without."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.fault  # whole trainings, each in a process of its own

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
PRECISIONS = ("fp32", "bf16", "fp16")
NAMED = "WARNING step 3 epoch 1: skipped, data: NaN in batch[0], batch 2 (from 0) of its loader"


def run(*words: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(  # noqa: S603 - our own words
        [str(word) for word in words],
        cwd=cwd,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )


def instrument(*words: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "stability_search", "instrument")
    return run(*command, *words, cwd=cwd, **variables)


def test_with_the_line_a_poisoned_script_runs_to_its_end(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    line = "import stability_search.instrument\n"
    script.write_text(line + (SCRIPTS / "poisoned.py").read_text())

    done = run(sys.executable, "-W", "error::FutureWarning", script, *PRECISIONS, cwd=tmp_path)

    assert done.returncode == 7, done.stderr
    results, loaded = done.stdout.splitlines()[:3], done.stdout.splitlines()[3].split()
    assert results == [f"{precision} finite" for precision in PRECISIONS]
    assert done.stderr.count("skipped, data: NaN in batch[0], batch 2 (from 0)") == 3
    assert NAMED in done.stderr
    assert "INFO patched: torch.cuda.amp.autocast -> torch.amp.autocast" in done.stderr
    assert "too late" not in done.stderr
    assert {"torch", "stability_search"} <= set(loaded)
    assert not {"ray", "optuna", "pandas", "pydantic", "typer", "scipy"} & set(loaded)


def test_the_twin_without_the_line_it_ends_in_nan(tmp_path: Path) -> None:
    done = run(sys.executable, SCRIPTS / "poisoned.py", *PRECISIONS, cwd=tmp_path)

    assert done.stdout.splitlines()[:3] == [f"{precision} NaN" for precision in PRECISIONS]
    assert "WARNING step" not in done.stderr


def test_the_command_reaches_the_children_of_a_launcher(tmp_path: Path) -> None:
    (tmp_path / "launch.py").write_text(
        "import subprocess, sys\n"
        "words = [sys.executable, '-m', 'poisoned', 'fp32', 'fp16']\n"
        "sys.exit(subprocess.run(words).returncode)\n"
    )
    shutil.copy(SCRIPTS / "poisoned.py", tmp_path)

    done = instrument(*("--init-scale", "512", "--", sys.executable, "-m", "launch"), cwd=tmp_path)

    assert done.returncode == 7, done.stderr
    assert done.stdout.splitlines()[:2] == ["fp32 finite", "fp16 finite"]
    assert done.stderr.startswith("INFO every Python process of this command")
    assert done.stderr.count("INFO patched: torch.cuda.amp.autocast") == 1
    assert NAMED in done.stderr
    assert "init_scale 512 instead of 65536" in done.stderr


def test_trainers_of_other_libraries_run_to_their_end(tmp_path: Path) -> None:
    for name in ("accelerate", "lightning"):
        if find_spec(name) is None:  # an import would leave its traces in this process
            pytest.skip(f"{name} is not installed")

    done = instrument(sys.executable, SCRIPTS / "trainers.py", tmp_path / "out", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.endswith((" finite", " NaN"))]
    assert lines == ["trainer finite", "lightning finite"]
    assert done.stderr.count("skipped, data: NaN in batch['x'], batch") == 4
    assert "INFO epoch 2: loss " in done.stderr


def test_a_signal_that_ends_the_script_ends_the_command(tmp_path: Path) -> None:
    end = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"

    assert instrument("--", sys.executable, "-c", end, cwd=tmp_path).returncode == -15


def test_a_process_without_torch_loads_nothing_and_keeps_its_own_start_up(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('their own start-up')\n")
    code = "import sys; print([n for n in sys.modules if n.partition('.')[0] in sys.argv[1:]])"
    words = (sys.executable, "-c", code, "torch", "stability_search")

    done = instrument("--", *words, cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")

    theirs = "their own start-up\n"  # once for the command, once for what it becomes
    assert done.stdout == f"{theirs}{theirs}[]\n", done.stderr


def test_a_wrong_setting_ends_the_script_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import stability_search.instrument\nprint('trained')\n")

    done = run(sys.executable, "train.py", cwd=tmp_path, STABILITY_SEARCH_MAX_SCALE="much")

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "CRITICAL STABILITY_SEARCH_MAX_SCALE: must be a number, but got 'much'. "
        "Nothing was started.\n"
    )
