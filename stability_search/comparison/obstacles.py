"""Why two runs cannot be compared, and what to bear in mind where they can."""

from collections.abc import Mapping
from math import isclose

from stability_search.comparison.differences import as_json, setting_differences, unnamed
from stability_search.comparison.pairs import have_one_measure
from stability_search.comparison.sides import Side
from stability_search.records.verdict import VerdictKind
from stability_search.scoring.constants import S_V1
from stability_search.settings.trial import SETTING_NAMES
from stability_search.space import Space, builtin_tasks
from stability_search.space.parameter import same_value
from stability_search.space.resuming import NOTHING
from stability_search.space.writing import flow_text

_SAME_LOSS = 1e-6  # relative: of one baseline computed on two machines
_COUNTED = ("stability-search", "torch")  # versions that may change what a trial does
_HASH_DIGITS = 10
_MAX_MODULES = 5  # that are named; the rest is counted


def reasons(first: Side, second: Side) -> tuple[str, ...]:
    """Say why q of the two runs does not mean the same: all reasons at once.

    Returns:
        A phrase each, of which the first word says what differs; empty where the runs can be
        compared.
    """
    return (
        *_task(first, second),
        *_horizon(first, second),
        *_device(first, second),
        *_score_version(first, second),
        *_baseline(first, second),
        *_metrics(first, second),
    )


def _task(first: Side, second: Side) -> list[str]:
    names = (first.space.task_name, second.space.task_name)
    hashes = (first.task_sha256, second.task_sha256)
    if not _is_one_task(first, second):
        return [f"task: {names[0]} in A, {names[1]} in B"]
    found = []
    if all(hashes) and hashes[0] != hashes[1]:
        name, shown = _class_name(first), [str(one)[:_HASH_DIGITS] for one in hashes]
        found.append(f"task: the file of {name} is another, sha256 {shown[0]} and {shown[1]}")
    found += _task_modules(first, second)
    return found + _task_arguments(first.space, second.space)


def _task_modules(first: Side, second: Side) -> list[str]:
    """Name the modules beside the task that differ, as far as both runs kept their hashes."""
    ours, theirs = first.task_modules, second.task_modules
    if ours is None or theirs is None:
        return []
    names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    shown = [_module(name, ours, theirs) for name in names[:_MAX_MODULES]]
    if len(names) > _MAX_MODULES:
        shown.append(f"and {len(names) - _MAX_MODULES} more")
    return [f"task: the task's code differs: {', '.join(shown)}"] if shown else []


