"""A configuration as text to copy: YAML, `GuardedEngine`, PyTorch, `TrainingArguments`."""

import json
import re
from collections.abc import Mapping
from typing import Any

from stability_search.settings.engine import ENGINE_SETTING_NAMES, EngineSettings

Settings = Mapping[str, Any]

_PLAIN_YAML = re.compile(r"^[A-Za-z_][A-Za-z0-9_./-]*$")
_RESERVED_YAML = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})
_FIRST_LONG_ESCAPE = 0x10000
_DEFAULTS = EngineSettings(learning_rate=1.0)
_BATCH = frozenset({"batch_size", "accumulation_steps"})  # every form has them
_WITHOUT_PLAIN_LINE = {
    "attention_clamp": "clamp the attention output in your model",
    "attention_logit_cap": "wrap the logits in stability_search.cap_logits(logits, cap)",
    "attention_precision": "run attention outside autocast in your model",
    "norm": "replace BatchNorm by GroupNorm(8 groups) in your model",
    "max_scale": "GradScaler has no upper bound; GuardedEngine has",
    "init_gain": "multiply the initial weight matrices",
    "gradient_checkpointing": "call torch.utils.checkpoint in your model",
}


def yaml_value(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """Return a JSON value as YAML 1.2 on one line; text that could be read otherwise is quoted."""
    if isinstance(value, str):
        is_plain = _PLAIN_YAML.match(value) and value.lower() not in _RESERVED_YAML
        return value if is_plain else _quoted(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(yaml_value(item) for item in value)}]"
    return json.dumps(value, allow_nan=False)


def as_yaml(settings: Settings) -> str:
    """Return settings as the `fixed` block of a space file."""
    lines = [f"  {yaml_value(name)}: {yaml_value(value)}" for name, value in settings.items()]
    return "\n".join(["fixed:", *lines])


def as_guarded_engine(settings: Settings) -> str:
    """Return a configuration as a call of the public engine."""
    arguments = [
        f"    {name}={tuple(value) if isinstance(value, list) else value!a},"
        for name, value in settings.items()
        if name in ENGINE_SETTING_NAMES and value is not None
    ]
    others = {
        name: value
        for name, value in settings.items()
        if name not in ENGINE_SETTING_NAMES and value is not None
    }
    note = [f"# {ascii(name)[1:-1]}: {value!a}" for name, value in others.items()]
    return "\n".join(
        [
            "from stability_search import EngineSettings, GuardedEngine",
            "",
            "settings = EngineSettings(",
            *arguments,
            "    num_planned_steps=num_steps,  # of your run: a schedule ends there",
            ")",
            "engine = GuardedEngine(model, settings)",
            "record = engine.step(micro_batches, loss_fn)  # once per optimizer step",
            *(["", "# not the engine's, set them in your own code:", *note] if note else []),
        ]
    )


def as_pytorch(settings: Settings, device: str) -> str:
    """Return a configuration as lines of a plain PyTorch loop.

    Args:
        settings: Every setting of the configuration.
        device: `cpu`, or the name of a GPU.
    """
    get = _getter(settings)
    kind = "cpu" if device == "cpu" else "cuda"
    windows = int(get("accumulation_steps") or 1)
    scaled = get("precision") == "fp16"
    lines = [_optimizer_line(get)]
    if scaled:
        lines.append(
            f'scaler = torch.amp.GradScaler("{kind}", init_scale={get("init_scale")!r}, '
            f"growth_interval={get('growth_interval')!r})"
        )
    if get("warmup_steps") or get("schedule") != "constant":
        lines.append(f"# warm up over {get('warmup_steps')!r} steps, then {get('schedule')}")
    lines += [
        "",
        f"for micro_batch in window:  # {windows} of batch size {get('batch_size') or 16}",
    ]
    forward = "loss = loss_fn(model, micro_batch)" + (f" / {windows}" if windows > 1 else "")
    if get("precision") == "fp32":
        lines.append(f"    {forward}")
    else:
        dtype = "bfloat16" if get("precision") == "bf16" else "float16"
        lines += [f'    with torch.autocast("{kind}", dtype=torch.{dtype}):', f"        {forward}"]
    lines.append(f"    {'scaler.scale(loss)' if scaled else 'loss'}.backward()")
    lines += ["scaler.unscale_(optimizer)  # before clipping, once per window"] if scaled else []
    if get("clip_norm") is not None:
        lines.append(f"torch.nn.utils.clip_grad_norm_(model.parameters(), {get('clip_norm')!r})")
    lines += ["scaler.step(optimizer)", "scaler.update()"] if scaled else ["optimizer.step()"]
    lines.append("optimizer.zero_grad()")
    return "\n".join([*lines, *_missing_lines(settings, frozenset())])


