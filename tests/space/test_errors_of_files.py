"""Files, overrides and shares that are wrong: every problem at its place, all at once."""

import pytest

from tests.space.refusing import MINIMAL, Load, heads, refused


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("", "x.yaml:1:1  : a space file is a mapping of keys, but got nothing. Start with"),
        ("- 1\n", "x.yaml:1:1  : a space file is a mapping of keys, but got a list."),
        ("fixed: {learning_rate: 1}\n", "x.yaml:1:1  : `task` is required, but it is missing."),
        ("task: ./toy.py:Toy\n", "x.yaml:1:1  : `learning_rate` is required in `space` or"),
        (
            "fixed: {learning_rate: 1}\ntask: no_such\n",
            "x.yaml:2:7  task: no such task, but got 'no_such'.",
        ),
        (
            "fixed: {learning_rate: 1}\ntask: ./none.py:Toy\n",
            "x.yaml:2:7  task: the task cannot be read: no file",
        ),
        ("fixed: {learning_rate: 1}\ntask: 'a b:C'\n", "x.yaml:2:7  task: a built-in name, `pack"),
        ("fixed: {learning_rate: 1}\ntask: a.b:1\n", "x.yaml:2:7  task: a class name must follow"),
        (
            "task: ./toy.py:Needy\nfixed: {learning_rate: 1}\n",
            (
                "x.yaml:1:7  task: the constructor's parameter `path` has no default, but "
                "it is given "
                "nowhere. Add it to `task_args`."
            ),
        ),
        (
            (
                "task: ./toy.py:Needy\nfixed: {learning_rate: 1}\n"
                "space:\n  path: {choice: [a, b], when: {hidden: 64}}\n"
            ),
            (
                "x.yaml:4:26  space.path: the constructor's parameter `path` has no "
                "default, so it "
                "must always apply. Remove its `when`."
            ),
        ),
        (
            "task: ./toy.py:Data\nfixed: {learning_rate: 1}\n",
            "x.yaml:1:7  task: the constructor's parameter `path` has no default, but",
        ),
        (
            "task: ./toy.py:Open\nfixed: {learning_rate: 1, 'a b': 1}\n",
            "x.yaml:2:27  fixed.a b: no such setting.",
        ),
        (
            MINIMAL + "space: {attention_modules: {choice: [a]}}\n",
            "x.yaml:3:28  space.attention_mo",
        ),
        (MINIMAL + "---\na: 1\n", "x.yaml:3:1  : a space file is one document, but a second"),
        ("%YAML 1.1\n---\n" + MINIMAL, "x.yaml:2:1  : no `%` directive may stand here."),
        (MINIMAL + "a: 'b\n", "x.yaml:4:1  : YAML cannot be read here: found unexpected end"),
        (MINIMAL + "\ta: b\n", "x.yaml:3:1  : YAML cannot be read here: "),
        (MINIMAL + 'name: "a\\0b"\n', "x.yaml:3:7  name: only printable characters may stand"),
        (MINIMAL + 'name: "\\ud800"\n', "x.yaml:3:7  name: only printable characters may stand"),
        (
            b"task: a\nb: \0\n",
            "x.yaml:2:4  : only printable characters may stand here, but got U+00",
        ),
        (b"task: a\nb: \xff\n", "x.yaml:2:4  : the file must be UTF-8, but got byte 0xff."),
        ("task: a\n".encode("utf-16"), "x.yaml:1:1  : the file must be UTF-8, but got UTF-16."),
        ("task: a\n".encode("utf-16-le"), "x.yaml:1:2  : only printable characters may stand"),
        ("#" * 65537, "x.yaml:1:1  : a space file holds at most 64 KiB"),
        ("a: [" + "1," * 5000 + "]", "x.yaml:1:9995  : a space file holds at most 5,000 YAML"),
        ("[" * 21 + "]" * 21, "x.yaml:1:21  : values may be nested 20 deep, but got more."),
    ],
)
def test_a_file_that_is_wrong_as_a_whole_is_answered_at_its_place(
    load_text: Load, text: str | bytes, head: str
) -> None:
    found = heads(refused(load_text, text))
    assert any(one.startswith(head) for one in found), found


