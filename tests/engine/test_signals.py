"""The numbers of a window: named, judged on the device and on the host alike."""

import math

import pytest
import torch

from stability_search.engine.signals import MAX_GRAD_NORM, Signals, spell_error

ONE = torch.tensor(1.0)
NAN, INF = torch.tensor(math.nan), torch.tensor(math.inf)


def filled(**kinds: torch.Tensor) -> Signals:
    signals = Signals()
    signals.add("loss", 0, [kinds.pop("loss", ONE)])
    for kind, value in kinds.items():
        signals.add(kind.replace("_", " ", 1) if kind == "attention_output" else kind, 0, [value])
    return signals


def test_numbers_keep_their_micro_batch() -> None:
    signals = Signals()
    for position in (0, 2):
        signals.add("loss", position, [torch.tensor(float(position))])
        signals.add_terms(position, {"box": torch.tensor([3.0 + position])})
        signals.add("attention_max", position, [torch.tensor(10.0 * position)])
        signals.add("clamp_frac", position, [torch.tensor(0.5 * position), torch.tensor(0.0)])
    signals.found_nonfinite(torch.tensor(8.0), torch.tensor(2.0))

    reading = signals.read(torch.tensor(5.0))

    assert reading.losses == {0: 0.0, 2: 2.0}
    assert reading.terms == {0: {"box": 3.0}, 2: {"box": 5.0}}
    assert (reading.attention_max, reading.clamp_frac, reading.cap_frac) == (20.0, 0.25, None)
    assert (reading.grad_norm, reading.is_grad_finite, reading.state_norm) == (2.0, True, 5.0)
    assert reading.faults == {}


def test_without_gradients_there_is_no_norm_and_nothing_to_fault() -> None:
    reading = filled().read(ONE)
    assert (reading.grad_norm, reading.is_grad_finite) == (None, True)


@pytest.mark.parametrize(
    ("kinds", "fault"),
    [
        ({}, None),
        ({"loss": NAN}, "loss is NaN"),
        ({"loss": INF}, "loss is Inf"),
        ({"loss": -INF}, "loss is -Inf"),
        ({"output": NAN, "loss": NAN}, "model output is NaN"),
        ({"attention_output": INF, "output": NAN, "loss": NAN}, "attention output is Inf"),
        ({"attention_output": INF}, "attention output is Inf"),
        ({"attention_max": INF}, None),  # an indicator: what it breaks is judged
        ({"cap_frac": NAN}, None),
    ],
)
def test_device_and_host_find_the_same_faults(
    kinds: dict[str, torch.Tensor], fault: str | None
) -> None:
    signals = filled(**kinds)
    found = signals.found_nonfinite(ONE, ONE)
    assert found.item() == (0.0 if fault is None else 1.0)
    assert signals.read(ONE).faults == ({} if fault is None else {0: fault})


@pytest.mark.parametrize(
    ("scaled", "norm", "is_finite"),
    [
        (1.0, 1.0, True),
        (0.0, 0.0, True),
        (MAX_GRAD_NORM * (1 - 2**-24), 1.0, True),  # the largest float32 below
        (MAX_GRAD_NORM, 1.0, False),
        (1.0, MAX_GRAD_NORM, False),
        (MAX_GRAD_NORM * 1.5, 1.0, False),  # finite, but its squares are not
        (1.0, MAX_GRAD_NORM * 1.5, False),  # a loss scale below 1
        (math.inf, math.inf, False),
        (math.nan, math.nan, False),
    ],
)
def test_the_device_skips_exactly_the_gradients_the_host_calls_non_finite(
    scaled: float, norm: float, is_finite: bool
) -> None:
    signals = filled()
    found = signals.found_nonfinite(torch.tensor(scaled), torch.tensor(norm))
    assert found.item() == (0.0 if is_finite else 1.0)
    assert signals.read(ONE).is_grad_finite is is_finite


def test_the_first_broken_term_is_named_with_its_own_value() -> None:
    signals = Signals()
    signals.add("loss", 1, [NAN])
    signals.add_terms(1, {"box": ONE, "cls": -INF, "cpe": NAN})
    assert signals.read(ONE).faults == {1: "loss term cls is -Inf"}

    signals.add("output", 1, [NAN])
    assert signals.read(ONE).faults == {1: "model output is NaN, loss term cls is -Inf"}


def test_terms_that_only_break_in_their_sum_blame_the_loss() -> None:
    signals = Signals()
    signals.add("loss", 0, [INF])
    signals.add_terms(0, {"box": torch.tensor(3e38), "cls": torch.tensor(3e38)})
    assert signals.read(ONE).faults == {0: "loss is Inf"}


def test_an_exception_is_the_reason_in_one_short_line() -> None:
    signals = Signals()
    signals.add_exception(3, FloatingPointError("first\nsecond"))
    reading = signals.read(ONE)
    assert reading.faults == {3: "FloatingPointError: first"}
    assert spell_error(ValueError()) == "ValueError"
    assert len(spell_error(ValueError("x" * 1000))) == 200


def test_a_nan_is_not_hidden_by_a_larger_number_beside_it() -> None:
    for order in ((NAN, ONE), (ONE, NAN)):
        signals = Signals()
        signals.add("attention_max", 0, order)
        attention_max = signals.read(ONE).attention_max
        assert attention_max is not None
        assert math.isnan(attention_max)
