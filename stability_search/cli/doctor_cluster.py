"""Checks of a cluster: joined and asked from one of its machines, else seen from outside."""

import dataclasses
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stability_search.cli.checks import Check, State
from stability_search.cli.doctor_nodes import (
    NodeLine,
    lines_from_outside,
    lines_of_survey,
)
from stability_search.cli.exposure import check_door, check_entry, check_token
from stability_search.errors import InfrastructureError, UsageError
from stability_search.ray_token import read_token

if TYPE_CHECKING:
    from stability_search.cluster.address import ClusterAddress
    from stability_search.cluster.outside import Outside, TokenUse
    from stability_search.search.survey import Survey, SurveyedNode

_LITTLE_DISK_MIB, _LITTLE_MEMORY_MIB = 2048, 1024
_MUCH_SKEW_S = 5.0
_MAX_NAMED = 3
_SAME_MINOR = 2  # parts of a version: Ray's interfaces stay within them
_TUNNEL = "ssh -L 8265:localhost:8265 HEAD, then --address http://localhost:8265; or TLS, https://"

Findings = tuple[list[Check], list[NodeLine]]


def examine_cluster(address: str) -> Findings:
    """Look at a cluster; nothing is left there.

    Args:
        address: `auto` or `HOST:PORT`, which is joined; or the URL of a dashboard, which is only
            looked at.

    Raises:
        UsageError: It is no address.
    """
    from stability_search.cluster.address import checked_join_address, is_url

    if is_url(address):
        return _seen_from_outside(address, os.environ, Path.home())
    return _joined(checked_join_address(address), os.environ, Path.home())


# -- joined -------------------------------------------------------------------------------------


def _joined(address: str, environment: Mapping[str, str], home: Path) -> Findings:
    from stability_search.search.survey import survey

    try:
        found = survey(address)
    except InfrastructureError as error:
        return [_no_answer(error), check_token(environment, home)], []
    door, is_asked_for = _door_of(found)
    entry = check_entry(has_sent_token=found.has_sent_token, is_asked_for=is_asked_for)
    checks = [*survey_checks(address, found), entry, door]
    if found.has_sent_token:
        checks.append(_check_token_file(environment, home))
    return checks, lines_of_survey(found)


def survey_checks(address: str, found: "Survey") -> list[Check]:
    """Check what the nodes of a cluster say: alike, one GPU model, room, the same time.

    Args:
        address: As it was given.
        found: The cluster, joined.
    """
    here = found.here
    checks = [
        Check(
            name="address",
            state=State.OK,
            found=f"{address}, joined, asked and left in {found.seconds:.1f} s",
        ),
        _check_trials(found.nodes),
        *_check_versions(found.nodes),
    ]
    if not any(one.problems for one in found.nodes):
        alike = f"Python {here.python}, torch {here.torch}, ray {here.ray} as here"
        checks.append(Check(name="versions", state=State.OK, found=alike))
    return [*checks, _check_models(found.nodes), *_check_room(found.nodes), _check_clocks(found)]


def _check_trials(nodes: Sequence["SurveyedNode"]) -> Check:
    able = [one for one in nodes if one.num_slots and not one.problems]
    each = "a GPU and a CPU core" if any(one.node.gpu_model for one in nodes) else "a CPU core"
    found = (
        f"{len(able)} of {len(nodes)} could run trials, {sum(one.num_slots for one in able)} "
        f"at once with {each} each"
    )
    if able:
        return Check(name="nodes", state=State.OK, found=found)
    fix = "give a node CPU cores, and the same versions as here"
    return Check(name="nodes", state=State.FAIL, found=found, fix=fix)


def _check_versions(nodes: Sequence["SurveyedNode"]) -> list[Check]:
    """Say in what nodes differ: a study would refuse those onto which its trials fit."""
    alike = defaultdict(list)
    for one in nodes:
        if one.problems:
            alike[bool(one.num_slots), one.problems].append(one.name)
    checks = []
    for (can_run, problems), names in alike.items():
        rest = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        found = f"{', '.join(names[:_MAX_NAMED])}{rest}: {'; '.join(problems)}"
        if can_run:
            fix = "make them alike, or keep trials off them by search.resources.labels"
            checks.append(Check(name="versions", state=State.FAIL, found=found, fix=fix))
        else:
            found = f"{found}; no trial fits there anyway"
            checks.append(Check(name="versions", state=State.WARN, found=found))
    return checks


