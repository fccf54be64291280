"""Synthetic studies for the tests of the tables and the report: rows as the ledger holds them.

`stable_study` has every outcome, a pilot, a search and three ladders; `hopeless_study` has
nothing that learns and lives; `interrupted_study` ended in the search; `empty_study` has no row.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from stability_search.records.trial import Outcome, Stage, TrialRow, TrialSummary
from stability_search.records.verdict import ChoiceReason, Verdict, VerdictKind
from stability_search.settings.study import ConfirmSettings, SearchSettings, StudySettings
from stability_search.settings.trial import config_id

SPACE_SETTINGS = (
    "batch_size",
    "accumulation_steps",
    "learning_rate",
    "precision",
    "init_scale",
    "clip_norm",
    "attention_clamp",
    "attention_logit_cap",
)
VARYING = SPACE_SETTINGS[2:]
START = 33.7  # probe loss before the first step
BLIND = 1.84  # of a model that ignores its input
BEST = 0.63
SPACE_TEXT = """\
# search_spaces/teacher.yaml
name: teacher
task: teacher
seed: 0
trial:
  steps: 200
fixed:
  batch_size: 2
  accumulation_steps: 2
space:
  learning_rate: {loguniform: {low: 1e-4, high: 0.3}}
  precision: {choice: [fp32, bf16, fp16]}
  init_scale: {choice: [1024, 65536, 16777216], when: {precision: fp16}}
  clip_norm: {choice: [null, 0.5, 1.0, 5.0, 10.0]}
  attention_clamp: {choice: [null, 10.0]}
  attention_logit_cap: {choice: [null, 30.0]}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyCase:
    """What a study leaves behind: its rows, its blocks, its verdict."""

    rows: tuple[TrialRow, ...]
    study: StudySettings
    verdict: Verdict
    start_config_ids: tuple[str, ...] = ()


def settings(**changed: Any) -> dict[str, Any]:  # noqa: ANN401 - any setting
    """Return every setting of the space; inactive ones are None."""
    values: dict[str, Any] = {
        "batch_size": 2,
        "accumulation_steps": 2,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "init_scale": None,
        "clip_norm": 1.0,
        "attention_clamp": None,
        "attention_logit_cap": None,
    }
    values |= changed
    if values["precision"] == "fp16" and values["init_scale"] is None:
        values["init_scale"] = 1024
    return values


def active_id(values: Mapping[str, Any]) -> str:
    """Hash a configuration as the space does: without an inactive `init_scale`."""
    is_fp16 = values["precision"] == "fp16"
    return config_id({k: v for k, v in values.items() if k != "init_scale" or is_fp16})


def cliff(values: Mapping[str, Any]) -> float:
    """Return the learning rate from which this configuration breaks: the synthetic truth."""
    edge = {"fp32": 0.06, "bf16": 0.045, "fp16": 0.012}[values["precision"]]
    edge *= 1.0 if values["clip_norm"] else 0.4
    edge *= 1.6 if values["attention_logit_cap"] else 1.0
    return edge * (0.05 if (values["init_scale"] or 0) > 1e7 else 1.0)


def _probe_steps(*horizons: int) -> tuple[int, ...]:
    return tuple(sorted({math.ceil(k * h / 10) for h in horizons for k in range(11)}))


def _wobble(*key: object) -> float:
    """Return a repeatable number in [-1, 1] for a key."""
    total = sum((i + 1) * ord(c) for i, c in enumerate(repr(key)))
    return math.sin(total * 12.9898)


def _probe(rate: float, step: int, edge: float) -> float:
    """Return the probe loss: learning speeds up with the rate until near the cliff."""
    speed = min(1.0, rate / 4e-3) ** 0.5
    floor = BEST + 1.1 * (1 - speed) + 0.5 * max(0.0, math.log2(rate / edge) + 1)
    return floor + (START - floor) * math.exp(-step * 0.05 * (0.35 + speed))


def _stopped(values: Mapping[str, Any], rate: float, edge: float, wobble: float) -> Outcome | None:
    """Return what stops a trial of this configuration, if anything does."""
    if rate * (1 + 0.15 * wobble) <= edge:
        return None
    if values["precision"] == "fp16":
        return Outcome.SCALE_COLLAPSE if wobble > 0.6 else Outcome.PRUNED
    if rate > 4 * edge and values["clip_norm"] is None:
        return Outcome.NONFINITE_PARAMETERS
    return Outcome.DIVERGED


