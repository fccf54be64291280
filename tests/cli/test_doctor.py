import fcntl
import json
from pathlib import Path

import pytest

from stability_search.cli import doctor, main
from stability_search.cli.checks import Check, State
from stability_search.cli.doctor import TorchFacts
from stability_search.cli.exposure import check_dashboards, check_token

MIB = 1024**2


def torch_facts(**changes: object) -> TorchFacts:
    facts = {"version": "2.13.0", "has_cpu_bf16": True, "is_gpu_build": True, **changes}
    return TorchFacts(**facts)  # type: ignore[arg-type]


def states(*checks: Check) -> list[State]:
    return [check.state for check in checks]


def test_an_old_python_fails() -> None:
    assert doctor.check_python((3, 11, 7)).state is State.OK
    assert doctor.check_python((3, 10, 12)) == Check(
        name="python", state=State.FAIL, found="3.10.12", fix="install Python 3.11"
    )


def test_packages_are_held_to_the_metadata() -> None:
    needed = ["ray[default,tune]<2.61,>=2.60", "torch>=2.13", "absent", 'pytest; extra == "dev"']
    there = {"ray": "2.61.0", "torch": "2.13.0+cpu"}

    checks = doctor.check_packages(needed, there.get)

    assert [check.name for check in checks] == ["ray", "torch", "absent"]
    assert states(*checks) == [State.FAIL, State.OK, State.FAIL]
    assert checks[0].found == "2.61.0, but <2.61,>=2.60 is needed"
    assert checks[2].found == "not installed"


def test_a_checkout_that_is_not_installed_is_a_warning() -> None:
    [check] = doctor.check_packages(None, {}.get)
    assert (check.state, check.fix) == (State.WARN, "pip install -c constraints.txt .")


@pytest.mark.parametrize(
    ("changes", "has_driver", "state", "found"),
    [
        ({}, False, State.OK, "no GPU; trials run on the CPU"),
        ({}, True, State.WARN, "there is an NVIDIA driver, but torch 2.13.0 sees none"),
        (
            {"is_gpu_build": False},
            True,
            State.WARN,
            "there is an NVIDIA driver, but torch 2.13.0 is a build for the CPU",
        ),
        ({"gpus": ("H200",) * 2, "has_gpu_bf16": True}, True, State.OK, "2 x H200"),
        ({"gpus": ("T4",)}, True, State.WARN, "1 x T4, without bf16"),
        ({"gpus": ("T4", "H200")}, True, State.WARN, "several models: T4, H200"),
    ],
)
def test_what_the_gpu_line_says(
    changes: dict[str, object], has_driver: bool, state: State, found: str
) -> None:
    gpu = doctor.check_torch(torch_facts(**changes), has_driver=has_driver)[1]
    assert (gpu.state, gpu.found) == (state, found)
    assert bool(gpu.fix) == (state is State.WARN)


def test_a_cpu_without_bf16_warns_and_a_missing_torch_fails() -> None:
    assert doctor.check_torch(torch_facts(has_cpu_bf16=False), has_driver=False)[0].state is (
        State.WARN
    )
    assert states(*doctor.check_torch(None, has_driver=False)) == [State.FAIL]


@pytest.mark.parametrize(
    ("free", "state"), [(255, State.FAIL), (256, State.WARN), (2047, State.WARN), (2048, State.OK)]
)
def test_disk_space(free: int, state: State, tmp_path: Path) -> None:
    assert doctor.check_disk(tmp_path, free=free * MIB).state is state
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_fails(tmp_path: Path) -> None:
    check = doctor.check_disk(tmp_path / "absent", free=10**12)
    assert check.state is State.FAIL
    assert "cannot be written: No such file or directory" in check.found


