"""Judges each step of a script: one reading, one label, one line.

judge(optimizer):
    read losses, gradient norm and loss scale, in one transfer to the host
    label the step; where it is not finite, ask the held batches whether they are the cause
    say it, count it, raise alarms; after the first NaN say what to look at
    copy the running statistics after a good step, put them back after a bad one
"""

import math
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stability_search.alarms.alarm import Alarm
from stability_search.alarms.epochs import epoch_line
from stability_search.patches.course import Course
from stability_search.patches.loading import Data
from stability_search.patches.messages import Level, Messages
from stability_search.patches.settings import PatchSettings, variable
from stability_search.patches.statistics import RunningStatistics
from stability_search.patches.window import LossScaling, Reading, Window
from stability_search.records.step import StepLabel, StepRecord
from stability_search.settings.alarms import OnAlarm

EXIT_STOPPED = 3  # that of `train`, ended by a stop rule
_LOST = (StepLabel.BAD, StepLabel.DATA)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What becomes of a step.

    Attributes:
        record: The step.
        is_skipped: True if it must change neither parameters nor optimizer state.
        num_good: Good steps since the loss scale last changed, before this one.
    """

    record: StepRecord
    is_skipped: bool
    num_good: int


class Monitor:
    """What the patches of this process know together.

    Args:
        settings: How they act.
        messages: Where they say so.

    Attributes:
        data: The batches it was fed.
        statistics: Running statistics that a skip puts back.
    """

    def __init__(self, settings: PatchSettings, messages: Messages) -> None:
        self.settings = settings
        self.messages = messages
        self._windows = _Windows()
        self.data = Data()
        self.statistics = RunningStatistics()
        self._has_looked_for_norms = False
        self._courses: weakref.WeakKeyDictionary[torch.optim.Optimizer, Course] = (
            weakref.WeakKeyDictionary()
        )
        self._told: list[Course] = []  # also of optimizers that are gone

    @property
    def window(self) -> Window:
        """What this thread has seen since its last step."""
        return self._windows.window

    # -- steps -------------------------------------------------------------------------------

    def judge(
        self, optimizer: torch.optim.Optimizer, scaling: LossScaling | None
    ) -> Verdict | None:
        """Judge an attempt at a step, before it is taken.

        Args:
            optimizer: Whose step it is.
            scaling: Its loss scaling; None without.

        Returns:
            None if there is nothing to judge, for want of gradients.
        """
        reading = self.window.read(optimizer, scaling)
        return None if reading is None else self.judge_reading(optimizer, reading)

    def judge_reading(self, optimizer: torch.optim.Optimizer, reading: Reading) -> Verdict:
        """Judge an attempt at a step that has been measured.

        Raises:
            SystemExit: An alarm rose whose `on_alarm` ends the run.
        """
        self.messages.release()
        course = self._course(optimizer)
        loss_decides = self._loss_decides(optimizer, reading)
        fault, index = "", None
        if not _is_finite(reading, loss_decides=loss_decides):
            fault, index = self.data.fault()
        record = course.judge(
            reading,
            learning_rate=_rate(optimizer),
            loss_decides=loss_decides,
            batch_fault=fault,
            batch_index=index,
        )
        is_lost = record.label in _LOST
        is_skipped = record.label is not StepLabel.OK and not course.is_observed
        self._say_step(course, record, last_batch=index)
        if is_lost:
            self._say_advice(record, fault, is_batch_known=index is not None)
            self._check_parameters(optimizer, course)
        if not self.settings.observe:
            self._keep_statistics(record)
        self.window.close()
        num_batches = self.data.step_was_taken()
        if num_batches:
            course.epoch_holds(num_batches)
        self._raise_alarms(course, record)
        return Verdict(record=record, is_skipped=is_skipped, num_good=reading.num_good)

    def scale_rose(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Note that the loss scale grew: it has proven nothing yet."""
        for optimizer in optimizers:
            self._course(optimizer).proof.scale_rose()

    def backward_was_aborted(self, error: RuntimeError) -> None:
        """Note that anomaly mode has found the operation that gave NaN."""
        fact = str(error).splitlines()[0]
        self.window.aborted = f"backward pass ended: {fact}"
        self.messages.say(
            Level.CRITICAL, f"anomaly mode: {fact} The trace of its forward call stands above."
        )

    # -- epochs ------------------------------------------------------------------------------

    def epoch_ended(self) -> None:
        """End the epoch of every optimizer: training starts its data again."""
        for course in list(self._courses.values()):
            self._say_alarms(course.end_epoch())
            self._say_epoch(course)

    def batch_arrived(self) -> None:
        """Look for norms before the first batch reaches them."""
        if self._has_looked_for_norms or self.settings.observe:
            return
        self._has_looked_for_norms = True
        with self.messages.survives("statistics of BatchNorm"):
            self.statistics.find()

    def summary(self) -> list[str]:
        """Return how the run went, a line for each optimizer that took a step."""
        lines = []
        for course in self._told:
            counts = ", ".join(
                f"{label.value} {course.counts[label]}"
                for label in StepLabel
                if course.counts[label]
            )
            lines.append(
                f"{course.step} steps: {self._skips(course)} ({counts}){self._which(course)}"
            )
        return lines

    # -- inside ------------------------------------------------------------------------------

    def _course(self, optimizer: torch.optim.Optimizer) -> Course:
        course = self._courses.get(optimizer)
        if course is None:
            is_split = _is_split(optimizer)
            if is_split and not self.settings.observe:
                self.messages.once("split", Level.WARNING, _SPLIT)
            course = Course(
                len(self._told) + 1,
                type(optimizer).__name__,
                self.settings.alarms,
                is_observed=self.settings.observe or is_split,
            )
            self._courses[optimizer] = course
            self._told.append(course)
            self.batch_arrived()  # of a script without a loader
        return course

    def _loss_decides(self, optimizer: torch.optim.Optimizer, reading: Reading) -> bool:
        """Return True if a loss that is not finite condemns a step of finite gradients."""
        if all(map(math.isfinite, reading.losses)):  # nearly always
            return True
        if _is_distributed():  # each process has a loss of its own, and all must decide alike
            return False
        # Of several optimizers, another one's loss says nothing about this one.
        return len(self._told) == 1 or self.window.reaches(optimizer)

    def _keep_statistics(self, record: StepRecord) -> None:
        with self.messages.survives("statistics of BatchNorm"):
            if record.label is StepLabel.OK:
                self.statistics.copy()
                return
            num_restored, num_lost = self.statistics.restore()
            if num_restored:
                self.messages.say(
                    Level.INFO,
                    f"step {record.step}: the running statistics of {num_restored} BatchNorm "
                    "module(s) were NaN or Inf, and are as after the last good step again",
                )
            if num_lost:
                self.messages.once(
                    "lost statistics",
                    Level.CRITICAL,
                    f"step {record.step}: the running statistics of {num_lost} BatchNorm "
                    "module(s) are NaN or Inf, and no earlier copy is finite: eval mode will "
                    "give NaN. Go on from the last good checkpoint.",
                )

    def _check_parameters(self, optimizer: torch.optim.Optimizer, course: Course) -> None:
        """Look at the parameters after the 1st, 2nd, 4th, 8th, ... bad step in a row."""
        count = course.num_bad_in_a_row
        if count & (count - 1) or _are_parameters_finite(optimizer):
            return
        self.messages.once(
            f"parameters of {course.number}",
            Level.CRITICAL,
            f"step {course.step}{self._which(course)}: parameters are NaN or Inf, so every "
            "further step will be bad, and no patch can undo it. Go on from the last good "
            "checkpoint.",
        )

    def _raise_alarms(self, course: Course, record: StepRecord) -> None:
        alarms, must_end = course.see(record)
        self._say_alarms(alarms)
        self._say_epoch(course)
        if self.settings.observe:
            return
        if must_end is OnAlarm.END_EPOCH:
            self.data.has_to_end_epoch = True
            self.messages.say(
                Level.WARNING,
                f"step {record.step}: this epoch ends here ({variable('alarms.on_alarm')})",
            )
        elif must_end is OnAlarm.END_RUN:
            self.messages.say(
                Level.CRITICAL,
                f"step {record.step}: the run ends here ({variable('alarms.on_alarm')})",
            )
            raise SystemExit(EXIT_STOPPED)

    # -- words -------------------------------------------------------------------------------

    def _say_step(self, course: Course, record: StepRecord, *, last_batch: int | None) -> None:
        if record.label is not StepLabel.OK:
            batch = ""
            if record.batch_index is not None:
                batch = f", batch {record.batch_index} (from 0) of its loader"
            elif last_batch is not None:
                batch = f", batch {last_batch} (from 0) was the last one read"
            deed = "skipped by PyTorch" if course.is_observed else "skipped"
            deed = "applied all the same" if record.is_applied else deed
            level = Level.WARNING if record.label in _LOST else Level.INFO
            self.messages.say(
                level,
                f"{self._place(course)}: {deed}, {record.label.value}: {record.reason}{batch} "
                f"(learning rate {record.learning_rate:g}{_scale(record)})",
            )
        if record.step % self.settings.every_steps == 0:
            self.messages.say(
                Level.INFO,
                f"{self._place(course)}: loss {_number(record.loss)}, "
                f"grad_norm {_number(record.grad_norm)}{_scale(record)}, {self._skips(course)}",
            )

    def _place(self, course: Course) -> str:
        return f"step {course.step} epoch {course.epoch}{self._which(course)}"

    def _say_epoch(self, course: Course) -> None:
        summary = course.take_finished_epoch()
        if summary is not None:
            self.messages.say(Level.INFO, f"{epoch_line(summary)}{self._which(course)}")

    def _skips(self, course: Course) -> str:
        share = course.num_skipped / course.step
        verb = "seen" if self.settings.observe else "skipped"
        return f"NaN/Inf {verb} {course.num_skipped} ({share:.1%})"

    def _which(self, course: Course) -> str:
        if len(self._told) == 1:
            return ""
        return f" (optimizer {course.number}, {course.kind})"

    def _say_alarms(self, alarms: Sequence[Alarm]) -> None:
        for alarm in alarms:
            self.messages.say(
                Level(alarm.level.value), alarm.message.removeprefix(f"{alarm.level} ")
            )

    def _say_advice(self, record: StepRecord, fault: str, *, is_batch_known: bool) -> None:
        """Say once what to look at, in the order in which it usually is the cause."""
        if fault:
            data = f"{fault}, see the line above"
        elif is_batch_known:
            data = "no NaN or Inf in the batch; look for corrupt or empty samples in it"
        else:
            data = "no batch was seen (no DataLoader); look for corrupt or empty samples"
        mode = "it is on, its trace names the operation"
        if not self.settings.anomaly:
            mode = f"{variable('anomaly')}=1 or --anomaly names the operation, at two thirds of "
            mode += "the speed"
        lines = [
            "after a NaN look at, in this order:",
            f"  1. the learning rate: it is {record.learning_rate:g}; try a tenth, down to 1e-6",
            f"  2. the data: {data}",
            "  3. the vocabulary: every token id must be below the size of its embedding",
            f"  4. anomaly detection: {mode}",
        ]
        for number, line in enumerate(lines):
            self.messages.once(f"advice {number}", Level.WARNING, line)