def test_a_condition_without_a_value_is_an_error(load_text: Load) -> None:
    text = MINIMAL + "space:\n  eps: {choice: [1], when: {beta1: [], beta2: {a: 1}}}\n"
    assert heads(refused(load_text, text)) == [
        (
            "x.yaml:4:36  space.eps: `when`: `beta1` takes one value, or a list of them, but got "
            "an empty list."
        ),
        (
            "x.yaml:4:47  space.eps: `when`: `beta2` takes one value, or a list of them, but got "
            "a mapping."
        ),
    ]


def test_constructor_names_that_clash_are_named_with_their_line(load_text: Load) -> None:
    found = heads(refused(load_text, MINIMAL.replace("Toy", "Clash")))
    assert [one.partition("`")[2].partition("`")[0] for one in found] == [
        "seed",
        "batch_size",
        "metric_loss",
    ]
    assert "a column of the tables" in found[0]
    assert "a setting of the engine" in found[1]
    assert found[0].endswith("toy.py:37.")


def test_a_circle_of_conditions_is_an_error(load_text: Load) -> None:
    text = (
        MINIMAL
        + "space:\n  eps: {choice: [1], when: {beta1: 0.5}}\n"
        + "  beta1: {choice: [0.5], when: {eps: 1}}\n"
        + "  beta2: {choice: [0.5], when: {beta2: 0.5}}\n"
    )
    found = heads(refused(load_text, text))
    assert found == [
        (
            "x.yaml:4:22  space.eps: `when` goes in a circle: eps -> beta1 -> eps. "
            "Remove one of them."
        ),
        "x.yaml:6:26  space.beta2: `when` goes in a circle: beta2 -> beta2. Remove one of them.",
    ]


def test_all_problems_come_at_once_in_the_order_of_the_file(load_text: Load) -> None:
    text = (
        "task: ./toy.py:Toy\n"
        "space:\n"
        "  learning_rate: {loguniform: {low: -1e-5, high: 1}}\n"
        "  precision: {choice: [fp16]}\n"
        "  init_scal: {choice: [1024, 65536], when: {precision: fp16}}\n"
    )
    assert str(refused(load_text, text)) == (
        "x.yaml:3:37  space.learning_rate: `low > 0` must hold, but got low=-1e-5. Try 1e-6.\n"
        "    3 |   learning_rate: {loguniform: {low: -1e-5, high: 1}}\n"
        "      |                                     ^\n"
        "x.yaml:5:3  space.init_scal: no such setting. Did you mean `init_scale`?\n"
        "    5 |   init_scal: {choice: [1024, 65536], when: {precision: fp16}}\n"
        "      |   ^\n"
        "2 problems; nothing was started"
    )


@pytest.mark.parametrize(
    ("option", "head"),
    [
        (
            "trial.steps=0",
            (
                "--set trial.steps=0  trial.steps: `steps >= 20` must hold, but got 0. "
                "Give 20 or more."
            ),
        ),
        ("trial.stepz=9", "--set trial.stepz=9  trial.stepz: no such key. Did you mean `steps`?"),
        ("trial.steps", "--set trial.steps  : `--set` takes KEY=VALUE, but got 'trial.steps'. "),
        ("=1", "--set =1  : `--set` takes KEY=VALUE, but got '=1'. "),
        ("seed=[", "--set seed=[  seed: YAML cannot be read here: "),
        ("seed=.nan", "--set seed=.nan  seed: a finite number is required, but got .nan."),
        ("seed=&a 1", "--set seed=&a 1  seed: anchors are refused, but got `&a`. Remove it."),
        ("seed=\x1b[31m", "--set seed=?[31m  seed: only printable characters may stand here"),
        (
            "trial.steps.more=1",
            (
                "--set trial.steps.more=1  trial.steps.more: cannot be set: 50 stands "
                "where `more` "
                "would be a key of it."
            ),
        ),
        (
            "start_with.3.precision=fp16",
            (
                "--set start_with.3.precision=fp16  start_with[3].precision: cannot be "
                "set: the list "
                "has no item 3, it counts from 0."
            ),
        ),
        (
            "fixed.precision=fp16",
            (
                "x.yaml:11:3  space.precision: a setting varies or is fixed, but `fixed` "
                "has it too "
                "(--set fixed.precision=fp16). Remove one."
            ),
        ),
    ],
)
def test_a_wrong_override_is_reported_as_the_option(
    load_text: Load, valid: str, option: str, head: str
) -> None:
    found = heads(refused(load_text, valid, option))
    assert len(found) == 1
    assert found[0].startswith(head), found


