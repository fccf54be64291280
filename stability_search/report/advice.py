"""What a reader should know or do: warnings beside the verdict, what broke, what to widen."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from typing import Any

from stability_search.inert import plain
from stability_search.records.step import PROOF_STEPS
from stability_search.records.trial import Outcome
from stability_search.report.alarms import alarm_sentences
from stability_search.report.context import Row, View
from stability_search.report.grouping import applying
from stability_search.report.wording import count, number, outcomes_text, setting_value
from stability_search.table import STABLE_Q

_MIN_GROUP = 5  # trials a group needs before its share means anything
_MIN_SIDE = 3  # trials on one side of a learning rate, likewise
_MIN_CONTRAST = 0.2
_MAX_GROUPS = 8
# Factors of the run score, and what a trial lacked whose smallest one it is; of equal ones the
# first counts.
_LACKED = {
    "progress": "too little progress",
    "kept": "a gain lost again",
    "smooth": "lasting loss spikes",
    "calm": "too many bad steps",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """How the share of stable trials differs between the values of one setting.

    Attributes:
        name: The setting.
        best: Its value with the largest share.
        best_counts: Stable trials and all trials there.
        worst: Its value with the smallest share.
        worst_counts: The same there.
    """

    name: str
    best: Any
    best_counts: tuple[int, int]
    worst: Any
    worst_counts: tuple[int, int]

    @property
    def size(self) -> float:
        """Difference of the two shares, in [0, 1]."""
        return self.best_counts[0] / self.best_counts[1] - (
            self.worst_counts[0] / self.worst_counts[1]
        )


def contrasts(view: View, rows: Sequence[Row]) -> list[Contrast]:
    """Compare the values of every setting with few values where it applies, strongest first."""
    found = []
    for name in view.report.varying:
        if name == "learning_rate":
            continue
        groups: dict[Any, list[bool]] = {}
        for row in applying(rows, name, view.report.varying):
            groups.setdefault(row.get(name), []).append(bool(row["is_stable"]))
        if len(groups) > _MAX_GROUPS:
            continue
        counted = [
            (sum(group) / len(group), value, (sum(group), len(group)))
            for value, group in groups.items()
            if len(group) >= _MIN_GROUP
        ]
        if len(counted) > 1:
            low, high = min(counted, key=lambda c: c[0]), max(counted, key=lambda c: c[0])
            found.append(
                Contrast(
                    name=name, best=high[1], best_counts=high[2], worst=low[1], worst_counts=low[2]
                )
            )
    return sorted(found, key=lambda c: -c.size)  # a stable sort: ties keep the space's order


def what_broke(view: View) -> list[str]:
    """Say in a few sentences what stopped the search's trials and where they stopped."""
    rows = [row for row in view.results if row["stage"] == "search"]
    if not rows:
        return []
    stable = sum(bool(row["is_stable"]) for row in rows)
    share = f"{stable:,} of {count(len(rows), 'search trial')}"
    nowhere = _nowhere_finite(view)
    others = "" if nowhere else _others_text(view, rows)  # how far it came was never measured
    sentences = [nowhere] if nowhere else []
    sentences.append(f"{share} {'was' if stable == 1 else 'were'} stable.{others}")
    broken = [row for row in view.results if row["first_bad_step"] is not None]
    modules = Counter(
        (row["first_nonfinite_module"], row["first_nonfinite_phase"]) for row in broken
    )
    unknown = sum(n for (module, _), n in modules.items() if not module)
    modules = Counter({key: n for key, n in modules.items() if key[0]})
    if unknown > max(modules.values(), default=0):
        sentences.append(
            f"In {unknown:,} of {count(len(broken), 'trial')} of all stages with a bad step no "
            "module was seen to turn non-finite first."
        )
    elif modules:
        (module, phase), seen = min(modules.items(), key=lambda item: (-item[1], str(item[0])))
        where = f" in the {plain(phase)} pass" if phase in {"forward", "backward"} else ""
        sentences.append(
            f"Non-finite values were first seen in {plain(module)}{where}, in {seen:,} of "
            f"{count(len(broken), 'trial')} of all stages with a bad step."
        )
    strongest = next(iter(contrasts(view, rows)), None)
    if strongest is not None and strongest.size >= _MIN_CONTRAST:
        apart = "Apart from learning_rate, s" if "learning_rate" in view.report.varying else "S"
        sentences.append(
            f"{apart}earch trials differed most in {strongest.name}: "
            f"{_share(strongest.best, strongest.best_counts)}, "
            f"{_share(strongest.worst, strongest.worst_counts)} (as tried, other settings not "
            "held equal)."
        )
    return sentences


