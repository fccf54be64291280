"""Every column of the three tables: its type, its unit and what it means.

In `trials` and `configurations` one column per setting stands after these, named like the setting
and typed by its values; then, in `trials`, `metric_NAME_first` and `metric_NAME_last` for each
metric of the task. Null means not measured, not finite, or, for a setting, off or inactive.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Dtype: TypeAlias = Literal["string", "Int64", "Float64", "boolean"]
TableName: TypeAlias = Literal["trials", "configurations", "steps"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One declared column.

    Attributes:
        table: The table it belongs to.
        name: Its name, the same in every file.
        dtype: Its nullable pandas type.
        unit: Its unit or range; empty for text and identifiers.
        meaning: What it says.
    """

    table: TableName
    name: str
    dtype: Dtype
    unit: str
    meaning: str


def _columns(table: TableName, lines: str) -> tuple[Column, ...]:
    """Read `name | dtype | unit | meaning` lines, a column each; indented lines go on."""
    columns = []
    for line in lines.strip().replace("\n    ", " ").splitlines():
        name, dtype, unit, meaning = (part.strip() for part in line.split("|"))
        if dtype not in ("string", "Int64", "Float64", "boolean"):
            raise AssertionError(f"{table}.{name}: no such type: {dtype}")
        columns.append(
            Column(table=table, name=name, dtype=dtype, unit=unit, meaning=meaning)  # type: ignore[arg-type]
        )
    return tuple(columns)


