"""The token of a Ray of our own is for its owner alone."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from stability_search.search.ray_host import ensure_private_token

TOKEN_MODE = {"RAY_AUTH_MODE": "token"}


@pytest.fixture(autouse=True)
def generous_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_token_is_written_for_its_owner_alone(tmp_path: Path) -> None:
    ensure_private_token(tmp_path, TOKEN_MODE)

    token = tmp_path / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.parent.stat().st_mode & 0o777 == 0o700
    assert re.fullmatch("[0-9a-f]{64}", token.read_text())
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]


def test_a_token_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("mine")

    ensure_private_token(tmp_path, TOKEN_MODE)

    assert token.read_text() == "mine"
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RAY_AUTH_MODE": "disabled"},
        {**TOKEN_MODE, "RAY_AUTH_TOKEN": "x"},
        {**TOKEN_MODE, "RAY_AUTH_TOKEN_PATH": "/x"},
    ],
)
def test_where_no_token_is_missing_none_is_written(
    environment: dict[str, str], tmp_path: Path
) -> None:
    ensure_private_token(tmp_path, environment)

    assert not list(tmp_path.iterdir())


def test_a_home_that_cannot_be_written_to_is_left_to_ray(tmp_path: Path) -> None:
    (tmp_path / ".ray").write_text("a file")

    ensure_private_token(tmp_path, TOKEN_MODE)

    assert (tmp_path / ".ray").read_text() == "a file"
