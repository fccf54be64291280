from pathlib import Path

import pytest

from stability_search.cli import main
from stability_search.cli.tracked import tracked
from stability_search.events import Event, Listener
from stability_search.trackers import names
from tests.trackers.fake_run import write_run


def test_without_a_tracker_the_study_is_run_as_it_is() -> None:
    def study(_on_event: Listener) -> str:
        return "as it is"

    assert tracked(study, ()) is study  # type: ignore[arg-type, comparison-overlap]


@pytest.mark.parametrize("command", ["run", "resume"])
def test_an_unknown_tracker_is_refused_before_anything_starts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    run = tmp_path / "run"
    words = {
        "run": ["run", "--space", "quickstart", "--output", str(run)],
        "resume": ["resume", str(run)],
    }[command]

    code = main([*words, "--tracker", "tensorbord"])

    assert code == 2
    err = capfd.readouterr().err
    assert "one of tensorboard, mlflow, wandb must hold, but got tensorbord" in err
    assert "Traceback" not in err
    assert not run.exists()


def test_a_missing_extra_is_refused_with_what_installs_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "is_there", lambda _module: False)
    run = tmp_path / "run"

    code = main(["run", "--space", "quickstart", "--output", str(run), "--tracker", "wandb"])

    assert code == 2
    assert "pip install 'stability-search[wandb]'" in capfd.readouterr().err
    assert not run.exists()


def test_a_listener_that_raises_is_the_study_s_own_affair(tmp_path: Path) -> None:
    """Trackers pass on what the outlet raises, and leave nothing behind."""
    run = write_run(tmp_path / "run")

    def study(on_event: Listener) -> str:
        on_event(Event(name="study_started", time="", fields={"run_directory": str(run.path)}))
        return "not reached"

    def broken(_event: Event) -> None:
        raise ZeroDivisionError("of the outlet")

    with pytest.raises(ZeroDivisionError, match="of the outlet"):
        tracked(study, ("tensorboard",))(broken)  # type: ignore[arg-type]
    assert sorted(path.name for path in run.path.iterdir()) == ["space.yaml", "steps"]