def _check_models(nodes: Sequence["SurveyedNode"]) -> Check:
    models = sorted({one.node.gpu_model for one in nodes} - {""})
    found = ", ".join(models) or "none; trials run on the CPU"
    if len(models) > 1:
        fix = "name one by search.resources.accelerator: trials on several are not compared"
        return Check(name="GPUs", state=State.WARN, found=f"several models: {found}", fix=fix)
    return Check(name="GPUs", state=State.OK, found=found)


def _check_room(nodes: Sequence["SurveyedNode"]) -> list[Check]:
    disks = {one.name: one.state.disk_free_bytes for one in nodes if one.state}
    memories = {
        one.name: one.state.memory_free_bytes
        for one in nodes
        if one.state and one.state.memory_free_bytes is not None
    }
    checks = []
    if disks:
        fix = "free some: Ray keeps its files there"
        checks.append(_check_least("disk", disks, _LITTLE_DISK_MIB, fix))
    if memories:
        fix = "end what takes it, or use others"
        checks.append(_check_least("memory", memories, _LITTLE_MEMORY_MIB, fix))
    return checks


def _check_least(name: str, free: Mapping[str, int], little_mib: float, fix: str) -> Check:
    mib = {node: num_bytes / 2**20 for node, num_bytes in free.items()}
    short = [f"{node} {one:.0f} MiB" for node, one in sorted(mib.items()) if one < little_mib]
    if short:
        return Check(
            name=name, state=State.WARN, found=f"little free: {', '.join(short)}", fix=fix
        )
    least = f"at least {min(mib.values()):.0f} MiB free on each"
    return Check(name=name, state=State.OK, found=least)


def _check_clocks(found: "Survey") -> Check:
    ahead = [
        f"{one.name} {one.skew_s:+.0f} s"
        for one in found.nodes
        if one.skew_s is not None and abs(one.skew_s) >= _MUCH_SKEW_S
    ]
    if ahead:
        fix = "let them keep time by NTP: times in the tables are the nodes' own"
        return Check(name="clocks", state=State.WARN, found=f"differ: {', '.join(ahead)}", fix=fix)
    return Check(name="clocks", state=State.OK, found="as here, as far as asking can tell")


def _door_of(found: "Survey") -> tuple[Check, bool | None]:
    """Ask the dashboard of a cluster that was joined whether it lets everybody in.

    Returns:
        What was found; and True if a token is asked for, None where that cannot be seen.
    """
    from stability_search.cluster.address import ClusterAddress, read_url
    from stability_search.cluster.outside import TokenUse, look_from_outside

    if not found.dashboard:
        return Check(name="dashboard", state=State.OK, found="none runs there"), None
    try:
        url, is_loopback = read_url(f"http://{found.dashboard}")
        if is_loopback and not found.is_head_here:
            seen = f"on {found.dashboard} of the head, that machine only"
            return Check(name="dashboard", state=State.OK, found=seen), None
        outside = look_from_outside(ClusterAddress(url=url, is_loopback=is_loopback))
    except (InfrastructureError, UsageError):
        seen = f"on {found.dashboard} of the head; it does not answer from here"
        return Check(name="dashboard", state=State.OK, found=seen), None
    is_open = outside.token is TokenUse.NOT_WANTED
    return check_door(url, is_loopback=is_loopback, is_open=is_open), not is_open


# -- from outside -------------------------------------------------------------------------------


