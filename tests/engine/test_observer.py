"""A signal that cannot be read is noted, and training goes on as if nobody had looked."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stability_search.engine import GuardedEngine
from stability_search.engine.observer import Observer
from stability_search.records.step import StepLabel
from stability_search.settings.engine import EngineSettings
from tests.engine.plain import loss_fn, net, same, train, windows

CHOSEN = EngineSettings(learning_rate=0.01)


class Unreadable(nn.Module):
    """Returns, beside its output, something that looks like a tensor and cannot be reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor) -> Any:
        odd = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        return {"prediction": self.net(x), "odd": odd}


def odd_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return loss_fn(lambda _: model(x)["prediction"], (x, y))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_output_that_cannot_be_read_is_noted_once_and_training_is_the_same() -> None:
    data = windows(5)
    odd, plain = Unreadable(), net()
    torch.manual_seed(3)
    with GuardedEngine(plain, CHOSEN) as engine:
        train(engine, data)
        assert engine.notes == ()
    torch.manual_seed(3)
    with GuardedEngine(odd, CHOSEN) as engine:
        records = train(engine, data, odd_loss)
        (note,) = engine.notes
    assert {record.label for record in records} == {StepLabel.OK}
    assert note.startswith("The model's output is not fully observed (")
    assert same(odd.net.state_dict(), plain.state_dict())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_without_the_observer_it_would_have_ended_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def look(_: Observer, what: str, read: Callable[[], Any], otherwise: Any) -> Any:  # noqa: ARG001
        return read()

    monkeypatch.setattr(Observer, "look", look)
    with (
        GuardedEngine(Unreadable(), CHOSEN) as engine,
        pytest.raises((RuntimeError, NotImplementedError), match=r"nested|Nested|aten::"),
    ):
        train(engine, windows(1), odd_loss)


def test_each_thing_is_noted_once() -> None:
    observer = Observer()

    def fail() -> int:
        raise ValueError("no such thing")

    seen = [observer.look(what, fail, 7) for what in ("clock", "clock", "door")]
    assert seen == [7, 7, 7]
    assert observer.look("window", lambda: 3, 7) == 3
    assert observer.notes == [
        "The clock is not fully observed (ValueError: no such thing).",
        "The door is not fully observed (ValueError: no such thing).",
    ]
