"""Labels from plain facts, and which loss scales count as known to work."""

import itertools

import pytest

from stability_search.engine.guards import ScaleProof, StepFacts, label_step
from stability_search.records.step import PROOF_STEPS, StepLabel

FINE = StepFacts(
    state_fault="",
    batch_fault="",
    forward_fault="",
    grad_fault="",
    scale=None,
    proven_scale=0.0,
)
STATE = {"state_fault": "a parameter became NaN or Inf"}
BATCH = {"batch_fault": "NaN in batch[0]"}
FORWARD = {"forward_fault": "loss is NaN"}
GRADIENT = {"grad_fault": "gradient is NaN or Inf"}


def facts(*parts: dict[str, object], **more: object) -> StepFacts:
    values = {name: getattr(FINE, name) for name in FINE.__slots__}
    for part in (*parts, more):
        values.update(part)
    return StepFacts(**values)


@pytest.mark.parametrize(
    ("parts", "label", "reason"),
    [
        ((), StepLabel.OK, ""),
        ((STATE, BATCH, FORWARD, GRADIENT), StepLabel.BAD, "a parameter became NaN or Inf"),
        ((STATE,), StepLabel.BAD, "a parameter became NaN or Inf"),
        ((BATCH, FORWARD, GRADIENT), StepLabel.DATA, "NaN in batch[0]"),
        ((BATCH, GRADIENT), StepLabel.DATA, "NaN in batch[0]"),
        ((BATCH,), StepLabel.OK, ""),  # a broken batch that broke nothing
        ((FORWARD, GRADIENT), StepLabel.BAD, "loss is NaN"),
        ((FORWARD,), StepLabel.BAD, "loss is NaN"),
        ((GRADIENT,), StepLabel.BAD, "gradient is NaN or Inf"),
    ],
)
def test_the_first_rule_that_matches_labels_the_step(
    parts: tuple[dict[str, object], ...], label: StepLabel, reason: str
) -> None:
    assert label_step(facts(*parts)) == (label, reason)


@pytest.mark.parametrize(
    ("scale", "proven", "label"),
    [
        (1024.0, 0.0, StepLabel.CALIBRATION),
        (1024.0, 512.0, StepLabel.CALIBRATION),
        (1024.0, 1024.0, StepLabel.BAD),
        (1024.0, 2048.0, StepLabel.BAD),
        (2.0, 0.0, StepLabel.CALIBRATION),
        (1.0, 0.0, StepLabel.BAD),  # below it lies only the collapse
        (0.5, 0.0, StepLabel.BAD),
    ],
)
def test_an_overflow_is_calibration_above_every_scale_known_to_work(
    scale: float, proven: float, label: StepLabel
) -> None:
    found, reason = label_step(facts(GRADIENT, scale=scale, proven_scale=proven))
    assert found is label
    assert f"{scale:g}" in reason
    assert ("known to work" in reason) == (proven >= scale)


def test_a_forward_fault_is_bad_at_any_scale() -> None:
    for scale, proven in itertools.product((1.0, 2.0**40), (0.0, 2.0**41)):
        label, _ = label_step(facts(FORWARD, GRADIENT, scale=scale, proven_scale=proven))
        assert label is StepLabel.BAD


def test_twenty_ok_steps_prove_a_scale() -> None:
    proof = ScaleProof()
    for _ in range(PROOF_STEPS - 1):
        proof.step_was_ok(1024.0)
    assert proof.proven_scale == 0.0
    proof.step_was_ok(1024.0)
    assert proof.proven_scale == 1024.0
    assert PROOF_STEPS == 20


def test_a_rise_starts_the_count_again_and_a_fall_keeps_it() -> None:
    proof = ScaleProof()
    for _ in range(19):
        proof.step_was_ok(1024.0)
    proof.scale_rose()
    for _ in range(19):
        proof.step_was_ok(2048.0)
    assert proof.proven_scale == 0.0
    proof.step_was_ok(512.0)  # it fell meanwhile: surviving more vouches for less
    assert proof.proven_scale == 512.0


def test_a_bad_overflow_withdraws_the_proof_and_half_the_scale_keeps_it() -> None:
    proof = ScaleProof()
    for _ in range(20):
        proof.step_was_ok(1024.0)
    proof.overflow_was_bad(1024.0)
    assert proof.proven_scale == 512.0
    assert label_step(facts(GRADIENT, scale=1024.0, proven_scale=512.0))[0].value == "calibration"
    proof.step_was_ok(512.0)
    assert proof.proven_scale == 512.0


def simulate(num_steps: int, *, fault_every: int, consecutive: bool = False) -> list[StepLabel]:
    """Run labels and proof alone; `consecutive` is the rule this one is better than."""
    proof, scale, labels = ScaleProof(), 65536.0, []
    for step in range(1, num_steps + 1):
        is_fine = step % fault_every != 0
        found = facts(
            grad_fault="" if is_fine else "gradient is NaN or Inf",
            scale=scale,
            proven_scale=proof.proven_scale,
        )
        label, _ = label_step(found)
        labels.append(label)
        if is_fine:
            proof.step_was_ok(scale)
            continue
        if label is StepLabel.BAD:
            proof.overflow_was_bad(scale)
        if consecutive:
            proof.scale_rose()
        scale /= 2
    return labels


def test_a_fault_at_every_fifteenth_step_is_bad_twelve_times_of_thirteen() -> None:
    labels = simulate(200, fault_every=15)
    assert labels.count(StepLabel.BAD) == 12
    assert labels.count(StepLabel.CALIBRATION) == 1


def test_counting_consecutive_steps_instead_would_let_every_fault_pass() -> None:
    """The twin: with a count that a fault resets nothing is ever proven."""
    labels = simulate(200, fault_every=15, consecutive=True)
    assert labels.count(StepLabel.BAD) == 0
    assert labels.count(StepLabel.CALIBRATION) == 13


def test_the_proof_goes_on_from_its_state() -> None:
    first, second = ScaleProof(), ScaleProof()
    for _ in range(19):
        first.step_was_ok(8.0)
    second.load_state_dict(first.state_dict())
    second.step_was_ok(8.0)
    assert second.proven_scale == 8.0
