"""Indicators of the headline configuration that lie beyond the thresholds of `alarms`."""

from collections import Counter
from collections.abc import Sequence
from statistics import median

from stability_search.alarms.overflows import RECENT_STEPS
from stability_search.records.trial import Outcome
from stability_search.report.context import Row, View
from stability_search.report.wording import count, number, part
from stability_search.settings.alarms import AlarmSettings

# Alarms that rose during the trials and that no column shows. `stale_epochs` is not among them:
# whether a trial still learned is judged on the probe.
_COUNTED: tuple[tuple[str, str], ...] = (
    ("grad_norm_late", "a gradient norm above {grad_norm_late} after epoch {late_epoch}"),
    ("grad_norm_jump", "a gradient norm {grad_norm_jump} times that of the step before"),
    ("bad_steps_advise", "more than {bad_steps_advise} bad (NaN or Inf) steps in an epoch"),
    ("bad_steps", "more than {bad_steps} bad (NaN or Inf) steps in an epoch"),
    ("skipped_frac", "more than {skipped_frac} of an epoch skipped"),
)


def alarm_sentences(view: View) -> list[str]:
    """Compare what the headline configuration showed on its confirm seeds with the alarms.

    Args:
        view: The study; a configuration that was not confirmed raises no alarm.

    Returns:
        A sentence for each indicator beyond its threshold, with the value farthest beyond it on
        any seed, or for how often something rose in training. What was not measured is silent.
    """
    rows = view.seeds_of(view.headline_id) if view.headline_id else []
    alarms = view.study.alarms
    whose = "The choice's" if view.verdict.choice else "The closest one's"
    return [
        *_clipping(view, whose, rows),
        *_attention(whose, rows, alarms),
        *_gradients(view, whose, rows),
        *_updates(whose, rows, alarms),
        *_low_precision(view, whose, rows),
        *_during_training(whose, rows, alarms),
    ]


def _measured(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row[name] is not None]


def _largest(rows: Sequence[Row], name: str) -> float | None:
    return max(_measured(rows, name), default=None)


def _clipping(view: View, whose: str, rows: Sequence[Row]) -> list[str]:
    limit = view.study.alarms.clip_frac
    clipped = _largest(rows, "clip_frac")
    if clipped is None or clipped <= limit:
        return []
    share = f"{part(clipped)} of them on its worst seed (alarm at {part(limit)})"
    meaning = (
        "There clip_norm, not the gradient, sets the size of a step: a hidden cut of the learning "
        "rate."
    )
    # The verdict was measured with both, so it wins over a rule of thumb about one of them.
    stands = (
        " The choice stands, for learning_rate and clip_norm together; to check whether it needs "
        "the clipping, run best.yaml with twice its clip_norm."
        if view.verdict.choice
        else ""
    )
    return [f"{whose} updates were clipped: {share}. {meaning}{stands}"]


def _attention(whose: str, rows: Sequence[Row], alarms: AlarmSettings) -> list[str]:
    found = []
    for name, limit, what, meaning in (
        ("clamp_frac", alarms.clamp_frac, "outputs lay beyond the clamp", "masked, not cured"),
        ("cap_frac", alarms.cap_frac, "logits lay beyond the cap", "training depends on it"),
    ):
        share = _largest(rows, name)
        if share is not None and share > limit:
            found.append(
                f"{whose} attention {what}: {part(share)} of them on its worst seed (alarm at "
                f"{part(limit)}), {meaning}."
            )
    logit = _largest(rows, "attention_max")
    for limit, how in (
        (alarms.attention_max_diverging, "diverging"),
        (alarms.attention_max_degraded, "degraded"),
        (alarms.attention_max, "to be watched"),
    ):
        if logit is not None and logit > limit:
            is_capped = _largest(rows, "cap_frac") is not None
            shown = "only the cap keeps them in range" if is_capped else how
            found.append(
                f"{whose} attention logits reached {number(logit)} (alarm at {number(limit)}): "
                f"{shown}."
            )
            break
    return found


