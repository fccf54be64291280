"""The built-in task `teacher`: a deep fusion model trained with CTC, the one that goes NaN.

Several sensor streams are projected, run through Inception blocks and fused by attention; CTC
reads the sequence of activities off. `stability_search/tasks/README.md` explains its failures.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from stability_search.tasks.clip_folder import read_folder
from stability_search.tasks.clips import (
    Clip,
    ClipBatch,
    ClipData,
    Units,
    collate,
    draw_clip,
    read_basic_motions,
)
from stability_search.tasks.ctc import (
    constant_prediction_loss,
    greedy_labels,
    num_edits,
    num_frames_needed,
)
from stability_search.tasks.teacher_model import (
    NUM_BRANCHES,
    TIME_STRIDE,
    BlockKind,
    Fusion,
    TeacherNetwork,
    TeacherShape,
    Variant,
    pooled_length,
)

Size = Literal["small", "baseline", "full"]

PROBE_BATCHES = 8
PROBE_BATCH_SIZE = 8
_PROBE_SEED = 20  # any fixed number: the probe is the same for every study


@dataclass(frozen=True, kw_only=True, slots=True)
class _SizeDefaults:
    hidden: int
    heads: int
    blocks: int
    fusion: Fusion
    block_kind: BlockKind


_SIZES: dict[Size, _SizeDefaults] = {
    "small": _SizeDefaults(
        hidden=32, heads=4, blocks=2, fusion="attention", block_kind="inception"
    ),
    "baseline": _SizeDefaults(
        hidden=512, heads=8, blocks=7, fusion="weighted_sum", block_kind="inverted"
    ),
    "full": _SizeDefaults(
        hidden=1024, heads=8, blocks=14, fusion="attention", block_kind="inception"
    ),
}


class Teacher:
    """A fusion model of sensor streams with a CTC loss, in its failing and its cured form.

    Args:
        variant: `original` fuses as the failing script did: the norm after the sum, attention
            weights materialised. `stable` is the cure: the norm before attention, projections
            started small (Xavier gain 0.5, bias zero), attention dropout 0.1, attention output
            clamped to [-10, 10], shortcut from the un-normalised input.
        size: `small` trains in milliseconds a step; `full` has 40 million parameters and more
            than 50 layers; `baseline` has 15 million, MobileNet blocks and no attention. What
            follows overrides its numbers.
        hidden: Width of every stream, a multiple of 4 and of `heads`; None takes the size's
            (32, 512, 1024). Narrower is cheaper and calmer.
        heads: Attention heads, >= 1; None takes the size's (4, 8, 8).
        blocks: Blocks over time, >= 1; None takes the size's (2, 7, 14). Fewer is calmer.
        fusion: `attention`, or `weighted_sum` with no attention at all; None takes the size's.
        dropout: Share of block outputs set to 0 in training, in [0, 1). Raise it against
            overfitting and to calm the gradient.
        attention_dropout: The same for attention weights; None takes the variant's (0 and 0.1).
        input_scale: Factor on every input, finite and > 0. Raise it to provoke overflow.
        raw_units: True leaves the recordings' own units instead of mean 0 and deviation 1.
        nan_frac: Share of training clips with a NaN frame, in [0, 1]; the probe is clean.
        short_frac: Share of training clips too short for their labels, so that CTC gives Inf, in
            [0, 1]; the probe is clean.
        data_dir: Folder of your own clips, see `clip_folder.read_folder`; None takes the
            recordings that come with the package.

    Raises:
        ValueError: An argument is out of its range.
        UsageError: `data_dir` cannot be used; every file at fault is named.
    """

    def __init__(  # noqa: PLR0913 - each is a setting that a space file may name
        self,
        *,
        variant: Variant = "original",
        size: Size = "small",
        hidden: int | None = None,
        heads: int | None = None,
        blocks: int | None = None,
        fusion: Fusion | None = None,
        dropout: float = 0.1,
        attention_dropout: float | None = None,
        input_scale: float = 1.0,
        raw_units: bool = False,
        nan_frac: float = 0.0,
        short_frac: float = 0.0,
        data_dir: str | None = None,
    ) -> None:
        _require_one_of("variant", variant, get_args(Variant))
        _require_one_of("size", size, get_args(Size))
        defaults = _SIZES[size]
        fusion = defaults.fusion if fusion is None else fusion
        _require_one_of("fusion", fusion, get_args(Fusion))
        if fusion != "attention":
            _require_absent_without_attention(heads=heads, attention_dropout=attention_dropout)
        if attention_dropout is None:
            attention_dropout = 0.1 if variant == "stable" else 0.0
        self._shape = TeacherShape(
            variant=variant,
            hidden=defaults.hidden if hidden is None else hidden,
            heads=defaults.heads if heads is None else heads,
            blocks=defaults.blocks if blocks is None else blocks,
            dropout=dropout,
            attention_dropout=attention_dropout,
            fusion=fusion,
            block_kind=defaults.block_kind,
        )
        _check_shape(self._shape)
        _require("finite and > 0", "input_scale", input_scale, holds=0 < input_scale < torch.inf)
        _require("0 <= value <= 1", "nan_frac", nan_frac, holds=0 <= nan_frac <= 1)
        _require("0 <= value <= 1", "short_frac", short_frac, holds=0 <= short_frac <= 1)
        self._nan_frac = nan_frac
        self._short_frac = short_frac
        units = Units(raw_units=raw_units, input_scale=input_scale)
        self._data = (
            read_basic_motions(units)
            if data_dir is None
            else read_folder(Path(data_dir), units, time_stride=TIME_STRIDE)
        )
        self._probe = _probe(self._data)

    def model(self) -> TeacherNetwork:
        """Build the untrained network from the global random state."""
        return TeacherNetwork(
            self._shape,
            stream_sizes=self._data.stream_sizes,
            num_classes=self._num_classes,
        )

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[ClipBatch]:
        """Yield batches of freshly drawn training clips without end."""
        while True:
            yield collate([self._training_clip(generator) for _ in range(batch_size)])

    def probe(self) -> Sequence[ClipBatch]:
        """Return the clean held-out batches."""
        return self._probe

    def loss(self, model: nn.Module, batch: ClipBatch) -> Tensor:
        """Compute the CTC loss, a mean over clips of the loss per label.

        Returns:
            A float32 scalar; infinite where a clip is too short for its labels, on purpose:
            `zero_infinity` would hide bad data.
        """
        log_probs: Tensor = model(batch.frames, batch.padding)
        return F.ctc_loss(
            log_probs.float(),
            batch.labels,
            # Lengths stay on the CPU, where CTC reads them: no transfer.
            torch.tensor([pooled_length(length) for length in batch.frame_lengths]),
            torch.tensor(batch.label_lengths),
            reduction="mean",
            zero_infinity=False,
        )

    def probe_loss(self, model: nn.Module, batch: ClipBatch) -> Tensor:
        """Return `loss`: no setting of this task changes what it measures."""
        return self.loss(model, batch)

    def metrics(self, model: nn.Module, batch: ClipBatch) -> dict[str, float]:
        """Measure the word error rate of greedy decoding.

        Returns:
            `word_error_rate`: edits per label, 0 is perfect; above 1 where more labels are
            invented than there are.
        """
        with torch.no_grad():
            log_probs: Tensor = model(batch.frames, batch.padding)
        best = log_probs.argmax(dim=2).transpose(0, 1).tolist()
        wanted = torch.split(batch.labels.cpu(), list(batch.label_lengths))
        edits = 0
        for path, length, labels in zip(best, batch.frame_lengths, wanted, strict=True):
            said = greedy_labels(path[: pooled_length(length)])
            edits += num_edits(said, labels.tolist())
        return {"word_error_rate": edits / sum(batch.label_lengths)}

    def baseline(self) -> float:
        """Return the probe loss of the best distribution that is the same at every frame."""
        return constant_prediction_loss(
            [
                (tuple(map(pooled_length, batch.frame_lengths)), batch.labels, batch.label_lengths)
                for batch in self._probe
            ],
            num_classes=self._num_classes,
        )

    def init_gain_parameters(self, model: nn.Module) -> list[str]:
        """Name the weights of the stream projections, which the team's cure started smaller."""
        return [
            name
            for name, _ in model.named_parameters()
            if name.startswith("projections.") and name.endswith(".weight")
        ]

    def ablations(self) -> dict[str, dict[str, Any]]:
        """Return the arguments of the teacher without attention, and of a smaller one."""
        changes: dict[str, dict[str, Any]] = {}
        if self._shape.fusion == "attention":
            changes["attention_bypassed"] = {
                "fusion": "weighted_sum",
                "heads": None,
                "attention_dropout": None,
            }
        smaller = _smaller(self._shape)
        if smaller:
            changes["smaller_model"] = smaller
        return changes

    def check_batch(self, batch: ClipBatch) -> Sequence[str]:
        """Return what keeps the labels of a batch from being learned, a sentence a clip."""
        sentences = []
        sequences = torch.split(batch.labels, list(batch.label_lengths))
        for index, (frames, labels) in enumerate(zip(batch.frame_lengths, sequences, strict=True)):
            wanted = labels.tolist()
            needed, given = num_frames_needed(wanted), pooled_length(frames)
            if needed > given:
                sentences.append(
                    f"clip {index}: its {len(wanted)} labels need {needed} frames of the model's "
                    f"output, but its {frames} frames give {given}; the CTC loss is Inf."
                )
            unknown = sorted({label for label in wanted if not 1 <= label <= self._num_classes})
            if unknown:
                sentences.append(
                    f"clip {index}: labels must lie in 1 to {self._num_classes}, but it has "
                    f"{', '.join(map(str, unknown))}."
                )
        return sentences

    @property
    def _num_classes(self) -> int:
        return self._data.num_classes

    def _training_clip(self, generator: torch.Generator) -> Clip:
        clip = draw_clip(self._data.train, generator)
        # Always drawn, so that the clean clips do not depend on the shares of defects.
        nan, place, short = torch.rand(3, generator=generator).tolist()
        frames = clip.frames
        if nan < self._nan_frac:
            frames = frames.clone()
            frames[int(place * len(frames))] = torch.nan
        if short < self._short_frac:
            frames = frames[: max(1, TIME_STRIDE * (len(clip.labels) - 1))]
        return Clip(frames=frames, labels=clip.labels)


