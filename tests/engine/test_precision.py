"""The loss scale on the host, and what a device cannot honour."""

import pytest
import torch

from stability_search.engine.precision import LossScale, autocast, check_precision
from stability_search.errors import UsageError
from stability_search.settings.engine import EngineSettings


def scale(**settings: float) -> LossScale:
    return LossScale(EngineSettings(learning_rate=1.0, precision="fp16", **settings))


def test_it_halves_on_overflow_and_doubles_after_calm_steps() -> None:
    found = scale(init_scale=1024.0, growth_interval=3)
    assert [found.worked() for _ in range(3)] == [False, False, True]
    assert found.value == 2048.0
    assert [found.worked() for _ in range(2)] == [False, False]
    found.overflowed()
    assert found.value == 1024.0
    assert [found.worked() for _ in range(3)] == [False, False, True]


def test_it_moves_as_gradscaler_does() -> None:
    steps = [True] * 7 + [False, True, True, False, False] + [True] * 9
    ours, theirs = (
        scale(init_scale=256.0, growth_interval=3),
        torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3),
    )
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], 0.0)
    for is_calm in steps:
        weight.grad = torch.ones(1) if is_calm else torch.full((1,), torch.inf)
        theirs.scale(torch.ones(1))
        theirs.step(optimizer)
        theirs.update()
        _ = ours.worked() if is_calm else ours.overflowed()
        assert ours.value == theirs.get_scale()


def test_it_never_passes_max_scale() -> None:
    found = scale(init_scale=1024.0, growth_interval=1, max_scale=3000.0)
    assert found.worked()
    assert not found.worked()
    assert found.value == 2048.0


def test_it_never_becomes_infinite() -> None:
    found = scale(init_scale=2.0**127, growth_interval=1)
    assert not found.worked()
    assert found.value == 2.0**127


def test_a_start_above_max_scale_is_refused() -> None:
    with pytest.raises(
        UsageError, match="init_scale <= max_scale must hold, but got 65536 and 1024"
    ):
        scale(max_scale=1024.0)


def test_it_goes_on_from_its_state() -> None:
    first, second = scale(growth_interval=3), scale(growth_interval=3)
    first.overflowed()
    first.worked()
    second.load_state_dict(first.state_dict())
    assert [second.worked(), second.worked()] == [False, True]
    assert second.value == 65536.0


def test_bf16_is_refused_where_the_gpu_only_imitates_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def is_supported(*, including_emulation: bool) -> bool:
        asked.append(including_emulation)
        return False

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Turing")
    with pytest.raises(UsageError, match="precision: Turing has no bf16"):
        check_precision("bf16", torch.device("cuda"))
    assert asked == [False]
    check_precision("fp16", torch.device("cuda"))
    check_precision("bf16", torch.device("cpu"))


def test_fp32_turns_an_outer_autocast_off() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with autocast("fp32", torch.device("cpu")):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
    with autocast("fp16", torch.device("cpu")):
        assert (x @ x).dtype == torch.float16
