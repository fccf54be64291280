"""Contents of batches and states, hashed so that they can be compared later."""

import dataclasses
import hashlib
import random
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor


def fingerprint(tree: object) -> bytes:
    """Hash a nest of containers, dataclasses, objects, arrays and tensors by content.

    Numbers are compared bit by bit together with their type; where a tensor lies is not.
    """
    digest = hashlib.sha256()
    for leaf in _leaves(tree):
        digest.update(leaf)
    return digest.digest()


def random_state() -> bytes:
    """Fingerprint the three global random states."""
    return fingerprint((torch.get_rng_state(), other_random_state()))


def other_random_state() -> bytes:
    """Fingerprint numpy's and Python's global random states."""
    return fingerprint((np.random.get_state(), random.getstate()))  # noqa: NPY002


def seed_everything(seed: int) -> None:
    """Set the three global random states."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global state is what is under test
    random.seed(seed)


def _leaves(tree: object) -> Iterator[bytes]:
    yield type(tree).__name__.encode()
    if isinstance(tree, Tensor):
        yield from _tensor_leaves(tree.detach().cpu())
    elif isinstance(tree, np.ndarray):
        yield f"{tree.shape}{tree.dtype}".encode()
        yield tree.tobytes()
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(key)
            yield from _leaves(value)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _leaves(item)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from _leaves(getattr(tree, field.name))
    elif hasattr(tree, "__dict__"):
        yield from _leaves(vars(tree))
    else:
        yield repr(tree).encode()


def _tensor_leaves(tensor: Tensor) -> Iterator[bytes]:
    yield f"{tuple(tensor.shape)}{tensor.dtype}{tensor.layout}".encode()
    for part in _dense_parts(tensor):
        # A conjugate is the original with a mark: its memory alone would be equal.
        plain = part.resolve_conj().resolve_neg().contiguous().flatten()
        yield plain.view(torch.uint8).numpy().tobytes()  # as bytes, for numpy has no bf16


def _dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return what a tensor consists of: itself, or places and values of a sparse one."""
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return tensor.indices(), tensor.values()
    if tensor.layout in {torch.sparse_csr, torch.sparse_bsr}:
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in {torch.sparse_csc, torch.sparse_bsc}:
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)
