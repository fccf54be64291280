"""`check_task` finds each fault it claims to find, and nothing in a sound task."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stability_search.testing import check_task
from tests.testing.sound_task import Deep, Sound

Method = Callable[..., Any]


def with_method(name: str, method: Method) -> Any:  # noqa: ANN401 - a task with one fault
    """Return the sound task with one method replaced."""
    return type("Faulty", (Sound,), {name: method})()


def numbers_of_numpy(_task: Sound, batch_size: int, _generator: torch.Generator) -> Iterator[Any]:
    while True:
        yield np.random.rand(batch_size)  # noqa: NPY002 - the fault


def global_numbers(_task: Sound, batch_size: int, _generator: torch.Generator) -> Iterator[Any]:
    while True:
        yield {"inputs": torch.randn(batch_size, 3), "targets": torch.zeros(batch_size, 1)}


def a_wasted_draw(task: Sound, batch_size: int, generator: torch.Generator) -> Iterator[Any]:
    for batch in Sound.batches(task, batch_size, generator):
        random.random()  # noqa: S311 - the fault
        yield batch


def always_the_same(_task: Sound, batch_size: int, _generator: torch.Generator) -> Iterator[Any]:
    while True:
        yield {"inputs": torch.ones(batch_size, 3), "targets": torch.ones(batch_size, 1)}


def a_short_stream(task: Sound, batch_size: int, generator: torch.Generator) -> Iterator[Any]:
    yield next(Sound.batches(task, batch_size, generator))


def no_stream(_task: Sound, _batch_size: int, _generator: torch.Generator) -> Iterator[Any]:
    return iter(())


class Counting:
    """Batches that go on where the last call ended."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, batch_size: int, _generator: torch.Generator) -> Iterator[Any]:
        while True:
            self.count += 1
            inputs = torch.full((batch_size, 3), float(self.count))
            yield {"inputs": inputs, "targets": inputs[:, :1]}


def own_seed(_task: Sound) -> nn.Module:
    model = nn.Linear(3, 1)
    nn.init.normal_(model.weight, generator=Fresh.generator)
    return model


class Fresh:
    generator = torch.Generator().manual_seed(5)


def frozen(_task: Sound) -> nn.Module:
    return nn.Linear(3, 1).requires_grad_(requires_grad=False)


def with_nan(_task: Sound) -> nn.Module:
    model = nn.Linear(3, 1)
    nn.init.constant_(model.bias, torch.nan)
    return model


def new_probe(task: Sound) -> Sequence[Any]:
    batches = task.batches(8, Fresh.generator)
    return [next(batches) for _ in range(4)]


def global_probe(_task: Sound) -> Sequence[Any]:
    return [{"inputs": torch.randn(8, 3), "targets": torch.zeros(8, 1)} for _ in range(4)]


def small_probe(task: Sound) -> Sequence[Any]:
    return Sound.probe(task)[:1]


def unreduced(_task: Sound, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["inputs"]) - batch["targets"]).square()