def _module(name: str, ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    if name in ours and name in theirs:
        return f"{name} is another"
    return f"{name} is only in {'A' if name in ours else 'B'}"


def _is_one_task(first: Side, second: Side) -> bool:
    """Say whether both name the same task; a file is known by its hash, whatever it is called."""
    if first.task_sha256 and second.task_sha256:
        return _class_name(first) == _class_name(second)
    return first.space.task_name == second.space.task_name


def _class_name(side: Side) -> str:
    return side.space.task_name.rpartition(":")[2]


def _task_arguments(first: Space, second: Space) -> list[str]:
    """Name the arguments of the task that differ; one that is a setting elsewhere is none."""
    found = []
    for name in dict.fromkeys((*first.task_args, *second.task_args)):
        if name in {*first.varying, *second.varying}:
            continue
        was, now = (space.fixed.get(name, unnamed(space, name)) for space in (first, second))
        if not same_value(was, now):
            found.append(f"task: {name} is {_argument(was)} in A, {_argument(now)} in B")
    return found


def _argument(value: object) -> str:
    return "not given" if value is NOTHING else flow_text(as_json(value))


def _horizon(first: Side, second: Side) -> list[str]:
    if first.horizon == second.horizon:
        return []
    return [f"horizon: confirmed over {first.horizon:,} steps in A, {second.horizon:,} in B"]


def _device(first: Side, second: Side) -> list[str]:
    found = []
    ours, theirs = first.seen("device"), second.seen("device")
    if ours and theirs and ours != theirs:
        found.append(f"device: {_listed(ours)} in A, {_listed(theirs)} in B")
    ours, theirs = first.seen("fp16_kind"), second.seen("fp16_kind")
    if ours and theirs and ours != theirs:
        found.append(f"device: fp16 is {_listed(ours)} in A, {_listed(theirs)} in B")
    return found


def _listed(words: frozenset[str]) -> str:
    return " and ".join(sorted(words))


def _score_version(first: Side, second: Side) -> list[str]:
    known = {side.score_version for side in (first, second)} - {None}
    if known <= {S_V1.name}:
        return []
    ours, theirs = first.score_version or "none", second.score_version or "none"
    if ours == theirs:
        return [f"score version: {ours} in both, of which this program knows only {S_V1.name}"]
    return [f"score version: {ours} in A, {theirs} in B"]


def _baseline(first: Side, second: Side) -> list[str]:
    ours, theirs = first.measure, second.measure
    sources = {ours.e0_source, theirs.e0_source}
    if sources == {"baseline", "blind"}:  # without a baseline, and only then, there is a blind run
        return ["baseline: the task has a `baseline()` in only one of the two"]
    if sources != {"baseline"} or ours.e0 is None or theirs.e0 is None:
        return []  # the start and a blind run depend on the pilot's seed and settings
    if isclose(ours.e0, theirs.e0, rel_tol=_SAME_LOSS):
        return []
    return [f"baseline: its loss is {ours.e0:.6g} in A, {theirs.e0:.6g} in B: other data"]


def _metrics(first: Side, second: Side) -> list[str]:
    if not first.trials or not second.trials:
        return []
    ours, theirs = _metric_names(first), _metric_names(second)
    if ours == theirs:
        return []
    return [f"metrics: {_listed(ours) or 'none'} in A, {_listed(theirs) or 'none'} in B"]


def _metric_names(side: Side) -> frozenset[str]:
    begin, end = "metric_", "_last"
    names = (str(name) for name in side.run.trials.columns)
    return frozenset(
        name[len(begin) : -len(end)]
        for name in names
        if name.startswith(begin) and name.endswith(end)
    )


def caveats(first: Side, second: Side) -> tuple[str, ...]:
    """Say what a reader of the comparison must bear in mind, a sentence each."""
    return (
        *_unfinished(first, second),
        *_measures(first, second),
        *_bars(first, second),
        *_versions(first, second),
        *_unknown_code(first, second),
        *_task_settings(first, second),
    )


def _unfinished(first: Side, second: Side) -> list[str]:
    sides = (("A", first), ("B", second))
    return [
        f"{name} has not finished: what it would have chosen is not known."
        for name, side in sides
        if side.verdict is VerdictKind.INCOMPLETE
    ]


def _measures(first: Side, second: Side) -> list[str]:
    if have_one_measure(first, second) or first.headline is None or second.headline is None:
        return []
    shown = [
        "no signal" if side.measure.delta is None else f"Delta {side.measure.delta:.4g}"
        for side in (first, second)
    ]
    text = (
        "Score, Q and the factors of each run stand on a yardstick of its own "
        f"({shown[0]} in A, {shown[1]} in B): they are not to be subtracted."
    )
    return [text]


def _bars(first: Side, second: Side) -> list[str]:
    ours, theirs = first.space.study, second.space.study
    found = []
    if (ours.confirm.octaves, ours.confirm.min_margin) != (
        theirs.confirm.octaves,
        theirs.confirm.min_margin,
    ):
        found.append(
            "The ladders or the bar differ (confirm.octaves, confirm.min_margin): so do what a "
            "score counts and what `stable` asks for."
        )
    if ours.kill_rule != theirs.kill_rule:
        found.append("The kill rule differs (prune): what one run stops may go on in the other.")
    return found


def _versions(first: Side, second: Side) -> list[str]:
    found = []
    for name in _COUNTED:
        ours, theirs = first.versions.get(name), second.versions.get(name)
        if ours is not None and theirs is not None and ours != theirs:
            found.append(f"{name} is {ours} in A, {theirs} in B.")
    places = first.seen("fingerprint"), second.seen("fingerprint")
    if not found and all(places) and places[0] != places[1]:
        found.append(
            "The trials ran on other versions, machines or files, as each environment.json says: "
            "the same seed need not give the same numbers."
        )
    return found


def _unknown_code(first: Side, second: Side) -> list[str]:
    task = first.space.task_name
    if not _is_one_task(first, second) or task in builtin_tasks():
        return []
    if first.task_sha256 is None or second.task_sha256 is None:
        return ["Whether the task's code is the same is not known: environment.json is missing."]
    if not first.task_sha256:
        return [f"What {task} imports and reads is not kept in a run, and taken to be the same."]
    if first.task_modules is None or second.task_modules is None:
        what = f"What {task} imports from beside it"
        return [f"{what} is not known of both runs, and taken to be the same."]
    return [f"What {task} reads, and what it imports from elsewhere, is taken to be the same."]


def _task_settings(first: Side, second: Side) -> list[str]:
    if not _is_one_task(first, second):
        return []
    names = [one.name for one in setting_differences(first, second)]
    of_the_task = [name for name in names if name not in SETTING_NAMES]
    if not of_the_task:
        return []
    text = (
        f"{', '.join(of_the_task)} {'goes' if len(of_the_task) == 1 else 'go'} to the task: where "
        "that changes what the probe measures, q cannot be compared."
    )
    return [text]
