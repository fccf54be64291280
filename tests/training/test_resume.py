"""`train --resume`: as if nothing had happened, or in a new phase; whole trainings."""

import time
from pathlib import Path

import pytest

from stability_search import files
from stability_search.errors import UsageError
from stability_search.training import checkpoint, session
from stability_search.training.command import begin
from stability_search.training.phase import PhaseRun
from stability_search.training.state import EndKind
from tests.training.world import (
    files_of,
    fingerprint,
    json_of,
    resumed,
    run_of,
    scramble_random_states,
    state_of,
    steps_of,
    without_evidence,
    write_space,
)

pytestmark = pytest.mark.fault


class _KilledError(BaseException):
    """Leaves the disk as a killed process does: no handler of the product sees it."""


def killed(*_: object, **__: object) -> None:
    raise _KilledError


class TestResume:
    def test_interrupted_anywhere_it_ends_bit_for_bit_as_if_it_had_not_been(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "whole").mkdir()
        (tmp_path / "cut").mkdir()
        run_of(tmp_path / "whole", task="Noisy", num_steps=14)
        for number, drawn in enumerate((3, 14, 23)):  # before, at and behind an epoch's end
            monkeypatch.setenv("SIGNAL_AT", f"{drawn} 15")
            if number:
                end, _ = resumed(tmp_path / "cut" / "run")
            else:
                end, _ = run_of(tmp_path / "cut", task="Noisy", num_steps=14)
            assert (end.kind, end.exit_code) == (EndKind.INTERRUPTED, 143)
            assert end.step == -(-drawn // 2)
            assert "stability-search train --resume" in end.lines[1]
            scramble_random_states()
        monkeypatch.delenv("SIGNAL_AT")
        end, lines = resumed(tmp_path / "cut" / "run")
        assert end.exit_code == 0
        assert not [line for line in lines if "not the same" in line]
        assert steps_of(tmp_path / "cut" / "run") == steps_of(tmp_path / "whole" / "run")
        assert fingerprint(tmp_path / "cut" / "run") == fingerprint(tmp_path / "whole" / "run")
        epochs = [json_of(tmp_path / name / "run")["epochs"] for name in ("cut", "whole")]
        assert epochs[0] == epochs[1]

    def test_a_step_file_beyond_the_checkpoint_is_made_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SIGNAL_AT", "24 15")
        run_of(tmp_path, task="Noisy", num_steps=14)
        run = tmp_path / "run"
        before = steps_of(run)
        last = checkpoint.found_in(run / "checkpoints", up_to_phase=1)[-1]
        assert last.step == 12
        last.path.unlink()  # killed between the steps and their checkpoint
        monkeypatch.delenv("SIGNAL_AT")
        resumed(run)
        assert steps_of(run)[:12] == before
        assert [record.step for record in steps_of(run)] == list(range(1, 15))

    def test_data_that_is_not_the_same_again_is_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SIGNAL_AT", "12 15")
        run_of(tmp_path, task="Noisy")
        monkeypatch.delenv("SIGNAL_AT")
        monkeypatch.setattr("numpy.random.rand", time.time)
        _, lines = resumed(tmp_path / "run")
        assert any(line.startswith("WARNING data: drawn again it is not") for line in lines)

    def test_only_the_directory_is_needed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SIGNAL_AT", "12 15")
        run_of(tmp_path, task="Noisy")
        monkeypatch.delenv("SIGNAL_AT")
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "task.py").unlink()
        end, _ = resumed(tmp_path / "moved")
        assert end.exit_code == 0

    @pytest.mark.parametrize("nth", [1, 4, 6, 9])
    def test_a_full_disk_is_exit_6_without_half_files_and_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
    ) -> None:
        space = write_space(tmp_path)
        count = 0
        real = files.put_in_place

        def full(part: Path, path: Path) -> None:
            nonlocal count
            if path.suffix in {".pt", ".parquet"}:
                count += 1
                if count >= nth:
                    raise OSError(28, "No space left on device")
            real(part, path)

        run = tmp_path / "run"
        with monkeypatch.context() as patch:
            patch.setattr(files, "put_in_place", full)
            patch.setattr(checkpoint, "put_in_place", full)
            end = begin(space, num_steps=20, output=run)
        assert end.exit_code == 6
        assert "No space left on device" in end.lines[0]
        assert end.lines[1] == f"next: stability-search train --resume {run}"
        assert not [name for name in files_of(run) if name.endswith(".part")]
        after, _ = resumed(run)
        assert after.exit_code == 0
        assert [record.step for record in steps_of(run)] == list(range(1, 21))


