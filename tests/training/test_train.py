"""`train` from its first file to its verdict, what it refuses and what stops it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stability_search.errors import UsageError
from stability_search.training import checkpoint
from stability_search.training.command import begin, go_on
from stability_search.training.state import EndKind
from tests.training.world import (
    files_of,
    json_of,
    resumed,
    run_of,
    state_of,
    steps_of,
    write_space,
)

pytestmark = pytest.mark.fault


class TestDone:
    @pytest.mark.usefixtures("real_picture")
    def test_it_leaves_space_task_checkpoints_steps_scalars_and_a_picture(
        self, tmp_path: Path
    ) -> None:
        end, lines = run_of(tmp_path, "fixed.learning_rate=0.02", "report.targets.error=9")
        run = tmp_path / "run"
        assert (end.kind, end.exit_code, end.step) == (EndKind.DONE, 0, 20)
        assert "0.02" in (run / "space.yaml").read_text()
        assert (run / "task.py").read_text() == (tmp_path / "task.py").read_text()
        assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert [record.step for record in steps_of(run)] == list(range(1, 21))
        assert json_of(run)["end"]["exit_code"] == 0
        assert [row["epoch"] for row in json_of(run)["epochs"]] == [1, 2, 3, 4]
        assert len(list((run / "tensorboard").iterdir())) == 1
        assert not [name for name in files_of(run) if Path(name).name.startswith(".")]
        assert end.lines[0].startswith("done: 20 steps, 4 epochs; 0 bad (NaN or Inf)")
        assert "target error 9: met" in "\n".join(end.lines)
        log = (run / "train.log").read_text()
        assert all(line in log for line in [*lines, *end.lines])

    def test_it_says_an_epoch_and_the_first_ten_steps_with_the_words_people_search_for(
        self, tmp_path: Path
    ) -> None:
        _, lines = run_of(tmp_path)
        assert lines[0].startswith("training tiny on cpu: 20 steps in epochs of 5; files in ")
        assert [line.partition(":")[0] for line in lines[1:]] == [
            *("epoch 1", "first 10 steps", "epoch 2", "epoch 3", "epoch 4"),
        ]
        assert "loss" in lines[1]
        assert "grad_norm" in lines[1]
        assert "0 of 5 steps skipped; probe loss" in lines[1]

    def test_the_trained_weights_are_read_back_as_the_readme_says(self, tmp_path: Path) -> None:
        run_of(tmp_path)
        last = checkpoint.found_in(tmp_path / "run" / "checkpoints", up_to_phase=1)[-1].path
        weights = torch.load(last, weights_only=True)["engine"]["model"]
        assert weights["0.weight"].shape == (16, 8)

    def test_a_course_says_which_row_was_reached(self, tmp_path: Path) -> None:
        course = "report.course=[{epoch: 1, loss: [1, 1e9]}, {epoch: 3, error: [0, 1e-9]}]"
        end, lines = run_of(tmp_path, course)
        said = [line for line in lines if "expected course" in line]
        assert said[0] == "epoch 1: expected course: on course: the row of epoch 1 is reached"
        assert said[3].startswith("epoch 4: expected course: behind: the row of epoch 1 is")
        assert "lacks error" in said[3]
        assert "expected course at epoch 4: behind" in "\n".join(end.lines)


class TestRefused:
    def test_a_space_that_varies_must_be_searched_first(self, tmp_path: Path) -> None:
        space = write_space(tmp_path, "space.clip_norm.choice=[null, 1]")
        with pytest.raises(UsageError, match=r"clip_norm varies.*run --space"):
            begin(space, num_steps=5, output=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_a_course_of_an_unknown_metric_is_refused_before_anything_is_made(
        self, tmp_path: Path
    ) -> None:
        space = write_space(tmp_path, "report.course=[{epoch: 1, wer: [0, 1]}]")
        with pytest.raises(UsageError, match=r"loss, grad_norm, error can be.*got wer"):
            begin(space, num_steps=5, output=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_a_setting_the_model_cannot_honour_is_refused_before_anything_is_made(
        self, tmp_path: Path
    ) -> None:
        space = write_space(tmp_path, "fixed.attention_clamp=10")
        with pytest.raises(UsageError, match="attention"):
            begin(space, num_steps=5, output=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_a_directory_with_a_training_names_the_command_that_goes_on(
        self, tmp_path: Path
    ) -> None:
        run_of(tmp_path, num_steps=1)
        with pytest.raises(UsageError, match=r"a training is there already.*train --resume"):
            run_of(tmp_path, num_steps=1)
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "a file").touch()
        with pytest.raises(UsageError, match="not empty"):
            run_of(tmp_path, num_steps=1, name="full")

    def test_a_locked_directory_is_refused(self, tmp_path: Path) -> None:
        run_of(tmp_path, num_steps=1)
        code = (
            "import fcntl, os, sys, time\n"
            "held = os.open(sys.argv[1], os.O_RDONLY)\n"
            "fcntl.flock(held, fcntl.LOCK_EX)\nprint('held', flush=True)\nsys.stdin.read()"
        )
        with subprocess.Popen(  # noqa: S603 - our own words
            [sys.executable, "-c", code, tmp_path / "run"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            with pytest.raises(UsageError, match="locked run"):
                go_on(tmp_path / "run", num_steps=9)
            holder.communicate()

    def test_a_done_training_asks_for_more_steps_and_never_for_fewer(self, tmp_path: Path) -> None:
        run_of(tmp_path, num_steps=5)
        with pytest.raises(UsageError, match=r"all 5 steps have been taken.*--steps 10"):
            resumed(tmp_path / "run")
        with pytest.raises(UsageError, match="may only rise, but got 4 after 5"):
            resumed(tmp_path / "run", num_steps=4)

    def test_task_model_and_optimizer_may_not_change_and_every_change_is_named(
        self, tmp_path: Path
    ) -> None:
        run_of(tmp_path, num_steps=5)
        with pytest.raises(UsageError, match=r"fixed\.width: may not change") as caught:
            resumed(
                tmp_path / "run",
                *("fixed.width=8", "fixed.precision=bf16", "seed=3", "fixed.init_gain=2"),
                num_steps=9,
            )
        for word in ("seed", "fixed.precision", "'bf16' after nothing", "fixed.init_gain"):
            assert word in caught.value.message

    def test_momentum_cannot_be_switched_on(self, tmp_path: Path) -> None:
        run_of(tmp_path, "fixed.optimizer=sgd", num_steps=5)
        with pytest.raises(UsageError, match="momentum must be on or off in both"):
            resumed(tmp_path / "run", "fixed.momentum=0.9", num_steps=9)

    def test_a_space_file_changed_by_hand_and_a_changed_task_are_refused(
        self, tmp_path: Path
    ) -> None:
        run_of(tmp_path, num_steps=5)
        run = tmp_path / "run"
        text = (run / "space.yaml").read_text()
        (run / "space.yaml").write_text(text.replace("0.01", "0.02"))
        with pytest.raises(UsageError, match="changed by hand"):
            resumed(run, num_steps=9)
        (run / "space.yaml").write_text(text)
        (run / "task.py").write_text((run / "task.py").read_text() + "\n# a change\n")
        with pytest.raises(UsageError, match="the task changed"):
            resumed(run, num_steps=9)

    def test_a_damaged_checkpoint_is_never_believed(self, tmp_path: Path) -> None:
        run_of(tmp_path, num_steps=10)
        last = checkpoint.found_in(tmp_path / "run" / "checkpoints", up_to_phase=1)[-1].path
        whole = last.read_bytes()
        at = whole.index(state_of(tmp_path / "run")["engine"]["model"]["0.weight"].numpy().data)
        flipped = bytes([whole[at] ^ 1])
        for content in (whole[:-100], whole[:at] + flipped + whole[at + 1 :], b""):
            last.write_bytes(content)
            with pytest.raises(UsageError, match=r"damaged checkpoint.*--from"):
                resumed(tmp_path / "run", num_steps=20)
        good = checkpoint.found_in(tmp_path / "run" / "checkpoints", up_to_phase=1)[0].path
        end, _ = resumed(tmp_path / "run", num_steps=12, which=good.name)
        assert end.exit_code == 0


class TestStopped:
    def test_a_step_of_bad_data_is_named_with_its_batch(self, tmp_path: Path) -> None:
        _, lines = run_of(tmp_path, "fixed.nan_from=17", task="Noisy")
        bad = [line for line in lines if line.startswith("WARNING step")]
        assert bad[0].startswith("WARNING step 9: data (NaN in batch[0])")
        assert "batch 16, " in bad[0]

    def test_the_kill_rule_stops_it_and_advises_a_tenth_of_the_rate(self, tmp_path: Path) -> None:
        end, _ = run_of(tmp_path, "fixed.learning_rate=1e30", task="Noisy", num_steps=40)
        assert (end.kind, end.exit_code) == (EndKind.STOPPED, 3)
        assert end.lines[0].startswith(f"CRITICAL stopped at step {end.step} of 40: ")
        command = next(line for line in end.lines if "stability-search" in line).split()
        assert command[:4] == ["stability-search", "train", "--resume", str(tmp_path / "run")]
        assert command[4:] == ["--from", "best", "--set", "fixed.learning_rate=1e+29"]
        assert steps_of(tmp_path / "run")[-1].step == end.step, "the fatal step is kept too"

        with pytest.raises(UsageError, match=r"the same settings would stop there again"):
            resumed(tmp_path / "run")
        after, lines = resumed(tmp_path / "run", "fixed.learning_rate=1e-3", which="best")
        assert after.exit_code == 0
        assert "fixed.learning_rate 1e+30 -> 0.001" in "\n".join(lines)
        assert steps_of(tmp_path / "run", 1)[-1].step == end.step, "what was given up is kept"
        assert steps_of(tmp_path / "run", 2)[-1].step == 40

    def test_fifty_steps_in_a_row_that_change_nothing_stop_it(self, tmp_path: Path) -> None:
        end, _ = run_of(tmp_path, "fixed.behaviour=nan_loss", num_steps=120)
        assert (end.kind, end.exit_code, end.step) == (EndKind.STOPPED, 3, 50)
        assert end.outcome == "nothing_trained"
        words = "nothing was trained: the last 50 steps changed no parameter"
        assert end.lines[0] == f"CRITICAL stopped at step 50 of 120: {words}"
        assert end.lines[1].startswith("look at the task's loss and the data")
        with pytest.raises(UsageError, match=r"would stop there again\. look at the task's loss"):
            resumed(tmp_path / "run")
        end, _ = resumed(tmp_path / "run", "fixed.learning_rate=1e-4", num_steps=130)
        assert end.step > 51, "other settings get fifty steps of their own"

    def test_all_steps_without_a_change_are_not_done(self, tmp_path: Path) -> None:
        end, _ = run_of(tmp_path, "fixed.behaviour=nan_loss", num_steps=10)
        assert (end.kind, end.exit_code) == (EndKind.DONE, 3)
        assert end.lines[0].startswith("CRITICAL nothing was trained: none of 10 steps")

    def test_a_probe_of_nan_is_a_warning_each_epoch_and_not_done(self, tmp_path: Path) -> None:
        end, lines = run_of(tmp_path, "fixed.behaviour=nan_probe", num_steps=10)
        assert (end.kind, end.exit_code) == (EndKind.DONE, 3)
        assert end.lines[0].startswith("CRITICAL the last probe loss is NaN or Inf: look at")
        assert not any(line.startswith("done") for line in end.lines)
        for epoch in (1, 2):
            start = f"WARNING epoch {epoch}: the probe loss is NaN or Inf"
            assert sum(line.startswith(start) for line in lines) == 1
        assert not any("healthy so far" in line for line in lines)

    def test_a_loss_far_above_its_start_stops_it(self, tmp_path: Path) -> None:
        end, _ = run_of(tmp_path, "fixed.behaviour=diverge", num_steps=120)
        assert end.outcome == "diverged"
        assert end.step == 70

    def test_an_alarm_ends_the_run_only_where_it_is_told_to(self, tmp_path: Path) -> None:
        overrides = ("fixed.nan_from=11", "alarms.skipped_frac=0.3")
        end, lines = run_of(tmp_path, *overrides, task="Noisy")
        assert end.exit_code == 0
        assert any(line.startswith("CRITICAL") and "skipped" in line for line in lines)
        end, _ = run_of(
            tmp_path, *overrides, "alarms.on_alarm=end_run", task="Noisy", name="other"
        )
        assert (end.exit_code, end.outcome) == (3, "alarm")
        assert end.step < 20

    def test_an_alarm_ends_the_epoch_and_leaves_its_data_out(self, tmp_path: Path) -> None:
        end, lines = run_of(
            tmp_path,
            *("fixed.nan_from=11", "alarms.skipped_frac=0.3", "alarms.on_alarm=end_epoch"),
            task="Noisy",
        )
        ended = [line for line in lines if "(alarms.on_alarm: end_epoch)" in line]
        assert ended
        assert ended[0].startswith("CRITICAL epoch 2 ended after 2 steps")
        assert end.step == 20
        left_out = sum(int(line.rpartition("of ")[2].split()[0]) for line in ended)
        assert state_of(tmp_path / "run")["stream"]["num_drawn"] == 2 * (20 + left_out)

    def test_out_of_memory_advises_half_the_batch(self, tmp_path: Path) -> None:
        end, _ = run_of(tmp_path, "fixed.behaviour=out_of_memory", "fixed.at_step=30")
        assert (end.exit_code, end.outcome) == (3, "out_of_memory")
        assert "--set fixed.batch_size=2 --set fixed.accumulation_steps=4" in end.lines[3]

    def test_an_error_of_the_task_is_exit_5_with_its_traceback_in_the_log(
        self, tmp_path: Path
    ) -> None:
        end, _ = run_of(tmp_path, "fixed.behaviour=raise", "fixed.at_step=30")
        assert end.exit_code == 5
        assert "KeyError: 'a bug of the user's'" in end.lines[0].replace('"', "'")
        assert "Traceback" in (tmp_path / "run" / "train.log").read_text()
