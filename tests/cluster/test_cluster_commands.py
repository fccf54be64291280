"""The commands of a study on a cluster: what they print, where, and their exit codes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from stability_search.cli import cluster_commands, main
from stability_search.cluster import fetching, stopping
from stability_search.cluster.address import ClusterAddress
from stability_search.cluster.jobs import JobRequest, JobState
from stability_search.cluster.result import AttemptResult
from tests.cluster.fake_jobs import NODE, URL, FakeJobs, start_nothing

SPACE = """\
name: small
task: ./mine.py:Mine
space:
  learning_rate: {loguniform: {low: 1e-3, high: 0.1}}
"""
VERDICT = (
    "Stable over 20 steps.\x1b[31m",
    "go on with `stability-search resume /far/away`.",
    "report: /far/away/report.html",
    "next: stability-search train --space /far/away/best.yaml",
)
Play = Callable[[JobRequest, FakeJobs], None]


def ends(exit_code: int, state: JobState = JobState.FAILED) -> Play:
    def play(request: JobRequest, jobs: FakeJobs) -> None:
        jobs.printed[request.id] = "one\ntwo \x1b[2J\n"
        jobs.set(request.id, state, exit_code=exit_code)
        jobs.leave(
            request.id, AttemptResult(exit_code=exit_code, lines=VERDICT, run_directory="/far/s")
        )

    return play


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeJobs:
    """Return the cluster that every command reaches, from a folder with a small study."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "small.yaml").write_text(SPACE)
    (here / "mine.py").write_text("class Mine: ...\n")
    monkeypatch.chdir(here)
    found = FakeJobs(logs=tmp_path / "logs", on_submit=ends(0, JobState.SUCCEEDED))
    monkeypatch.setattr(cluster_commands, "connect", lambda _address: found)
    return found


