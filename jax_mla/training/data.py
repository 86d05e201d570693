"""Rows of tokens from files, in an order that a seed and a position fix."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_mla.config.model import DeepSeekConfig
from jax_mla.text import Tokenizer
from jax_mla.training.batch import Batch

_FINGERPRINT_BYTES = 1 << 20
_TOKEN_DTYPES = ("uint16", "uint32")


@dataclasses.dataclass(frozen=True, eq=False)
class TokenRows:
    """Batches of rows cut from files of tokens; every batch depends on its number alone.

    The files, one after another, are cut into rows of `row_tokens`, each beginning with the last
    token of the one before. A row may hold the end of a file, short files and the beginning of
    another, each a segment of its own: tokens see their own file only, and the step from one file
    to the next is not predicted. So every token but the first of each file is predicted once per
    epoch, except for what is left at the end of the last file and fills no row. Each epoch visits
    all rows in an order of its own. A batch may begin in one epoch and end in another.

    Attributes:
      files: one array of ids per file, of any length; memory-mapped arrays are read row by row.
      separator: an id that ends documents within a file: tokens after one do not see those before
        it. None lets every token see all of its file in the row, as DeepSeek-V3 was trained.

    Raises:
      ValueError: a file is not one axis of integers, all together are shorter than a row, the seed
        is negative, or a batch holds an id outside the vocabulary.
    """

    files: Sequence[np.ndarray] = dataclasses.field(repr=False)
    batch_rows: int
    row_tokens: int
    vocab_size: int
    seed: int = 0
    separator: int | None = None

    def __post_init__(self) -> None:
        for file in [self.files] if isinstance(self.files, np.ndarray) else self.files:
            kind = f"{getattr(file, 'dtype', type(file).__name__)} of shape {np.shape(file)}"
            if self.files is file or not isinstance(file, np.ndarray) or file.ndim != 1:
                raise ValueError(f"files must be a list of arrays of one axis, got {kind}")
            if not np.issubdtype(file.dtype, np.integer):
                raise ValueError(f"a file must hold token ids, which are integers, got {kind}")
        if self.batch_rows < 1 or self.row_tokens < 2:
            raise ValueError(
                f"a batch needs at least 1 row of 2 tokens, got {self.batch_rows} rows of "
                f"{self.row_tokens}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if not self.num_rows:
            raise ValueError(
                f"a row needs {self.row_tokens} tokens, all files together have {self.total_tokens}"
            )

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """Where each file starts if all are laid end to end, and where the last one ends."""
        return np.cumsum([0, *map(len, self.files)])

    @property
    def total_tokens(self) -> int:
        """Tokens of all files."""
        return int(self._starts[-1])

    @property
    def num_rows(self) -> int:
        """Rows in one epoch."""
        return max(self.total_tokens - 1, 0) // (self.row_tokens - 1)

    @property
    def num_tokens(self) -> int:
        """Tokens that are predicted in one epoch, before the separator leaves out any."""
        end = self.num_rows * (self.row_tokens - 1)
        starts = np.unique(self._starts[:-1])
        return end - int(((0 < starts) & (starts <= end)).sum())

    @property
    def batch_tokens(self) -> int:
        """Tokens of one batch."""
        return self.batch_rows * self.row_tokens

    def seen_tokens(self, num_batches: int) -> int:
        """Tokens of the files that the first num_batches batches hold, each counted once."""
        count = min(num_batches * self.batch_rows, self.num_rows)
        rows = np.sort(_order(self.seed, 0, self.num_rows)[:count])
        # A row shares its first token with the row before it.
        num_shared = int((np.diff(rows) == 1).sum())
        return count * self.row_tokens - num_shared

    def batch(self, index: int) -> Batch:
        """Batch number `index` of the run, from 0 on, in host memory."""
        first = index * self.batch_rows
        rows = [self._row(self._row_number(first + i)) for i in range(self.batch_rows)]
        tokens = np.stack([row for row, _ in rows])
        for worst in (tokens.min(), tokens.max()):
            if not 0 <= worst < self.vocab_size:
                raise ValueError(f"token id {worst} is outside the vocabulary of {self.vocab_size}")
        tokens = tokens.astype(np.int32)
        if self.separator is None and len(self.files) == 1:
            return Batch(tokens)
        # All batches have segment ids or none: a second kind would compile the step again.
        begins = np.stack([begins for _, begins in rows])
        if self.separator is not None:
            begins[:, 1:] |= tokens[:, :-1] == self.separator
        return Batch(tokens, np.cumsum(begins, axis=1, dtype=np.int32))

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a position in one data set to mean the same in another."""
        return {
            "seed": self.seed,
            "batch_rows": self.batch_rows,
            "row_tokens": self.row_tokens,
            "separator": self.separator,
            "files": [
                {"tokens": len(file), "sha256_of_both_ends": _ends(file)} for file in self.files
            ],
        }

    def _row_number(self, position: int) -> int:
        epoch, within = divmod(position, self.num_rows)
        return int(_order(self.seed, epoch, self.num_rows)[within])

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a row, and which of them begin a file; the first one is never marked."""
        start = number * (self.row_tokens - 1)
        end = start + self.row_tokens
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, end, side="left"))
        pieces = [
            self.files[i][max(start - int(self._starts[i]), 0) : end - int(self._starts[i])]
            for i in range(first, last)
        ]
        begins = np.zeros(self.row_tokens, bool)
        begins[self._starts[first + 1 : last] - start] = True
        return np.concatenate(pieces), begins


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def _order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def _ends(file: np.ndarray) -> str:
    count = _FINGERPRINT_BYTES // file.dtype.itemsize
    ends = (file[:count], file[max(len(file) - count, 0) :])
    return hashlib.sha256(b"".join(np.ascontiguousarray(end).tobytes() for end in ends)).hexdigest()


def read_tokens(path: Path, config: DeepSeekConfig, tokenizer: Tokenizer | None) -> np.ndarray:
    """The ids of one file: `.npy` files of uint16 or uint32 are mapped, others are text.

    A text file is one document: the tokenizer's ids of it, and the end token. All of its characters
    count, carriage returns included.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a `.npy` file holds something else, a text is not UTF-8, or a text comes without a
        tokenizer.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    if path.suffix == ".npy":
        return _mapped(path)
    if tokenizer is None:
        raise ValueError(f"{path} is text, which needs a tokenizer; token files end in .npy")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is neither UTF-8 text nor a .npy file: {error}") from None
    ids = [*tokenizer.encode(text), *config.eos_token_id[:1]]
    return np.array(ids, np.uint32)


def _mapped(path: Path) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a .npy file of tokens: {error}") from None
    if ids.ndim != 1 or ids.dtype.name not in _TOKEN_DTYPES:
        raise ValueError(
            f"{path} holds {ids.dtype.name} of shape {ids.shape}, tokens are one axis of "
            f"{' or '.join(_TOKEN_DTYPES)}"
        )
    return ids
