"""Byte-pair encoding over raw bytes: learned from a text, and able to write any other.

The first 256 tokens are the bytes themselves, so that no script, and no file, has an unknown
character; each further token is two earlier ones that often stood side by side. Tokenizer packages
do this for gigabytes; for a text of megabytes a merge is one pass of numpy.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[np.int32]

NUM_BYTES = 256
MAX_VOCABULARY = 1024  # pairs are counted in a table of vocabulary squared
_SAMPLE_BYTES = 256 * 1024  # of text that merges are learned from; more finds the same ones
_SAMPLE_PARTS = 16  # spread over the text, which may change its script on the way


@dataclass(frozen=True, kw_only=True)
class BytePairs:
    """A vocabulary of byte strings.

    Attributes:
        merges: The two tokens that each token from 256 on is made of, in order.
    """

    merges: tuple[tuple[int, int], ...]

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return NUM_BYTES + len(self.merges)

    @cached_property
    def spellings(self) -> tuple[bytes, ...]:
        """The bytes of every token."""
        found = [bytes([value]) for value in range(NUM_BYTES)]
        for left, right in self.merges:
            found.append(found[left] + found[right])
        return tuple(found)

    def encode(self, text: bytes) -> TokenArray:
        """Turn bytes into tokens.

        Args:
            text: Any bytes; 3 MiB take a second.

        Returns:
            Token ids (tokens,) int32, all below `vocabulary`.

        Example:
            >>> BytePairs(merges=((97, 98), (256, 99))).encode(b"abcab").tolist()
            [257, 256]
        """
        tokens = np.frombuffer(text, dtype=np.uint8).astype(np.int32)
        for index, pair in enumerate(self.merges):
            tokens = _merged(tokens, pair, NUM_BYTES + index)
        return tokens

    def decode(self, tokens: TokenArray) -> bytes:
        """Return the bytes that tokens were made from; a character may be cut at either end."""
        return b"".join(self.spellings[token] for token in tokens.tolist())


def learn_byte_pairs(text: bytes, vocabulary: int) -> BytePairs:
    """Join the most frequent pair of neighbours, again and again.

    Args:
        text: What to learn from; of a long one, 256 KiB in parts spread over it.
        vocabulary: Tokens wanted, 256 to 1024. More make a token longer and a model larger.

    Returns:
        As many tokens as asked for, or fewer where no pair occurs twice any more. Of equally
        frequent pairs the one of lower ids is taken, so that the result is the same everywhere.

    Source:
        Sennrich, Haddow and Birch 2016, Neural Machine Translation of Rare Words with Subword
        Units, arXiv 1508.07909; over bytes as in Radford et al. 2019 (GPT-2).
    """
    tokens = np.frombuffer(_sample(text), dtype=np.uint8).astype(np.int32)
    merges: list[tuple[int, int]] = []
    for new in range(NUM_BYTES, vocabulary):
        if len(tokens) < 2:  # noqa: PLR2004 - there is no pair
            break
        counts = np.bincount(tokens[:-1] * new + tokens[1:])
        pair = int(counts.argmax())
        if counts[pair] < 2:  # noqa: PLR2004 - seen once: nothing is gained
            break
        left, right = divmod(pair, new)
        merges.append((left, right))
        tokens = _merged(tokens, (left, right), new)
    return BytePairs(merges=tuple(merges))


def _sample(text: bytes) -> bytes:
    if len(text) <= _SAMPLE_BYTES:
        return text
    every, size = len(text) // _SAMPLE_PARTS, _SAMPLE_BYTES // _SAMPLE_PARTS
    return b"".join(text[part * every :][:size] for part in range(_SAMPLE_PARTS))


def _merged(tokens: TokenArray, pair: tuple[int, int], new: int) -> TokenArray:
    """Put `new` wherever the pair stands; the input is not changed."""
    left, right = pair
    at = np.flatnonzero((tokens[:-1] == left) & (tokens[1:] == right))
    if not len(at):
        return tokens
    if left == right:
        # In a run of equal tokens pairs overlap: every second one counts, from the run's start.
        is_start = np.diff(at, prepend=-2) != 1
        start_of_run = at[is_start][np.cumsum(is_start) - 1]
        at = at[(at - start_of_run) % 2 == 0]
    joined = tokens.copy()
    joined[at] = new
    return np.delete(joined, at + 1)