def _nowhere_finite(view: View) -> str:
    """Say that a loss was finite in no trial, so that nothing about training is known; or ""."""
    rows = [row for row in view.results if row["num_steps"]]
    num_steps = sum(row["num_steps"] for row in rows)
    if rows and all(row["num_data_steps"] == row["num_steps"] for row in rows):
        return (
            f"In all {count(num_steps, 'step')} of {count(len(rows), 'trial')} the training loss "
            "was not finite, even with the initial model in fp32."
        )
    if rows and all(row["probe_first"] is None for row in rows):
        return (
            f"The probe loss was not finite at step 0 in any of {count(len(rows), 'trial')}, so "
            "nothing says what training did."
        )
    return ""


def _finite_hint(view: View) -> str:
    """Say where to look if a loss was finite in no trial; else nothing."""
    if not _nowhere_finite(view):
        return ""
    if any(row["num_judged_steps"] for row in view.results):
        return "Look at the data of the probe, and at the task's loss: no setting mends them."
    return "Look at the training data and at the task's loss: no setting mends them."


def _others_text(view: View, rows: Sequence[Row]) -> str:
    """Say how the trials ended that were not stable, and what the weak ones lacked."""
    others = [row for row in rows if not row["is_stable"]]
    weak = [row for row in others if row["outcome"] == Outcome.COMPLETED]
    stopped = [row for row in others if row["outcome"] != Outcome.COMPLETED]
    parts = [outcomes_text(view, stopped)] if stopped else []
    if weak:
        lacked = Counter(min(_LACKED, key=lambda name: row[name] or 0.0) for row in weak)
        why = ", ".join(f"{_LACKED[name]} in {lacked[name]:,}" for name in _LACKED if lacked[name])
        parts.append(f"{len(weak):,} completed with a run score q below 1/2 ({why})")
    return f" The others: {', '.join(parts)}." if parts else ""


def what_to_widen(view: View) -> str:
    """Name the setting to widen after a study without a stable configuration."""
    rows = [row for row in view.results if row["stage"] in {"search", "pilot"}]
    rates = sorted(row["learning_rate"] for row in rows if row.get("learning_rate"))
    closest = view.by_id.get(view.verdict.closest or "")
    too_few = "Run more trials: too few ended to say which setting to widen."
    if not rates:
        return _finite_hint(view) or too_few
    found = _finite_hint(view) or _precision_hint(view) or _progress_hint(view, closest)
    if found:
        return found
    if "learning_rate" not in view.report.varying:
        return "Let learning_rate vary: it is the setting that most often decides stability."
    found = _step_hint(rows, rates[0])
    if not found and closest is None:
        return too_few
    if not found and closest is not None and closest.get("learning_rate"):
        found = _sides_hint(view, rows, closest)
    guard = _unused_guard(view)
    return found or f"Neither end of learning_rate asks for more: run more trials{guard}."


def _step_hint(rows: Sequence[Row], low: float) -> str:
    """Say what to change where nothing completed, or nothing learned; else nothing."""
    completed = [row for row in rows if row["outcome"] == Outcome.COMPLETED]
    if not completed:
        return f"Widen learning_rate downwards: every trial from {number(low)} on broke."
    if all(not row["progress"] for row in completed):
        if num_broken := len(rows) - len(completed):
            broken = min(r["learning_rate"] for r in rows if r["outcome"] != Outcome.COMPLETED)
            if sum(row["learning_rate"] < broken for row in completed) >= _MIN_GROUP:
                return (
                    f"Raise trial.steps: below {number(broken)} nothing broke, and nothing had "
                    "learned anything yet."
                )
            return (
                f"Widen learning_rate downwards: from {number(low)} on, {num_broken:,} of "
                f"{count(len(rows), 'trial')} broke, and none that completed had learned anything."
            )
        return "Raise trial.steps: what completed had not yet learned anything."
    return ""


def _precision_hint(view: View) -> str:
    """Say that fp32 is worth a try, where it alone held at the same rates; else nothing."""
    low = [row for row in view.results if row["stage"] != "pilot"]
    names = {view.setting(row, "precision") for row in low}
    pilot = [row for row in view.results if row["stage"] == "pilot"]
    held = sum(row["outcome"] == Outcome.COMPLETED for row in pilot)
    broke = all(Outcome(row["outcome"]).is_unstable for row in low)
    if len(low) < _MIN_GROUP or "fp32" in names or not broke or 2 * held <= len(pilot):
        return ""
    return (
        f"Let precision vary: all {len(low):,} trials in {' and '.join(sorted(map(str, names)))} "
        f"broke, while {held:,} of {count(len(pilot), 'trial')} of the pilot, in fp32, completed."
    )


