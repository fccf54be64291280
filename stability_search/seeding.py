"""One study seed becomes every other seed."""

import hashlib

SEED_BITS = 63  # torch and numpy both take any non-negative 63-bit integer


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Derive the seed for one purpose; other purposes get unrelated seeds.

    Args:
        seed: The parent's seed, any integer.
        purpose: What the new seed is for, for example `("confirm", 2)`.

    Returns:
        A seed in [0, 2**63), the same on every machine and Python version.

    Example:
        >>> derive_seed(0, "search") == derive_seed(0, "search")
        True
        >>> derive_seed(0, "search") == derive_seed(0, "confirm", 0)
        False
    """
    text = "/".join([str(seed), *(f"{type(part).__name__}:{part}" for part in purpose)])
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)