def summary_of(
    values: Mapping[str, Any], *, steps: int, seed_index: int = 0, probes: tuple[int, ...] = ()
) -> TrialSummary:
    """Return how a trial of these settings ends in the synthetic world."""
    rate, edge = float(values["learning_rate"]), cliff(values)
    wobble = _wobble(sorted(values.items(), key=str), seed_index, steps)
    outcome = _stopped(values, rate, edge, wobble)
    at = probes or _probe_steps(steps)
    is_fp16 = values["precision"] == "fp16"
    if outcome is None:
        num_bad = 1 if is_fp16 and wobble > 0.8 else 0
        losses = tuple(
            _probe(rate, t, edge) * (1 + 0.03 * _wobble(t, seed_index)) for t in range(steps)
        )
        return TrialSummary(
            outcome=Outcome.COMPLETED,
            num_planned_steps=steps,
            num_steps=steps,
            num_judged_steps=steps - (2 if is_fp16 else 0),
            num_bad_steps=num_bad,
            num_calibration_steps=2 if is_fp16 else 0,
            judged_losses=losses[: steps - (2 if is_fp16 else 0)],
            probe_steps=at,
            probe_losses=tuple(_probe(rate, t, edge) * (1 + 0.01 * wobble * (t > 0)) for t in at),
            probe_batch_losses=tuple(
                tuple(_probe(rate, t, edge) * (1 + 0.004 * b) for b in range(4)) for t in at
            ),
            metrics_first={"word_error_rate": 1.0},
            metrics_last={"word_error_rate": 0.28 + 0.2 * abs(wobble)},
            baseline=BLIND,
            first_bad_step=57 if num_bad else None,
            evidence=0.02,
            final_scale=2048.0 if is_fp16 else None,
            grad_norm_median=0.7,
            grad_norm_max=4.2,
            clip_frac=None if values["clip_norm"] is None else 0.21,
            attention_max=85.0,
            peak_memory_mib=412.0,
            train_s=4.1 * steps / 200,
            wall_s=4.9 * steps / 200,
        )
    stop = {Outcome.DIVERGED: 70, Outcome.NONFINITE_PARAMETERS: 12}.get(
        outcome, 22 + int(9 * wobble)
    )
    num_bad = 0 if outcome is Outcome.DIVERGED else min(9, stop)
    shown = tuple(t for t in at if t <= stop)
    return TrialSummary(
        outcome=outcome,
        reason={
            Outcome.DIVERGED: "loss stayed above its start",
            Outcome.PRUNED: "rate of bad steps",
            Outcome.SCALE_COLLAPSE: "loss scale below 1",
            Outcome.NONFINITE_PARAMETERS: "parameters non-finite",
        }[outcome],
        num_planned_steps=steps,
        num_steps=stop,
        num_judged_steps=stop,
        num_bad_steps=num_bad,
        judged_losses=(None,) * num_bad + (START * 2,) * (stop - num_bad),
        probe_steps=at,
        probe_losses=tuple(START * (1 + 0.2 * k) if k < 2 else None for k in range(len(shown))),
        metrics_first={"word_error_rate": 1.0},
        metrics_last={"word_error_rate": None},
        baseline=BLIND,
        are_parameters_finite=outcome is not Outcome.NONFINITE_PARAMETERS,
        first_bad_step=3 if num_bad else None,
        first_nonfinite_module="fusion.attention" if num_bad else None,
        first_nonfinite_phase="forward" if num_bad else None,
        evidence=118.0 if outcome is Outcome.PRUNED else 0.4,
        grad_norm_median=9.0,
        grad_norm_max=480.0,
        attention_max=2.3e4,
        peak_memory_mib=412.0,
        train_s=1.3,
        wall_s=2.0,
    )


def trial_row(
    stage: Stage,
    index: int,
    values: Mapping[str, Any],
    summary: TrialSummary,
    **more: Any,  # noqa: ANN401
) -> TrialRow:
    """Return one finished trial as the ledger keeps it."""
    seconds = 40 * index + {Stage.PILOT: 0, Stage.SEARCH: 400, Stage.CONFIRM: 2600}[stage]
    clock = f"{9 + seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    if "config_id" not in more:
        more["config_id"] = active_id(values)
    row = TrialRow(
        trial_id=f"{stage}-{index:03d}",
        stage=stage,
        index=index,
        config_id=more["config_id"],
        seed=8_675_309_000_000_001 + index,
        settings=values,
        summary=summary,
        started_at=f"2026-03-01T{clock}+00:00",
        node=f"gpu-box-{index % 2}.lab.example",
    )
    if values.get("precision") == "fp16":
        row = replace(row, summary=replace(summary, fp16_kind="emulated"))
    return replace(row, **more)


def pilot_rows(trial_steps: int = 200, confirm_steps: int = 400) -> list[TrialRow]:
    """Return the learning-rate sweep that fixes the yardstick."""
    rates = [1e-4 * (0.3 / 1e-4) ** (k / 6) for k in range(7)]
    probes = _probe_steps(trial_steps, confirm_steps)
    rows = []
    for index, rate in enumerate(rates):
        values = settings(learning_rate=rate)
        rows.append(
            trial_row(
                Stage.PILOT, index, values, summary_of(values, steps=confirm_steps, probes=probes)
            )
        )
    return rows