def detached(task: Sound, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss = Sound.loss(task, model, batch)
    assert isinstance(loss, Tensor)
    return loss.detach()


def infinite_term(task: Sound, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = Sound.loss(task, model, batch)
    assert isinstance(loss, Tensor)
    return {"fit": loss, "prior": torch.tensor(torch.inf)}


def number(_task: Sound, _model: nn.Module, _batch: object) -> float:
    return 1.0


@pytest.mark.parametrize("task", [Sound(), Deep()])
def test_a_sound_task_has_no_findings(task: Sound) -> None:
    assert check_task(task) == ()
    assert check_task(task) == ()


def test_a_loss_of_named_terms_is_sound() -> None:
    def loss(task: Sound, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"half": Sound.loss(task, model, batch) / 2, "rest": torch.tensor(0.0)}  # type: ignore[operator]

    assert check_task(with_method("loss", loss)) == ()


@pytest.mark.parametrize(
    ("name", "method", "finding"),
    [
        ("model", lambda _task: 3, "`model` must return a torch.nn.Module, but returned int."),
        ("model", frozen, "`model` has no parameter to train."),
        ("model", with_nan, "`model` starts with a parameter that is NaN or infinite."),
        ("model", own_seed, "`model` gives other weights under the same seed"),
        ("batches", a_short_stream, "`batches` must never end, but ended after 1"),
        ("batches", no_stream, "`batches` must never end, but ended after 0"),
        ("batches", a_wasted_draw, "`batches` draws from a global random state"),
        ("batches", global_numbers, "`batches` draws from a global random state"),
        ("batches", global_numbers, "`batches` depends on the global random state"),
        ("batches", always_the_same, "`batches` ignores its generator"),
        ("batches", Counting(), "`batches` gives other batches under the same generator seed"),
        ("probe", new_probe, "`probe` must return the same batches at every call"),
        ("probe", global_probe, "`probe` draws from a global random state"),
        ("probe", small_probe, "`probe` should have at least 4 batches"),
        ("loss", unreduced, "`loss` must be a scalar, but has shape (2, 1) on a training batch"),
        ("loss", detached, "it has no gradient"),
        ("loss", infinite_term, "`loss` (term `prior`) must be finite at the start, but is inf"),
        ("loss", number, "`loss` must be a tensor, but is float on a training batch"),
        ("loss", lambda *_: {}, "`loss` must name at least one term"),
        ("probe_loss", number, "`probe_loss` must be a tensor, but is float on probe batch 0"),
        ("baseline", lambda _: float("nan"), "`baseline` must return a finite number"),
        ("baseline", lambda _: torch.rand(1).item(), "`baseline` must return the same number"),
        ("metrics", lambda *_: {"error": None}, "`metrics` must return finite numbers"),
        (
            "init_gain_parameters",
            lambda *_: ["weight", "wait"],
            "`init_gain_parameters` names `wait`",
        ),
        (
            "parameter_groups",
            lambda _, model: [{"params": [model.weight]}],
            "`parameter_groups` leaves out `bias`; it would never be trained.",
        ),
    ],
)
def test_each_fault_is_found(name: str, method: Method, finding: str) -> None:
    findings = check_task(with_method(name, method))
    assert [sentence for sentence in findings if finding in sentence], findings


def test_numpy_numbers_in_the_stream_are_found() -> None:
    faulty = with_method("batches", numbers_of_numpy)
    faulty.__class__.loss = lambda _task, model, _batch: model.weight.sum()
    findings = check_task(faulty)
    assert any("`batches` draws from a global random state" in sentence for sentence in findings)


def test_missing_methods_are_named_and_nothing_else_is_tried() -> None:
    class Half:
        model = Sound.model
        loss = Sound.loss

    half: Any = Half()
    assert check_task(half) == (
        "The method `batches` is missing.",
        "The method `probe` is missing.",
    )


def test_a_missing_baseline_is_asked_for() -> None:
    class WithoutBaseline:
        model, batches, probe, loss = Sound.model, Sound.batches, Sound.probe, Sound.loss

    task: Any = WithoutBaseline()
    (finding,) = check_task(task)
    assert finding.startswith("The method `baseline` is missing: return the probe loss")


def test_what_a_task_raises_is_not_hidden() -> None:
    def broken(_task: Sound, _model: nn.Module, _batch: object) -> Tensor:
        raise KeyError("frames")

    with pytest.raises(KeyError, match="frames"):
        check_task(with_method("loss", broken))


def test_the_random_states_are_left_as_they_were() -> None:
    def draw_after(act: Callable[[], object]) -> tuple[float, float, float]:
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002 - the global states are what is shown
        random.seed(1)
        act()
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002, S311

    assert draw_after(lambda: check_task(Sound())) == draw_after(lambda: None)


def test_batches_may_be_any_nest() -> None:
    class Holder:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    def nested(_task: Sound, batch_size: int, generator: torch.Generator) -> Iterator[Any]:
        while True:
            inputs = torch.randn(batch_size, 3, generator=generator)
            yield [(Holder(inputs), "name"), {"targets": inputs[:, :1].numpy()}]

    def loss(_task: Sound, model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
        if isinstance(batch, dict):
            return model(batch["inputs"]).mean()  # type: ignore[no-any-return]
        return model(batch[0][0].value).mean()  # type: ignore[no-any-return]

    task = type("Nested", (Sound,), {"batches": nested, "loss": loss, "probe": a_plain_probe})()
    assert check_task(task) == ()


def a_plain_probe(_task: Sound) -> Sequence[Any]:
    return Sound().probe()
