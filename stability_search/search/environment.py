"""What `environment.json` says: command, versions, device, seeds, and what ran the trials.

It is made again from the ledger's facts whenever something new is known; only what a fingerprint
stands for is kept from one writing to the next.
"""

import json
import shlex
from collections.abc import Mapping

from stability_search.files import write_whole
from stability_search.records.trial import TrialRow
from stability_search.records.values import Json
from stability_search.search import run_directory
from stability_search.search.nodes import NodeFacts
from stability_search.search.run_directory import RunDirectory
from stability_search.seeding import derive_seed
from stability_search.space import Space


class Environment:
    """The environment of one study.

    Args:
        directory: Its run directory; nodes of an earlier run are read from there.
        space: The study's space.
        command: The command line.
    """

    def __init__(self, directory: RunDirectory, space: Space, command: str) -> None:
        self._directory = directory
        self._space = space
        self._command = command
        self._nodes = _known_nodes(directory)

    def write(self, facts: Mapping[str, Json], *, device: str) -> None:
        """Write the file.

        Args:
            facts: What the ledger keeps of the study.
            device: Device of the trials.

        Raises:
            StoppedEarlyError: It could not be written.
        """
        told = describe(self._space, self._command, device=device)
        nodes: list[Json] = list(self._nodes.values())
        study = run_directory.with_tilde(dict(facts))
        text = run_directory.as_json({**told, "nodes": nodes, "study": study})
        write_whole(self._directory.environment, text)

    def knows(self, row: TrialRow) -> bool:
        """Return True if the file says what the fingerprint of a row stands for."""
        return not row.fingerprint or (row.node, row.fingerprint) in self._nodes

    def note(self, row: TrialRow, facts: NodeFacts) -> str:
        """Take in what ran a trial.

        Returns:
            In what it differs from what ran the first trial; empty if in nothing.
        """
        node: dict[str, Json] = {**facts.to_json(), "device": row.summary.device}
        del node["host"]
        first = next(iter(self._nodes.values()), node)
        self._nodes[row.node, row.fingerprint] = {
            "node": row.node,
            "fingerprint": row.fingerprint,
            **node,
        }
        differing = {key: value for key, value in node.items() if value != first.get(key)}
        return "; ".join(
            f"{key} {value}, not {first.get(key)}" for key, value in differing.items()
        )


def describe(space: Space, command: str, *, device: str) -> dict[str, Json]:
    """Return what is known before any trial has run.

    Args:
        space: The study's space.
        command: The command line.
        device: Device of the trials.
    """
    study = space.study
    seeds = {"study": study.seed, "search": derive_seed(study.seed, "search")} | {
        f"confirm {i}": derive_seed(study.seed, "confirm", i) for i in range(study.confirm.seeds)
    }
    return run_directory.describe_environment(
        command=shlex.split(command), device=device, seeds=seeds
    )


def _known_nodes(run: RunDirectory) -> dict[tuple[str, str], dict[str, Json]]:
    try:
        listed = json.loads(run.environment.read_text())["nodes"]
        return {(str(one["node"]), str(one["fingerprint"])): dict(one) for one in listed}
    except (OSError, ValueError, TypeError, KeyError):
        return {}