def test_excerpts_are_short_and_inert(load_text: Load) -> None:
    text = MINIMAL + "name: [" + "x" * 500 + "]\t# \x1b[31m\n"
    assert "\x1b" not in str(refused(load_text, text))
    wide = MINIMAL + "report: {targets: {" + "x" * 500 + ": low}}\n"
    excerpt = refused(load_text, wide).problems[0].excerpt
    source, caret = excerpt.split("\n")
    assert len(source) <= 108
    assert source[caret.index("^") :].startswith("low")


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        (
            "prune: {control: 1.5}",
            "3:18  prune.control: `control <= 1` must hold, but got 1.5. Give 1 or less.",
        ),
        (
            "search: {resources: {gpu: 1.5}}",
            (
                "3:27  search.resources.gpu: a whole number, or a share of one GPU from 0.01 on, "
                "is required, but got 1.5."
            ),
        ),
        (
            "search: {resources: {gpu: 0.001}}",
            (
                "3:27  search.resources.gpu: a whole number, or a share of one GPU from 0.01 on, "
                "is required, but got 0.001."
            ),
        ),
        (
            "search: {resources: {accelerator: 'H100, A100'}}",
            (
                "3:35  search.resources.accelerator: the name of a GPU model, such as H100, is "
                "required, but got 'H100, A100'."
            ),
        ),
        (
            "search: {resources: {gpu: 0, accelerator: H100}}",
            (
                "3:43  search.resources.accelerator: trials on a GPU model need `gpu > 0`, but "
                "got 'H100' with gpu=0. Remove one of them."
            ),
        ),
        (
            "search: {resources: {custom: {GPU: 1}}}",
            (
                "3:31  search.resources.custom.GPU: a name such as `fast_disk` is required, but "
                "got 'GPU'. Cores and GPUs have keys of their own."
            ),
        ),
        (
            "search: {resources: {custom: {'a b': 1}}}",
            (
                "3:31  search.resources.custom.a b: a name such as `fast_disk` is required, but "
                "got 'a b'."
            ),
        ),
        (
            "search: {resources: {custom: {disk: 1.5}}}",
            (
                "3:37  search.resources.custom.disk: a whole number, or a part of one, is "
                "required, but got 1.5."
            ),
        ),
        (
            "search: {resources: {custom: {disk: 0}}}",
            "3:37  search.resources.custom.disk: `disk > 0` must hold, but got 0.",
        ),
        (
            "search: {resources: {labels: {po ol: spot}}}",
            (
                "3:31  search.resources.labels.po ol: a name such as `pool` or "
                "`example.com/pool` is required, but got 'po ol'."
            ),
        ),
        (
            "search: {resources: {labels: {pool: [spot, 3]}}}",
            (
                "3:37  search.resources.labels.pool: a word of letters, digits, `_`, `-` and `.`, "
                "or a list of such words, is required, but got a list."
            ),
        ),
    ],
)
def test_shares_and_gpus_out_of_range_are_refused_with_their_place(
    block: str, problem: str, load_text: Load
) -> None:
    assert heads(refused(load_text, f"{MINIMAL}{block}\n")) == [f"x.yaml:{problem}"]
