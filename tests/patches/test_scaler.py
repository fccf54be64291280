"""The safe scaler: its values, its limits, and the loops of the field reports."""

import pytest
import torch
from torch import nn

from stability_search.patches import uninstall
from stability_search.records.step import PROOF_STEPS
from tests.patches.conftest import Install
from tests.patches.loops import INF, NAN, Scripted

Captured = pytest.CaptureFixture[str]


# -- values -----------------------------------------------------------------------------------


def test_its_values_are_safe_where_the_script_gives_none(
    patched: Install, capsys: Captured
) -> None:
    patched()
    scaler = torch.amp.GradScaler("cpu")

    assert (scaler.get_scale(), scaler.get_growth_interval()) == (1024.0, 100)
    assert "GradScaler was made: init_scale 1024 instead of 65536; growth_interval 100" in (
        capsys.readouterr().err
    )


def test_a_value_of_the_script_is_kept_and_said(patched: Install, capsys: Captured) -> None:
    patched()
    scaler = torch.amp.GradScaler("cpu", 65536.0, growth_interval=7)

    assert (scaler.get_scale(), scaler.get_growth_interval()) == (65536.0, 7)
    assert "init_scale 65536 is the script's own and is kept (STABILITY_SEARCH_INIT_SCALE" in (
        capsys.readouterr().err
    )


def test_a_value_that_was_asked_for_replaces_the_scripts(
    patched: Install, capsys: Captured
) -> None:
    patched(init_scale=512.0, growth_interval=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)

    assert (scaler.get_scale(), scaler.get_growth_interval()) == (512.0, 3)
    assert "init_scale 512 instead of 65536" in capsys.readouterr().err


def test_a_scale_beyond_the_limits_starts_at_the_limit(patched: Install) -> None:
    patched(max_scale=2048.0)

    assert torch.amp.GradScaler("cpu", init_scale=65536.0).get_scale() == 2048.0


def test_arguments_that_pytorch_refuses_are_refused_by_pytorch(patched: Install) -> None:
    patched()

    with pytest.raises(TypeError, match="unexpected keyword argument 'initial_scale'"):
        torch.amp.GradScaler("cpu", initial_scale=3.0)


# -- the scale --------------------------------------------------------------------------------


def take_steps(scripted: Scripted, *factors: float) -> list[float]:
    """Take a step with each factor; return the scale after each."""
    scales = []
    for factor in factors:
        scripted.optimizer.zero_grad()
        scripted.backward(factor)
        scripted.scaler.step(scripted.optimizer)
        scripted.scaler.update()
        scales.append(scripted.scaler.get_scale())
    return scales


def test_it_moves_as_pytorchs_does_and_says_so(patched: Install, capsys: Captured) -> None:
    factors = (1.0, INF, 1.0, 1.0, 1.0, NAN, 1.0)
    plain = take_steps(Scripted(init_scale=8.0, growth_interval=2), *factors)
    patched()
    scripted = Scripted(init_scale=8.0, growth_interval=2)

    assert take_steps(scripted, *factors) == plain == [8, 4, 4, 8, 8, 4, 4]
    text = capsys.readouterr().err
    assert "WARNING step 2: loss scale 8 -> 4 (gradient overflow, NaN or Inf)" in text
    assert "INFO step 4: loss scale 4 -> 8 (growth)" in text


def test_it_stays_within_its_limits(patched: Install, capsys: Captured) -> None:
    patched(max_scale=8.0)
    scripted = Scripted(init_scale=4.0, growth_interval=1)

    assert take_steps(scripted, 1.0, 1.0, 1.0) == [8, 8, 8]
    assert take_steps(scripted, *[INF] * 6) == [4, 2, 1, 1, 1, 1]
    text = capsys.readouterr().err
    assert (
        "CRITICAL step 7: loss scale 1 -> 1: gradient overflow (NaN or Inf) asks for 0.5" in text
    )
    assert "Reduce the learning rate, or leave fp16" in text


def test_the_twin_pytorchs_own_scale_falls_through_the_floor() -> None:
    assert take_steps(Scripted(init_scale=2.0), *[INF] * 3) == [1, 0.5, 0.25]


