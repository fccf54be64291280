"""One trial to run: what the driver asks of a worker, and what the ledger will say about it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from stability_search.records.trial import Stage
from stability_search.records.values import Json
from stability_search.settings.trial import TrialConfig, TrialConstants

MAX_ATTEMPTS = 3  # an `infrastructure` end is tried again twice


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRequest:
    """A trial that should run now.

    Attributes:
        trial_id: Made from stage, index, seed and rung.
        stage: `pilot`, `search` or `confirm`.
        index: Position among the trials of its stage, from 0.
        config_id: Hash of the active settings.
        candidate_id: Candidate whose ladder it belongs to; None outside confirm.
        octave: Octave from that candidate's learning rate; None outside confirm.
        seed_index: Position of the seed among the stage's seeds, from 0.
        settings: Every named setting; None where inactive or off.
        config: What the worker trains.
        constants: What the study fixes for it.
        attempt: 1, or more after an `infrastructure` end.
        preflight: Configurations whose settings the model must be able to honour; tried for one
            step before this trial, the first of its study.
    """

    trial_id: str
    stage: Stage
    index: int
    config_id: str
    candidate_id: str | None = None
    octave: int | None = None
    seed_index: int = 0
    settings: Mapping[str, Json]
    config: TrialConfig
    constants: TrialConstants
    attempt: int = 1
    preflight: tuple[TrialConfig, ...] = ()

    @property
    def allowance(self) -> int:
        """Factor on the time limit of a trial that also works for the whole study."""
        return Order(
            config=self.config, constants=self.constants, preflight=self.preflight
        ).allowance

    def to_text(self) -> str:
        """Return what a worker needs as JSON text."""
        return json.dumps(
            {
                "config": self.config.to_json(),
                "constants": asdict(self.constants),
                "preflight": [config.to_json() for config in self.preflight],
            },
            allow_nan=False,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """The worker's side of a request.

    Attributes:
        config: What to train.
        constants: What the study fixes.
        preflight: What to try for one step before it.
    """

    config: TrialConfig
    constants: TrialConstants
    preflight: tuple[TrialConfig, ...]

    @property
    def allowance(self) -> int:
        """Factor on the time limit of a trial that also works for the whole study."""
        return 1 + len(self.preflight) + self.constants.measures_blind_run

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read what `TrialRequest.to_text` wrote."""
        data: dict[str, Any] = json.loads(text)
        constants = dict(data["constants"])
        constants["probe_steps"] = tuple(constants["probe_steps"])
        return cls(
            config=TrialConfig.from_json(data["config"]),
            constants=TrialConstants(**constants),
            preflight=tuple(TrialConfig.from_json(config) for config in data["preflight"]),
        )
