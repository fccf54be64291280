"""The same on a GPU: `gpu: auto` takes it, and an interrupted training goes on there."""

from pathlib import Path

import pytest
import torch

from stability_search.training.command import begin, go_on
from tests.training.world import json_of, steps_of, write_space

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_trains_and_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    space = write_space(tmp_path, f"fixed.precision={precision}", task="Noisy")
    monkeypatch.setenv("SIGNAL_AT", "14 15")
    assert begin(space, num_steps=20, output=tmp_path / "run").exit_code == 143
    monkeypatch.delenv("SIGNAL_AT")
    lines: list[str] = []
    assert go_on(tmp_path / "run", listener=lines.append).exit_code == 0
    assert not [line for line in lines if "not the same" in line]
    assert json_of(tmp_path / "run")["phases"][0]["device"] == "cuda"
    assert [record.step for record in steps_of(tmp_path / "run")] == list(range(1, 21))
