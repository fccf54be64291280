"""What is said of a wrong command line: the way out, and never a password."""

import json
from pathlib import Path

import pytest
import typer

from stability_search.cli import main
from stability_search.cli.commands import parse
from stability_search.cli.program import _usage_line
from stability_search.errors import UsageError
from stability_search.privacy import without_passwords
from stability_search.search.run_directory import describe_environment

URL = "http://me:canary@gpu-box:8265"


@pytest.mark.parametrize(
    "words",
    [
        ["logs", "--", "x", "--address", URL],
        ["logs", "x", URL],
        ["logs", "x", "--address", "http://localhost:1", URL],
        ["logs", "x", "--address", URL, "--bogus"],
        ["logs", f"--address={URL}"],
        ["status", "x", "--format", URL],
        ["status", "x", f"--format={URL}"],
        ["status", "x", "--format", "http://me:it's canary@h"],
        ["status", "x", "--format", 'http://me:"canary\\@h'],
        ["me:canary@gpu-box"],
        ["submit", "--space", "x", "--nodes", "me:canary@h"],
        [f"--bogus={URL}"],
        ["run", "--space", "x", "--address", URL],
        ["resume", "x", "--address", "me:canary@h:6379"],
        ["run", "--space", URL],
        ["validate", "--space", URL],
        ["report", URL],
        ["status", URL],
        ["logs", URL, "--address", "http://localhost:1"],
        ["stop", "x", "--address", URL],
        ["fetch", "x", "--address", URL],
        ["doctor", "--address", URL],
    ],
    ids=" ".join,
)
def test_a_password_is_never_repeated(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capfd.readouterr()
    assert "canary" not in out + err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_the_twin_what_holds_no_password_is_repeated(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "x", "--format", "http://canary:1/"]) == 2
    assert "'http://canary:1/' is not one of" in capfd.readouterr().err


def test_a_traceback_has_no_password(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(_words: object) -> int:
        raise RuntimeError(f"planted: {URL}")

    monkeypatch.setattr("stability_search.cli.program.parse", fail)
    assert main(["schema"]) == 1
    err = capfd.readouterr().err
    assert "planted: http://***@gpu-box:8265" in err
    assert "canary" not in err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:canary@h:1/x", "http://***@h:1/x"),
        ("https://canary@h", "https://***@h"),
        ("http:/me:canary@h", "http:/***@h"),  # as of a path
        ("http://me:can@a/ry?x@h and a@b", "http://***@h and a@b"),
        ("http://h:8265/a@b", "http://h:8265/a@b"),
        ("hf://me/model@v2, file:///home/a@b", "hf://me/model@v2, file:///home/a@b"),
    ],
)
def test_of_a_url_only_user_and_password_are_hidden(text: str, shown: str) -> None:
    assert without_passwords(text) == shown


def test_the_record_of_a_command_has_no_password() -> None:
    words = ["stability-search", "run", "--set", f"task_args.data={URL}/x"]
    told = json.dumps(describe_environment(command=words, device="cpu", seeds={}))
    assert "http://***@gpu-box:8265/x" in told
    assert "canary" not in told


@pytest.mark.parametrize("command", ["logs", "stop", "fetch"])
def test_a_missing_address_comes_with_an_example(
    command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "x"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("Missing option '--address'. The cluster's dashboard, e.g. http://loc")
    assert err.count("\n") == 1


def test_what_follows_two_dashes_is_no_value_of_an_option() -> None:
    assert "but got" not in _line_of(["logs", "--", "x", "--address", "there"])
    assert "but got 'there'" in _line_of(["status", "x", "--format", "there"])


def _line_of(words: list[str]) -> str:
    with pytest.raises(typer.TyperException) as caught:
        parse(words)
    return _usage_line(caught.value, words)


@pytest.mark.parametrize("words", [["run", "--space", "quickstart"], ["resume", "here"]])
def test_what_could_not_be_joined_is_refused_before_anything_is_made(words: list[str]) -> None:
    assert callable(parse([*words, "--address", "auto"]))
    with pytest.raises(UsageError, match="`auto` or HOST:PORT of a cluster's head is needed"):
        parse([*words, "--address", "http://localhost:8265"])
