"""Patches go in once, come out whole, say what they do, and never end a training."""

import sys
import types
import warnings

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers
from torch.utils.data import DataLoader, dataloader

from stability_search.patches import PatchSettings, install, lateness, monitor, uninstall, window
from stability_search.settings.alarms import AlarmSettings
from tests.patches.conftest import Install
from tests.patches.loops import INF, Scripted, are_equal, loader, train, values

Captured = pytest.CaptureFixture[str]
OWNERS = (
    torch.amp.GradScaler,
    torch.cuda.amp,
    torch.cuda.amp.autocast_mode,
    torch.cuda.amp.GradScaler,
    torch.cuda.amp.autocast,
    torch.cpu.amp.GradScaler,
    torch.cpu.amp.autocast,
    torch.autograd,
    nn.utils,
    nn.utils.clip_grad,
    DataLoader,
    dataloader._BaseDataLoaderIter,  # noqa: SLF001 - what is replaced
)


def snapshot() -> list[object]:
    """Return everything that could be replaced, and every global hook."""
    found: list[object] = [value for owner in OWNERS for value in vars(owner).values()]
    hooks = (
        optimizers._global_optimizer_pre_hooks,  # noqa: SLF001 - where the official hooks are
        optimizers._global_optimizer_post_hooks,  # noqa: SLF001 - as above
        nn.modules.module._global_buffer_registration_hooks,  # noqa: SLF001 - as above
    )
    return [*found, *(hook for table in hooks for hook in table.values())]


def is_same(before: list[object], after: list[object]) -> bool:
    return len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("observe", [False, True])
def test_uninstalling_puts_every_name_back(patched: Install, *, observe: bool) -> None:
    before = snapshot()
    patched(observe=observe, anomaly=True)
    between = snapshot()
    uninstall()

    assert not is_same(before, between)
    assert is_same(before, snapshot())
    assert not torch.is_anomaly_enabled()


def test_installing_twice_is_installing_once(patched: Install, capsys: Captured) -> None:
    before = snapshot()
    patched()
    once = snapshot()
    assert install(PatchSettings()) == install(PatchSettings())
    assert is_same(once, snapshot())
    assert capsys.readouterr().err == ""
    install(PatchSettings(every_steps=7))
    assert "WARNING the patches are in already, with other settings" in capsys.readouterr().err
    uninstall()
    uninstall()

    assert is_same(before, snapshot())


def test_what_somebody_else_replaced_since_is_left_to_them(
    patched: Install, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = nn.utils.clip_grad_value_
    patched()
    monkeypatch.setattr(nn.utils, "clip_grad_value_", own)
    monkeypatch.setattr(nn.utils, "clip_grad_value_", theirs := lambda: None)
    uninstall()

    assert nn.utils.clip_grad_value_ is theirs
    assert "torch.nn.utils.clip_grad_value_ was replaced by somebody" in capsys.readouterr().err


def test_it_says_what_it_patched(capsys: Captured) -> None:
    try:
        done = install(PatchSettings(init_scale=512.0, max_scale=2048.0))
    finally:
        uninstall()

    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"INFO patched: {what}" for what in done]
    for word in ("autocast", "init_scale 512", "at most 2048", "clip_grad_norm_", "NaN and Inf"):
        assert any(word in line for line in lines)


def test_a_quiet_process_speaks_with_its_first_step(capsys: Captured) -> None:
    try:
        install(PatchSettings(), is_quiet=True)
        assert capsys.readouterr().err == ""
        weight = nn.Parameter(torch.zeros(1))
        weight.grad = torch.ones(1)
        torch.optim.SGD([weight], lr=0.5).step()
    finally:
        uninstall()

    assert capsys.readouterr().err.startswith("INFO patched: torch.cuda.amp.autocast")


# -- deprecated names -------------------------------------------------------------------------


