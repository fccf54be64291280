"""What a trial may leave behind in its process is seen, and named."""

import contextlib
import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import timeit
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_pre_hook

from stability_search.records.trial import TrialSummary
from stability_search.search import process_state as process_states
from stability_search.search.process_state import CleanProcess
from stability_search.settings.engine import EngineSettings
from stability_search.settings.trial import TaskReference, TrialConfig, TrialConstants
from stability_search.trial import run_trial
from stability_search.yardstick import probe_steps

pytestmark = pytest.mark.fault

TINY = Path(__file__).resolve().parents[1] / "tiny_task.py"

Undo = Callable[[], object]


@pytest.fixture(scope="module", autouse=True)
def _used_torch() -> None:
    """Do what a worker does in its `setup`: the first optimizer imports much of torch."""
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


def switch(owner: object, name: str, value: object) -> Undo:
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def call(change: Callable[..., object], value: object, back: object) -> Undo:
    change(value)
    return lambda: change(back)


def plant_hook() -> Undo:
    return nn.modules.module.register_module_forward_hook(lambda *_: None).remove


def plant_optimizer_hook() -> Undo:
    hook = register_optimizer_step_pre_hook(lambda *_: None)
    return hook.remove


def enter(context: "contextlib.AbstractContextManager[object]") -> Undo:
    context.__enter__()
    return lambda: context.__exit__(None, None, None)


def plant_variable() -> Undo:
    os.environ["PLANTED"] = "1"
    return lambda: os.environ.pop("PLANTED")


def plant_method() -> Undo:
    torch.Tensor.add = lambda *_: None  # type: ignore[assignment, method-assign]
    return lambda: delattr(torch.Tensor, "add")


def plant_filter() -> Undo:
    catcher = warnings.catch_warnings()
    catcher.__enter__()
    warnings.simplefilter("error", category=BytesWarning)
    return lambda: catcher.__exit__(None, None, None)


def plant_directory() -> Undo:
    before = Path.cwd()
    os.chdir("/")
    return lambda: os.chdir(before)


def plant_affinity() -> Undo:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    return lambda: os.sched_setaffinity(0, before)


def plant_numpy() -> Undo:
    before = np.seterr(all="raise")
    return lambda: np.seterr(**before)


def plant_signal() -> Undo:
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    return lambda: signal.signal(signal.SIGUSR2, before)


def plant_collector() -> Undo:
    gc.disable()
    return gc.enable


THREADS = torch.get_num_threads()
LIMIT = sys.getrecursionlimit()

PLANTS: dict[str, tuple[str, Callable[[], Undo]]] = {
    "dtype": ("default dtype", lambda: call(torch.set_default_dtype, torch.half, torch.float32)),
    "device": ("default device", lambda: call(torch.set_default_device, "meta", None)),
    "threads": ("torch threads", lambda: call(torch.set_num_threads, THREADS + 1, THREADS)),
    "gradients": ("gradient mode", lambda: call(torch.set_grad_enabled, False, True)),
    "anomaly": (
        "anomaly detection",
        lambda: call(torch.autograd.set_detect_anomaly, True, False),
    ),
    "autocast": (
        "autocast",
        lambda: call(lambda on: torch.set_autocast_enabled("cpu", on), True, False),
    ),
    "autocast dtype": (
        "autocast dtype",
        lambda: call(
            lambda dtype: torch.set_autocast_dtype("cpu", dtype), torch.half, torch.bfloat16
        ),
    ),
    "deterministic": (
        "deterministic algorithms",
        lambda: call(torch.set_deterministic_debug_mode, 1, 0),
    ),
    "matmul": (
        "fp32 precision",
        lambda: call(torch.set_float32_matmul_precision, "high", "highest"),
    ),
    "denormal": ("denormal numbers", lambda: call(torch.set_flush_denormal, True, False)),
    "cudnn": ("cudnn.benchmark", lambda: switch(torch.backends.cudnn, "benchmark", True)),
    "mkldnn": ("mkldnn", lambda: call(torch._C._set_mkldnn_enabled, False, True)),  # noqa: SLF001
    "tf32": (
        "cuda.matmul.allow_tf32",
        lambda: switch(torch.backends.cuda.matmul, "allow_tf32", True),
    ),
    "kernels": (
        "attention kernels",
        lambda: call(torch.backends.cuda.enable_math_sdp, False, True),
    ),
    "hook": ("global hooks", plant_hook),
    "optimizer hook": ("global hooks", plant_optimizer_hook),
    "function mode": (
        "torch function modes",
        lambda: enter(torch.overrides.BaseTorchFunctionMode()),
    ),
    "saved tensors": (
        "hooks of saved tensors",
        lambda: enter(torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)),
    ),
    "function": (
        "torch.nn.functional.softmax",
        lambda: switch(functional, "softmax", functional.relu),
    ),
    "layer": ("LayerNorm.forward", lambda: switch(nn.LayerNorm, "forward", nn.Linear.forward)),
    "method": ("replaced methods of Tensor", plant_method),
    "directory": ("working directory", plant_directory),
    "variable": ("environment variables", plant_variable),
    "affinity": ("CPU affinity", plant_affinity),
    "collector": ("garbage collection", plant_collector),
    "recursion": ("recursion limit", lambda: call(sys.setrecursionlimit, LIMIT + 1, LIMIT)),
    "signal": ("signal handlers", plant_signal),
    "filter": ("warnings as errors", plant_filter),
    "numpy": ("numpy's floating-point errors", plant_numpy),
}