def _probe(data: ClipData) -> tuple[ClipBatch, ...]:
    """Draw the probe, or take a user's test clips, spread evenly, as they are."""
    wanted = PROBE_BATCHES * PROBE_BATCH_SIZE
    if data.test.are_joined:
        generator = torch.Generator().manual_seed(_PROBE_SEED)
        clips = [draw_clip(data.test, generator) for _ in range(wanted)]
    else:
        every = max(1, len(data.test.clips) // wanted)
        clips = list(data.test.clips[::every][:wanted])
    size = max(1, len(clips) // PROBE_BATCHES)
    return tuple(collate(clips[start : start + size]) for start in range(0, len(clips), size))


def _smaller(shape: TeacherShape) -> dict[str, Any] | None:
    """Halve the width as the checklist does, with half dropped out; else the depth; else None."""
    step = math.lcm(NUM_BRANCHES, shape.heads if shape.fusion == "attention" else 1)
    hidden = shape.hidden // 2 // step * step
    if hidden:
        return {"hidden": hidden, "dropout": max(shape.dropout, 0.5)}
    return {"blocks": shape.blocks // 2} if shape.blocks > 1 else None


def _check_shape(shape: TeacherShape) -> None:
    for name, low in (("hidden", NUM_BRANCHES), ("heads", 1), ("blocks", 1)):
        value = getattr(shape, name)
        _require(f"an integer >= {low}", name, value, holds=type(value) is int and value >= low)
    for name in ("dropout", "attention_dropout"):
        value = getattr(shape, name)
        _require("0 <= value < 1", name, value, holds=0 <= value < 1)
    divisors = (NUM_BRANCHES, shape.heads) if shape.fusion == "attention" else (NUM_BRANCHES,)
    for divisor in divisors:
        rule = f"a multiple of {divisor} ({NUM_BRANCHES} branches, {shape.heads} heads)"
        _require(rule, "hidden", shape.hidden, holds=shape.hidden % divisor == 0)


def _require(rule: str, name: str, value: object, *, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name}: {rule} must hold, but got {value!r}.")


def _require_one_of(name: str, value: object, choices: Sequence[str]) -> None:
    _require(f"one of {', '.join(choices)}", name, value, holds=value in choices)


def _require_absent_without_attention(**values: float | None) -> None:
    for name, value in values.items():
        rule = "fusion=attention (in a space file: when: {fusion: attention})"
        _require(rule, name, value, holds=value is None)