def _gradients(view: View, whose: str, rows: Sequence[Row]) -> list[str]:
    alarms, norm = view.study.alarms, _largest(rows, "grad_norm_max")
    reached = f"{whose} gradient norm reached {number(norm)} before clipping"
    if norm is not None and norm > alarms.grad_norm_advise:
        at = f"alarm at {number(alarms.grad_norm_advise)}"
        if view.verdict.choice:
            stands = "The choice stands: its seeds held with such gradients."
            later = "Only if a longer training breaks, go on with a tenth of its learning rate."
            return [f"{reached} ({at}). {stands} {later}"]
        return [f"{reached} ({at}): a tenth of its learning rate is advised."]
    if norm is not None and norm > alarms.grad_norm:
        return [f"{reached} (alarm at {number(alarms.grad_norm)})."]
    return []


def _updates(whose: str, rows: Sequence[Row], alarms: AlarmSettings) -> list[str]:
    found = []
    ratio = _largest(rows, "update_ratio")
    if ratio is not None and ratio > alarms.update_ratio:
        found.append(
            f"{whose} typical update was {number(ratio)} of its weights in size (alarm at "
            f"{number(alarms.update_ratio)}, 1e-3 is typical): large steps for these weights."
        )
    gradient = min(_measured(rows, "grad_rms_over_eps"), default=None)
    if gradient is not None and gradient < alarms.grad_rms_over_eps:
        found.append(
            f"{whose} smallest gradient of a weight matrix was {number(gradient)} times Adam's "
            f"eps (alarm below {number(alarms.grad_rms_over_eps)}): eps shrinks its update."
        )
    return found


def _low_precision(view: View, whose: str, rows: Sequence[Row]) -> list[str]:
    """Tell overflows where the alarm rose, and judge zero gradients against the fp32 pilot."""
    alarms, found = view.study.alarms, []
    # A trial's own rate is no measure: one overflow in fewer than 200 steps would exceed it.
    num_seeds = sum(1 for row in rows if _times_risen(row)["overflow_rate"])
    if num_seeds:
        found.append(
            f"{whose} gradients overflowed in more than {part(alarms.overflow_rate)} of "
            f"{RECENT_STEPS} steps in a row, once the loss scale was found, on {num_seeds} of "
            f"{count(len(rows), 'seed')}: lower max_scale, or use bf16."
        )
    low = [row for row in rows if view.setting(row, "precision") not in {None, "fp32"}]
    share = _largest(low, "zero_grad_frac")
    pilot = [row for row in view.in_stage("pilot") if row["outcome"] == Outcome.COMPLETED]
    in_fp32 = _measured(pilot, "zero_grad_frac")
    if share is not None and in_fp32 and share - median(in_fp32) > alarms.zero_grad_frac:
        found.append(
            f"{whose} gradients were zero in {part(share)} of cases, in the fp32 pilot in "
            f"{part(median(in_fp32))} (alarm {100 * alarms.zero_grad_frac:.0f} points above): "
            "small ones vanish in low precision."
        )
    return found


def _times_risen(row: Row) -> Counter[str]:
    """Read the column `alarms`, such as `grad_norm 3, bad_steps 1`."""
    times: Counter[str] = Counter()
    for entry in (row["alarms"] or "").split(", "):
        name, _, number_risen = entry.rpartition(" ")
        times[name] += int(number_risen) if number_risen.isdecimal() else 0
    return times


def _during_training(whose: str, rows: Sequence[Row], alarms: AlarmSettings) -> list[str]:
    counts = sum((_times_risen(row) for row in rows), Counter[str]())
    limits = {name: number(getattr(alarms, name)) for name, _ in _COUNTED}
    limits |= {
        "late_epoch": number(alarms.late_epoch),
        "skipped_frac": part(alarms.skipped_frac),
    }
    said = [
        f"{words.format(**limits)} ({count(counts[name], 'time')})"
        for name, words in _COUNTED
        if counts[name]
    ]
    if not said:
        return []
    seeds = count(len(rows), "seed")
    return [f"{whose} alarms rose in training, over {seeds}: {'; '.join(said)}."]
