"""A cluster that cannot be joined: told at once, in one line, and before anything is written."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from stability_search import run
from stability_search.errors import InfrastructureError
from stability_search.search.joining import cannot_join, refuse_unreachable
from tests.search.inline_study import write_space

NO_RAY = "Could not find any running Ray instance. Please specify the one to connect to."


@pytest.fixture
def silent() -> Iterator[str]:
    """Return an address at which nobody listens, and nobody else can."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_a_head_that_does_not_answer_is_named_with_what_the_system_says(silent: str) -> None:
    with pytest.raises(InfrastructureError, match="does not answer: Connection ref") as caught:
        refuse_unreachable(silent)
    assert str(caught.value).startswith(f"{silent}: ")


def test_a_port_that_cannot_be_is_an_error_of_the_same_kind() -> None:
    with pytest.raises(InfrastructureError, match="the cluster does not answer"):
        refuse_unreachable("127.0.0.1:99999")


def test_what_listens_is_let_through_and_auto_is_left_to_ray() -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        refuse_unreachable(f"127.0.0.1:{head.getsockname()[1]}")
    refuse_unreachable("auto")


def test_a_study_for_a_cluster_that_is_not_there_leaves_no_run_directory(
    silent: str, tmp_path: Path
) -> None:
    space = write_space(tmp_path)
    with pytest.raises(InfrastructureError, match="the cluster does not answer"):
        run(space, output=tmp_path / "out", address=silent)
    assert not (tmp_path / "out").exists()


def test_what_ray_says_becomes_one_line_with_the_way_out() -> None:
    assert str(cannot_join("head:6379", "Version mismatch:\n    Ray: 2.59.\n")) == (
        "head:6379: it cannot be joined: Version mismatch: Ray: 2.59. "
        "If it asks for a token, set RAY_AUTH_MODE=token here, too, and name the token's file in "
        "RAY_AUTH_TOKEN_PATH; `stability-search doctor --address` says more."
    )
    assert len(str(cannot_join("head:6379", "x" * 5000))) < 600


def test_where_no_ray_runs_that_is_what_is_said() -> None:
    assert "auto: no Ray runs on this machine" in str(cannot_join("auto", NO_RAY))
