import pytest

from stability_search.errors import UsageError
from stability_search.trackers import names
from stability_search.trackers.names import TrackerName, named_trackers


def test_each_tracker_is_chosen_once_in_the_order_given() -> None:
    chosen = named_trackers(["wandb", "tensorboard", "wandb"])

    assert chosen == (TrackerName.WANDB, TrackerName.TENSORBOARD)


def test_an_unknown_tracker_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"one of tensorboard, mlflow, wandb .* got tensorbord"):
        named_trackers(["mlflow", "tensorbord"])


def test_missing_extras_are_named_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(names, "is_there", lambda _module: False)

    with pytest.raises(
        UsageError,
        match=r"mlflow and wandb must .* pip install 'stability-search\[mlflow,wandb\]'",
    ):
        named_trackers(["tensorboard", "mlflow", "wandb"])


def test_tensorboard_needs_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "is_there", lambda _module: False)

    assert named_trackers(["tensorboard"]) == (TrackerName.TENSORBOARD,)
