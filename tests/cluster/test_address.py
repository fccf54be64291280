"""Where a cluster is, and which token goes there."""

from pathlib import Path

import pytest

from stability_search.cluster.address import (
    ClusterAddress,
    checked_join_address,
    is_url,
    read_address,
)
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
    [
        *(
            "auto",
            "10.0.0.1:6379",
            "localhost:8265",
            "ray://head:10001",
            "http://",
            "http://a:b:c",
        ),
        *(
            "http://h:99999",
            "http://h h",
            "http://h\n",
            "http://\u00e9",
            "http://a..b",
            "http://a/\u00e9",
        ),
        *("http://" + "a" * 64, "http://[::1", "http://h$(id)"),
    ],
)
def test_what_is_no_url_of_a_dashboard_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a URL is needed here, but got"):
        read(text, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "http://me:canary@localhost:8265",
        "http://canary@localhost:8265",
        "http://me:canary@localhost:port",
        "http://me:canary@[localhost",
        "htp://me:canary@localhost",
        "me:canary@localhost:8265",
        "http://me:canary@h h",
        "http://localhost:8265?token=canary",
        "http://localhost:8265#canary",
        "localhost:8265?token=canary",
    ],
)
def test_what_may_hold_a_password_is_refused_and_not_repeated(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--address: a URL ") as caught:
        read(text, tmp_path)
    assert "canary" not in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize(
    ("text", "way_out"),
    [
        ("localhost:8265", "Try http://localhost:8265."),
        ("h:6379", "6379 is a port of Ray itself; its dashboard has 8265 by default."),
        ("ray://h:10001", "10001 is a port of Ray itself; its dashboard has 8265 by default."),
        ("auto", "Give the URL of the cluster's dashboard, e.g. http://localhost:8265."),
    ],
)
def test_what_was_meant_for_ray_is_led_to_its_dashboard(
    text: str, way_out: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="a URL is needed here") as caught:
        read(text, tmp_path)
    assert str(caught.value).endswith(f" {way_out}")


# To be joined


@pytest.mark.parametrize(
    "text", ["auto", "10.0.0.1:6379", "gpu-box:6379", "[::1]:6379", "http:6379"]
)
def test_a_cluster_of_this_machine_is_named_as_ray_names_it(text: str) -> None:
    assert checked_join_address(text) == text
    assert not is_url(text)


@pytest.mark.parametrize(
    ("text", "way_out"),
    [
        ("http://localhost:8265", "for `submit` and `doctor`; on a machine of the cluster"),
        ("HTTPS://h", "for `submit` and `doctor`"),
        ("ray://h:10001", "from elsewhere `submit --address"),
        ("local", "Leave --address out"),
        ("gpu-box", "`ray status` names HOST:PORT"),
        ("h:port", "`ray status` names HOST:PORT"),
        ("h:1234567", "`ray status` names HOST:PORT"),
        ("", "but got ''"),
        ("h h:1", "but got 'h h:1'"),
    ],
)
def test_what_ray_could_not_join_is_refused_with_what_takes_it(text: str, way_out: str) -> None:
    with pytest.raises(UsageError, match=r"`auto` or HOST:PORT of a cluster's head") as caught:
        checked_join_address(text)
    assert way_out in str(caught.value)


@pytest.mark.parametrize("text", ["http://me:canary@h:8265", "me:canary@h:6379", "canary@h"])
def test_a_password_in_what_is_joined_is_not_repeated(text: str) -> None:
    with pytest.raises(UsageError, match="but got something else") as caught:
        checked_join_address(text)
    assert "canary" not in f"{caught.value} {caught.value.__cause__}"


# The token and the way


def test_plain_http_to_another_machine_is_refused_with_and_without_a_token(tmp_path: Path) -> None:
    write_token(tmp_path)  # as Ray leaves one behind, and RAY_AUTH_MODE says nothing
    for environment in ({}, {"RAY_AUTH_TOKEN": CANARY}, {"RAY_AUTH_MODE": "token"}):
        with pytest.raises(UsageError, match="plain HTTP to another machine is refused") as caught:
            read(REMOTE, tmp_path, **environment)
        assert caught.value.exit_code == 2
        for way_out in ("ssh -L", "https://", "--insecure"):
            assert way_out in str(caught.value)


def test_what_nobody_can_read_on_the_way_and_what_is_asked_for_is_sent(tmp_path: Path) -> None:
    write_token(tmp_path)
    insecure = read(REMOTE, tmp_path, insecure=True)
    assert (insecure.token, insecure.is_readable_on_the_way) == (CANARY, True)
    for url in ("https://10.1.2.3", "http://localhost:1", "http://127.0.0.1:1", "http://[::1]:1"):
        found = read(url, tmp_path)
        assert (found.token, found.is_readable_on_the_way) == (CANARY, False)


@pytest.mark.parametrize(
    "host",
    ["localhost.example.com", "127.0.0.1.example.com", "1.0.0.127", "ray.localhost", "localhost."],
)
def test_what_only_looks_like_this_machine_is_another(host: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="plain HTTP to another machine"):
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
    address = read(REMOTE, tmp_path, insecure=True, RAY_AUTH_TOKEN=CANARY)

    assert CANARY not in f"{address} {address!r}"
    assert CANARY in address.token  # the twin: it is there


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])  # noqa: S104 - it is refused
def test_where_a_dashboard_listens_is_no_way_to_it(host: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not how it is reached.*http://127\.0\.0\.1:8265\."):
        read(f"http://{host}:8265", tmp_path)