def test_a_floor_below_1_is_a_setting_and_crossing_1_is_critical(
    patched: Install, capsys: Captured
) -> None:
    patched(min_scale=0.25)

    assert take_steps(Scripted(init_scale=1.0), *[INF] * 3) == [0.5, 0.25, 0.25]
    assert "CRITICAL step 1: loss scale 1 -> 0.5" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_leaves_the_scale_alone(patched: Install) -> None:
    patched()
    scripted = Scripted(init_scale=8.0, growth_interval=2)
    for factor, offset in ((1.0, 0.0), (NAN, NAN), (1.0, 0.0)):
        scripted.optimizer.zero_grad()
        scripted.backward(factor, offset=offset)
        scripted.scaler.step(scripted.optimizer)
        scripted.scaler.update()

    assert scripted.scaler.get_scale() == 16.0  # two good steps, and the bad one no overflow
    assert scripted.value == 1.0 - 2 * 0.125


@pytest.mark.parametrize(("init_scale", "label"), [(65536.0, "calibration"), (1.0, "bad")])
def test_an_overflow_is_labelled(
    init_scale: float, label: str, patched: Install, capsys: Captured
) -> None:
    patched()
    take_steps(Scripted(init_scale=init_scale), INF)

    assert f"step 1 epoch 1: skipped, {label}: gradient" in capsys.readouterr().err


def test_a_number_given_to_update_is_the_new_scale(patched: Install) -> None:
    patched()
    scripted = Scripted(init_scale=8.0)
    take_steps(scripted, 1.0)
    scripted.scaler.update(64.0)

    assert scripted.scaler.get_scale() == 64.0


# -- loops of the field reports ---------------------------------------------------------------


def skip_without_update(scripted: Scripted) -> float:
    """Train as the first report's loop does; return the weight."""
    for factor in (1.0, INF, 1.0):
        scripted.optimizer.zero_grad()
        scripted.backward(factor)
        scripted.scaler.unscale_(scripted.optimizer)
        norm = nn.utils.clip_grad_norm_([scripted.weight], 10.0)
        if torch.isinf(norm):
            continue
        scripted.scaler.step(scripted.optimizer)
        scripted.scaler.update()
    return scripted.value


def test_a_skip_without_update_survives_and_lowers_the_scale(
    patched: Install, capsys: Captured
) -> None:
    patched()
    scripted = Scripted(init_scale=8.0)

    assert skip_without_update(scripted) == 1.0 - 2 * 0.125
    assert scripted.scaler.get_scale() == 4.0
    text = capsys.readouterr().err
    assert "neither step nor update followed" in text
    assert "step 2 epoch 1: skipped, calibration: gradient overflow" in text


def test_the_twin_without_the_patches_it_crashes() -> None:
    with pytest.raises(RuntimeError, match="unscale_\\(\\) has already been called"):
        skip_without_update(Scripted(init_scale=8.0))


def unscale_every_micro_batch(scripted: Scripted) -> float:
    """Train as the third report's loop does, two windows of four; return the weight."""
    for index in range(8):
        scripted.backward(0.25 * (index % 4))
        scripted.scaler.unscale_(scripted.optimizer)
        assert torch.isfinite(nn.utils.get_total_norm([scripted.weight.grad]))
        if index % 4 == 3:
            scripted.scaler.step(scripted.optimizer)
            scripted.scaler.update()
            scripted.optimizer.zero_grad()
    return scripted.value


def test_unscaling_every_micro_batch_counts_all_of_them(
    patched: Install, capsys: Captured
) -> None:
    patched()

    assert unscale_every_micro_batch(Scripted(init_scale=8.0)) == 1.0 - 2 * 1.5 * 0.125
    assert "WARNING scaler.unscale_ was called before the last backward" in capsys.readouterr().err


def test_the_twin_without_the_patches_that_crashes_too() -> None:
    with pytest.raises(RuntimeError, match="unscale_\\(\\) has already been called"):
        unscale_every_micro_batch(Scripted(init_scale=8.0))