def test_a_ledger_can_be_kept_here_and_not_where_locks_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    assert doctor.check_storage(tmp_path).state is State.OK
    monkeypatch.setattr(fcntl, "flock", refuse)
    check = doctor.check_storage(tmp_path)
    assert (check.state, check.fix) == (State.FAIL, "run on a local disk")
    assert "cannot hold a ledger: No locks available" in check.found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "mode", "state", "found"),
    [
        ({}, None, State.OK, "none yet"),
        ({"RAY_AUTH_MODE": "token"}, 0o600, State.OK, "mode 600"),
        ({}, 0o644, State.WARN, "others on this machine may read it"),
        ({"RAY_AUTH_MODE": "disabled"}, 0o600, State.WARN, "anyone who reaches a Ray port"),
        ({"RAY_AUTH_TOKEN": "secret"}, None, State.WARN, "taken from RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN_PATH": "/absent/file"}, None, State.FAIL, "cannot be read"),
    ],
)
def test_what_the_token_line_says(
    environment: dict[str, str], mode: int | None, state: State, found: str, tmp_path: Path
) -> None:
    if mode is not None:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("secret")
        (tmp_path / ".ray" / "auth_token").chmod(mode)

    check = check_token(environment, tmp_path)

    assert check.state is state
    assert found in check.found
    assert "secret" not in f"{check.found} {check.fix}"


@pytest.mark.parametrize(
    ("options", "state", "found"),
    [
        ([], State.OK, "on 127.0.0.1:8265, this machine only"),
        (["--host=localhost", "--port=9000"], State.OK, "on localhost:9000, this machine only"),
        (["--host=::1", "--port=9000"], State.OK, "on ::1:9000, this machine only"),
        (["--host=0.0.0.0", "--port=8265"], State.WARN, "listens on 0.0.0.0:8265, which other"),
        (["--host=gpu-box"], State.WARN, "listens on gpu-box:8265, which other"),
    ],
)
def test_a_dashboard_that_others_can_reach_is_flagged(
    options: list[str], state: State, found: str
) -> None:
    running = ["python", "-u", "/lib/ray/dashboard/dashboard.py", *options]

    check = check_dashboards([["bash"], running])

    assert check.state is state
    assert found in check.found


def test_without_a_dashboard_the_line_says_so() -> None:
    check = check_dashboards([["vim", "dashboard.py"], []])
    assert (check.state, check.found) == (State.OK, "none runs here")


@pytest.mark.parametrize(
    ("free", "state"), [(None, State.OK), (64 * MIB, State.WARN), (150 * MIB, State.OK)]
)
def test_shared_memory(free: int | None, state: State) -> None:
    assert doctor.check_shared_memory(free).state is state


def test_a_missing_chromium_is_a_warning() -> None:
    assert doctor.check_chromium(None).fix == "apt-get install chromium"
    assert doctor.check_chromium("/usr/bin/chromium").state is State.OK


def test_lines_and_exit_code() -> None:
    checks = [
        Check(name="python", state=State.OK, found="3.11.7"),
        Check(name="disk", state=State.WARN, found="little\x1b[2J", fix="free some"),
        Check(name="ray", state=State.FAIL, found="not installed", fix="install"),
    ]
    assert doctor.lines(checks) == [
        "ok    python  3.11.7",
        r"warn  disk    little\x1b[2J. Fix: free some",
        "FAIL  ray     not installed. Fix: install",
        "1 ok, 1 warn, 1 FAIL",
    ]
    assert doctor.exit_code(checks) == 4
    assert doctor.exit_code(checks[:2]) == 0


def test_the_command_looks_at_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    code = main(["doctor", "--format", "json"])

    document = json.loads(capfd.readouterr().out)
    checks = {check["name"]: check for check in document["checks"]}
    assert document["schema"] == "stability-search/doctor/1"
    assert code == document["exit_code"]
    assert code == (4 if "FAIL" in {check["state"] for check in checks.values()} else 0)
    assert {
        *("python", "bf16 on CPU", "bf16 on GPU", "disk", "storage", "shared memory", "token"),
        *("dashboard", "chromium"),
    } <= set(checks)


@pytest.mark.parametrize(
    ("chosen", "first"), [("table", "ok    python  3"), ("csv", "name,state,found,fix")]
)
def test_the_other_forms(
    chosen: str, first: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    python = Check(name="python", state=State.OK, found="3")
    monkeypatch.setattr(doctor, "examine", lambda _: [python])

    assert main(["doctor", "--format", chosen]) == 0

    assert capfd.readouterr().out.splitlines()[0] == first
