"""The race: our study against what a user would pick instead, at equal optimizer steps.

    python -m tests.benchmarks.race                                   everything: hours
    python -m tests.benchmarks.race --track own --seeds 0 --parts study table

What is measured. On each track (see `tracks`) and study seed our whole study runs: pilot, 24
search trials, confirm. Every rival then gets as many optimizer steps as that study executed, in
trials of `confirm.steps`, on the same space and engine, with today's configuration first:

    tune       Ray Tune with its OptunaSearch, on the final probe loss
    asha       the same with AsyncHyperBandScheduler, ten reports a trial
    hyperband  Optuna: TPE with HyperbandPruner
    threshold  Optuna: TPE with ThresholdPruner at twice the untrained loss; it prunes NaN, too
    random     random search, on the final probe loss

No kill rule and no loss stop ends a rival's trial and bad steps are skipped by our engine, where
a plain loop would have been lost: this is generous to them. They hear the true probe loss, NaN
included, and choose what their own interface calls best; if that raises they have no choice.

Every choice, and our `fastest` beside it, is trained again with 10 fresh seeds of each study seed
over five times the horizon, kill rule and loss stop in force. It survived a seed if it completed
there, its last probe level is finite and it gained at least half of Delta. E_0 is measured as a
pilot measures it; Delta is what the best configuration of an exhaustive grid gained whose every
seed completed. The best of that grid that survives the same 10 seeds is what final losses are
compared with. Our steps leave out the blind run and the one-step check of settings.

Trainings are kept in `--store` under a hash of configuration and code, so that parts run in any
order, can be broken off and gone on with, and a change to our method trains only what is new. A
study with a changed method has another budget; a rival's earlier trials are reused all the same.
`--adopt` keeps the trainings after a change of the engine's sources that changes no bit.
Parts: `study` (all methods), `grid`, `evaluate`, `table`; a later part runs what it still needs.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.benchmarks.race.adopting import adopt
from tests.benchmarks.race.judging import Judge
from tests.benchmarks.race.ours import Finished, run_study
from tests.benchmarks.race.rivals import OPTUNA_RIVALS, run_optuna
from tests.benchmarks.race.store import Store, read_json, write_json
from tests.benchmarks.race.tables import Line, track_table
from tests.benchmarks.race.tracks import TRACKS, Track

METHODS = ("ours", "tune", "asha", "hyperband", "threshold", "random")
PARTS = ("study", "grid", "evaluate", "table")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts asked for."""
    import torch

    torch.set_num_threads(1)
    options = _parse(arguments)
    store = Store(options.store)
    options.store.mkdir(parents=True, exist_ok=True)
    if options.adopt:
        _say(adopt(store, options.adopt))
    tracks = [TRACKS[name] for name in options.track]
    finished: dict[str, list[Finished]] = {}
    judges = {track.name: Judge(track, store, jobs=options.jobs) for track in tracks}
    if {"study", "evaluate", "table"} & set(options.parts):
        for track in tracks:
            seeds = track.study_seeds if options.seeds is None else options.seeds
            finished[track.name] = [
                one for seed in seeds for one in run_methods(track, seed, store, options.methods)
            ]
    if "grid" in options.parts:
        for track in tracks:
            _say(f"{track.name}: grid")
            judges[track.name].yard()
    if {"evaluate", "table"} & set(options.parts):
        for track in tracks:
            _say(f"{track.name}: evaluation")
            text, data = judged_table(track, judges[track.name], finished[track.name], store)
            write_json(store.note_path("tables", f"{track.name}.json"), data)
            if "table" in options.parts:
                print(f"\n### {track.name}\n\n{text}", flush=True)


def _parse(arguments: Sequence[str] | None) -> Any:  # noqa: ANN401 - argparse's namespace
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.race")
    parser.add_argument("--track", nargs="+", choices=TRACKS, default=list(TRACKS))
    parser.add_argument("--seeds", nargs="+", type=int, help="study seeds (default: the track's)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--store", type=Path, default=Path(".race"))
    parser.add_argument(
        "--adopt",
        metavar="FINGERPRINT",
        help="first take over the trainings of other sources, if a sample ends to the bit alike",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes for grid and evaluation")
    return parser.parse_args(arguments)


def run_methods(track: Track, seed: int, store: Store, methods: Sequence[str]) -> list[Finished]:
    """Run every method on one track and study seed; ours first, for it sets the budget."""
    space = track.space(seed, store.folder / "spaces")
    ours = _timed(f"{track.name}, seed {seed}: ours", store, lambda: run_study(space, store))
    finished = [ours] if "ours" in methods else []
    rivals = (method for method in methods if method != "ours")
    finished += [_rival(name, track, seed, store, budget=ours.steps) for name in rivals]
    return finished


def _rival(method: str, track: Track, seed: int, store: Store, *, budget: int) -> Finished:
    """Run a rival, unless a run with this budget is kept."""
    space = track.space(seed, store.folder / "spaces")
    text = hashlib.sha256(space.text.encode()).hexdigest()[:8]
    path = store.note_path("rivals", f"{track.name}-{text}-{seed}-{method}-{budget}.json")
    if (kept := read_json(path)) is not None:
        return Finished(**kept)

    def run() -> Finished:
        if method in OPTUNA_RIVALS:
            return run_optuna(method, space, store, budget=budget)
        from tests.benchmarks.race.tune_rivals import run_tune

        return run_tune(method, space, store, budget=budget)

    finished = _timed(f"{track.name}, seed {seed}: {method}", store, run)
    write_json(path, finished.to_json())
    return finished


def _timed(what: str, store: Store, run: Any) -> Finished:  # noqa: ANN401 - a closure
    began, before = time.monotonic(), store.num_steps_run
    _say(f"{what} begins")
    finished: Finished = run()
    elapsed_s = time.monotonic() - began
    new = store.num_steps_run - before
    _say(
        f"{what}: {finished.trials} trials, {finished.steps:,} steps ({new:,} run here now), "
        f"{elapsed_s:.0f} s; {'a choice' if finished.choice else 'no choice'}"
    )
    return finished


def judged_table(
    track: Track, judge: Judge, finished: Sequence[Finished], store: Store
) -> tuple[str, dict[str, Any]]:
    """Evaluate every choice of a track and write its tables, as text and as JSON."""
    lines = []
    for one in finished:
        lines.append((one.method, one, one.choice))
        if one.method == "ours":
            lines.append(("ours, fastest", one, one.fastest))
    wanted = [(choice, one.seed) for _, one, choice in lines if choice is not None]
    ended = iter(judge.evaluate(wanted))
    judged = [
        Line(
            name=name,
            finished=one,
            choice=choice,
            evaluated=None if choice is None else next(ended),
        )
        for name, one, choice in lines
    ]
    best = judge.best_surviving(min(one.seed for one in finished)) if finished else None
    varying = track.space(0, store.folder / "spaces").varying
    data = {
        "track": track.name,
        "lines": [asdict(line) for line in judged],
        "best": None if best is None else [asdict(part) for part in best],
        "e0": judge.yard().e0,
        "delta": judge.yard().delta,
    }
    json.dumps(data, allow_nan=False)
    return track_table(judged, best, varying), data


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