@pytest.mark.parametrize(("name", "plant"), PLANTS.values(), ids=PLANTS)
def test_a_setting_left_behind_is_named(name: str, plant: Callable[[], Undo]) -> None:
    clean = CleanProcess()
    assert clean.changes() == ()
    undo = plant()
    try:
        found = clean.changes()
    finally:
        undo()
    assert name in found
    assert clean.changes() == ()


@contextlib.contextmanager
def running_thread() -> Iterator[str]:
    ends = threading.Event()
    thread = threading.Thread(target=ends.wait, name="planted", daemon=True)
    thread.start()
    yield "thread planted"
    ends.set()
    thread.join()


@contextlib.contextmanager
def running_worker() -> Iterator[str]:
    worker = multiprocessing.get_context("fork").Process(target=signal.pause, daemon=True)
    worker.start()
    yield f"process {worker.pid}"
    worker.kill()
    worker.join()


@contextlib.contextmanager
def running_command() -> Iterator[str]:
    command = subprocess.Popen(["/bin/sleep", "60"], start_new_session=True)
    while not Path(f"/proc/{command.pid}/cmdline").read_bytes():
        time.sleep(0.001)  # it has only just begun
    yield f"process {command.pid}"
    command.kill()
    command.wait()


@contextlib.contextmanager
def kept_memory() -> Iterator[str]:
    kept = np.ones(int(200 * 2**20 / 8))
    yield "host memory"
    del kept


@pytest.mark.parametrize("leak", [running_thread, running_worker, running_command, kept_memory])
def test_what_goes_on_after_a_trial_is_named(
    leak: Callable[[], "contextlib.AbstractContextManager[str]"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_states, "SETTLE_S", 0.05)
    monkeypatch.setattr(process_states, "HOST_MEMORY_MIB", 100.0)
    monkeypatch.setattr(process_states, "HOST_MEMORY_SHARE", 0.0)
    gc.collect()  # what other tests left must not go while memory is compared
    clean = CleanProcess()
    assert clean.changes() == ()
    with leak() as name:
        found = clean.changes()
    assert [text.partition(" (")[0] for text in found] == [name]
    assert clean.changes() == ()


def test_processes_left_behind_can_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_states, "SETTLE_S", 10.0)
    with running_command() as before:
        clean = CleanProcess()
        with running_command() as left:
            clean.end_children()
            assert clean.changes() == ()
            assert left != before


def test_a_thread_that_ends_soon_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_states, "SETTLE_S", 10.0)
    clean = CleanProcess()
    thread = threading.Timer(0.1, lambda: None)
    thread.start()
    assert clean.changes() == ()


def test_memory_the_first_trial_keeps_is_its_data_and_no_leak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process_states, "HOST_MEMORY_MIB", 20.0)
    monkeypatch.setattr(process_states, "HOST_MEMORY_SHARE", 0.0)
    clean = CleanProcess()
    data = np.ones(int(40 * 2**20 / 8))
    assert clean.changes() == ()
    assert clean.changes() == ()
    assert data.size


def test_threads_of_torch_and_ray_are_theirs() -> None:
    clean = CleanProcess()
    ends = threading.Event()

    class Helper(threading.Thread):
        def run(self) -> None:
            ends.wait()

    Helper.__module__ = "ray.util"
    helper = Helper()
    helper.start()
    try:
        assert clean.changes() == ()
    finally:
        ends.set()
        helper.join()


def test_a_setting_torch_refuses_to_read_differs_from_one_it_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    clean = CleanProcess()
    readers = {**process_states._readers(), "fp32 precision": refuse}  # noqa: SLF001
    monkeypatch.setattr(process_states, "_readers", lambda: readers)
    assert clean.changes() == ("fp32 precision",)


def test_looking_costs_less_than_two_milliseconds() -> None:
    clean = CleanProcess()
    clean.changes()
    seconds = min(timeit.repeat(clean.changes, number=10, repeat=5)) / 10
    print(f"{1e3 * seconds:.2f} ms a trial")
    assert seconds < 2 * 2e-3  # the promise, doubled for a busy machine


CONSTANTS = TrialConstants(probe_steps=probe_steps(20), measures_blind_run=True)


def train(behaviour: str = "fine") -> TrialSummary:
    config = TrialConfig(
        task=TaskReference(file=str(TINY), class_name="Tiny"),
        task_args={"behaviour": behaviour},
        engine=EngineSettings(learning_rate=0.01, num_planned_steps=20),
        num_planned_steps=20,
    )
    trial = run_trial(config, constants=CONSTANTS)
    while True:
        try:
            next(trial)
        except StopIteration as end:
            summary: TrialSummary = end.value
            return summary


def test_a_sound_trial_leaves_its_process_clean() -> None:
    train()  # loads the task, as a worker does before it looks
    clean = CleanProcess()
    assert train().num_steps == 20
    assert clean.changes() == ()


def test_random_states_left_behind_change_nothing_of_the_next_trial() -> None:
    first = train()
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002 - what is planted
    torch.manual_seed(7)
    torch.rand(3)
    second = train()
    assert second.num_steps == 20
    assert (second.judged_losses, second.probe_batch_losses, second.baseline) == (
        first.judged_losses, first.probe_batch_losses, first.baseline,
    )  # fmt: skip
