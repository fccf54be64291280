"""Indicators of the headline configuration that lie beyond the thresholds of `alarms`."""

from stability_search.report.context import View
from stability_search.report.wording import number

_DIVERGING_LOGIT = 1e4  # Wortsman et al. 2023, arXiv 2309.14322


def alarm_sentences(view: View) -> list[str]:
    """Compare what the headline configuration showed on its confirm seeds with the alarms.

    Args:
        view: The study; a configuration that was not confirmed raises no alarm.

    Returns:
        A sentence for each indicator beyond its threshold, with the largest value seen.
    """
    rows = view.seeds_of(view.headline_id) if view.headline_id else []
    largest = {
        name: max((row[name] for row in rows if row[name] is not None), default=None)
        for name in ("attention_max", "clip_frac", "clamp_frac", "cap_frac", "grad_norm_max")
    }
    alarms = view.study.alarms
    found = []
    clipped = largest["clip_frac"]
    if clipped is not None and clipped > alarms.clip_frac:
        found.append(
            f"{clipped:.0%} of its updates were clipped (alarm at {alarms.clip_frac:.0%}): "
            "clipping acts as a hidden cut of the learning rate."
        )
    for name, limit, what in (
        ("clamp_frac", alarms.clamp_frac, "outputs lay beyond the clamp: masked, not cured"),
        ("cap_frac", alarms.cap_frac, "logits lay beyond the cap: training depends on it"),
    ):
        share = largest[name]
        if share is not None and share > limit:
            found.append(f"{share:.1%} of its attention {what} (alarm at {limit:.1%}).")
    logit = largest["attention_max"]
    if logit is not None and logit > alarms.attention_max:
        how = "only the cap keeps them in range"
        if largest["cap_frac"] is None:
            how = "diverging" if logit > _DIVERGING_LOGIT else "to be watched"
        found.append(
            f"Its attention logits reached {number(logit)} (alarm at "
            f"{number(alarms.attention_max)}): {how}."
        )
    norm = largest["grad_norm_max"]
    if norm is not None and norm > alarms.grad_norm:
        found.append(
            f"Its gradient norm reached {number(norm)} before clipping "
            f"(alarm at {number(alarms.grad_norm)})."
        )
    return found