def _progress_hint(view: View, closest: Row | None) -> str:
    """Say that longer trials are missing, where nothing broke; else nothing."""
    if closest is None:
        return ""
    factors = [closest[name] for name in _LACKED if closest[name] is not None]
    is_short = bool(factors) and closest["progress"] == min(factors)
    if not is_short or any(row["outcome"] != Outcome.COMPLETED for row in view.results):
        return ""
    return (
        "Raise trial.steps and confirm.steps: no trial broke, and what came closest made too "
        f"little progress (P {closest['progress']:.2f})."
    )


def _sides_hint(view: View, rows: Sequence[Row], closest: Row) -> str:
    """Say what the trials on either side of the stable learning rates ask for, if anything."""
    rated = [row for row in rows if row.get("learning_rate")]
    rates = [row["learning_rate"] for row in rated if row["is_stable"]]
    low, high = min(rates or [closest["learning_rate"]]), max(rates or [closest["learning_rate"]])
    below = [row for row in rated if row["learning_rate"] < low]
    above = [row for row in rated if row["learning_rate"] > high]
    if not rates and _lacks_progress(closest):  # then its own rate was too low
        below += [row for row in rated if row["learning_rate"] == low]
    num_weak = sum(_lacks_progress(row) for row in below)
    num_failed = sum(not row["is_stable"] for row in above)
    weak = (
        f"{'below' if rates else 'up to'} {number(low)}, {num_weak:,} of "
        f"{count(len(below), 'trial')} made too little progress"
    )
    failed = (
        f"above {number(high)}, {num_failed:,} of {count(len(above), 'trial')} were not stable"
    )
    match _is_most(num_weak, below), _is_most(num_failed, above):
        case True, True:
            near = f"Narrow it to {number(low)} to {number(high)}" if low < high else "Go between"
            return (
                f"Widening learning_rate helps at neither end: {weak}; {failed}. {near}, raise "
                f"trial.steps and confirm.steps{_unused_guard(view)}."
            )
        case True, False:
            return _rate_hint(rated, closest) or f"Raise the lower end of learning_rate: {weak}."
        case False, True:
            return _rate_hint(rated, closest) or f"Lower the upper end of learning_rate: {failed}."
    return _rate_hint(rated, closest)


def _is_most(num: int, rows: Sequence[Row]) -> bool:
    return len(rows) >= _MIN_SIDE and 2 * num > len(rows)


def _lacks_progress(row: Row) -> bool:
    """Say whether too little progress is what kept a trial or configuration from the bar."""
    factors = [row[name] for name in _LACKED if row[name] is not None]
    is_broken = row.get("outcome", Outcome.COMPLETED) != Outcome.COMPLETED
    return bool(factors) and not is_broken and row["progress"] == min(factors) < STABLE_Q


def _unused_guard(view: View) -> str:
    """Name a guard that the space does not vary; empty if it varies all."""
    names = ("attention_logit_cap", "clip_norm", "warmup_steps")
    absent = next((name for name in names if name not in view.report.varying), None)
    return f", or let {absent} vary" if absent else ""


def _rate_hint(rows: Sequence[Row], closest: Row) -> str:
    """Say which end of the learning rates asks for more, if one does; else nothing."""
    rates = [row["learning_rate"] for row in rows]
    rate, low, high = closest["learning_rate"], min(rates), max(rates)
    broke = [row for row in rows if row["outcome"] != Outcome.COMPLETED]
    below = [row for row in rows if row["learning_rate"] < rate]
    num_broken = sum(row["learning_rate"] < rate for row in broke)
    if _is_most(num_broken, below):
        return (
            f"Widen learning_rate downwards: {num_broken:,} of {count(len(below), 'trial')} below "
            f"{number(rate)}, where the closest lies, broke."
        )
    if log2(rate / low) <= 1 and not _lacks_progress(closest):
        return f"Widen learning_rate downwards: the closest lies at its lower end ({number(low)})."
    if log2(high / rate) <= 1 and not broke:
        return f"Widen learning_rate upwards: the closest lies at its upper end ({number(high)})."
    return ""


