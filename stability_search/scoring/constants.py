"""The judgement in the score, in one place."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConstants:
    """The judgement in the score, in one place and stored with every study.

    Attributes:
        name: Version of the score. Scores of different names are never compared.
        calm_half_rate: Share of bad steps that halves A, > 0.
        smooth_half_rate: Share of spikes that halves B, > 0.
        progress_target: Share of the best progress from which on P is 1, in (0, 1]. Short runs
            flatter high learning rates, so more than this is not rewarded.
        spike_window: Finite losses before a step that it is compared with.
        spike_min_losses: Losses the window must hold before steps are judged.
        spike_z: Robust z-score of ln(loss) from which a loss exceeds.
        spike_jump_frac: Share of Delta by which it must exceed as well.
        spike_floor: Smallest spread of ln(loss); times Delta where losses are not positive.
        spike_lasting: Steps from the spike on that must exceed, of `spike_run`.
        spike_run: Steps looked at for that; as many in a row are a new level.
        lower_bound: Quantile of the Beta distribution that makes Q, in (0, 1).
        dead_q: Mean q below which a rung counts 0.
        alive_q: q from which on a run counts as stable.
    """

    name: str = "S-v1"
    calm_half_rate: float = 0.02
    smooth_half_rate: float = 0.01
    progress_target: float = 0.9
    spike_window: int = 32
    spike_min_losses: int = 8
    spike_z: float = 6.0
    spike_jump_frac: float = 0.1
    spike_floor: float = 0.01
    spike_lasting: int = 2
    spike_run: int = 3
    lower_bound: float = 0.10
    dead_q: float = 0.01
    alive_q: float = 0.5

    def __post_init__(self) -> None:
        """Keep the name S-v1 for the constants of S-v1.

        Raises:
            ValueError: A constant differs while the name is S-v1.
        """
        if self.name != "S-v1":
            return
        for spec in fields(self):
            value = getattr(self, spec.name)
            if value != spec.default:
                raise ValueError(
                    f"{spec.name}: {spec.default!r} must hold in S-v1, but got {value!r}. "
                    "Give the other constants another name."
                )


S_V1 = ScoreConstants()
