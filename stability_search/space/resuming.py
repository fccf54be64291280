"""What may change when a study goes on."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping

from stability_search.space.model import Space

_YAML_NAMES = (
    ("trial_steps", "trial.steps"),
    ("timeout_s", "trial.timeout_s"),
    ("kill_rule.", "prune."),
    ("control", "prune.control"),
    ("targets", "report.targets"),
    ("course", "report.course"),
)
_MAY_RISE = frozenset(
    {
        "search.trials",
        "search.time_budget_s",
        "search.step_budget",
        "confirm.top",
        "confirm.seeds",
    }
)
# They say where a trial may run and are part of no number of it; cores are its threads, a share of
# a GPU is its memory, and a GPU model has its own numerics.
_PLACEMENT = frozenset({"search.resources.custom", "search.resources.labels"})
_MAY_DIFFER = _MAY_RISE | _PLACEMENT


def _flat(prefix: str, value: object) -> dict[str, object]:
    if isinstance(value, Mapping) and prefix not in _PLACEMENT:  # whole: a key may be gone
        flat: dict[str, object] = {}
        for key, item in value.items():
            flat |= _flat(f"{prefix}.{key}" if prefix else str(key), item)
        return flat
    return {prefix: value}


def _yaml_name(name: str) -> str:
    for start, written in _YAML_NAMES:
        if name == start or (name.startswith(start) and start.endswith(".")):
            return written + name.removeprefix(start)
        if name.startswith(f"{start}."):
            return written + name.removeprefix(start)
    return name


def _facts(space: Space) -> dict[str, object]:
    study = {_yaml_name(k): v for k, v in _flat("", dataclasses.asdict(space.study)).items()}
    facts = {
        **study,
        "task": space.task_name,
        **_flat("task_args", space.task_args),
        **_flat("fixed", space.fixed),
        "start_with": [dict(start) for start in space.start_with],
    }
    for parameter in space.parameters:
        facts |= _flat(f"space.{parameter.name}", dataclasses.asdict(parameter))
    return facts


def _may_rise(old: object, new: object) -> bool:
    if old is None:  # no limit: nothing is larger
        return False
    return new is None or (
        isinstance(new, int | float) and isinstance(old, int | float) and new > old
    )


class _Nothing:
    """Stands for a key that is not there; a value may be None."""

    def __repr__(self) -> str:
        return "nothing"


NOTHING = _Nothing()


def changed_values(old: Space, new: Space) -> dict[str, tuple[object, object]]:
    """List what differs between two spaces.

    Returns:
        By dotted key, the old and the new value; `NOTHING` where there is none.
    """
    before, after = _facts(old), _facts(new)
    changed: dict[str, tuple[object, object]] = {}
    for name in [*before, *(key for key in after if key not in before)]:
        was, now = before.get(name, NOTHING), after.get(name, NOTHING)
        if was != now or isinstance(was, bool) != isinstance(now, bool):
            changed[name] = (was, now)
    return changed


def resume_difference(old: Space, new: Space) -> tuple[str, ...]:
    """List what differs and may not, between a study's space and the one it is resumed with.

    Args:
        old: The space of the study so far.
        new: The same file with other overrides.

    Returns:
        One sentence for each change; empty where the study may go on. Only budgets (trials,
        seconds, steps), `confirm.top` and `confirm.seeds` may rise, and only `labels` and
        `custom` of `search.resources` may change: another cluster has others.
    """
    differences = []
    for name, (was, now) in changed_values(old, new).items():
        if name in _PLACEMENT:
            continue
        if name not in _MAY_RISE:
            differences.append(f"{name}: may not change, but got {now!r} after {was!r}.")
        elif not _may_rise(was, now):
            differences.append(f"{name}: may only rise, but got {now} after {was}.")
    return tuple(differences)


def study_identity(space: Space) -> str:
    """Return a hash of all that makes a space this study: what `resume` refuses to change.

    Args:
        space: Any space; a file and the same one with larger budgets, or for nodes with other
            labels, have one identity.
    """
    kept = {name: value for name, value in _facts(space).items() if name not in _MAY_DIFFER}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()
