"""Keep a store after a change of the code that trains, if the change changes no bit.

The store is kept by the sources, and a change of words in them need not run hours again. One
training of every kind that is there (task, precision, cap and outcome) is run anew; only if all
of them end to the bit as they did does the store pass on to the new code.
"""

from collections.abc import Iterator
from typing import Any

from stability_search.records.trial import TrialSummary
from stability_search.settings.trial import TrialConfig, TrialConstants
from tests.benchmarks.race.store import Store, Training, fingerprint, read_json

# What may differ: time and memory. What a summary has gained since is not compared, either.
_LOOSE = {"wall_s", "train_s", "peak_memory_mib"}


def adopt(store: Store, old: str) -> str:
    """Hand the trainings of other sources on to the present ones.

    Args:
        store: The store.
        old: Fingerprint of the other sources, the name of their folder.

    Returns:
        What was compared.

    Raises:
        ValueError: There is no such folder, the present sources have trainings of their own, or
            a training ends otherwise than it did.
    """
    folder = store.folder / old
    if not (folder / "trial").is_dir():
        raise ValueError(f"--adopt: a folder of the store is needed, but got {old!r}.")
    target = store.folder / fingerprint()
    if target.exists():
        raise ValueError(f"--adopt: {target} is there already. Remove it to adopt another.")
    samples = list(_samples(folder.glob("trial/*.json")))
    for kept in samples:
        again = store.train(_training(kept)).to_json()
        then = TrialSummary.from_json(kept["summary"]).to_json()
        told = kept["summary"].keys() - _LOOSE
        differing = sorted(key for key in told if then[key] != again[key])
        if differing:
            raise ValueError(f"--adopt: a training ends otherwise now: {', '.join(differing)}.")
    folder.rename(target)
    return f"{len(samples)} kinds of trainings end to the bit as before; {old} is {target.name}"


def _training(kept: dict[str, Any]) -> Training:
    constants = dict(kept["constants"])
    constants["probe_steps"] = tuple(constants["probe_steps"])
    return Training(
        config=TrialConfig.from_json(kept["config"]), constants=TrialConstants(**constants)
    )


def _samples(paths: Iterator[Any]) -> Iterator[dict[str, Any]]:
    """Give the shortest training of every kind."""
    kinds: dict[tuple[object, ...], dict[str, Any]] = {}
    for path in sorted(paths):
        kept = read_json(path)
        engine = kept["config"]["engine"]
        kind = (
            kept["config"]["task"]["class_name"],
            engine["precision"],
            engine["attention_logit_cap"] is None,
            kept["summary"]["outcome"],
        )
        known = kinds.get(kind)
        if known is None or kept["summary"]["num_steps"] < known["summary"]["num_steps"]:
            kinds[kind] = kept
    yield from kinds.values()