def use_deprecated_names() -> None:
    with torch.cpu.amp.autocast(dtype=torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")
    torch.cpu.amp.GradScaler()
    torch.cuda.amp.GradScaler(enabled=False)
    torch.cuda.amp.autocast(enabled=False)

    class Double(torch.autograd.Function):
        @staticmethod
        @torch.cuda.amp.custom_fwd
        def forward(_context: object, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        @torch.cuda.amp.custom_bwd
        def backward(_context: object, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * 2

    x = torch.ones(1, requires_grad=True)
    Double.apply(x).backward()
    assert x.grad == 2


def test_deprecated_names_work_without_their_warning(patched: Install) -> None:
    patched()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use_deprecated_names()


def test_the_twin_without_the_patches_they_warn() -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        use_deprecated_names()


def test_a_deprecated_scaler_is_a_safe_one(patched: Install) -> None:
    patched()

    assert torch.cpu.amp.GradScaler().get_scale() == 1024.0
    assert torch.cpu.amp.GradScaler(64.0).get_scale() == 64.0


# -- too late ---------------------------------------------------------------------------------


def test_too_late_is_said_with_what_and_where(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = types.ModuleType("theirs")
    theirs.__file__ = "theirs.py"
    theirs.clip = nn.utils.clip_grad_norm_  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "theirs", theirs)
    scaler = torch.amp.GradScaler("cpu")
    try:
        install(PatchSettings())
    finally:
        uninstall()

    text = capsys.readouterr().err
    assert "theirs.py has bound clip_grad_norm_ as clip, which stays PyTorch's own" in text
    assert "a GradScaler exists already (init_scale 65536, growth_interval 2000)" in text
    assert "the line `import stability_search.instrument` must be the first of" in text
    assert scaler.get_scale() == 65536.0


def test_in_time_nothing_is_said_of_it(capsys: Captured) -> None:
    try:
        install(PatchSettings())
    finally:
        uninstall()

    assert "too late" not in capsys.readouterr().err


def test_an_early_scaler_is_judged_all_the_same(patched: Install, capsys: Captured) -> None:
    scripted = Scripted(init_scale=1.0)
    patched()
    scripted.backward(INF)
    scripted.scaler.step(scripted.optimizer)
    scripted.scaler.update()

    assert scripted.scaler.get_scale() == 1.0
    assert "CRITICAL" in capsys.readouterr().err


# -- our own failures -------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_hook_of_ours_that_fails_is_said_and_training_goes_on(
    precision: str, patched: Install, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = values(*train(loader(4), precision=precision, clip_norm=1.0)[:2])

    def broken(*_words: object, **_named: object) -> None:
        raise ZeroDivisionError("planted")

    for owner, name in (
        (window.Window, "read"),
        (window.Window, "add_loss"),
        (window.Window, "add_clipped"),
        (monitor.Monitor, "batch_arrived"),
    ):
        monkeypatch.setattr(owner, name, broken)
    patched(init_scale=65536.0, growth_interval=2000)

    assert are_equal(plain, values(*train(loader(4), precision=precision, clip_norm=1.0)[:2]))
    text = capsys.readouterr().err
    assert "WARNING a patch of stability-search failed (" in text
    assert "ZeroDivisionError: planted); training goes on without it" in text


# -- watching ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_observing_changes_nothing_to_the_bit(
    precision: str, patched: Install, capsys: Captured, *, fused: bool
) -> None:
    words = {"precision": precision, "clip_norm": 0.5, "fused": fused}
    plain = values(*train(loader(5, poisoned=3), **words)[:2])  # type: ignore[arg-type]
    patched(observe=True)

    observed = train(loader(5, poisoned=3), **words)  # type: ignore[arg-type]
    assert are_equal(plain, values(*observed[:2]))
    assert "step 4 epoch 1: " in capsys.readouterr().err


def test_the_twin_acting_changes_what_nan_does(patched: Install) -> None:
    plain = values(*train(loader(5, poisoned=3))[:2])
    patched()

    assert not are_equal(plain, values(*train(loader(5, poisoned=3))[:2]))


def test_observing_crashes_where_pytorch_does(patched: Install) -> None:
    patched(observe=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))

    assert scaler.get_scale() == 65536.0
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.update()


# -- messages ---------------------------------------------------------------------------------


def test_a_line_every_so_many_steps(patched: Install, capsys: Captured) -> None:
    patched(every_steps=2)
    train(loader(4, poisoned=1), precision="fp16")

    lines = [line for line in capsys.readouterr().err.splitlines() if "NaN/Inf skipped" in line]
    assert len(lines) == 2
    assert lines[1].startswith("INFO step 4 epoch 1: loss ")
    assert lines[1].endswith("loss scale 1024, NaN/Inf skipped 1 (25.0%)")


def test_after_a_nan_it_says_once_what_to_look_at(patched: Install, capsys: Captured) -> None:
    patched()
    train(loader(4, poisoned=1), epochs=2)

    text = capsys.readouterr().err
    places = [
        text.index(word) for word in ("1. the learning rate: it is 0.01", "2. the data: NaN")
    ]
    places += [text.index(word) for word in ("3. the vocabulary", "4. anomaly detection")]
    assert places == sorted(places)
    assert text.count("in this order") == 1


def test_an_epoch_gets_its_line(patched: Install, capsys: Captured) -> None:
    patched()
    train(loader(4, poisoned=1), epochs=2)

    text = capsys.readouterr().err
    assert text.count("1 of 4 steps skipped") == 2
    assert "INFO epoch 2: loss " in text


def test_running_statistics_survive_and_that_is_said(patched: Install, capsys: Captured) -> None:
    patched()
    train(loader(4, poisoned=1))

    assert "the running statistics of 1 BatchNorm module(s) were NaN" in capsys.readouterr().err


def alarms(**words: object) -> AlarmSettings:
    return AlarmSettings(overflow_rate=0.02, **words)  # type: ignore[arg-type]


def test_an_alarm_can_end_the_epoch(patched: Install, capsys: Captured) -> None:
    patched(alarms=alarms(bad_steps=1, on_alarm="end_epoch"))
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    taken = []
    batches = loader(8)
    for _ in range(2):
        taken.append(0)
        for _ in batches:
            taken[-1] += 1
            weight.grad = torch.tensor([INF])
            optimizer.step()

    assert taken == [2, 2]
    assert "step 2: this epoch ends here" in capsys.readouterr().err


def test_an_alarm_can_end_the_run(patched: Install, capsys: Captured) -> None:
    patched(alarms=alarms(bad_steps=1, on_alarm="end_run"))

    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.tensor([INF])
    optimizer = torch.optim.SGD([weight], lr=0.5)
    optimizer.step()

    with pytest.raises(SystemExit) as end:
        optimizer.step()
    assert end.value.code == 3
    assert "CRITICAL step 2: the run ends here" in capsys.readouterr().err


def test_lateness_leaves_torchs_own_modules_out() -> None:
    original = nn.utils.clip_grad.clip_grad_norm_

    assert lateness._bound_names({id(original): "clip_grad_norm_"}) == []  # noqa: SLF001 - its answer


@pytest.mark.parametrize("on_alarm", ["end_epoch", "end_run"])
def test_observing_ends_nothing(on_alarm: str, patched: Install, capsys: Captured) -> None:
    patched(observe=True, alarms=alarms(bad_steps=1, on_alarm=on_alarm))
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    num_batches = 0
    for _ in loader(4):
        num_batches += 1
        weight.grad = torch.tensor([INF])
        optimizer.step()

    assert num_batches == 4
    text = capsys.readouterr().err
    assert "number of bad steps" in text
    assert "ends here" not in text
