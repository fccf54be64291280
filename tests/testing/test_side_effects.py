"""`check_task` finds what a task keeps, shares or changes, and lets the harmless pass."""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stability_search.testing import check_task
from tests.testing.sound_task import Sound

Batch = dict[str, Tensor]


class OneModel(Sound):
    """Hands out the same module at every call."""

    def __init__(self) -> None:
        self.kept = nn.Linear(3, 1)

    def model(self) -> nn.Module:
        return self.kept


class OneBackbone(Sound):
    """Shares a frozen part between trials, as a pretrained one may be."""

    def __init__(self) -> None:
        self.backbone = nn.Linear(3, 3).requires_grad_(requires_grad=False)

    def model(self) -> nn.Module:
        return nn.Sequential(self.backbone, nn.Linear(3, 1))


class OneBuffer(Sound):
    """Fills the same tensors again for every batch."""

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        kept: Batch | None = None
        for batch in super().batches(batch_size, generator):
            kept = kept or batch
            for name, tensor in batch.items():
                kept[name].copy_(tensor)
            yield kept


class InOnePlace(Sound):
    """Cuts training and probe batches out of one tensor, side by side."""

    first_probe_sample = 32

    def __init__(self) -> None:
        self.inputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(2))
        self.mask = torch.ones(3)

    def _batch(self, start: int, stop: int) -> Batch:
        inputs = self.inputs[start:stop]
        return {"inputs": inputs, "targets": inputs.sum(dim=1, keepdim=True), "mask": self.mask}

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            start = int(torch.randint(32 - batch_size, (1,), generator=generator))
            yield self._batch(start, start + batch_size)

    def probe(self) -> Sequence[Batch]:
        first = self.first_probe_sample
        return [self._batch(first + 8 * k, first + 8 * (k + 1)) for k in range(4)]


class NothingHeldOut(InOnePlace):
    """Probes what it trains on."""

    first_probe_sample = 0


class WritesIntoBatch(Sound):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        batch["inputs"].mul_(0.9)
        return super().loss(model, batch)  # type: ignore[return-value]


class DrawsFromNumpy(Sound):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().loss(model, batch) * np.random.rand()  # type: ignore[operator,return-value]  # noqa: NPY002


class DrawsFromPython(Sound):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().loss(model, batch) * random.random()  # type: ignore[operator,return-value]  # noqa: S311


class DrawsFromTorch(Sound):
    """Adds noise that the engine can repeat: harmless."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().loss(model, batch) + torch.rand(())  # type: ignore[operator]


class SwitchesMode(Sound):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        model.eval()
        return super().loss(model, batch)  # type: ignore[return-value]


class Counts(Sound):
    """Weighs the loss by how often it was asked for."""

    def __init__(self) -> None:
        self.count = 0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.count += 1
        return super().loss(model, batch) * self.count  # type: ignore[operator,return-value]


class Curriculum(Sound):
    """Weighs the loss by the batches drawn so far, those of earlier trials included."""

    num_drawn = 0

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        for batch in super().batches(batch_size, generator):
            self.num_drawn += 1
            yield batch

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().loss(model, batch) * self.num_drawn  # type: ignore[operator,return-value]


class NewCurriculum(Curriculum):
    """The same, begun again by every trial: harmless."""

    def model(self) -> nn.Module:
        self.num_drawn = 0
        return super().model()


class WritesIntoProbe(Sound):
    """Spoils a probe batch while it trains."""

    def __init__(self) -> None:
        self.kept = list(Sound.probe(self))
        self.num_steps = 0

    def probe(self) -> Sequence[Batch]:
        return self.kept

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.num_steps += torch.is_grad_enabled()
        if self.num_steps > 4:
            self.kept[0]["inputs"].zero_()
        return super().loss(model, batch)  # type: ignore[return-value]

    def baseline(self) -> float:
        return 3.0


class MovingBaseline(WritesIntoProbe):
    """Measures its baseline by what training has left behind."""

    def probe(self) -> Sequence[Batch]:
        return Sound.probe(self)

    def baseline(self) -> float:
        return float(self.num_steps > 4)


@pytest.mark.parametrize(
    ("make", "finding"),
    [
        (OneModel, "`model` hands out the parameter `weight` a second time"),
        (OneBuffer, "`batches` changes a batch after it was yielded"),
        (NothingHeldOut, "`batches` yields memory of `probe`"),
        (WritesIntoBatch, "`loss` changes its batch in place"),
        (DrawsFromNumpy, "`loss` draws from numpy's or Python's global random state"),
        (DrawsFromPython, "`loss` draws from numpy's or Python's global random state"),
        (SwitchesMode, "`loss` switches modules between train and eval mode"),
        (Counts, "on the same weights, batch and random state; keep nothing between two calls"),
        (Curriculum, "the task keeps something of the first one"),
        (WritesIntoProbe, "`probe` returns other batches after training"),
        (MovingBaseline, "`baseline` returns another number after training"),
    ],
)
def test_each_side_effect_is_found(make: Callable[[], Any], finding: str) -> None:
    findings = check_task(make())
    assert len(findings) == 1, findings
    assert finding in findings[0]


@pytest.mark.parametrize("make", [OneBackbone, InOnePlace, DrawsFromTorch, NewCurriculum])
def test_what_is_harmless_passes(make: Callable[[], Any]) -> None:
    assert check_task(make()) == ()


def test_side_effects_wait_until_the_rest_is_sound() -> None:
    class TwoFaults(WritesIntoBatch):
        def probe(self) -> Sequence[Batch]:
            return super().probe()[:1]

    (finding,) = check_task(TwoFaults())
    assert finding.startswith("`probe` should have at least 4 batches")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("torch's default dtype", lambda: torch.set_default_dtype(torch.float64)),
        ("torch's gradient mode", lambda: torch.set_grad_enabled(False)),
        ("torch's number of threads", lambda: torch.set_num_threads(torch.get_num_threads() + 1)),
        ("torch's precision of fp32 products", lambda: torch.set_float32_matmul_precision("high")),
    ],
)
def test_a_setting_of_the_process_that_was_changed_is_named_and_put_back(
    name: str, change: Callable[[], object]
) -> None:
    class Changes(Sound):
        def baseline(self) -> float:
            change()
            return 3.0

    before = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    assert check_task(Changes())[-1] == (
        f"The task leaves {name} changed; other tasks share the process."
    )
    after = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    assert before == after
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_changed_working_directory_is_named_and_put_back(tmp_path: Path) -> None:
    class Moves(Sound):
        def probe(self) -> Sequence[Batch]:
            os.chdir(tmp_path)
            return super().probe()

    before = Path.cwd()
    (finding,) = check_task(Moves())
    assert finding.startswith("The task leaves the working directory changed")
    assert Path.cwd() == before


def test_a_baseline_that_is_no_number_is_found() -> None:
    class Boolean(Sound):
        def baseline(self) -> float:
            return True

    (finding,) = check_task(Boolean())
    assert finding == "`baseline` must return a finite number, but returned True."
