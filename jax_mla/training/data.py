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
    """Batches of rows cut from long runs of tokens; every batch depends on its number alone.

    A run is cut into rows of `row_tokens`, each beginning with the last token of the one before, so
    that every token but the first is predicted once an epoch; what is left over is not used. Each
    epoch visits all rows in an order of its own. A batch may begin in one epoch and end in another.

    Attributes:
      runs: one array of ids a file; memory-mapped arrays are read row by row.
      separator: an id that ends documents: tokens after one do not see those before it. None lets
        every token see its whole row, as DeepSeek-V3 was trained.

    Raises:
      ValueError: a run is not one axis of integers, none is as long as a row, the seed is
        negative, or a batch holds an id outside the vocabulary.
    """

    runs: Sequence[np.ndarray] = dataclasses.field(repr=False)
    batch_rows: int
    row_tokens: int
    vocab_size: int
    seed: int = 0
    separator: int | None = None

    def __post_init__(self) -> None:
        for run in [self.runs] if isinstance(self.runs, np.ndarray) else self.runs:
            kind = f"{getattr(run, 'dtype', type(run).__name__)} of shape {np.shape(run)}"
            if self.runs is run or not isinstance(run, np.ndarray) or run.ndim != 1:
                raise ValueError(f"runs must be a list of arrays of one axis, got {kind}")
            if not np.issubdtype(run.dtype, np.integer):
                raise ValueError(f"a run must hold token ids, which are integers, got {kind}")
        if self.batch_rows < 1 or self.row_tokens < 2:
            raise ValueError(
                f"a batch needs at least 1 row of 2 tokens, got {self.batch_rows} rows of "
                f"{self.row_tokens}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if not self.num_rows:
            longest = max((len(run) for run in self.runs), default=0)
            raise ValueError(
                f"the longest file has {longest} tokens, a row needs {self.row_tokens}"
            )

    @functools.cached_property
    def _first_rows(self) -> np.ndarray:
        """The number of each run's first row, and that of all rows."""
        stride = self.row_tokens - 1
        return np.cumsum([0, *(max(len(run) - 1, 0) // stride for run in self.runs)])

    @property
    def num_rows(self) -> int:
        """Rows in one epoch."""
        return int(self._first_rows[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens that are predicted in one epoch."""
        return self.num_rows * (self.row_tokens - 1)

    @property
    def batch_tokens(self) -> int:
        """Tokens of one batch."""
        return self.batch_rows * self.row_tokens

    def batch(self, index: int) -> Batch:
        """Batch number `index` of the run, from 0 on, in host memory."""
        first = index * self.batch_rows
        numbers = [self._row_number(first + i) for i in range(self.batch_rows)]
        tokens = np.stack([self._row(number) for number in numbers])
        for worst in (tokens.min(), tokens.max()):
            if not 0 <= worst < self.vocab_size:
                raise ValueError(f"token id {worst} is outside the vocabulary of {self.vocab_size}")
        tokens = tokens.astype(np.int32)
        if self.separator is None:
            return Batch(tokens)
        is_end = tokens[:, :-1] == self.separator
        segment_ids = np.pad(np.cumsum(is_end, axis=1, dtype=np.int32), ((0, 0), (1, 0)))
        return Batch(tokens, segment_ids)

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a position in one data set to mean the same in another."""
        return {
            "seed": self.seed,
            "batch_rows": self.batch_rows,
            "row_tokens": self.row_tokens,
            "separator": self.separator,
            "files": [{"tokens": len(run), "sha256_of_both_ends": _ends(run)} for run in self.runs],
        }

    def _row_number(self, position: int) -> int:
        epoch, within = divmod(position, self.num_rows)
        return int(_order(self.seed, epoch, self.num_rows)[within])

    def _row(self, number: int) -> np.ndarray:
        run = int(np.searchsorted(self._first_rows, number, side="right")) - 1
        start = (number - int(self._first_rows[run])) * (self.row_tokens - 1)
        return np.asarray(self.runs[run][start : start + self.row_tokens])


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def _order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def _ends(run: np.ndarray) -> str:
    count = _FINGERPRINT_BYTES // run.dtype.itemsize
    ends = (run[:count], run[max(len(run) - count, 0) :])
    return hashlib.sha256(b"".join(np.ascontiguousarray(end).tobytes() for end in ends)).hexdigest()


def read_tokens(path: Path, config: DeepSeekConfig, tokenizer: Tokenizer | None) -> np.ndarray:
    """The ids of one file: `.npy` files of uint16 or uint32 are mapped, others are text.

    A text file is one document: the tokenizer's ids of it, and the end token.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a `.npy` file holds something else, a text is not UTF-8, or a text comes without a
        tokenizer.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    if path.suffix == ".npy":
        try:
            run = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is not a .npy file of tokens: {error}") from None
        if run.ndim != 1 or run.dtype.name not in _TOKEN_DTYPES:
            raise ValueError(
                f"{path} holds {run.dtype.name} of shape {run.shape}, tokens are one axis of "
                f"{' or '.join(_TOKEN_DTYPES)}"
            )
        return run
    if tokenizer is None:
        raise ValueError(f"{path} is text, which needs a tokenizer; token files end in .npy")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is neither UTF-8 text nor a .npy file: {error}") from None
    ids = [*tokenizer.encode(text), *config.eos_token_id[:1]]
    return np.array(ids, np.uint32)
