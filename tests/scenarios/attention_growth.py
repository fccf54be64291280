"""Scenario: attention logits that grow because the learning rate is too high.

Nothing becomes NaN, so counting NaN sees nothing. Sign: progress P below 3/4, no margin, and the
alarm of the attention logits beyond 1e3. Fix: a learning rate of 2^-10 to 2^-8, or QK-norm, or a
cap on the logits.
"""

from tests.scenarios.ladders import Ladder, constants_after
from tests.scenarios.running import Evidence, Recipe, Run, run

OCTAVES = 1
FAULTS = (-4, -2)  # log2 of the learning rates
SOUND = (-10, -8)
PILOT = (-10, -8, -6)
CURED_AT = -4
LOW = 0.75  # judgement: progress below it is low; every fix must reach it
CAP = 30.0
ALARMS = ("attention_max_degraded", "attention_max_diverging")  # 1e3 and 1e4


def recipe(steps: int) -> Recipe:
    """Return the training: two pre-norm layers of width 32."""
    return Recipe(
        task_class="Grammar",
        steps=steps,
        engine={"learning_rate": 0.01, "beta2": 0.95, "warmup_steps": 20, "clip_norm": 1.0},
    )


def scenario(
    seed: int,
    *,
    steps: int = 300,
    faults: tuple[int, ...] = FAULTS,
    sound: tuple[int, ...] = SOUND,
) -> Evidence:
    """Train at rates that are too high, at sound ones, and with QK-norm or cap."""
    ladder = _train(seed, steps, faults, sound)
    broken = [ladder.standing("plain", 2.0**power, octaves=OCTAVES) for power in faults]
    sound_ones = {power: ladder.standing("plain", 2.0**power, octaves=OCTAVES) for power in sound}
    cured = {name: ladder.standing(name, 2.0**CURED_AT, octaves=0) for name in ("qk_norm", "cap")}
    runs = ladder.runs
    return Evidence(
        seed=seed,
        is_guard_shown=all(
            standing.progress < LOW
            and standing.score.margin_octaves == 0
            and warns_of_logits(runs["plain", 2.0**power])
            and runs["plain", 2.0**power].has_survived
            for power, standing in zip(faults, broken, strict=True)
        ),
        is_sign_absent=not any(
            warns_of_logits(runs["plain", 2.0**power]) or standing.progress < LOW
            for power, standing in sound_ones.items()
        ),
        fixes={
            **{
                f"LR 2^{power}": standing.meets_bar and standing.progress >= LOW
                for power, standing in sound_ones.items()
            },
            f"QK-norm at 2^{CURED_AT}": cured["qk_norm"].progress >= LOW
            and not warns_of_logits(runs["qk_norm", 2.0**CURED_AT]),
            # The alarm reads the logits before the cap; what reaches the softmax is below it.
            f"cap {CAP:g} at 2^{CURED_AT}": cured["cap"].progress >= LOW,
        },
        figures="; ".join(
            f"2^{power}: logits {runs['plain', 2.0**power].summary.attention_max:.2g}, "
            f"P {standing.progress:.2f}"
            for power, standing in zip(faults, broken, strict=True)
        )
        + f"; P with QK-norm {cured['qk_norm'].progress:.2f}, cap {cured['cap'].progress:.2f}",
    )


def warns_of_logits(trial: Run) -> bool:
    """Say whether the alarm of attention logits beyond 1e3 rose."""
    return any(trial.summary.alarms.get(name, 0) for name in ALARMS)


def _train(seed: int, steps: int, faults: tuple[int, ...], sound: tuple[int, ...]) -> Ladder:
    training = recipe(steps)
    pilot = {2.0**power: run(training.config(seed, learning_rate=2.0**power)) for power in PILOT}
    constants = constants_after(pilot, steps)
    powers = {power + k for power in (*faults, *sound) for k in range(OCTAVES + 1)}
    runs = {
        ("plain", 2.0**power): run(training.config(seed, learning_rate=2.0**power), constants)
        for power in sorted(powers - set(PILOT))
    }
    # Without a Delta nothing is stopped for its loss; these sound runs would not be anyway.
    runs |= {("plain", rate): trial for rate, trial in pilot.items()}
    rate = 2.0**CURED_AT
    runs["qk_norm", rate] = run(
        training.config(seed, {"has_qk_norm": True}, learning_rate=rate), constants
    )
    runs["cap", rate] = run(
        training.config(seed, learning_rate=rate, attention_logit_cap=CAP), constants
    )
    return Ladder(horizon=steps, pilot=pilot, runs=runs)
