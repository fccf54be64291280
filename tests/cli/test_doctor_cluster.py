"""`doctor --address`: what is said of a cluster, joined or seen from outside."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from stability_search.cli import doctor, main
from stability_search.cli.checks import Check, State
from stability_search.cli.doctor_cluster import outside_checks, survey_checks
from stability_search.cli.doctor_nodes import lines_from_outside, lines_of_survey, table
from stability_search.cli.exposure import check_door, check_entry
from stability_search.cluster import outside as seeing
from stability_search.cluster.address import ClusterAddress
from stability_search.cluster.outside import Outside, OutsideNode, TokenUse
from stability_search.errors import InfrastructureError
from stability_search.search import survey as surveying
from stability_search.search.machine import Node
from stability_search.search.nodes import facts_here
from stability_search.search.survey import NodeState, Survey, SurveyedNode

GIB = 2**30
HERE = replace(facts_here(""), python="3.11.7", torch="2.13.0", cuda="", ray="2.60.0")
LOCAL = ClusterAddress(url="http://localhost:8265", is_loopback=True)
FAR = ClusterAddress(url="http://gpu-box:8265", is_loopback=False)
HOSTILE = "gpu\x1b[2J"


def node(name: str, *problems: str, skew_s: float = 0.0, **changes: object) -> SurveyedNode:
    resources = {"CPU": 4.0, **changes.pop("resources", {})}  # type: ignore[dict-item]
    told: dict[str, object] = {
        "disk_free_bytes": 50 * GIB, "memory_free_bytes": 8 * GIB, "clock_s": 0.0, **changes
    }  # fmt: skip
    return SurveyedNode(
        name=name,
        node=Node(node_id=name, host=name, resources=resources),
        num_slots=4,
        state=NodeState(facts=HERE, **told),  # type: ignore[arg-type]
        skew_s=skew_s,
        problems=problems,
    )


def checks_of(*nodes: SurveyedNode) -> dict[str, Check]:
    found = survey_checks("auto", Survey(here=HERE, nodes=nodes, seconds=2.0))
    assert len({check.name for check in found}) == len(found)
    return {check.name: check for check in found}


def test_a_cluster_whose_nodes_are_alike_is_ok() -> None:
    found = checks_of(node("a"), node("b"))
    assert {check.state for check in found.values()} == {State.OK}
    assert found["nodes"].found == "2 of 2 could run trials, 8 at once with a CPU core each"
    assert found["versions"].found == "Python 3.11.7, torch 2.13.0, ray 2.60.0 as here"
    assert found["GPUs"].found == "none; trials run on the CPU"
    assert found["disk"].found == "at least 51200 MiB free on each"


def test_nodes_that_differ_alike_are_one_line_which_fails() -> None:
    others = [node(f"n{index}", "torch 2.12.0 there, 2.13.0 here") for index in range(5)]
    found = checks_of(node("a"), *others)
    assert found["nodes"].state is State.OK
    assert found["versions"] == Check(
        name="versions",
        state=State.FAIL,
        found="n0, n1, n2 and 2 more: torch 2.12.0 there, 2.13.0 here",
        fix="make them alike, or keep trials off them by search.resources.labels",
    )
    assert checks_of(*others)["nodes"].state is State.FAIL


def test_a_node_onto_which_no_trial_fits_may_differ() -> None:
    head = replace(node("head", "torch none there, 2.13.0 here"), num_slots=0)
    found = checks_of(node("a"), head)
    assert found["versions"].state is State.WARN
    assert found["versions"].found.endswith("no trial fits there anyway")


def test_gpus_of_several_models_little_room_and_another_time_are_warned_of() -> None:
    h100 = {"GPU": 1.0, "accelerator_type:H100": 1.0}
    t4 = {"GPU": 1.0, "accelerator_type:T4": 1.0}
    found = checks_of(
        node("a", resources=h100, disk_free_bytes=GIB),
        node("b", resources=t4, memory_free_bytes=GIB // 2, skew_s=-7.0),
        node("c", resources=t4, memory_free_bytes=None),
    )
    warned = {name for name, check in found.items() if check.state is State.WARN}
    assert warned == {"GPUs", "disk", "memory", "clocks"}
    assert {check.state for check in found.values()} == {State.OK, State.WARN}
    assert found["GPUs"].found == "several models: H100, T4"
    assert found["disk"].found == "little free: a 1024 MiB"
    assert found["memory"].found == "little free: b 512 MiB"
    assert found["clocks"].found == "differ: b -7 s"


def test_a_node_that_says_nothing_hides_nothing_of_the_others() -> None:
    silent = replace(node("b", "an answer none within 60 s there, at once here"), state=None)
    found = checks_of(node("a"), replace(silent, skew_s=None))
    assert found["versions"].state is State.FAIL
    assert found["disk"].state is State.OK
    alone = checks_of(replace(silent, skew_s=None))
    assert not {"disk", "memory"} & set(alone)


def test_nodes_are_a_table_whose_text_is_harmless() -> None:
    alike = node("a", resources={"GPU": 2.0, "accelerator_type:H100": 1.0}, memory_free_bytes=None)
    silent = replace(node(HOSTILE, "silent"), state=None, skew_s=None)
    lines = table(lines_of_survey(Survey(here=HERE, nodes=(alike, silent))))
    assert [line.split()[:5] for line in lines] == [
        ["node", "state", "trials", "CPUs", "GPUs"],
        ["a", "alike", "4", "4", "2"],
        [r"gpu\x1b[2J", "silent", "0", "4", "0"],
    ]
    assert "50.0 GiB" in lines[1]
    assert "H100" in lines[1]
    assert "memory free" not in lines[0]  # nobody knows


def test_what_a_dashboard_tells_of_its_nodes_is_a_table_too() -> None:
    told = Outside(
        token=TokenUse.ACCEPTED,
        nodes=(
            OutsideNode(name="a", is_alive=True, cpus=8.0, gpus=0.0, disk_free_bytes=GIB),
            OutsideNode(name="b", is_alive=False),
        ),
    )
    assert [line.split() for line in table(lines_from_outside(told))] == [
        ["node", "state", "CPUs", "GPUs", "disk", "free"],
        ["a", "alive", "8", "0", "1.0", "GiB"],
        ["b", "dead"],
    ]


# From outside


def outside_of(address: ClusterAddress, found: Outside) -> dict[str, Check]:
    return {check.name: check for check in outside_checks(address, found)}


def test_a_guarded_dashboard_on_this_machine_is_ok() -> None:
    nodes = (OutsideNode(name="a", is_alive=True, cpus=8.0, gpus=1.0),)
    told = Outside(token=TokenUse.ACCEPTED, ray_version=doctor_ray(), nodes=nodes)
    found = outside_of(LOCAL, told)
    assert {check.state for check in found.values()} == {State.OK}
    assert found["nodes"].found == "1 of 1 alive; CPU cores 8, GPUs 1"
    assert found["token"].found == "ours is accepted"


def doctor_ray() -> str:
    from importlib.metadata import version

    return version("ray")


@pytest.mark.parametrize(
    ("is_loopback", "is_open", "state", "found"),
    [
        (True, False, State.OK, "asks for a token"),
        (False, False, State.OK, "asks for a token"),
        (True, True, State.WARN, "OPEN: http://h asks for no token, so everybody on that machine"),
        (False, True, State.FAIL, "OPEN: http://h asks for no token, so whoever reaches it"),
    ],
)
def test_an_open_dashboard_is_said_loudly(
    is_loopback: bool, is_open: bool, state: State, found: str
) -> None:
    check = check_door("http://h", is_loopback=is_loopback, is_open=is_open)
    assert (check.state, found in check.found) == (state, True)


@pytest.mark.parametrize(
    ("use", "state", "found"),
    [
        (TokenUse.NOT_WANTED, State.OK, "none is asked for"),
        (TokenUse.REFUSED, State.FAIL, "another than ours is asked for"),
        (TokenUse.MISSING, State.FAIL, "one, and there is none here, is asked for"),
        (TokenUse.KEPT_BACK, State.WARN, "ours was not sent"),
    ],
)
def test_what_became_of_the_token_is_said(use: TokenUse, state: State, found: str) -> None:
    check = outside_of(FAR, Outside(token=use))["token"]
    assert (check.state, found in check.found) == (state, True)


def test_plain_http_to_another_machine_fails_and_https_does_not() -> None:
    told = Outside(token=TokenUse.MISSING)
    assert outside_of(FAR, told)["way"].state is State.FAIL
    assert "ssh -L" in outside_of(FAR, told)["way"].fix
    tls = replace(FAR, url="https://gpu-box")
    assert outside_of(tls, told)["way"] == Check(name="way", state=State.OK, found="encrypted")


@pytest.mark.parametrize(
    ("version", "state"),
    [("2.59.1", State.FAIL), ("3", State.FAIL), ("\x1b", State.FAIL), ("", State.OK)],
)
def test_another_ray_fails(version: str, state: State) -> None:
    told = Outside(token=TokenUse.ACCEPTED, ray_version=version)
    assert outside_of(LOCAL, told)["ray"].state is state


def test_a_cluster_without_a_core_for_a_driver_fails() -> None:
    nodes = (OutsideNode(name="a", is_alive=True, cpus=0.0, gpus=1.0),)
    told = Outside(token=TokenUse.ACCEPTED, nodes=nodes)
    assert outside_of(LOCAL, told)["nodes"].state is State.FAIL


# The command


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def call(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["doctor", *words])
    out, err = capfd.readouterr()
    return code, out, err


@pytest.mark.usefixtures("home")
def test_a_joined_cluster_in_every_form(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    found = Survey(here=HERE, nodes=(node("a"), node("b", "torch differs")), seconds=2.0)
    monkeypatch.setattr(surveying, "survey", lambda _address: found)

    code, out, err = call(capfd, "--address", "auto")
    lines = out.splitlines()
    assert (code, err) == (4, "")
    assert [line.split()[0] for line in lines[:4]] == ["node", "a", "b", "ok"]
    assert "FAIL  versions   b: torch differs. Fix: make them alike" in out

    code, out, _ = call(capfd, "--address", "auto", "--format", "json")
    document = json.loads(out)
    assert (code, document["exit_code"], document["schema"]) == (4, 4, doctor.SCHEMA)
    assert [one["state"] for one in document["nodes"]] == ["alike", "differs"]
    assert document["nodes"][1]["problem"] == "torch differs"

    _, out, _ = call(capfd, "--address", "auto", "--format", "csv")
    table_of_checks = list(csv.DictReader(io.StringIO(out)))
    assert set(table_of_checks[0]) == {"name", "state", "found", "fix"}
    assert {"nodes", "dashboard", "token"} <= {row["name"] for row in table_of_checks}


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://h:10001", "`auto` or HOST:PORT"),
        ("local", "Leave --address out"),
        ("h", "`auto` or HOST:PORT"),
        ("http://me:canary@localhost:8265", "without a user or a password"),
        ("me:canary@h:6379", "but got something else"),
    ],
)
def test_a_wrong_address_is_one_line(
    address: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capfd, "--address", address)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err
    assert "canary" not in err


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("address", ["auto", "http://localhost:8265"])
def test_a_cluster_that_does_not_answer_fails_with_the_way_out(
    address: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(_address: object) -> None:
        raise InfrastructureError("it does not answer.", hint="Start it.")

    monkeypatch.setattr(surveying, "survey", refuse)
    monkeypatch.setattr(seeing, "look_from_outside", refuse)
    code, out, _ = call(capfd, "--address", address)
    assert code == 4
    assert out.splitlines()[0].split(maxsplit=2)[2] == "it does not answer. Fix: Start it"


def test_a_token_is_looked_at_and_never_shown(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("canary")
    asked: list[ClusterAddress] = []

    def look(address: ClusterAddress) -> Outside:
        asked.append(address)
        return Outside(token=TokenUse.NOT_WANTED, ray_version=doctor_ray())

    monkeypatch.setattr(seeing, "look_from_outside", look)
    code, out, err = call(capfd, "--address", "http://gpu-box:8265", "--format", "json")
    assert [one.token for one in asked] == ["canary"]
    assert "canary" not in out + err
    states = {one["name"]: one["state"] for one in json.loads(out)["checks"]}
    assert code == 4
    assert (states["dashboard"], states["way"], states["token file"]) == ("FAIL", "FAIL", "warn")


def test_a_token_file_that_cannot_be_read_is_a_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "gone"))
    monkeypatch.setattr(seeing, "look_from_outside", lambda _: Outside(token=TokenUse.MISSING))
    code, out, _ = call(capfd, "--address", "http://localhost:8265")
    assert code == 4
    assert "FAIL  token file  RAY_AUTH_TOKEN_PATH: " in out


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("dashboard", "told", "shown"),  # of a head that is this machine
    [
        ("", None, "ok    dashboard  none runs there"),
        ("10.0.0.5:8265", TokenUse.NOT_WANTED, "FAIL  dashboard  OPEN: http://10.0.0.5:8265 "),
        ("127.0.0.1:8265", TokenUse.NOT_WANTED, "warn  dashboard  OPEN: http://127.0.0.1:8265 "),
        ("10.0.0.5:8265", TokenUse.MISSING, "ok    dashboard  http://10.0.0.5:8265 asks for"),
        ("10.0.0.5:8265", None, "ok    dashboard  on 10.0.0.5:8265 of the head; it does not"),
    ],
)
def test_the_dashboard_of_a_joined_cluster_is_tried_without_a_token(
    dashboard: str,
    told: TokenUse | None,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    asked: list[ClusterAddress] = []

    def look(address: ClusterAddress) -> Outside:
        asked.append(address)
        if told is None:
            raise InfrastructureError("silence")
        return Outside(token=told)

    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary")
    cluster = Survey(here=HERE, nodes=(node("a"),), dashboard=dashboard, is_head_here=True)
    monkeypatch.setattr(surveying, "survey", lambda _address: cluster)
    monkeypatch.setattr(seeing, "look_from_outside", look)
    assert f"\n{shown}" in call(capfd, "--address", "auto")[1]
    assert all(address.token == "" for address in asked)


@pytest.mark.usefixtures("home")
def test_the_loopback_address_of_another_machine_is_not_tried_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster = Survey(here=HERE, nodes=(node("a"),), dashboard="127.0.0.1:8265")
    monkeypatch.setattr(surveying, "survey", lambda _address: cluster)
    monkeypatch.setattr(seeing, "look_from_outside", pytest.fail)
    _, out, _ = call(capfd, "--address", "auto")
    assert "ok    dashboard  on 127.0.0.1:8265 of the head, that machine only" in out


@pytest.mark.parametrize(
    ("has_sent_token", "is_asked_for", "state", "found"),
    [
        (False, None, State.WARN, "OPEN: it let us in without a token"),
        (False, True, State.WARN, "OPEN: it let us in without a token"),
        (True, False, State.WARN, "OPEN: a token was sent, but the dashboard demands none"),
        (True, None, State.WARN, "a token was sent; whether it is demanded cannot be told from"),
        (True, True, State.OK, "one was sent, and nobody gets in without"),
    ],
)
def test_a_cluster_that_may_let_everybody_in_is_said_loudly(
    *, has_sent_token: bool, is_asked_for: bool | None, state: State, found: str
) -> None:
    check = check_entry(has_sent_token=has_sent_token, is_asked_for=is_asked_for)
    assert (check.name, check.state) == ("token", state)
    assert check.found.startswith(found)


@pytest.mark.parametrize("mode", ["", "token"])  # as here, which says nothing of what was sent
@pytest.mark.parametrize(
    ("has_sent_token", "told", "shown"),
    [
        (False, TokenUse.NOT_WANTED, "warn  token      OPEN: it let us in without a token"),
        (True, TokenUse.NOT_WANTED, "warn  token      OPEN: a token was sent"),
        (True, TokenUse.MISSING, "ok    token      one was sent"),
    ],
)
def test_what_was_sent_and_what_the_dashboard_asks_for_tell_who_gets_in(  # noqa: PLR0913 - cases
    *,
    has_sent_token: bool,
    told: TokenUse,
    shown: str,
    mode: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    file = home / ".ray" / "auth_token"
    file.parent.mkdir(exist_ok=True)
    file.write_text("canary")
    file.chmod(0o644)
    cluster = Survey(
        here=HERE,
        nodes=(node("a"),),
        dashboard="10.0.0.5:8265",
        has_sent_token=has_sent_token,
    )
    monkeypatch.setattr(surveying, "survey", lambda _address: cluster)
    monkeypatch.setattr(seeing, "look_from_outside", lambda _: Outside(token=told))
    _, out, _ = call(capfd, "--address", "auto")
    assert shown.split(None, 2)[2] in out
    assert ("others on this machine may read it" in out) == has_sent_token
