"""What the guards cost: a guarded step against plain PyTorch with clipping.

    PYTHONPATH=. python tests/benchmarks/bench_step.py [--steps 150] [--threads 1]

Both train the same two-layer transformer of width 128, a step of the one after a step of the
other, so that a busy machine slows both. The plain loop clips, reads its loss once a step, and
scales the loss in fp16. The budget is 1.05; a number above it on a busy machine says little.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from stability_search.engine import GuardedEngine
from stability_search.settings import EngineSettings

BUDGET = 1.05
WIDTH, LENGTH, BATCH, VOCABULARY = 128, 32, 16, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Batch = tuple[torch.Tensor, torch.Tensor]
Step = Callable[[Batch], None]


class Language(nn.Module):
    """Two transformer layers between an embedding and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.1, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embedding(tokens)))


def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
    tokens, targets = batch
    return F.cross_entropy(model(tokens).float().flatten(0, 1), targets.flatten())


def build() -> Language:
    torch.manual_seed(0)
    return Language()


def guarded_step(settings: EngineSettings) -> Step:
    engine = GuardedEngine(build(), settings)

    def step(batch: Batch) -> None:
        record = engine.step([batch], loss_fn)
        if not record.is_applied:
            raise SystemExit(f"the benchmark must take healthy steps, but: {record.reason}")

    return step


def plain_step(settings: EngineSettings) -> Step:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, fused=True)
    is_scaled = settings.precision == "fp16"
    scaler = torch.amp.GradScaler("cpu", init_scale=settings.init_scale, enabled=is_scaled)
    dtype, is_low = DTYPES[settings.precision], settings.precision != "fp32"

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype if is_low else torch.bfloat16, enabled=is_low):
            loss = loss_fn(model, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm or 1.0)
        scaler.step(optimizer)
        scaler.update()
        loss.item()

    return step


def measure(steps: dict[str, Step], num_steps: int) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(1)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(num_steps + 10):
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
        batch = (tokens[:, :-1], tokens[:, 1:])
        order = list(steps) if number % 2 else list(steps)[::-1]
        for name in order:
            started = time.perf_counter()
            steps[name](batch)
            if number >= 10:  # the first ones make states and caches
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    print(
        f"torch {torch.__version__}, {platform.machine()}, {arguments.threads} thread(s), {today}"
    )
    for precision in DTYPES:
        settings = EngineSettings(
            learning_rate=1e-3,
            precision=precision,  # type: ignore[arg-type]
            clip_norm=1.0,
            init_scale=1024.0,
            fp16_on_cpu="native",
        )
        found = measure(
            {"plain": plain_step(settings), "guarded": guarded_step(settings)}, arguments.steps
        )
        plain, guarded = (statistics.median(found[name]) for name in ("plain", "guarded"))
        paired = statistics.median(
            g / p for g, p in zip(found["guarded"], found["plain"], strict=True)
        )
        verdict = "within" if paired <= BUDGET else "OVER"
        print(
            f"{precision}: plain {plain * 1e3:.2f} ms, guarded {guarded * 1e3:.2f} ms, "
            f"ratio {paired:.3f} ({verdict} the budget of {BUDGET})"
        )


if __name__ == "__main__":
    main()