def as_training_arguments(settings: Settings) -> str:
    """Return a configuration as Hugging Face `TrainingArguments`.

    Off is written out where the Trainer's own default differs: no clipping is 0.0 there.
    """
    get = _getter(settings)
    decay = get("weight_decay")
    default_decay = 0.01 if get("optimizer") == "adamw" else 0.0
    schedule = get("schedule")
    if schedule == "constant" and get("warmup_steps"):
        schedule = "constant_with_warmup"
    values = {
        "learning_rate": get("learning_rate"),
        "optim": "sgd" if get("optimizer") == "sgd" else "adamw_torch",
        "weight_decay": default_decay if decay is None else decay,
        "adam_beta1": get("beta1"),
        "adam_beta2": get("beta2"),
        "adam_epsilon": get("eps"),
        "lr_scheduler_type": schedule,
        "warmup_steps": get("warmup_steps"),
        "per_device_train_batch_size": get("batch_size") or 16,
        "gradient_accumulation_steps": get("accumulation_steps") or 1,
        "max_grad_norm": get("clip_norm") or 0.0,
        "fp16": get("precision") == "fp16",
        "bf16": get("precision") == "bf16",
        # Off is the Trainer's default too, and newer versions warn of the name.
        **({"gradient_checkpointing": True} if get("gradient_checkpointing") else {}),
    }
    lines = [f"    {name}={value!r}," for name, value in values.items()]
    scale = {"init_scale": "the Trainer makes its own GradScaler; pass it a scaler of this scale"}
    notes = _missing_lines(settings, frozenset({"gradient_checkpointing"}), scale)
    return "\n".join(
        ["args = TrainingArguments(", "    output_dir=output_dir,", *lines, ")", *notes]
    )


def _quoted(text: str) -> str:
    """Quote text for YAML in ASCII; JSON's escapes will not do beyond the first 65,536."""
    return "".join(['"', *map(_escaped, text), '"'])


def _escaped(char: str) -> str:
    if char in {'"', "\\"}:
        return f"\\{char}"
    if " " <= char <= "~":
        return char
    code = ord(char)
    return f"\\u{code:04x}" if code < _FIRST_LONG_ESCAPE else f"\\U{code:08x}"


def _getter(settings: Settings) -> Any:  # noqa: ANN401 - a function over mixed values
    def get(name: str) -> Any:  # noqa: ANN401 - a setting has its own type
        value = settings.get(name)
        return getattr(_DEFAULTS, name, None) if value is None else value

    return get


def _optimizer_line(get: Any) -> str:  # noqa: ANN401 - see _getter
    decay = get("weight_decay")
    tail = "" if decay is None else f", weight_decay={decay!r}"
    if get("optimizer") == "sgd":
        rest = f"momentum={get('momentum')!r}"
        name = "SGD"
    else:
        rest = f"betas=({get('beta1')!r}, {get('beta2')!r}), eps={get('eps')!r}"
        name = "Adam" if get("optimizer") == "adam" else "AdamW"
    return (
        f"optimizer = torch.optim.{name}(model.parameters(), "
        f"lr={get('learning_rate')!r}, {rest}{tail})"
    )


def _missing_lines(
    settings: Settings, covered: frozenset[str], more: Mapping[str, str] | None = None
) -> list[str]:
    """Say of every setting that these lines cannot express what to do instead."""
    notes = []
    for name, advice in {**_WITHOUT_PLAIN_LINE, **(more or {})}.items():
        value = settings.get(name)
        is_default = value is None or value == getattr(_DEFAULTS, name, None)
        if not is_default and name not in covered:
            notes.append(f"# {name}={value!a}: {advice}")
    tasks = [
        f"# {ascii(name)[1:-1]}={value!a}: of your task, set it in your own code"
        for name, value in settings.items()
        if name not in ENGINE_SETTING_NAMES and name not in _BATCH and value is not None
    ]
    return [*notes, *tasks]
