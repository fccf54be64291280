"""Texts to learn tokens from: Python's own documentation, or a folder of UTF-8 files."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stability_search.errors import UsageError
from stability_search.tasks.bpe import BytePairs, learn_byte_pairs

MAX_FOLDER_BYTES = 16 * 1024 * 1024
HELD_OUT_SHARE = 10  # one in so many characters, at the end of each text
MIN_PROBE_CONTEXTS = 8  # held-out tokens, in contexts: fewer would be one text over and over
_MAX_PROBLEMS = 8  # of a folder, named one by one
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_TEXT_END = "\n\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """Pieces of text of one micro-batch.

    Attributes:
        tokens: (batch, context + 1) int64: each token but the last is an input, each but the
            first a target.
        highest: The largest id in it; a plain integer, so that a check needs no transfer.
        num_bytes: Bytes that the targets stand for.
    """

    tokens: Tensor
    highest: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStreams:
    """Texts as tokens, and the tokenizer that was learned from the training part.

    Attributes:
        pairs: The tokenizer.
        train: (tokens,) int64 to train on.
        test: (tokens,) int64 held out.
        sizes: (vocabulary,) int64, bytes of each token.
    """

    pairs: BytePairs
    train: Tensor
    test: Tensor
    sizes: Tensor

    def pieces(self, stream: Tensor, starts: Tensor, context: int) -> TokenBatch:
        """Cut pieces of `context + 1` tokens out of a stream, at (batch,) starts."""
        tokens = stream[starts[:, None] + torch.arange(context + 1)]
        return TokenBatch(
            tokens=tokens,
            highest=int(tokens.max()),
            num_bytes=int(self.sizes[tokens[:, 1:]].sum()),
        )


def tokenize(texts: Sequence[str], *, vocabulary: int, context: int) -> TokenStreams:
    """Split texts, learn a tokenizer from the training part and encode both parts.

    Args:
        texts: At least one; the last tenth of each is held out.
        vocabulary: Tokens of the tokenizer, 256 to 1024.
        context: Tokens of a piece, >= 1.

    Returns:
        Both parts as tokens.

    Raises:
        UsageError: There is too little text for `context`.
    """
    cuts = [len(text) - len(text) // HELD_OUT_SHARE for text in texts]
    parts = (
        _TEXT_END.join(text[:cut] for text, cut in zip(texts, cuts, strict=True)).encode(),
        _TEXT_END.join(text[cut:] for text, cut in zip(texts, cuts, strict=True)).encode(),
    )
    pairs = learn_byte_pairs(parts[0], vocabulary)
    train, test = (torch.from_numpy(pairs.encode(part)).long() for part in parts)
    needed = MIN_PROBE_CONTEXTS * context
    if len(test) < needed or len(train) < needed:
        raise UsageError(
            f"data_dir: {needed} tokens ({MIN_PROBE_CONTEXTS} contexts) in each part must hold, "
            f"but got {len(train)} to train on and {len(test)} held out, from "
            f"{sum(map(len, parts))} bytes. Add text, about {_bytes_needed(parts, test, needed)} "
            f"bytes in all, or lower `context`."
        )
    sizes = torch.tensor([len(spelling) for spelling in pairs.spellings])
    return TokenStreams(pairs=pairs, train=train, test=test, sizes=sizes)


def _bytes_needed(parts: tuple[bytes, bytes], test: Tensor, needed: int) -> int:
    """Guess how much text gives so many held-out tokens, with a tenth to spare."""
    bytes_per_token = len(parts[1]) / max(1, len(test))
    return int(1.1 * HELD_OUT_SHARE * needed * max(1.0, bytes_per_token))


def read_python_documentation() -> tuple[str, ...]:
    """Read the topics of Python's `help()`, which are part of its standard library.

    Returns:
        About 460,000 characters in 80 texts. They differ from one Python to the next, so figures
        are comparable within one version only.

    Raises:
        UsageError: This Python was packaged without them.
    """
    try:
        found = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError) as error:
        raise UsageError(
            "data_dir: a folder must be given, since this Python comes without the text of its "
            f"own documentation ({error}). Put .txt files in UTF-8 there."
        ) from error
    return tuple(text for _, text in sorted(found.items()) if isinstance(text, str))


def read_text_folder(folder: Path) -> tuple[str, ...]:
    """Read a user's own texts.

    Args:
        folder: Holds `*.txt` in UTF-8, in any script; at most 16 MiB together.

    Returns:
        One text a file, in order of names; a byte-order mark is left out.

    Raises:
        UsageError: Names every file that cannot be used, with the byte where it is not UTF-8.
    """
    if not folder.is_dir():
        state = "not a folder" if folder.exists() else "not there"
        raise UsageError(f"data_dir: a folder of .txt files is needed, but {folder} is {state}.")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".txt")
    if not files:
        others = sum(1 for _ in folder.iterdir())
        raise UsageError(
            f"data_dir: {folder} must hold at least one .txt file, but holds none "
            f"({others} other entries). Folders inside it are not searched."
        )
    size = sum(file.stat().st_size for file in files if file.is_file())
    if size > MAX_FOLDER_BYTES:
        raise UsageError(
            f"data_dir: at most {MAX_FOLDER_BYTES // 2**20} MiB of text must hold, but {folder} "
            f"has {size / 2**20:.0f} MiB. Take a sample: a trial of 200 steps reads 0.1 MiB."
        )
    texts: list[str] = []
    problems: list[str] = []
    for file in files:
        try:
            texts.append(_read_text(file))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        hidden = len(problems) - _MAX_PROBLEMS
        shown = "; ".join(problems[:_MAX_PROBLEMS]) + (f"; and {hidden} more" * (hidden > 0))
        raise UsageError(
            f"data_dir: every .txt file must be text in UTF-8, but of {len(files)} in {folder} "
            f"{len(problems)} cannot be used: {shown}."
        )
    return tuple(texts)


def _read_text(file: Path) -> str:
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file.name} cannot be read ({error.strerror})") from error
    if raw.startswith(_UTF16_MARKS):
        raise ValueError(f"{file.name} is UTF-16, by its first two bytes; save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec does not count a byte-order mark that it left out.
        at = error.start + len(raw) - len(error.object)
        byte = f"0x{error.object[error.start]:02x}"
        raise ValueError(f"{file.name} has {byte} at byte {at} ({error.reason})") from error
    if not text.strip():
        raise ValueError(f"{file.name} is empty" if not raw else f"{file.name} is blank")
    return text