def test_a_cured_skip_is_counted_once(patched: Install, capsys: Captured) -> None:
    patched()
    scripted = Scripted(init_scale=8.0)
    scripted.backward(INF)
    scripted.scaler.unscale_(scripted.optimizer)
    scripted.scaler.update()
    scripted.optimizer.zero_grad()
    take_steps(scripted, 1.0)
    uninstall()

    assert scripted.scaler.get_scale() == 4.0
    assert capsys.readouterr().err.count("skipped, calibration") == 1


def test_a_window_of_skipped_micro_batches_survives(patched: Install, capsys: Captured) -> None:
    patched()
    scripted = Scripted()
    scripted.scaler.unscale_(scripted.optimizer)
    scripted.scaler.step(scripted.optimizer)
    scripted.scaler.update()
    take_steps(scripted, 1.0)
    scripted.optimizer.zero_grad()
    scripted.scaler.step(scripted.optimizer)
    scripted.scaler.update()

    text = capsys.readouterr().err
    assert all(f"scaler.{name} without any gradient" in text for name in ("step", "update"))
    assert scripted.scaler.get_scale() == 1024.0


def test_the_twin_without_the_patches_an_empty_update_raises() -> None:
    scripted = Scripted()
    scripted.scaler.scale(torch.ones(()))
    with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
        scripted.scaler.update()


def test_two_optimizers_share_a_scaler(patched: Install) -> None:
    def both() -> tuple[float, float, float]:
        first, second = Scripted(init_scale=8.0), Scripted()
        second.scaler = first.scaler
        for factor in (1.0, INF, 1.0):
            first.optimizer.zero_grad()
            second.optimizer.zero_grad()
            first.backward(1.0)
            first.scaler.unscale_(first.optimizer)
            second.backward(factor)
            first.scaler.step(first.optimizer)
            first.scaler.step(second.optimizer)
            first.scaler.update()
        return first.value, second.value, first.scaler.get_scale()

    plain = both()
    patched()

    assert both() == plain == (1.0 - 3 * 0.125, 1.0 - 2 * 0.125, 4.0)


def test_fp16_parameters_are_refused_with_the_way_out(patched: Install) -> None:
    patched()
    scripted = Scripted()
    scripted.weight.data = scripted.weight.data.half()
    scripted.backward()

    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients") as caught:
        scripted.scaler.step(scripted.optimizer)
    assert "keep them in fp32" in caught.value.__notes__[0]


def test_a_scaler_that_is_turned_off_is_left_alone(patched: Install) -> None:
    patched()
    scripted = Scripted()
    scripted.scaler = torch.amp.GradScaler("cpu", enabled=False)
    scripted.backward()
    scripted.scaler.step(scripted.optimizer)
    scripted.scaler.update()

    assert scripted.value == 1.0 - 0.125


def test_the_norm_in_the_messages_is_that_of_unscaled_gradients(
    patched: Install, capsys: Captured
) -> None:
    patched(every_steps=1)
    take_steps(Scripted(), 3.0)

    assert "loss 1, grad_norm 4.243, loss scale 1024" in capsys.readouterr().err


def test_unscaling_the_same_gradients_again_does_nothing(
    patched: Install, capsys: Captured
) -> None:
    patched()
    scripted = Scripted(init_scale=8.0)
    scripted.backward()
    scripted.scaler.unscale_(scripted.optimizer)
    scripted.scaler.unscale_(scripted.optimizer)
    scripted.scaler.step(scripted.optimizer)
    scripted.scaler.update()

    assert scripted.value == 1.0 - 0.125
    assert "scaler.unscale_ was called again on the same gradients" in capsys.readouterr().err


