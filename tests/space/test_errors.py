"""Every wrong file is answered with file, line and column, and all problems at once."""

import pytest

from tests.space.refusing import Load, heads, refused


# Each line replaces the first occurrence of a piece of the valid file, and gives the whole
# first line of the one problem that follows.
@pytest.mark.parametrize(
    ("old", "new", "head"),
    [
        (
            "low: 1e-4",
            "low: -1e-5",
            "x.yaml:10:37  space.learning_rate: `low > 0` must hold, but got low=-1e-5. Try 1e-6.",
        ),
        (
            "low: 1e-4, high: 0.3",
            "low: 1, high: 1e-6",
            (
                "x.yaml:10:18  space.learning_rate: `low < high` must hold, but got low=1, "
                "high=1e-6. Swap them."
            ),
        ),
        (
            "low: 1e-4, high: 0.3",
            "low: 0.1, high: 0.1",
            (
                "x.yaml:10:18  space.learning_rate: `low < high` must hold, but got low=0.1, "
                "high=0.1. Put it under `fixed`."
            ),
        ),
        (
            "  clip_norm:",
            "  clip_nrom:",
            "x.yaml:13:3  space.clip_nrom: no such setting. Did you mean `clip_norm`?",
        ),
        (
            "batch_size: 2",
            "lr: 2",
            "x.yaml:8:3  fixed.lr: no such setting. Did you mean `learning_rate`?",
        ),
        (
            "steps: 50 ",
            "stepz: 50 ",
            "x.yaml:5:3  trial.stepz: no such key. Did you mean `steps`?",
        ),
        (
            "steps: 50 ",
            "steps: 19 ",
            "x.yaml:5:10  trial.steps: `steps >= 20` must hold, but got 19. Give 20 or more.",
        ),
        (
            "steps: 50 ",
            "steps: 1e2 ",
            "x.yaml:5:10  trial.steps: an integer is required, but got 1e2. Write 100.",
        ),
        (
            "steps: 50 ",
            "steps: true ",
            "x.yaml:5:10  trial.steps: an integer is required, but got true.",
        ),
        (
            "steps: 50 ",
            "steps: 500 ",
            (
                "x.yaml:5:10  trial.steps: `confirm.steps >= trial.steps` must hold, but got "
                "confirm.steps=400, trial.steps=500. Try `confirm.steps: 1000`."
            ),
        ),
        (
            "timeout_s: 100",
            "timeout_s: .inf",
            "x.yaml:6:14  trial.timeout_s: a finite number is required, but got .inf.",
        ),
        (
            "timeout_s: 100",
            "timeout_s: 1e400",
            "x.yaml:6:14  trial.timeout_s: a finite number is required, but got 1e400.",
        ),
        (
            "timeout_s: 100",
            "steps: 60",
            "x.yaml:6:3  trial.steps: a key may stand once, but got it on line 5 too. Remove one.",
        ),
        (
            "[null, 0.5, 1]",
            "[None, 0.5, 1]",
            (
                "x.yaml:13:24  space.clip_norm: a number is required, but got 'None'. "
                "Write `null` to turn it off."
            ),
        ),
        (
            "[null, 0.5, 1]",
            "[0, 0.5, 1]",
            (
                "x.yaml:13:24  space.clip_norm: a finite number > 0 must hold, but got 0. "
                "Write `null` to turn it off."
            ),
        ),
        (
            "[null, 0.5, 1]",
            "[1.0, 0.5, 1]",
            (
                "x.yaml:13:34  space.clip_norm: each choice may stand once, but got 1 twice. "
                "Remove one."
            ),
        ),
        (
            "[null, 0.5, 1]",
            "[]",
            "x.yaml:13:23  space.clip_norm: `choice` needs one value or more, but got none.",
        ),
        (
            "[null, 0.5, 1]",
            "[null, [1]]",
            (
                "x.yaml:13:30  space.clip_norm: a number, a word, `true`, `false` or `null` is "
                "required, but got a list."
            ),
        ),
        (
            "[fp32, bf16, fp16]",
            "[fp32, bf61, fp16]",
            (
                "x.yaml:11:30  space.precision: one of fp32, bf16, fp16 must hold, but got "
                "'bf61'. "
                "Did you mean `bf16`?"
            ),
        ),
        (
            "{choice: [fp32, bf16, fp16]}",
            "{uniform: {low: 1, high: 2}}",
            "x.yaml:11:15  space.precision: its values are no uniform range. Use `choice`.",
        ),
        (
            "{int: {low: 1, high: 4}}",
            "{uniform: {low: 1, high: 4}}",
            "x.yaml:15:24  space.accumulation_steps: its values are no uniform range. Use `int`.",
        ),
        (
            "{int: {low: 1, high: 4}}",
            "{int: {low: 0, high: 4}}",
            "x.yaml:15:35  space.accumulation_steps: value >= 1 must hold, but got 0.",
        ),
        (
            "{int: {low: 1, high: 4}}",
            "{int: {low: 1, high: 4}, choice: [1]}",
            (
                "x.yaml:15:23  space.accumulation_steps: exactly one of choice, uniform, "
                "loguniform, "
                "int, logint is required, but got choice, int."
            ),
        ),
        (
            "{int: {low: 1, high: 4}}",
            "{int: {low: 1}}",
            (
                "x.yaml:15:29  space.accumulation_steps: `high` is required, but it is missing. "
                "Add `high: ...`."
            ),
        ),
        (
            "{int: {low: 1, high: 4}}",
            "4",
            (
                "x.yaml:15:23  space.accumulation_steps: a mapping is required, but got 4. "
                "Write `{choice: [...]}`, or put one value under `fixed`."
            ),
        ),
        (
            "when: {precision: fp16}",
            "when: {precision: fp61}",
            (
                "x.yaml:12:57  space.init_scale: `when`: `precision` never is 'fp61', it "
                "is one of "
                "fp32, bf16, fp16. Did you mean `fp16`?"
            ),
        ),
        (
            "when: {precision: fp16}",
            "when: {precison: fp16}",
            (
                "x.yaml:12:46  space.init_scale: `when`: no setting `precison`. "
                "Did you mean `precision`?"
            ),
        ),
        (
            "when: {precision: fp16}",
            "when: {schedule: cosin}",
            (
                "x.yaml:12:56  space.init_scale: `when`: `schedule`: one of constant, "
                "linear, cosine "
                "must hold, but got 'cosin'. Did you mean `cosine`?"
            ),
        ),
        (
            "high: 0.3}}",
            "high: 0.3}, when: {precision: fp16}}",
            (
                "x.yaml:10:55  space.learning_rate: the learning rate must always apply. "
                "Remove its `when`."
            ),
        ),
        (
            "learning_rate: 1e-3",
            "learning_rate: 1",
            (
                "x.yaml:17:21  start_with[0].learning_rate: must lie in the space, 0.0001 "
                "to 0.3, but "
                "got 1. Change it, or widen `space.learning_rate`."
            ),
        ),
        (
            "fp16, init_scale: 1024, ",
            "fp32, init_scale: 1024, ",
            (
                "x.yaml:17:44  start_with[0].init_scale: does not apply where `precision` "
                "is fp32. "
                "Leave it out."
            ),
        ),
        (
            "clip_norm: 1}",
            "batch_size: 4}",
            "x.yaml:17:74  start_with[0].batch_size: is fixed at 2, but got 4. Leave it out.",
        ),
        (
            "clip_norm: 1}",
            "eps: 4}",
            (
                "x.yaml:17:62  start_with[0].eps: no such setting varies here. Add it to "
                "`space`, or "
                "leave it out."
            ),
        ),
        (
            "batch_size: 2",
            "dropout: 0.1",
            (
                "x.yaml:14:3  space.dropout: a setting varies or is fixed, but `fixed` has it too "
                "(line 8). Remove one."
            ),
        ),
        (
            "batch_size: 2",
            "hidden: 64",
            "x.yaml:8:3  fixed.hidden: the value is given in `task_args` too. Remove one.",
        ),
        (
            "batch_size: 2",
            "mode: [1]",
            (
                "x.yaml:8:9  fixed.mode: a setting of the task is one value, but got a list. "
                "Put it under `task_args`."
            ),
        ),
        (
            "batch_size: 2",
            "attention_modules: fusion",
            (
                "x.yaml:8:22  fixed.attention_modules: a list of patterns is required, but got "
                "'fusion'."
            ),
        ),
        (
            "batch_size: 2",
            "gradient_checkpointing: yes",
            (
                "x.yaml:8:27  fixed.gradient_checkpointing: `true` or `false` is required, "
                "but got "
                "'yes'. Write `true`."
            ),
        ),
        (
            "batch_size: 2",
            "beta2: 1.0",
            "x.yaml:8:10  fixed.beta2: 0 <= value < 1 must hold, but got 1.0.",
        ),
        (
            "{hidden: 32}",
            "{hiden: 32}",
            (
                "x.yaml:3:13  task_args.hiden: the task's constructor takes no such argument. "
                "Did you mean `hidden`?"
            ),
        ),
        (
            "{hidden: 32}",
            "{eps: 32}",
            (
                "x.yaml:3:13  task_args.eps: the task's constructor takes no such "
                "argument. It is a "
                "setting of the engine: put it under `fixed` or `space`."
            ),
        ),
        (
            "toy.py:Toy",
            "toy.py:Tox",
            "x.yaml:2:7  task: the file defines no class `Tox`. Did you mean `Toy`?",
        ),
        (
            "search: {trials: 12}",
            "search: {trials: 0}",
            "x.yaml:18:18  search.trials: `trials >= 1` must hold, but got 0. Give 1 or more.",
        ),
        (
            "search: {trials: 12}",
            "search: {sampler: tpee}",
            (
                "x.yaml:18:19  search.sampler: one of tpe, random, qmc is required, but "
                "got 'tpee'. "
                "Did you mean `tpe`?"
            ),
        ),
        (
            "search: {trials: 12}",
            "search: {max_concurrent: many}",
            "x.yaml:18:26  search.max_concurrent: `auto` or a number is required, but got 'many'.",
        ),
        (
            "search: {trials: 12}",
            "search: {resources: {gpu: -1}}",
            (
                "x.yaml:18:27  search.resources.gpu: `gpu >= 0` must hold, but got -1. Give 0 "
                "or more."
            ),
        ),
        (
            "search: {trials: 12}",
            "search: {time_budget_s: none}",
            (
                "x.yaml:18:25  search.time_budget_s: a number is required, but got 'none'. "
                "Write `null` to turn it off."
            ),
        ),
        (
            "search: {trials: 12}",
            "search:",
            (
                "x.yaml:18:1  search: a mapping is required, but got nothing. "
                "Fill it or remove the key."
            ),
        ),
        (
            "search: {trials: 12}",
            "prune: {bad_rate: 1}",
            "x.yaml:18:19  prune.bad_rate: `bad_rate < 1` must hold, but got 1.",
        ),
        (
            "search: {trials: 12}",
            "confirm: {min_margin: 4}",
            (
                "x.yaml:18:23  confirm.min_margin: `confirm.min_margin <= confirm.octaves` "
                "must hold, "
                "but got min_margin=4, octaves=3. Try `min_margin: 3`."
            ),
        ),
        (
            "search: {trials: 12}",
            "alarms: {on_alarm: panic}",
            (
                "x.yaml:18:20  alarms.on_alarm: one of warn, end_epoch, end_run is "
                "required, but got "
                "'panic'."
            ),
        ),
        (
            "search: {trials: 12}",
            "alarms: {grad_norm: 0}",
            "x.yaml:18:21  alarms.grad_norm: `grad_norm > 0` must hold, but got 0.",
        ),
        (
            "search: {trials: 12}",
            "report: {targets: {loss: low}}",
            "x.yaml:18:26  report.targets.loss: a number is required, but got 'low'.",
        ),
        (
            "search: {trials: 12}",
            "name: a/b",
            (
                "x.yaml:18:7  name: a plain file name of letters, digits, `_`, `-`, `.` "
                "and blanks is "
                "required, but got 'a/b'."
            ),
        ),
        (
            "search: {trials: 12}",
            "a: &b 1",
            "x.yaml:18:4  a: anchors are refused, but got `&b`. Remove it.",
        ),
        (
            "trials: 12",
            "trials: !!int 12",
            (
                "x.yaml:18:18  search.trials: tags are refused, but got `tag:yaml.org,2002:int`. "
                "Remove it."
            ),
        ),
        (
            "trials: 12",
            "trials: *b",
            "x.yaml:18:18  search.trials: aliases are refused, but got `*b`. Write the value out.",
        ),
        (
            "trials: 12",
            "trials: 99999999999999999999",
            (
                "x.yaml:18:18  search.trials: an integer has at most 63 bits, but got "
                "99999999999999999999."
            ),
        ),
        (
            "trials: 12",
            "[trials]: 12",
            "x.yaml:18:10  search: a key is a plain word, but got a list.",
        ),
    ],
)
def test_one_mistake_gives_one_problem_at_its_place(
    load_text: Load, valid: str, old: str, new: str, head: str
) -> None:
    assert valid.count(old) >= 1
    error = refused(load_text, valid.replace(old, new, 1))
    assert head in heads(error)
    others = [one for one in heads(error) if one != head]
    # An unknown key `a`, and a `start_with` that names what no longer varies, are true too.
    assert [one for one in others if "no such key" not in one and "varies here" not in one] == []