_SPLIT = (
    "gradients are split over processes (FSDP, DTensor): NaN and Inf are only counted there, as "
    "one process cannot skip a step for all"
)


class _Windows(threading.local):
    """A window for each thread, as each may train a model of its own."""

    def __init__(self) -> None:
        self.window = Window()


def _is_finite(reading: Reading, *, loss_decides: bool) -> bool:
    """Return True if nothing about it asks for a look at the data."""
    if reading.aborted or not (reading.grad_norm is None or math.isfinite(reading.grad_norm)):
        return False
    return not loss_decides or all(map(math.isfinite, reading.losses))


def _rate(optimizer: torch.optim.Optimizer) -> float:
    rate = optimizer.param_groups[0].get("lr", 0.0)
    if isinstance(rate, torch.Tensor):
        rate = rate.item() if rate.device.type == "cpu" else 0.0  # not worth a transfer
    return float(rate)


def _is_distributed() -> bool:
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return False
    return distributed.get_world_size() > 1


def _is_split(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if this process holds only a part of the gradients."""
    parameters = optimizer.param_groups[0]["params"]
    return bool(parameters) and (
        hasattr(parameters[0], "full_tensor") or hasattr(parameters[0], "_is_flat_param")
    )


def _are_parameters_finite(optimizer: torch.optim.Optimizer) -> bool:
    return all(
        bool(torch.isfinite(parameter).all())
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def _number(value: float | None) -> str:
    return "NaN or Inf" if value is None else f"{value:.4g}"


def _scale(record: StepRecord) -> str:
    return "" if record.scale is None else f", loss scale {record.scale:g}"
