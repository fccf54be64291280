"""`stability-search train` as a process: killed, signalled, called wrongly."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stability_search.cli import main
from tests.training.world import (
    fingerprint,
    json_of,
    resumed,
    run_of,
    steps_of,
    write_space,
)

pytestmark = pytest.mark.fault


class TestCommandLine:
    @pytest.fixture
    def call(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[..., subprocess.CompletedProcess[str]]:
        root = str(Path(__file__).resolve().parents[2])

        def call(*words: str, signal_at: str = "") -> subprocess.CompletedProcess[str]:
            return subprocess.run(  # noqa: S603 - our own command
                [sys.executable, "-m", "stability_search", "train", *words],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": root, "SIGNAL_AT": signal_at},
                check=False,
                capture_output=True,
                text=True,
            )

        monkeypatch.chdir(tmp_path)
        return call

    @pytest.mark.timeout(120)
    def test_killed_twice_it_ends_bit_for_bit_as_if_it_had_not_been(
        self, tmp_path: Path, call: Callable[..., subprocess.CompletedProcess[str]]
    ) -> None:
        (tmp_path / "whole").mkdir()
        run_of(tmp_path / "whole", task="Noisy", num_steps=24)
        write_space(tmp_path, task="Noisy")
        first = call(
            *("--space", "best.yaml", "--steps", "24", "--output", "run"), signal_at="17 9"
        )
        assert first.returncode == -9
        second = call("--resume", "run", signal_at="37 9")
        assert second.returncode == -9
        assert json_of(tmp_path / "run")["end"] is None
        end, _ = resumed(tmp_path / "run")
        assert end.exit_code == 0
        assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole" / "run")
        assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole" / "run")
        print("killed at steps 9 and 19 of 24: records and state equal to the bit")

    def test_ctrl_c_prints_the_command_that_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_space(tmp_path, task="Noisy")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("SIGNAL_AT", "7 2")
        assert main(["train", "--space", "best.yaml", "--steps", "9", "--output", "r"]) == 130
        printed = capsys.readouterr().out.splitlines()
        assert printed[0] == "stopped by SIGINT after step 4; everything up to there is kept"
        assert printed[-1] == "next: stability-search train --resume r"

    @pytest.mark.timeout(60)
    def test_sigterm_in_a_long_step_ends_within_two_seconds(
        self, call: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
    ) -> None:
        write_space(tmp_path, task="Noisy")
        words = ("--space", "best.yaml", "--steps", "9", "--output", "r")
        done = call(*words, signal_at="7 15 hang")
        took = time.monotonic() - float(done.stderr.partition("signalled ")[2].split()[0])
        assert done.returncode == 143
        assert "ended at once; next: stability-search train --resume r" in done.stderr
        assert 1.0 < took < 4, "else it was not waited for, or too long"
        print(f"SIGTERM in a hanging step: exit after {took:.2f} s")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "either --space FILE --steps N, or --resume DIR"),
            (["--space", "best.yaml"], "--steps: the length"),
            (["--space", "best.yaml", "--steps", "0"], "--steps: 1 or more"),
            (["--space", "best.yaml", "--steps", "5", "--from", "best"], "need --resume"),
            (["--resume", "nowhere"], "no run directory"),
            (["--resume", ".", "--output", "x"], "stays in its directory"),
            (["--resume", "."], "no training: it must hold train.json"),
        ],
    )
    def test_a_wrong_command_line_is_exit_2(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        words: list[str],
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write_space(tmp_path)
        assert main(["train", *words]) == 2
        assert message in capsys.readouterr().err

    def test_the_verdict_is_on_stdout_and_the_lines_are_on_stderr(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write_space(tmp_path)
        assert main(["train", "--space", "best.yaml", "--steps", "10"]) == 0
        out, err = capfd.readouterr()
        assert out.startswith("done: 10 steps")
        assert "epoch 2: loss" in err
        assert "a word of the task's" in err
        run = next((tmp_path / "reports").iterdir())
        assert run.name.startswith("tiny-train-")
        assert json.loads((run / "train.json").read_text())["name"] == "tiny"
