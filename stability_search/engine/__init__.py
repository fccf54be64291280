"""The guarded engine: one optimizer step, taken safely."""

from stability_search.engine.clamps import cap_logits
from stability_search.engine.step import GuardedEngine

__all__ = ["GuardedEngine", "cap_logits"]