def search_rows(count: int = 48, *, worst: float = 1.0) -> list[TrialRow]:
    """Return a search with every outcome; `worst` scales the learning rates."""
    clips, scales = (None, 0.5, 1.0, 5.0, 10.0), (1024, 65536, 16777216)
    odd = {
        9: Outcome.OUT_OF_MEMORY,
        21: Outcome.TIMED_OUT,
        30: Outcome.INFRASTRUCTURE,
        37: Outcome.USER_ERROR,
    }
    rows = []
    for index in range(count):
        share = (index * 0.618034) % 1.0
        values = settings(
            learning_rate=worst * 1e-4 * (0.3 / 1e-4) ** share,
            precision=("bf16", "fp16", "fp32")[index % 3],
            init_scale=scales[index // 3 % 3] if index % 3 == 1 else None,
            clip_norm=clips[index * 3 % 5],
            attention_clamp=10.0 if index % 4 == 0 else None,
            attention_logit_cap=30.0 if index % 5 < 2 else None,
        )
        summary = summary_of(values, steps=200)
        if index in odd:
            summary = TrialSummary(
                outcome=odd[index],
                reason=odd[index].replace("_", " "),
                num_planned_steps=200,
                num_steps=11,
                num_judged_steps=11,
                judged_losses=(START,) * 11,
                probe_steps=_probe_steps(200),
                probe_losses=(START,),
                wall_s=3.0,
            )
        rows.append(trial_row(Stage.SEARCH, index, values, summary))
    return rows


def ladder_rows(
    candidate: Mapping[str, Any],
    first_index: int,
    *,
    octaves: tuple[int, ...],
    base: int,
    seeds: int = 5,
) -> list[TrialRow]:
    """Return a ladder: every rung on two seeds, the base on all of them."""
    rows: list[TrialRow] = []
    name = active_id(candidate)
    for octave in octaves:
        values = {**candidate, "learning_rate": candidate["learning_rate"] * 2.0**octave}
        for seed_index in range(seeds if octave == base else min(2, seeds)):
            index = first_index + len(rows)
            rows.append(
                trial_row(
                    Stage.CONFIRM,
                    index,
                    values,
                    summary_of(values, steps=400, seed_index=seed_index),
                    candidate_id=name,
                    octave=octave,
                    seed=77_000 + seed_index,
                    seed_index=seed_index,
                )
            )
    return rows


CANDIDATES = (
    settings(learning_rate=8e-3, precision="bf16", clip_norm=1.0, attention_logit_cap=30.0),
    settings(learning_rate=7e-3, precision="fp32", clip_norm=0.5),
    settings(learning_rate=1e-4, precision="fp16", init_scale=1024, attention_clamp=10.0),
)


def stable_study() -> StudyCase:
    """Return a finished study with a choice, a faster runner-up and today's configuration."""
    rows = pilot_rows() + search_rows()
    for candidate in CANDIDATES:
        octaves = (0, 1, 2, 3) if candidate["learning_rate"] < 7.5e-3 else (-1, 0, 1, 2, 3)
        rows += ladder_rows(candidate, 100 + len(rows), octaves=octaves, base=0)
    choice, other, today = (active_id(candidate) for candidate in CANDIDATES)
    verdict = Verdict(
        kind=VerdictKind.STABLE,
        exit_code=0,
        choice=choice,
        choice_reason=ChoiceReason.TIED,
        fastest=other,
        tied=(choice, other),
        confirmed=(choice, other, today),
    )
    study = StudySettings(name="teacher", targets={"word_error_rate": 0.3, "grad_norm": 5.0})
    return StudyCase(rows=tuple(rows), study=study, verdict=verdict, start_config_ids=(today,))


def hopeless_study() -> StudyCase:
    """Return a finished study in which no configuration met the bar."""
    candidate = settings(learning_rate=0.03, precision="fp16", init_scale=1024)
    rows = pilot_rows() + search_rows(24, worst=40.0)
    rows += ladder_rows(candidate, 500, octaves=(-1, 0, 1), base=0)
    closest = active_id(candidate)
    verdict = Verdict(
        kind=VerdictKind.NONE,
        exit_code=3,
        closest=closest,
        confirmed=(closest,),
        missed=("0 of 5 seeds reached q >= 1/2", "margin 0 of 1 doubling"),
        reason="No configuration met the bar.",
    )
    study = StudySettings(name="teacher", search=SearchSettings(trials=24))
    return StudyCase(rows=tuple(rows), study=study, verdict=verdict, start_config_ids=(closest,))


def interrupted_study() -> StudyCase:
    """Return a study that Ctrl-C ended in the search."""
    verdict = Verdict(kind=VerdictKind.INCOMPLETE, exit_code=130, reason="Interrupted by Ctrl-C.")
    rows = tuple(pilot_rows() + search_rows(42))
    return StudyCase(rows=rows, study=StudySettings(name="teacher"), verdict=verdict)


def empty_study() -> StudyCase:
    """Return a study that ended before its first trial did."""
    verdict = Verdict(kind=VerdictKind.INCOMPLETE, exit_code=4, reason="No usable node was left.")
    study = StudySettings(name="teacher", confirm=ConfirmSettings(seeds=3))
    return StudyCase(rows=(), study=study, verdict=verdict)
