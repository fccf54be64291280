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
        "Every machine needs the same versions of Ray and Python; `stability-search doctor "
        "--address http://HEAD:8265` tells what can be seen from outside."
    )
    assert len(str(cannot_join("head:6379", "x" * 5000))) < 600


RAISED = """\
Failed to connect to Ray cluster at head:6379: Failed to connect to GCS. Last connection error: \
Traceback (most recent call last):
  File "ray/_private/node.py", line 996, in _init_gcs_client
    client = GcsClient(
{}

"""
MISSING = (
    "ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: Authentication token is "
    "missing or incorrect. "
)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            RAISED.format(f"{MISSING}Note: RAY_AUTH_MODE is currently 'disabled' (not 'token')."),
            "it asks for a token, and none was sent",
        ),
        (RAISED.format(MISSING), "it asks for another token than the one here"),
        (
            "Token authentication is enabled but no authentication token was found. Ensure that",
            "RAY_AUTH_MODE is token, and there is no token here",
        ),
    ],
)
def test_a_token_that_is_missing_or_another_is_told_with_the_way_to_it(
    said: str, told: str
) -> None:
    assert str(cannot_join("auto", said)) == (
        f"auto: it cannot be joined: {told}. "
        "Set RAY_AUTH_MODE=token here, too, and name a copy of the cluster's token, mode 600, in "
        "RAY_AUTH_TOKEN_PATH; it is what `ray get-auth-token` prints on the head."
    )


def test_of_a_traceback_only_what_was_raised_is_told() -> None:
    told = str(cannot_join("head:6379", RAISED.format("ray.exceptions.RpcError: no way")))
    assert told.startswith("head:6379: it cannot be joined: ray.exceptions.RpcError: no way. ")
    assert "Traceback" not in told


def test_where_no_ray_runs_that_is_what_is_said() -> None:
    assert "auto: no Ray runs on this machine" in str(cannot_join("auto", NO_RAY))
