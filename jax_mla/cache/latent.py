"""Latent caches: one row of C + R numbers a token and layer, in pages.

A row holds the normalised latent, then the rotated key (first all first members of the rotary
pairs, then all second ones; see `layers/rope.py`).
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_mla.checks.arrays import as_array, as_int32, check_dtype
from jax_mla.checks.sizes import check_positive
from jax_mla.config.model import DeepSeekConfig

DEFAULT_PAGE_SIZE = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """A dense cache: every sequence owns `max_tokens` rows, rounded up to whole pages.

    It is a paged cache whose table counts 0, 1, 2, ..., so that one decode op serves both.

    Attributes:
      pages: rows of all layers and sequences.
      lengths: tokens in cache.
      num_shares: of the devices that rules.context splits the pages over. Page j of every sequence
        is in share j % num_shares, and the shares lie one behind the other.
    """

    pages: Float[Array, "L num_pages page_size X"]
    lengths: Int[Array, " B"]
    num_shares: int = dataclasses.field(default=1, metadata={"static": True})

    @classmethod
    def empty(
        cls,
        config: DeepSeekConfig,
        batch: int,
        max_tokens: int,
        *,
        dtype: DTypeLike | None = None,
        page_size: int = DEFAULT_PAGE_SIZE,
        num_shares: int = 1,
    ) -> LatentCache:
        """A cache of no tokens.

        Args:
          max_tokens: longest sequence, prompt and continuation together.
          dtype: of the rows, float32, bfloat16 or float16; None takes config.dtype.
          num_shares: devices that are to hold the pages of each sequence between them; a sequence
            gets equally many pages of each.

        Raises:
          ValueError: a size is not positive, or the dtype is another one.

        Cost: L * B * max_tokens * (C + R) numbers of memory.
        """
        check_positive(
            batch=batch, max_tokens=max_tokens, page_size=page_size, num_shares=num_shares
        )
        each = num_shares * -(-max_tokens // (page_size * num_shares))
        pages = _zero_pages(config, batch * each, page_size, dtype)
        return cls(pages, jnp.zeros(batch, jnp.int32), num_shares)

    @property
    def page_table(self) -> Int[Array, "B max_pages"]:
        return _counting_table(self.lengths.shape[0], self.pages.shape[1], self.num_shares)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedLatentCache:
    """A paged cache: the table names the page of each run of `page_size` tokens of a sequence.

    Attributes:
      pages: rows of all layers; any sequence may use any page, and several may share one.
      lengths: tokens in cache.
      page_table: entries beyond the last used page are ignored and may hold anything.
    """

    pages: Float[Array, "L num_pages page_size X"]
    lengths: Int[Array, " B"]
    page_table: Int[Array, "B max_pages"]

    @classmethod
    def empty(
        cls,
        config: DeepSeekConfig,
        num_pages: int,
        page_size: int = DEFAULT_PAGE_SIZE,
        *,
        batch: int = 1,
        page_table: Int[Array, "B max_pages"] | np.ndarray | None = None,
        dtype: DTypeLike | None = None,
        num_shares: int = 1,
    ) -> PagedLatentCache:
        """A cache of no tokens.

        Args:
          num_pages: pages in the pool.
          batch: sequences; ignored when `page_table` is given.
          page_table: None gives every sequence as many of the pool's pages.
          dtype: of the rows, float32, bfloat16 or float16; None takes config.dtype.
          num_shares: of the pool, for rules.context; ignored when `page_table` is given, whose
            column j must name pages of share j % num_shares.

        Raises:
          ValueError: the pool has fewer pages than sequences, a size is not positive, the page
            table is not [B, max_pages] of integers of 32 bits, or the dtype is another one.
        """
        check_positive(num_pages=num_pages, page_size=page_size, batch=batch, num_shares=num_shares)
        if page_table is None:
            if num_pages < batch * num_shares:
                of_shares = f" of each of num_shares={num_shares}" if num_shares > 1 else ""
                raise ValueError(
                    f"num_pages={num_pages} cannot give each of batch={batch} a page{of_shares}"
                )
            page_table = _counting_table(batch, num_pages, num_shares)
        page_table = as_array("page_table", page_table)
        if page_table.ndim != 2 or 0 in page_table.shape:
            raise ValueError(
                f"page_table must have 2 axes [B, max_pages], got shape {page_table.shape}"
            )
        page_table = as_int32("page_table", page_table)
        lengths = jnp.zeros(page_table.shape[0], jnp.int32)
        return cls(_zero_pages(config, num_pages, page_size, dtype), lengths, page_table)


Cache = TypeVar("Cache", LatentCache, PagedLatentCache)


def _zero_pages(
    config: DeepSeekConfig, num_pages: int, page_size: int, dtype: DTypeLike | None
) -> jax.Array:
    shape = (config.num_hidden_layers, num_pages, page_size, config.cache_row_dim)
    return jnp.zeros(shape, check_dtype(config.dtype if dtype is None else dtype))


def _counting_table(batch: int, num_pages: int, num_shares: int) -> Int[Array, "B max_pages"]:
    """Equally many pages of each share for every sequence, as they come; some may be left over."""
    each = num_pages // (batch * num_shares)
    table = jnp.arange(num_shares * (num_pages // num_shares), dtype=jnp.int32)
    table = table.reshape(num_shares, -1)[:, : batch * each].reshape(num_shares, batch, each)
    return table.transpose(1, 2, 0).reshape(batch, each * num_shares)
