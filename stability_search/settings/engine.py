"""How one optimizer step is taken."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from stability_search.settings.rules import is_positive, require

OptimizerName = Literal["adamw", "adam", "sgd"]
ScheduleName = Literal["constant", "linear", "cosine"]
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """How one optimizer step is taken.

    Attributes:
        learning_rate: Peak learning rate, > 0. The setting that most often decides stability.
        num_planned_steps: Steps until `schedule` reaches 0, >= 1; unused by `constant`.
        optimizer: `adamw`, `adam` or `sgd`.
        weight_decay: >= 0; None takes PyTorch's default (0.01 for adamw, else 0).
        beta1: Adam's first-moment decay, in [0, 1).
        beta2: Adam's second-moment decay, in [0, 1). Lower forgets a gradient spike sooner.
        momentum: Of sgd, in [0, 1).
        eps: Added to Adam's denominator, > 0. Raise it where gradients are near it.
        warmup_steps: Steps over which the rate rises linearly from 0, >= 0.
        schedule: `constant`, or `linear` or `cosine` to 0 over the planned steps.
        precision: `fp32`, or `bf16` or `fp16` by autocast; fp16 scales the loss.
        fp16_on_cpu: `emulated` computes in fp32 and rounds to fp16 operator by operator;
            `native` uses the CPU's own fp16 kernels, 1 to 40 times slower than fp32, by model and
            processor.
        init_scale: First loss scale, >= 1; fp16 only. Below 1 it counts as collapsed.
        growth_interval: Steps without overflow until the scale doubles, >= 1; fp16 only.
        max_scale: Upper bound on the scale, > 0; None for none; fp16 only.
        clip_norm: Largest L2 norm of the gradient, > 0; None turns clipping off.
        attention_clamp: Attention outputs are clamped to [-c, c], c > 0; None is off.
        attention_logit_cap: Logits become c*tanh(logits/c) before the mask, c > 0; None is off.
        attention_precision: `trial`, or `fp32` to run attention outside autocast.
        attention_modules: Glob patterns; empty for every `nn.MultiheadAttention`.
        init_gain: Factor on the initial weight matrices, > 0; 1 changes nothing.
        norm: `keep`, or `group` to turn BatchNorm into GroupNorm.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        bad_microbatch: `skip` goes on without a non-finite micro-batch; `drop` gives up the
            window it belongs to.
        max_bad_steps: End the trial once so many steps were bad, >= 1; None for no limit.
    """

    learning_rate: float
    num_planned_steps: int = 1
    optimizer: OptimizerName = "adamw"
    weight_decay: float | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    momentum: float = 0.0
    eps: float = 1e-8
    warmup_steps: int = 0
    schedule: ScheduleName = "constant"
    precision: Precision = "fp32"
    fp16_on_cpu: Literal["emulated", "native"] = "emulated"
    init_scale: float = 65536.0
    growth_interval: int = 2000
    max_scale: float | None = None
    clip_norm: float | None = None
    attention_clamp: float | None = None
    attention_logit_cap: float | None = None
    attention_precision: Literal["trial", "fp32"] = "trial"
    attention_modules: tuple[str, ...] = ()
    init_gain: float = 1.0
    norm: Literal["keep", "group"] = "keep"
    gradient_checkpointing: bool = False
    bad_microbatch: Literal["skip", "drop"] = "skip"
    max_bad_steps: int | None = None

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            ValueError: Names the setting, the rule and the value received.
        """
        for name, choices in ENGINE_CHOICES.items():
            value = getattr(self, name)
            require(f"one of {', '.join(choices)}", name, value, holds=value in choices)
        for name in (
            "learning_rate",
            "eps",
            "max_scale",
            "clip_norm",
            "attention_clamp",
            "attention_logit_cap",
            "init_gain",
        ):
            value = getattr(self, name)
            require("a finite number > 0", name, value, holds=is_positive(value))
        holds = math.isfinite(self.init_scale) and self.init_scale >= 1
        require("a finite number >= 1", "init_scale", self.init_scale, holds=holds)
        for name in ("beta1", "beta2", "momentum"):
            value = getattr(self, name)
            require("0 <= value < 1", name, value, holds=0 <= value < 1)
        for name, low in (
            ("num_planned_steps", 1),
            ("growth_interval", 1),
            ("warmup_steps", 0),
            ("max_bad_steps", 1),
            ("weight_decay", 0),
        ):
            value = getattr(self, name)
            require(f"value >= {low}", name, value, holds=value is None or value >= low)

    @property
    def has_loss_scaling(self) -> bool:
        """True where the loss is scaled, that is in fp16."""
        return self.precision == "fp16"


ENGINE_CHOICES: Mapping[str, tuple[str, ...]] = {
    "optimizer": ("adamw", "adam", "sgd"),
    "schedule": ("constant", "linear", "cosine"),
    "precision": ("fp32", "bf16", "fp16"),
    "fp16_on_cpu": ("emulated", "native"),
    "attention_precision": ("trial", "fp32"),
    "norm": ("keep", "group"),
    "bad_microbatch": ("skip", "drop"),
}

ENGINE_SETTING_NAMES: tuple[str, ...] = tuple(
    spec.name for spec in dataclasses.fields(EngineSettings) if spec.name != "num_planned_steps"
)