@pytest.mark.parametrize("is_last", [False, True])
def test_an_abandoned_overflow_of_one_of_two_optimizers_lowers_the_scale_once(
    patched: Install, capsys: Captured, *, is_last: bool
) -> None:
    patched()
    sound, overflowing = Scripted(init_scale=8.0), Scripted()
    scaler = overflowing.scaler = sound.scaler
    for factor in (INF, 1.0):
        sound.backward(1.0)
        overflowing.backward(factor)
        for one in (sound, overflowing) if is_last else (overflowing, sound):
            scaler.unscale_(one.optimizer)
        if factor == INF:
            sound.optimizer.zero_grad()
            overflowing.optimizer.zero_grad()
            continue
        scaler.step(sound.optimizer)
        scaler.step(overflowing.optimizer)
        scaler.update()

    assert scaler.get_scale() == 4.0
    assert sound.value == overflowing.value == 1.0 - 0.125
    assert capsys.readouterr().err.count("skipped, calibration") == 1


def test_each_of_two_abandoned_overflows_is_judged(patched: Install, capsys: Captured) -> None:
    patched()
    pair = Scripted(init_scale=8.0), Scripted()
    pair[1].scaler = pair[0].scaler
    for one in pair:
        one.backward(INF)
    for one in pair:
        one.scaler.unscale_(one.optimizer)
    pair[0].backward()

    assert pair[0].scaler.get_scale() == 4.0
    assert capsys.readouterr().err.count("skipped, calibration") == 2


def test_a_skip_that_leaves_the_scale_says_once_what_that_means_for_a_schedule(
    patched: Install, capsys: Captured
) -> None:
    patched()
    scripted = Scripted()
    take_steps(scripted, INF)
    assert "learning-rate schedule" not in capsys.readouterr().err
    for _ in range(2):
        scripted.optimizer.zero_grad()
        scripted.backward(NAN, offset=NAN)
        scripted.scaler.step(scripted.optimizer)
        scripted.scaler.update()

    assert capsys.readouterr().err.count("steps its learning-rate schedule") == 1


def test_a_loaded_scale_above_the_limit_is_no_overflow(patched: Install, capsys: Captured) -> None:
    patched(max_scale=8.0)
    scripted = Scripted()
    scripted.scaler.load_state_dict({**scripted.scaler.state_dict(), "scale": 64.0})

    assert take_steps(scripted, 1.0) == [8.0]
    text = capsys.readouterr().err
    assert "INFO step 1: loss scale 64 -> 8, which is the limit that was set" in text
    assert "overflow" not in text


def test_a_scale_that_grew_has_to_prove_itself_again(patched: Install, capsys: Captured) -> None:
    patched()
    scripted = Scripted(init_scale=8.0, growth_interval=PROOF_STEPS)
    scales = take_steps(scripted, *[1.0] * PROOF_STEPS, 1.0, INF)

    assert scales[-3:] == [16, 16, 8]
    assert "skipped, calibration" in capsys.readouterr().err


def test_an_overflow_of_a_step_without_the_scaler_is_counted_once(
    patched: Install, capsys: Captured
) -> None:
    patched()
    scripted = Scripted(init_scale=8.0)
    scripted.backward(INF)
    scripted.scaler.unscale_(scripted.optimizer)
    scripted.optimizer.step()
    scripted.scaler.update()

    assert (scripted.value, scripted.scaler.get_scale()) == (1.0, 4.0)
    assert capsys.readouterr().err.count("skipped, calibration") == 1


def test_an_overflow_that_the_script_skips_is_counted_beside_a_step(
    patched: Install, capsys: Captured
) -> None:
    patched()
    sound, overflowing = Scripted(init_scale=8.0), Scripted()
    scaler = overflowing.scaler = sound.scaler
    sound.backward(1.0)
    overflowing.backward(INF)
    scaler.unscale_(overflowing.optimizer)
    scaler.step(sound.optimizer)
    scaler.update()

    assert scaler.get_scale() == 4.0
    assert "(optimizer 2, SGD): skipped, calibration" in capsys.readouterr().err


def test_a_scaled_loss_that_was_divided_is_not_taken_for_another(
    patched: Install, capsys: Captured
) -> None:
    patched(every_steps=1)
    scripted = Scripted()
    (scripted.scaler.scale(scripted.weight.sum()) / 2).backward()
    scripted.scaler.step(scripted.optimizer)

    assert "loss 2, grad_norm 0.7071, loss scale 1024" in capsys.readouterr().err