def warnings(view: View) -> tuple[str, ...]:
    """Return everything to be said beside the verdict, each sentence once."""
    found = [*alarm_sentences(view), *_unread_steps(view), *view.verdict.warnings]
    for horizon in sorted(view.report.yardsticks):
        found += view.report.yardsticks[horizon].warnings
    if _has_schedule(view) and view.study.trial_steps != view.study.confirm.steps:
        found.append(
            "The schedule depends on the length of a trial, and the pilot ran to "
            f"{max(view.study.trial_steps, view.study.confirm.steps):,} steps: what counts as "
            f"progress over {view.study.trial_steps:,} was read half-way through it. With equal "
            "trial.steps and confirm.steps it is exact."
        )
    if view.results and not any(row["num_judged_steps"] for row in view.results):
        num_data = sum(row["num_data_steps"] or 0 for row in view.results)
        found.append(
            f"All {num_data:,} steps were labelled `data`: the training loss is not finite even "
            "with the initial model in fp32. Look at the data and at the task's loss."
        )
    found += _precision_warnings(view)
    found += _memory_advice(view)
    search = view.study.search
    if search.sampler == "tpe" and search.max_concurrent != 1 and view.in_stage("search"):
        found.append(
            "TPE ran with trials in flight: the order in which they finished shaped the search; "
            "search.max_concurrent=1 makes it repeatable."
        )
    unseen = sum(bool(row["warnings"]) for row in view.trials)
    if unseen:
        found.append(
            f"{count(unseen, 'trial')} carried a warning of {'its' if unseen == 1 else 'their'} "
            "own: see the table of trials."
        )
    return tuple(dict.fromkeys(plain(view.private(text)) for text in found))


def _unread_steps(view: View) -> list[str]:
    """Say for how many of the trials that are drawn the step files cannot be read."""
    lost = view.curves.lost
    if not lost:
        return []
    about = "the choice" if view.verdict.choice else "what came closest"
    seeds = sum(row["config_id"] == view.headline_id and row["stage"] == "confirm" for row in lost)
    of_them = f", {count(seeds, 'seed')} of {about} among them" if seeds else ""
    its = "its file is" if len(lost) == 1 else "their files are"
    text = (
        f"The steps of {count(len(lost), 'trial')} could not be read{of_them}: {its} missing or "
        "damaged, and figures of steps leave them out. The verdict needs no step file."
    )
    return [text]


def _has_schedule(view: View) -> bool:
    return any(view.setting(row, "schedule") not in {None, "constant"} for row in view.trials)


def _precision_warnings(view: View) -> list[str]:
    half = [row for row in view.trials if view.setting(row, "precision") == "fp16"]
    if not half:
        return []
    found = []
    if view.report.device == "cpu":
        kinds = " and ".join(sorted({row["fp16_kind"] for row in half if row["fp16_kind"]}))
        found.append(
            f"fp16 was {kinds} on a CPU: overflow and loss scaling carry over to a GPU, but "
            "rounding, softmax and layer norm differ. Confirm there before a long run."
        )
    headline = view.by_id.get(view.headline_id or "")
    if headline is not None and view.setting(headline, "precision") != "fp16":
        return found  # the verdict is about a training without a loss scale
    horizon = max(row["num_planned_steps"] for row in half)
    intervals = [view.setting(row, "growth_interval") or 0 for row in half]
    if all(interval >= horizon for interval in intervals):
        found.append(
            f"growth_interval ({min(intervals):,}) lies beyond the trials ({horizon:,} steps): "
            "no growth of the loss scale was tested."
        )
    if any(0 < interval < PROOF_STEPS for interval in intervals):
        found.append(
            f"growth_interval is below {PROOF_STEPS} in some trials: no loss scale was ever "
            "proven there, so overflows counted as calibration."
        )
    return found


def _memory_advice(view: View) -> list[str]:
    """Say how the same step is taken with less memory, where trials ran out of it."""
    rows = [row for row in view.results if row["outcome"] == Outcome.OUT_OF_MEMORY]
    if not rows:
        return []
    found = []
    sizes = {(view.setting(r, "batch_size"), view.setting(r, "accumulation_steps")) for r in rows}
    for batch, windows in sorted(size for size in sizes if None not in size):
        if batch % 2 == 0:
            found.append(
                f"Out of memory at batch_size={batch}, accumulation_steps={windows}: half the "
                f"batch with twice the accumulation is a step of the same size (batch_size="
                f"{batch // 2}, accumulation_steps={2 * windows})."
            )
    if not all(view.setting(row, "gradient_checkpointing") for row in rows):
        found.append(
            f"{count(len(rows), 'trial')} ran out of memory: gradient_checkpointing=true takes "
            "less of it and more time, and changes no result."
        )
    return found


def _share(value: Any, counts: tuple[int, int]) -> str:  # noqa: ANN401 - any JSON scalar
    return f"{counts[0]:,} of {counts[1]:,} stable at {setting_value(value)}"