def _seen_from_outside(text: str, environment: Mapping[str, str], home: Path) -> Findings:
    from stability_search.cluster.address import ClusterAddress, read_url
    from stability_search.cluster.outside import look_from_outside

    url, is_loopback = read_url(text)
    token_file = _check_token_file(environment, home)
    try:
        token = read_token(environment, home)
    except UsageError as error:
        token = ""
        fix = error.hint.rstrip(".")
        token_file = Check(name="token file", state=State.FAIL, found=error.message, fix=fix)
    address = ClusterAddress(url=url, is_loopback=is_loopback, token=token)
    try:
        found = look_from_outside(address)
    except InfrastructureError as error:
        return [_no_answer(error), token_file], []
    return [*outside_checks(address, found), token_file], lines_from_outside(found)


def outside_checks(address: "ClusterAddress", found: "Outside") -> list[Check]:
    """Check what a dashboard tells of itself.

    Args:
        address: Where it is.
        found: What it told.
    """
    from stability_search.cluster.outside import TokenUse

    is_open = found.token is TokenUse.NOT_WANTED
    return [
        Check(name="address", state=State.OK, found=f"{address.url} answers"),
        _check_way(address),
        check_door(address.url, is_loopback=address.is_loopback, is_open=is_open),
        _check_our_token(found.token),
        _check_ray(found.ray_version),
        _check_told(found),
        Check(
            name="versions",
            state=State.OK,
            found="Python, torch and stability-search cannot be seen from outside; a study "
            "compares its nodes before it starts, as does `doctor --address auto` there",
        ),
    ]


def _check_way(address: "ClusterAddress") -> Check:
    name = "way"
    if address.is_readable_on_the_way:
        found = "plain HTTP to another machine: others can read and change all of it, a token too"
        return Check(name=name, state=State.FAIL, found=found, fix=_TUNNEL)
    found = "this machine, or a tunnel that begins here" if address.is_loopback else "encrypted"
    return Check(name=name, state=State.OK, found=found)


def _check_our_token(use: "TokenUse") -> Check:
    from stability_search.cluster.outside import TokenUse

    name = "token"
    if use is TokenUse.NOT_WANTED:
        return Check(name=name, state=State.OK, found="none is asked for")
    if use is TokenUse.ACCEPTED:
        return Check(name=name, state=State.OK, found="ours is accepted")
    if use is TokenUse.KEPT_BACK:
        found = "one is asked for; ours was not sent, for it could be read on the way"
        return Check(name=name, state=State.WARN, found=found, fix=_TUNNEL)
    is_other = use is TokenUse.REFUSED
    found = "another than ours" if is_other else "one, and there is none here,"
    fix = "name the file with the cluster's token in RAY_AUTH_TOKEN_PATH"
    return Check(name=name, state=State.FAIL, found=f"{found} is asked for", fix=fix)


def _check_ray(there: str) -> Check:
    from importlib.metadata import version

    here = version("ray")
    if not there:
        return Check(name="ray", state=State.OK, found=f"{here} here; not told there")
    found = f"{there} there, {here} here"
    if there.split(".")[:_SAME_MINOR] == here.split(".")[:_SAME_MINOR]:
        return Check(name="ray", state=State.OK, found=found)
    fix = f"install ray {here} on every node, with the same version of stability-search"
    return Check(name="ray", state=State.FAIL, found=found, fix=fix)


def _check_told(found: "Outside") -> Check:
    if found.nodes is None:
        return Check(name="nodes", state=State.OK, found="not told")
    alive = [one for one in found.nodes if one.is_alive]
    cpus, gpus = (sum(getattr(one, what) or 0.0 for one in alive) for what in ("cpus", "gpus"))
    told = f"{len(alive)} of {len(found.nodes)} alive; CPU cores {cpus:g}, GPUs {gpus:g}"
    if alive and not cpus:
        fix = "a study's driver needs a CPU core: start a node with --num-cpus"
        return Check(name="nodes", state=State.FAIL, found=told, fix=fix)
    return Check(name="nodes", state=State.OK, found=told)


def _check_token_file(environment: Mapping[str, str], home: Path) -> Check:
    return dataclasses.replace(check_token(environment, home), name="token file")


def _no_answer(error: InfrastructureError) -> Check:
    fix = error.hint.rstrip(".")
    return Check(name="address", state=State.FAIL, found=error.message.rstrip("."), fix=fix)
