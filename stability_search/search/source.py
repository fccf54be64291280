"""What the driver of Ray asks of a study."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from stability_search.records.trial import TrialSummary
from stability_search.search.nodes import NodeFacts
from stability_search.search.request import TrialRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a trial ran.

    Attributes:
        host: Name of the node; empty where the worker died before anybody knew.
        facts: What the node is like; None where nobody knows.
    """

    host: str
    facts: NodeFacts | None


class TrialSource(Protocol):
    """Says which trial comes next, and is told what became of it."""

    def next_trial(self) -> TrialRequest | None:
        """Return the next trial; None where it depends on one that is running."""
        ...

    @property
    def is_over(self) -> bool:
        """True once no further trial will come."""
        ...

    def trial_started(self, request: TrialRequest, node: str) -> None:
        """Hear that a worker has taken the trial."""
        ...

    def trial_progressed(self, request: TrialRequest, progress: Mapping[str, Any]) -> None:
        """Hear how far a trial is."""
        ...

    def trial_ended(
        self, request: TrialRequest, summary: TrialSummary, steps: bytes | None, place: Place
    ) -> None:
        """Hear how a trial ended, exactly once; the next trial may depend on it."""
        ...

    def node_quarantined(self, node: str, reason: str) -> None:
        """Hear that a node gets no further trials."""
        ...

    def noticed(self, text: str) -> None:
        """Hear what somebody who watches should know."""
        ...

    def settle(self) -> None:
        """Write down what has ended: a trial is finished when it is written down."""
        ...