_TRIALS = """
trial_id | string | | Made from stage, index, seed and rung; unique together with `attempt`.
stage | string | | `pilot`, `search` or `confirm`.
index | Int64 | >= 0 | Position among the trials of its stage, in the order they were proposed.
attempt | Int64 | >= 1 | 1, or more after an `infrastructure` end.
config_id | string | | Hash of the active settings, the learning rate included.
candidate_id | string | | The `config_id` whose ladder it belongs to; null outside confirm.
octave | Int64 | doublings | Of the learning rate from the candidate's, negative below; null
    outside confirm.
seed | Int64 | | Seed of the trial.
seed_index | Int64 | >= 0 | Position of that seed among the stage's seeds.
is_control | boolean | | True if the trial was killed but let run on, to judge the kill rule; all
    but the next three columns and the times are as of the kill.
control_outcome | string | | How that run ended; null if the trial is not one of the control.
control_q | Float64 | [0, 1] | Run score of that run as a whole; null likewise, or where its end
    says nothing about stability.
control_num_steps | Int64 | steps | Attempted steps of that run, those before the kill included.
started_at | string | UTC, ISO 8601 | When the trial started, by the study's clock: when it
    heard of that, or `wall_s` before it heard of the end, whichever is earlier.
node | string | | Host that ran it.
fingerprint | string | | Short hash of what can change its numbers there: versions, CPU, GPU, the
    task's files; `environment.json` says what it stands for.
device | string | | `cpu`, or the name of the GPU.
fp16_kind | string | | How fp16 was computed: `emulated` or `native` on a CPU, `cuda` on a GPU;
    null in another precision.
outcome | string | | How the trial ended.
reason | string | | Why, as a short phrase; empty for `completed`.
stopped_before_refit | boolean | | True if the trial `diverged` by another Delta than the final
    one; the stop stands. Null unless it diverged.
is_stable | boolean | | `completed` with q >= 1/2; null where the end says nothing about
    stability.
horizon | Int64 | steps | The horizon T that q and the probes refer to; a pilot trial may run
    beyond it.
q | Float64 | [0, 1] | Run score, higher is better; null where the end says nothing about
    stability.
calm | Float64 | [0, 1] | Factor A: few bad steps.
smooth | Float64 | [0, 1] | Factor B: few lasting spikes.
kept | Float64 | [0, 1] | Factor C: keeps what it gained.
progress | Float64 | [0, 1] | Factor P: how far it came on the study's yardstick.
num_spikes | Int64 | steps | Steps of lasting spikes.
probe_first | Float64 | loss | Probe loss before the first step.
probe_last | Float64 | loss | Last probe level E_T: median of the last three probes of the
    horizon; null if it did not get there finite.
num_planned_steps | Int64 | steps | Steps the trial was to take.
num_steps | Int64 | steps | Attempted steps.
num_judged_steps | Int64 | steps | `ok` and `bad` steps.
num_bad_steps | Int64 | steps | `bad` steps.
num_calibration_steps | Int64 | steps | Overflows of a benign loss-scale search.
num_data_steps | Int64 | steps | Steps whose batch was at fault.
first_bad_step | Int64 | step | First `bad` step, from 1; null if there was none.
first_nonfinite_module | string | | Module that first turned finite values non-finite at the
    first bad step.
first_nonfinite_phase | string | | `forward`, `loss`, `backward` or `update`, of the first bad
    step.
last_finite_max | Float64 | | Largest absolute value that went into that module, or came back to it
    as a gradient, while all was finite.
is_first_bad_transient | boolean | | True if the first bad step's fault did not show again on the
    same inputs; null where nobody looked.
evidence | Float64 | >= 0 | E_t of the kill rule after the last judged step; kills at
    1/`prune.false_kill`.
final_scale | Float64 | | Loss scale at the end; null without loss scaling.
grad_norm_median | Float64 | L2 norm | Median finite gradient norm before clipping.
grad_norm_max | Float64 | L2 norm | Largest finite gradient norm before clipping.
clip_frac | Float64 | [0, 1] | Share of applied updates that were clipped; null without clipping.
attention_max | Float64 | logit | Largest attention logit seen, before cap and mask; for fused
    attention without a cap a bound on it, up to a few times larger.
clamp_frac | Float64 | [0, 1] | Share of attention outputs outside the clamp, before it acted.
cap_frac | Float64 | [0, 1] | Share of attention logits beyond the cap, before it acted.
update_ratio | Float64 | >= 0 | Median RMS of an update over RMS of its weights; typical 1e-3.
zero_grad_frac | Float64 | [0, 1] | Mean share of exact zeros in the gradients of weight matrices.
grad_rms_over_eps | Float64 | >= 0 | Median over steps of the smallest RMS of a weight matrix's
    gradient, after clipping, over Adam's `eps`.
overflow_rate | Float64 | [0, 1] | Gradient overflows per step after the loss scale was found,
    `data` steps left out; null without loss scaling or before it was.
alarms | string | | Which alarms rose and how often, for example `grad_norm 3, stale_epochs 1`.
are_parameters_finite | boolean | | False if a parameter ended NaN or infinite.
told_value | Float64 | [0, 1] | What the sampler was told; null outside search or where told as
    failed.
error_type | string | | Exception type of a `user_error` or `infrastructure` end.
error_place | string | | `file:line` that raised it.
warnings | string | | What a reader of the row must know, sentences separated by a space.
peak_memory_mib | Float64 | MiB | Largest resident (CPU) or allocated (GPU) memory seen.
train_s | Float64 | s | Time spent in training steps.
wall_s | Float64 | s | Time from the trial's start to its end, by the clock of its worker.
"""

_CONFIGURATIONS = """
config_id | string | | Hash of the active settings, the learning rate included.
role | string | | `choice`, `tied`, `closest`, `confirmed` (had all seeds), `rung` (part of a
    ladder), `search` or `pilot`: the first that applies.
is_fastest | boolean | | True for the configuration with the lowest last probe among those that
    meet the bar.
score | Float64 | [0, 100] | Stability score S-v1, higher is better; null before confirm.
q_lower | Float64 | [0, 1] | Q, a lower bound on the mean run score over seeds.
mean_margin | Float64 | [0, 1] | M, mean run score over the rungs above.
margin_octaves | Int64 | doublings | Doublings of the learning rate it survives.
margin_is_capped | boolean | | True if no higher rung was tried: the margin is at least this.
calm | Float64 | [0, 1] | Mean factor A over its seeds.
smooth | Float64 | [0, 1] | Mean factor B over its seeds.
kept | Float64 | [0, 1] | Mean factor C over its seeds.
progress | Float64 | [0, 1] | Mean factor P over its seeds.
num_seeds | Int64 | seeds | Seeds it was confirmed on.
num_completed | Int64 | seeds | Seeds that ran to the end.
num_stable_seeds | Int64 | seeds | Seeds that ran to the end with q >= 1/2.
ceiling | Float64 | [0, 100] | Largest score possible with that many seeds.
num_planned_steps | Int64 | steps | Horizon of its confirmation.
num_judged_steps | Int64 | steps | `ok` and `bad` steps over all seeds.
num_bad_steps | Int64 | steps | `bad` steps over all seeds.
bad_rate_bound | Float64 | [0, 1] | The rate of bad steps is at most this at 95 % confidence, if
    steps are independent.
probe_last | Float64 | loss | Mean last probe level E_T over its seeds.
meets_bar | boolean | | True if every seed completed with q >= 1/2 and the margin is large
    enough.
missed | string | | What it missed of the bar, in plain words; empty if it meets it.
search_q | Float64 | [0, 1] | Run score of its search trial; null if it was not part of the
    search.
"""

