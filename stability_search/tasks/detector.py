"""The built-in task `detector`: boxes and classes of digits, and a loss of six named terms.

`stability_search/tasks/README.md` explains which of them goes NaN, and what its clamps can cure.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from stability_search.tasks import detector_losses as losses
from stability_search.tasks.detector_baseline import constant_losses
from stability_search.tasks.detector_model import (
    NUM_BINS,
    Detections,
    DetectorNetwork,
    cell_centers,
    cells_of,
    edge_distances,
)
from stability_search.tasks.scene_files import read_scenes
from stability_search.tasks.scenes import SceneBatch, SceneData, collate, misfits, read_digits

BoxClamp = Literal["none", "iou", "delta", "loss", "all"]
CpeClamp = Literal["none", "similarity", "exponentials", "loss", "all"]
CpePrecision = Literal["trial", "fp32"]

PROBE_BATCHES = 8
PROBE_BATCH_SIZE = 8
BOX_WEIGHT, CLASS_WEIGHT = 7.5, 0.5  # of the probe loss, whatever the loss weighs
_SMALLER_HIDDEN = 16
_BOX_CLAMPS = {"iou": "iou", "delta": "delta", "loss": "box_loss"}
_CPE_CLAMPS = {"similarity": "similarity", "exponentials": "exponential", "loss": "cpe_loss"}


class Detector:
    """A convolutional detector whose loss is a sum of named terms, each with weight and switch.

    Args:
        hidden: Channels of the deeper convolutions, an even number, at least 2. Fewer is cheaper.
        box_weight: Weight of the box loss (WIoU), finite and > 0, as all weights.
        class_weight: Weight of the class loss.
        contrastive_weight: Weight of the supervised contrastive term.
        cpe_weight: Weight of the contrastive embedding term.
        triplet_weight: Weight of the triplet term.
        distribution_focal_weight: Weight of the distribution-focal term.
        use_box: False leaves the term out, as all switches do.
        use_class: The same for the class loss.
        use_contrastive: The same for the supervised contrastive term.
        use_cpe: The same for `cpe`, which overflows in fp16 where two embeddings are alike.
        use_triplet: The same for the triplet term.
        use_distribution_focal: The same for the distribution-focal term; off unless asked for.
        class_clamp: True clamps class logits to [-10, 10].
        box_clamp: Which values of the box loss are clamped: `iou`, its `delta`, the `loss`,
            `all` of them or `none`.
        cpe_clamp: Which values of `cpe` are clamped: `similarity` from above, `exponentials`,
            the `loss` of each object, `all` of them or `none`.
        cpe_precision: `trial` computes the exponentials of `cpe` in the trial's precision, as the
            team did; in `fp32` they cannot overflow.
        data_dir: Folder of your own scenes, see `scene_files.read_scenes`; None draws digits.

    Raises:
        ValueError: An argument is out of its range, belongs to a term that is off, or `data_dir`
            cannot be used.
    """

    def __init__(  # noqa: PLR0913 - each is a setting that a space file may name
        self,
        *,
        hidden: int = 32,
        box_weight: float = 7.5,
        class_weight: float = 0.5,
        contrastive_weight: float = 1.0,
        cpe_weight: float = 0.5,
        triplet_weight: float = 0.2,
        distribution_focal_weight: float = 1.5,
        use_box: bool = True,
        use_class: bool = True,
        use_contrastive: bool = True,
        use_cpe: bool = True,
        use_triplet: bool = True,
        use_distribution_focal: bool = False,
        class_clamp: bool = False,
        box_clamp: BoxClamp = "none",
        cpe_clamp: CpeClamp = "none",
        cpe_precision: CpePrecision = "trial",
        data_dir: str | None = None,
    ) -> None:
        is_hidden = type(hidden) is int and hidden >= 2 and hidden % 2 == 0  # noqa: PLR2004
        _require("an even number, at least 2", "hidden", hidden, holds=is_hidden)
        weights = {
            "box": (box_weight, use_box),
            "class": (class_weight, use_class),
            "contrastive": (contrastive_weight, use_contrastive),
            "cpe": (cpe_weight, use_cpe),
            "triplet": (triplet_weight, use_triplet),
            "distribution_focal": (distribution_focal_weight, use_distribution_focal),
        }
        for name, (weight, _) in weights.items():
            _require("finite and > 0", f"{name}_weight", weight, holds=0 < weight < math.inf)
        self._weights = {name: weight for name, (weight, is_used) in weights.items() if is_used}
        rule = "at least one of use_box, use_class, ... true"
        _require(rule, "use_*", "all false", holds=bool(self._weights))
        _require_one_of("box_clamp", box_clamp, get_args(BoxClamp))
        _require_one_of("cpe_clamp", cpe_clamp, get_args(CpeClamp))
        _require_one_of("cpe_precision", cpe_precision, get_args(CpePrecision))
        _require_term("box", use_box, box_clamp=box_clamp != "none")
        _require_term("class", use_class, class_clamp=class_clamp)
        _require_term(
            "cpe", use_cpe, cpe_clamp=cpe_clamp != "none", cpe_precision=cpe_precision != "trial"
        )
        clamped = {"class_logit"} if class_clamp else set()
        clamped |= _chosen(box_clamp, _BOX_CLAMPS) | _chosen(cpe_clamp, _CPE_CLAMPS)
        self._bound = losses.clamping(clamped)
        self._is_cpe_in_fp32 = cpe_precision == "fp32"
        self._hidden = hidden
        self._data = read_digits() if data_dir is None else read_scenes(Path(data_dir).resolve())
        self._probe = _probe(self._data)

    def model(self) -> DetectorNetwork:
        """Build the untrained network from the global random state."""
        return DetectorNetwork(
            hidden=self._hidden,
            num_channels=self._data.num_channels,
            num_classes=self._data.num_classes,
            reach=self._data.reach,
        )

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[SceneBatch]:
        """Yield batches of freshly drawn training scenes without end."""
        while True:
            yield collate([self._data.train.draw(generator) for _ in range(batch_size)])

    def probe(self) -> Sequence[SceneBatch]:
        """Return the held-out batches."""
        return self._probe

    def loss(self, model: nn.Module, batch: SceneBatch) -> dict[str, Tensor]:
        """Compute the weighted terms that are switched on, by name."""
        terms = self._terms(model(batch.images), batch, set(self._weights), self._bound)
        return {name: self._weights[name] * term for name, term in terms.items()}

    def probe_loss(self, model: nn.Module, batch: SceneBatch) -> Tensor:
        """Compute 7.5 times the box loss and 0.5 times the class loss, without any clamp.

        What a detector is for: the same whatever terms, weights and clamps it is trained with.
        """
        free = losses.clamping(frozenset())
        terms = self._terms(model(batch.images), batch, {"box", "class"}, free)
        return BOX_WEIGHT * terms["box"] + CLASS_WEIGHT * terms["class"]

    def metrics(self, model: nn.Module, batch: SceneBatch) -> dict[str, float]:
        """Measure boxes and classes, and what the clamps have to do.

        Returns:
            `mean_iou` of the boxes, in [0, 1]; `accuracy`, the share of objects whose cell gives
            their class the highest logit; and for each clamp `NAME_clamp_frac`, the share of its
            values that lie beyond it, counted before it acts, also where it is off.
        """
        fracs = dict.fromkeys(losses.LIMITS, 0.0)
        with torch.no_grad():
            found: Detections = model(batch.images)
            counting = losses.counting(self._bound, fracs)
            self._terms(found, batch, {"box", "class", "cpe"}, counting)
            there = found.at(cells_of(batch.boxes, batch.scenes, batch.images))
            overlap = losses.iou(there.boxes, batch.boxes)
            is_right = (there.class_logits.argmax(dim=1) == batch.labels).float()
        return {
            "mean_iou": losses.mean_over_objects(overlap).item(),
            "accuracy": losses.mean_over_objects(is_right).item(),
            **{f"{name}_clamp_frac": frac for name, frac in fracs.items()},
        }

    def baseline(self) -> float:
        """Return the probe loss of the best box and class that are the same in every cell."""
        box, class_ = constant_losses(self._probe, num_classes=self._data.num_classes)
        return BOX_WEIGHT * box + CLASS_WEIGHT * class_

    def ablations(self) -> dict[str, dict[str, Any]]:
        """Return how to build it smaller; it has no attention to go without."""
        if self._hidden <= _SMALLER_HIDDEN:
            return {}
        return {"smaller_model": {"hidden": _SMALLER_HIDDEN}}

    def check_batch(self, batch: SceneBatch) -> Sequence[str]:
        """Say which boxes are empty or outside their scene, and which labels are no class."""
        return misfits(batch, num_classes=self._data.num_classes)

    def _terms(
        self, found: Detections, batch: SceneBatch, names: AbstractSet[str], bound: losses.Bound
    ) -> dict[str, Tensor]:
        """Compute these terms, not weighted, in the order of the report."""
        cells = cells_of(batch.boxes, batch.scenes, batch.images)
        there = found.at(cells)
        terms: dict[str, Tensor] = {}
        if "box" in names:
            terms["box"] = losses.mean_over_objects(
                losses.wise_iou(there.boxes, batch.boxes, bound)
            )
        if "class" in names:
            wanted = torch.zeros_like(found.class_logits, dtype=torch.float32)
            wanted[cells, batch.labels] = 1
            summed = losses.class_loss(found.class_logits, wanted, bound)
            terms["class"] = summed / max(len(cells), 1)
        terms |= self._embedding_terms(there.embeddings, batch.labels, names, bound)
        if "distribution_focal" in names:
            distances = edge_distances(batch.boxes, cell_centers(cells, batch.images))
            each = losses.distribution_focal(
                there.edge_logits, distances * ((NUM_BINS - 1) / self._data.reach)
            )
            terms["distribution_focal"] = losses.mean_over_objects(each)
        return terms

    def _embedding_terms(
        self, embeddings: Tensor, labels: Tensor, names: AbstractSet[str], bound: losses.Bound
    ) -> dict[str, Tensor]:
        wanted = [name for name in ("contrastive", "cpe", "triplet") if name in names]
        if len(labels) < 2:  # noqa: PLR2004 - a pair
            return dict.fromkeys(wanted, 0 * embeddings.float().sum())
        similar = losses.cosines(embeddings)
        is_same = losses.others(labels.unsqueeze(1) == labels)
        terms: dict[str, Tensor] = {}
        if "contrastive" in names:
            terms["contrastive"] = losses.supervised_contrastive(similar, is_same)
        if "cpe" in names:
            chosen = similar.float() if self._is_cpe_in_fp32 else similar
            terms["cpe"] = losses.cpe(chosen, is_same, bound)
        if "triplet" in names:
            terms["triplet"] = losses.triplet(similar, is_same)
        return terms


def _chosen(choice: str, clamps: Mapping[str, str]) -> set[str]:
    """Return the clamped values that a choice of an argument stands for."""
    if choice == "none":
        return set()
    return set(clamps.values()) if choice == "all" else {clamps[choice]}


def _probe(data: SceneData) -> tuple[SceneBatch, ...]:
    scenes = data.test.held_out(PROBE_BATCHES * PROBE_BATCH_SIZE)
    size = max(1, len(scenes) // PROBE_BATCHES)
    return tuple(collate(scenes[start : start + size]) for start in range(0, len(scenes), size))


def _require(rule: str, name: str, value: object, *, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name}: {rule} must hold, but got {value!r}.")


def _require_term(term: str, is_used: bool, **are_given: bool) -> None:
    """Refuse what would be ignored in silence, because its term is off."""
    rule = f"use_{term}=true (in a space file: when: {{use_{term}: true}})"
    for name, is_given in are_given.items():
        _require(rule, name, f"use_{term}=false", holds=is_used or not is_given)


def _require_one_of(name: str, value: object, choices: Sequence[str]) -> None:
    _require(f"one of {', '.join(choices)}", name, value, holds=value in choices)