class TestPhases:
    def test_changed_settings_begin_a_phase_that_is_recorded(self, tmp_path: Path) -> None:
        run_of(tmp_path, num_steps=10)
        run = tmp_path / "run"
        end, lines = resumed(run, "fixed.learning_rate=1e-3", num_steps=20)
        assert end.exit_code == 0
        phases = json_of(run)["phases"]
        assert [phase["first_step"] for phase in phases] == [1, 11]
        assert phases[1]["changes"] == {
            "fixed.learning_rate": ["0.01", "0.001"],
            "steps": ["10", "20"],
        }
        assert phases[1]["from_checkpoint"].startswith("phase-1-step-00000010")
        assert {record.learning_rate for record in steps_of(run, 1)} == {0.01}
        assert {record.learning_rate for record in steps_of(run, 2)} == {0.001}
        assert "learning_rate: 1e-3" in (run / "space-2.yaml").read_text()
        assert lines[1].startswith("phase 2 from phase-1-step-00000010")

    def test_a_phase_without_changes_but_length_trains_as_one_that_was_longer(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "parts").mkdir()
        (tmp_path / "whole").mkdir()
        run_of(tmp_path / "parts", num_steps=10)
        resumed(tmp_path / "parts" / "run", num_steps=20)
        run_of(tmp_path / "whole", num_steps=20)
        parts = [*steps_of(tmp_path / "parts" / "run"), *steps_of(tmp_path / "parts" / "run", 2)]
        whole = steps_of(tmp_path / "whole" / "run")
        assert [without_evidence(one) for one in parts] == [without_evidence(one) for one in whole]

    def test_another_batch_size_draws_other_data_and_goes_on(self, tmp_path: Path) -> None:
        run_of(tmp_path, num_steps=10)
        run = tmp_path / "run"
        resumed(run, "fixed.batch_size=8", "fixed.accumulation_steps=1", num_steps=12)
        stream = state_of(run)["stream"]
        assert (stream["batch_size"], stream["num_drawn"]) == (8, 2)
        resumed(run, num_steps=14)
        assert state_of(run)["stream"]["num_drawn"] == 4

    def test_changes_wait_for_calm_epochs_and_are_then_made(self, tmp_path: Path) -> None:
        run_of(tmp_path, num_steps=10)
        run = tmp_path / "run"
        end, _ = resumed(run, "fixed.learning_rate=0.02", advance_after=2, num_steps=40)
        assert end.exit_code == 0
        phases = json_of(run)["phases"]
        assert [phase["first_step"] for phase in phases] == [1, 11, 21]
        assert phases[2]["changes"] == {"fixed.learning_rate": ["0.01", "0.02"]}
        assert json_of(run)["pending"] is None
        assert {record.learning_rate for record in steps_of(run, 2)} == {0.01}
        assert {record.learning_rate for record in steps_of(run, 3)} == {0.02}

    def test_an_alarm_in_every_epoch_keeps_changes_waiting_and_the_end_says_so(
        self, tmp_path: Path
    ) -> None:
        run_of(tmp_path, "alarms.grad_norm=1e-9", num_steps=10)
        end, _ = resumed(
            tmp_path / "run", "fixed.learning_rate=0.02", advance_after=1, num_steps=25
        )
        assert end.exit_code == 0
        said = [line for line in end.lines if line.startswith("WARNING")]
        assert said == [
            (
                "WARNING the changes fixed.learning_rate=0.02 were never made: epochs in a row "
                "without an alarm 0, wanted 1"
            )
        ]

    def test_waiting_survives_an_interruption(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run_of(tmp_path, task="Noisy", num_steps=10)
        run = tmp_path / "run"
        monkeypatch.setenv("SIGNAL_AT", "34 15")
        resumed(run, "fixed.learning_rate=0.02", advance_after=2, num_steps=30)
        assert json_of(run)["pending"]["num_calm_epochs"] == 2
        monkeypatch.delenv("SIGNAL_AT")
        end, _ = resumed(run)
        assert [phase["first_step"] for phase in json_of(run)["phases"]] == [1, 11, 21]
        assert end.exit_code == 0

    def test_waiting_needs_a_change(self, tmp_path: Path) -> None:
        run_of(tmp_path, num_steps=5)
        with pytest.raises(UsageError, match="--advance-after: 1 or more epochs and a change"):
            resumed(tmp_path / "run", advance_after=2, num_steps=9)


class TestGoingBack:
    def test_killed_before_its_phase_began_a_checkpoint_is_never_gone_on_from(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run_of(tmp_path, num_steps=10)
        run = tmp_path / "run"
        first = checkpoint.found_in(run / "checkpoints", up_to_phase=1)[0]
        assert first.step < 10
        with monkeypatch.context() as patch:
            patch.setattr(session, "write_state", killed)
            with pytest.raises(_KilledError):
                resumed(run, "fixed.learning_rate=0.5", num_steps=20)
        stale = {path.name for path in (run / "checkpoints").glob("phase-2-step-00000010-*")}
        assert stale, "written before `train.json` could say that phase 2 began"
        assert first.path.exists(), "nothing is given up for a phase that has not begun"
        with monkeypatch.context() as patch:
            patch.setattr(PhaseRun, "_heed_signals", killed)  # before its first step
            with pytest.raises(_KilledError):
                resumed(run, "fixed.learning_rate=1e-3", which=first.path.name, num_steps=20)
        end, lines = resumed(run)
        assert lines[0].startswith(f"training tiny goes on after step {first.step} of 20")
        assert end.exit_code == 0
        assert {record.learning_rate for record in steps_of(run, 2)} == {1e-3}

    def test_back_again_and_again_each_kill_test_gets_a_number_of_its_own(
        self, tmp_path: Path
    ) -> None:
        run_of(tmp_path, num_steps=45)
        run = tmp_path / "run"
        first = checkpoint.found_in(run / "checkpoints", up_to_phase=1)[0].path
        numbers = [state_of(run)["stops"]["number"]]
        kept = first.read_bytes()
        for rate in ("0.02", "0.03"):
            first.write_bytes(kept)  # only the last two and the best are kept
            resumed(run, f"fixed.learning_rate={rate}", which=first.name)
            numbers.append(state_of(run)["stops"]["number"])
        assert numbers == [3, 4, 5]
        assert json_of(run)["num_tests"] == 5

    def test_a_test_that_began_behind_the_last_checkpoint_counts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(PhaseRun, "_is_due", lambda *_, **__: False)
        monkeypatch.setattr(PhaseRun, "_finish", killed)
        with pytest.raises(_KilledError):
            run_of(tmp_path, num_steps=45)
        assert json_of(tmp_path / "run")["num_tests"] == 3
