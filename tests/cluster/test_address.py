"""Where a cluster is, and which token goes there."""

from pathlib import Path

import pytest

from stability_search.cluster.address import ClusterAddress, read_address
from stability_search.errors import UsageError

REMOTE = "http://10.1.2.3:8265"
CANARY = "canary-token"
DEFAULT, NAMED, DIRECT = "default", "named", "direct"
BROKEN = "canary\r\nHost: evil"


def read(text: str, home: Path, *, insecure: bool = False, **environment: str) -> ClusterAddress:
    return read_address(text, insecure=insecure, environment=environment, home=home)


def write_token(home: Path, text: str = CANARY) -> None:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(text)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://localhost:8265", "http://localhost:8265"),
        ("http://127.8.9.1:8265/", "http://127.8.9.1:8265"),
        ("http://[::1]:8265", "http://[::1]:8265"),
        ("https://ray.example.com/cluster/", "https://ray.example.com/cluster"),
    ],
)
def test_a_url_is_taken_without_its_last_slash(text: str, url: str, tmp_path: Path) -> None:
    assert read(text, tmp_path).url == url


@pytest.mark.parametrize(
    "text",
    ["auto", "10.0.0.1:6379", "localhost:8265", "ray://head:10001", "http://", "http://a:b:c"],
)
def test_what_is_no_url_of_a_dashboard_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a URL is needed here, but got"):
        read(text, tmp_path)


def test_a_url_with_a_password_is_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="without a user or a password") as caught:
        read("http://me:canary@localhost:8265", tmp_path)
    assert "canary" not in str(caught.value)


def test_a_url_with_a_query_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"without \? and #"):
        read("http://localhost:8265?token=x", tmp_path)


def test_plain_http_to_another_machine_needs_a_token_or_insecure(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="plain HTTP to another machine needs a token") as caught:
        read(REMOTE, tmp_path)
    assert caught.value.exit_code == 2
    assert "--insecure" in str(caught.value)

    assert read(REMOTE, tmp_path, insecure=True).is_readable_on_the_way
    assert read(REMOTE, tmp_path, RAY_AUTH_TOKEN=CANARY).token == CANARY
    assert not read("https://10.1.2.3", tmp_path).is_readable_on_the_way
    assert not read("http://localhost:1", tmp_path).is_readable_on_the_way


@pytest.mark.parametrize("host", ["localhost.example.com", "127.0.0.1.example.com", "1.0.0.127"])
def test_what_only_looks_like_this_machine_is_another(host: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a token"):
        read(f"http://{host}:8265", tmp_path)


def test_a_token_is_looked_for_where_ray_looks(tmp_path: Path) -> None:
    named = tmp_path / "named"
    named.write_text("named\n")
    url = "http://localhost:8265"
    assert not read(url, tmp_path).token

    write_token(tmp_path, "default\n")

    assert read(url, tmp_path).token == DEFAULT
    assert read(url, tmp_path, RAY_AUTH_TOKEN_PATH=str(named)).token == NAMED
    both = {"RAY_AUTH_TOKEN_PATH": str(named), "RAY_AUTH_TOKEN": DIRECT}
    assert read(url, tmp_path, **both).token == DIRECT
    assert not read(url, tmp_path, **both, RAY_AUTH_MODE="disabled").token


def test_a_token_that_must_be_there_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="RAY_AUTH_MODE=token needs a token"):
        read("http://localhost:8265", tmp_path, RAY_AUTH_MODE="token")


def test_a_named_token_file_must_be_readable(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read("http://localhost:8265", tmp_path, RAY_AUTH_TOKEN_PATH=str(tmp_path / "gone"))


def test_a_token_that_would_break_a_header_is_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one line of plain ASCII") as caught:
        read("http://localhost:8265", tmp_path, RAY_AUTH_TOKEN=BROKEN)
    assert "canary" not in str(caught.value)


def test_a_token_is_never_shown(tmp_path: Path) -> None:
    address = read(REMOTE, tmp_path, RAY_AUTH_TOKEN=CANARY)

    assert CANARY not in f"{address} {address!r}"
    assert CANARY in address.token  # the twin: it is there