def call(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main([*words, "--address", URL])
    out, err = capfd.readouterr()
    return code, out, err


def submit(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    return call(capfd, "submit", "--space", "small.yaml", *words)


def test_what_is_sent_is_shown_before_it_is_sent(
    jobs: FakeJobs, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = submit(capfd, "--dry-run")

    assert code == 0
    assert out.startswith("small-")
    assert err.splitlines() == [
        "space file: small.yaml",
        f"to be sent to {URL}: 2 files, 0.1 KiB",
        "      0.0 KiB  mine.py",
        "      0.1 KiB  space.yaml",
    ]
    assert (jobs.requests, jobs.uploads) == ([], {})


def test_a_study_is_followed_and_ends_with_its_verdict(
    jobs: FakeJobs, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = submit(capfd)

    name = jobs.requests[0].id
    assert code == 0
    assert out.splitlines() == [
        r"Stable over 20 steps.\x1b[31m",
        "go on with `stability-search submit` with the same words.",
        f"files: /far/s on node {NODE} of {URL}",
        f"next: stability-search fetch {name} --address {URL}",
    ]
    assert err.splitlines()[-3:] == [f"{name}: submitted to {URL}", "one", r"two \x1b[2J"]


@pytest.mark.parametrize("exit_code", [3, 4, 5, 6, 143])
def test_the_exit_code_is_that_of_the_record(
    jobs: FakeJobs, capfd: pytest.CaptureFixture[str], exit_code: int
) -> None:
    jobs.on_submit = ends(exit_code)

    assert submit(capfd)[0] == exit_code


def test_a_job_without_a_record_is_a_failure_of_machines(
    jobs: FakeJobs, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs.on_submit = lambda request, jobs: jobs.set(request.id, JobState.SUCCEEDED, exit_code=0)

    code, out, err = submit(capfd)

    assert (code, out) == (4, "")
    assert "left no record" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_submitted_again_it_does_not_run_again(
    jobs: FakeJobs, capfd: pytest.CaptureFixture[str]
) -> None:
    first = submit(capfd)
    second = submit(capfd)

    assert len(jobs.requests) == 1
    assert second[:2] == first[:2]
    assert "it has finished there as small-" in second[2]


def test_no_wait_returns_with_the_name(jobs: FakeJobs, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = submit(capfd, "--no-wait", "--name", "mine")

    assert (code, out) == (0, "mine\n")
    assert [request.id for request in jobs.requests] == ["mine"]
    assert "one" not in err


def test_ctrl_c_leaves_the_study_running_and_says_how_to_come_back(
    jobs: FakeJobs, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_job_id: str) -> str:
        raise KeyboardInterrupt

    jobs.log = interrupt  # type: ignore[method-assign]

    code, out, err = submit(capfd, "--name", "mine")

    assert (code, out) == (130, "")
    assert jobs.stopped == []
    assert f"`stability-search logs mine --address {URL} --follow`" in err


@pytest.mark.usefixtures("jobs")
def test_logs_are_data_and_harmless(capfd: pytest.CaptureFixture[str]) -> None:
    submit(capfd, "--name", "mine")

    assert call(capfd, "logs", "mine") == (0, "one\ntwo \\x1b[2J\n", "")


def test_followed_logs_end_as_the_study_does(
    jobs: FakeJobs, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs.on_submit = ends(3)
    submit(capfd, "--name", "mine", "--no-wait")

    code, out, err = call(capfd, "logs", "mine", "--follow")

    assert code == 3
    assert out.startswith("Stable over 20 steps.")
    assert err.splitlines() == ["one", r"two \x1b[2J"]


def test_a_study_is_stopped(jobs: FakeJobs, capfd: pytest.CaptureFixture[str]) -> None:
    jobs.on_submit = lambda request, jobs: jobs.set(request.id, JobState.RUNNING)
    submit(capfd, "--name", "mine", "--no-wait")

    code, out, err = call(capfd, "stop", "mine")

    assert (code, out, jobs.stopped) == (0, "", ["mine"])
    assert err.splitlines()[-1] == "mine: stopped. Submit it again to go on."
    assert call(capfd, "stop", "mine")[2] == "mine: it had ended before: stopped\n"


def test_a_study_that_waits_for_a_core_is_stopped_in_one_line(
    jobs: FakeJobs, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs.on_submit = start_nothing
    monkeypatch.setattr(jobs, "stop", jobs.stopped.append)  # Ray tells it once it runs
    monkeypatch.setattr(stopping, "_PENDING_S", 0.0)
    monkeypatch.setattr(stopping, "_POLL_S", 0.001)
    submit(capfd, "--name", "mine", "--no-wait")

    code, out, err = call(capfd, "stop", "mine")

    assert (code, out, jobs.stopped) == (0, "", ["mine"])
    assert err == "mine: it waits for a free CPU, and will end as soon as it gets one\n"


def test_a_status_of_a_cluster_is_that_of_its_node(
    jobs: FakeJobs, capfd: pytest.CaptureFixture[str]
) -> None:
    submit(capfd, "--name", "mine", "--no-wait")
    jobs.files = {
        "stability-search/mine/status.table": b"/far/mine: finished\nnext: train\n",
        "stability-search/mine/status.json": b'{\n  "state": "finished"\n}\n',
    }

    code, out, _ = call(capfd, "status", "mine")
    assert code == 0
    assert out.splitlines() == [
        f"mine on {URL}: attempt mine, exit 0, there is a choice",
        "/far/mine: finished",
        f"next: stability-search fetch mine --address {URL}",
    ]
    assert call(capfd, "status", "mine", "--format", "json")[1] == '{\n  "state": "finished"\n}\n'


def test_an_end_is_told_by_the_record_and_not_in_rays_word(
    jobs: FakeJobs, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs.on_submit = ends(3)
    submit(capfd, "--name", "mine", "--no-wait")
    jobs.files = {"stability-search/mine/status.table": b"/far/mine: finished\n"}

    assert call(capfd, "stop", "mine") == (
        0,
        "",
        "mine: it had ended before: exit 3, no stable configuration\n",
    )
    status = call(capfd, "status", "mine")[1]
    assert status.startswith(f"mine on {URL}: attempt mine, exit 3, no stable configuration\n")


def test_a_job_without_a_record_is_not_said_to_have_failed_or_succeeded(
    jobs: FakeJobs, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs.on_submit = lambda request, jobs: jobs.set(request.id, JobState.SUCCEEDED, exit_code=0)
    submit(capfd, "--name", "mine", "--no-wait")

    assert call(capfd, "stop", "mine")[2] == (
        "mine: it had ended before: no record of how it ended\n"
    )


def test_a_status_of_a_study_that_waits_for_a_cpu_is_no_error(
    jobs: FakeJobs, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs.on_submit = start_nothing
    submit(capfd, "--name", "mine", "--no-wait")

    assert call(capfd, "status", "mine") == (
        0,
        (
            f"mine on {URL}: attempt mine, waits for a free CPU\n"
            f"next: stability-search logs mine --address {URL} --follow\n"
        ),
        "",
    )
    code, out, err = call(capfd, "status", "mine", "--format", "json")
    assert (code, out) == (4, "")
    assert err.endswith("its job waits for a free CPU. Try again later.\n")


@pytest.mark.usefixtures("jobs")
@pytest.mark.parametrize("has_choice", [True, False])
def test_a_fetch_ends_with_the_commands_that_hold_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *, has_choice: bool
) -> None:
    submit(capfd, "--name", "mine", "--no-wait")
    directory = Path("a copy")
    directory.mkdir()
    if has_choice:
        (directory / "best.yaml").touch()
    done = fetching.Fetched(directory=directory, num_files=1, num_new=1, num_bytes=1, seconds=1)
    monkeypatch.setattr(fetching, "fetch", lambda *_: done)

    code, out, err = call(capfd, "fetch", "mine", "--output", "a copy")

    assert (code, out) == (0, "a copy\n")
    assert "next: stability-search report 'a copy'  # its pages name paths of the" in err
    assert ("next: stability-search train --space 'a copy/best.yaml'" in err) is has_choice


@pytest.mark.usefixtures("jobs")
def test_a_name_that_the_cluster_does_not_know_is_one_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    for command in ("logs", "stop", "fetch", "status"):
        code, out, err = call(capfd, command, "nobody")
        assert (code, out) == (2, "")
        assert err.startswith(f"nobody: {URL} knows no study of that name")
        assert len(err.splitlines()) == 1


@pytest.mark.usefixtures("jobs")
@pytest.mark.parametrize("command", ["logs", "stop", "fetch", "status"])
@pytest.mark.parametrize("name", ["../x", "/etc", "a b", "x.2", "", "a\x1b[2J"])
def test_what_is_no_name_is_refused_before_it_is_asked_for(
    command: str, name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))

    code, out, err = call(capfd, command, name)

    assert (code, out) == (2, "")
    assert err.startswith("NAME: letters, digits")
    assert "\x1b" not in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("folder", ["runs", "./runs", "../runs"])
def test_a_folder_that_would_go_with_the_job_is_refused(
    jobs: FakeJobs, folder: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _, err = submit(capfd, "--remote-output", folder)

    assert code == 2
    assert "--remote-output: a folder that begins with / or ~ is needed" in err
    assert jobs.requests == []
    assert submit(capfd, "--remote-output", "/data/runs")[0] == 0


# The real connection


@pytest.fixture
def no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_token")
@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("http://10.255.255.1:8265", 2, "plain HTTP to another machine is refused"),
        ("auto", 2, "a URL is needed here"),
        ("http://127.0.0.1:9", 4, "the cluster does not answer"),
    ],
)
def test_a_cluster_that_cannot_be_asked_is_one_line(
    url: str, code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["logs", "x", "--address", url]) == code
    err = capfd.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.usefixtures("no_token")
@pytest.mark.parametrize(
    "url",
    [
        "http://me:canary@localhost:8265",
        "http://me:canary@localhost:port",
        "htp://me:canary@localhost",
        "http://localhost:8265?token=canary",
    ],
)
@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--no-wait",)])
def test_a_password_in_an_address_is_never_shown(
    jobs: FakeJobs, url: str, more: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "--space", "small.yaml", "--address", url, *more]) == 2

    out, err = capfd.readouterr()
    assert out == ""
    assert "canary" not in err
    assert len(err.splitlines()) == 1
    assert jobs.requests == []


@pytest.mark.usefixtures("no_token")
def test_a_token_goes_over_plain_http_only_if_it_is_asked_for(
    jobs: FakeJobs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("canary")
    asked: list[ClusterAddress] = []

    def connect(address: ClusterAddress) -> FakeJobs:
        asked.append(address)
        return jobs

    monkeypatch.setattr(cluster_commands, "connect", connect)
    words = ["submit", "--space", "small.yaml", "--no-wait", "--address", "http://10.1.2.3:8265"]

    assert main(words) == 2
    assert asked == []
    assert main([*words, "--insecure"]) == 0
    assert [address.token for address in asked] == ["canary"]
    out, err = capfd.readouterr()
    assert "warning: http://10.1.2.3:8265 is plain HTTP to another machine" in err
    assert "canary" not in out + err