_STEPS = """
trial_id | string | | The trial it is a step of.
attempt | Int64 | >= 1 | The attempt of that trial.
step | Int64 | >= 1 | Attempted step of the trial.
label | string | | `ok`, `calibration`, `bad` or `data`.
reason | string | | Why, as a short phrase; empty for `ok`.
loss | Float64 | loss | Mean over all micro-batches before the update; null if any was not finite.
is_loss_finite | boolean | | False if the loss of any micro-batch was NaN or infinite.
grad_norm | Float64 | L2 norm | Of the unscaled gradients before clipping; null if not finite or
    if no backward pass ran.
is_grad_finite | boolean | | False if a backward pass gave NaN or infinity.
clipped | boolean | | True if clipping made the gradient smaller.
is_applied | boolean | | True if the optimizer changed the parameters.
learning_rate | Float64 | >= 0 | The rate of this step, after warm-up and schedule.
scale | Float64 | | Loss scale the step ran with; null without loss scaling.
attention_max | Float64 | logit | Largest attention logit of the step, before cap and mask, of the
    first attention; for fused attention without a cap a bound on it, up to a few times larger.
clamp_frac | Float64 | [0, 1] | Share of attention outputs outside the clamp, before it acted.
cap_frac | Float64 | [0, 1] | Share of attention logits beyond the cap, before it acted.
batch_index | Int64 | >= 0 | Place in the trial's stream of the first micro-batch at fault; null if
    none was.
first_nonfinite_module | string | | Module that first turned finite values non-finite; null if none
    did.
first_nonfinite_phase | string | | `forward`, `loss`, `backward` or `update`; null likewise.
last_finite_max | Float64 | | Largest absolute value that went into that module or loss, or came
    back to it as a gradient, while all was finite.
is_transient | boolean | | True if the fault did not show again on the same inputs; null where
    nobody looked.
update_ratio | Float64 | >= 0 | RMS of the update over RMS of the weights, of one weight matrix, in
    every fourth step the next; null in the others.
zero_grad_frac | Float64 | [0, 1] | Share of exact zeros in the gradient of the same matrix; null
    likewise.
grad_rms_over_eps | Float64 | >= 0 | Smallest RMS of a weight matrix's gradient, after clipping,
    over Adam's `eps`; null likewise.
loss_terms | string | JSON | Named terms of the loss, a mean over the micro-batches each; `{}`
    where they have no names.
evidence | Float64 | >= 0 | E_t of the kill rule after this step; kills at 1/`prune.false_kill`.
step_s | Float64 | s | Wall-clock time of the step.
"""

COLUMNS: tuple[Column, ...] = (
    *_columns("trials", _TRIALS),
    *_columns("configurations", _CONFIGURATIONS),
    *_columns("steps", _STEPS),
)

RESERVED_NAMES: frozenset[str] = frozenset(c.name for c in COLUMNS if c.table != "steps")
"""Names that no setting of a task may have: they are columns of the table it would stand in."""


def as_markdown() -> str:
    """Return the columns of each table as Markdown, as they stand in `report/README.md`."""
    lines = []
    for table in get_args(TableName):
        lines += [
            f"### `{table}`",
            "",
            "| column | type | unit or range | meaning |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| `{c.name}` | {c.dtype} | {c.unit} | {c.meaning} |"
            for c in COLUMNS
            if c.table == table
        ]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"
