"""Latent caches: one row of C + R numbers a token and layer, in pages.

A row holds the normalised latent, then the rotated key (first all first members of the rotary
pairs, then all second ones; see `layers/rope.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jax_mla.arrays import as_array, as_int32, check_dtype
from jax_mla.checks import check_positive
from jax_mla.config import DeepSeekConfig

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


def capacity(cache: LatentCache | PagedLatentCache) -> int:
    """The most tokens that one sequence can hold."""
    return cache.page_table.shape[1] * cache.pages.shape[2]


def cache_specs(
    spec: Callable[..., PartitionSpec],
) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """Of a paged cache's fields: sequences and their pages are split alike, and the pages of each
    sequence over `context`."""
    return spec(None, ("context", "batch"), None, None), spec("batch"), spec("batch", None)


def renumber(cache: PagedLatentCache, axes: tuple[str, ...]) -> PagedLatentCache:
    """Page numbers of the whole pool to those of a device's own share; others are out of range.

    Inside of shard_map, where `axes` split the pages.
    """
    if not axes:
        return cache
    first_page = jax.lax.axis_index(axes) * cache.pages.shape[1]
    return dataclasses.replace(cache, page_table=cache.page_table - first_page)


def own_tokens(
    cache: LatentCache | PagedLatentCache, axes: tuple[str, ...]
) -> LatentCache | PagedLatentCache:
    """A renumbered cache as if it held nothing but the tokens on this device, one behind the other.

    Inside of shard_map, where `axes` split the pages of each sequence.
    """
    if not axes:
        return cache
    num_shares, rank = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    padding = -cache.page_table.shape[1] % num_shares  # columns that no token of a length is in
    table = jnp.pad(cache.page_table, ((0, 0), (0, padding)))
    table = table.reshape(len(table), -1, num_shares)
    lengths = own_lengths(cache.lengths, cache.pages.shape[2], num_shares, rank)
    table = jax.lax.dynamic_index_in_dim(table, rank, axis=2, keepdims=False)
    return PagedLatentCache(cache.pages, lengths, table)


def own_lengths(
    lengths: Int[Array, " B"], page_size: int, num_shares: int, rank: int | Int[Array, ""]
) -> Int[Array, " B"]:
    """How many of the first lengths[b] tokens are in pages rank, rank + num_shares, ..."""
    num_full, rest = lengths // page_size, lengths % page_size
    own_full = (num_full - rank + num_shares - 1) // num_shares
    return own_full * page_size + jnp.where(num_full % num_shares == rank, rest, 0)


def layer_pages(
    cache: LatentCache | PagedLatentCache, layer: int | Array
) -> tuple[Float[Array, "num_pages page_size X"], Int[Array, "B max_pages"]]:
    """All layers' pages as one pool, and the table of one layer in it. Copies nothing."""
    num_layers, num_pages, page_size, width = cache.pages.shape
    pool = cache.pages.reshape(num_layers * num_pages, page_size, width)
    return pool, cache.page_table + layer * num_pages


def append(
    cache: Cache, layer: int | Array, rows: Float[Array, "B T X"], num_new: Int[Array, " B"]
) -> Cache:
    """Writes the first `num_new[b]` of T rows behind the cached ones of sequence b.

    Lengths stay as they are until `advance`, because all layers append at the same place. Rows
    beyond the capacity, and rows whose table entry names no page, are dropped.
    """
    num_layers, num_pages, page_size, width = cache.pages.shape
    table = cache.page_table
    step = jnp.arange(rows.shape[1], dtype=jnp.int32)[None, :]
    position = cache.lengths[:, None] + step
    slot = jnp.minimum(position // page_size, table.shape[1] - 1)
    page = jnp.take_along_axis(table, slot, axis=1)
    is_kept = (step < num_new[:, None]) & (position < table.shape[1] * page_size)
    is_kept &= (page >= 0) & (page < num_pages)
    row = (layer * num_pages + page) * page_size + position % page_size
    pages_end = num_layers * num_pages * page_size  # out of range: dropped
    row = jnp.where(is_kept, row, pages_end)
    if rows.shape[:2] == (1, 1):
        # XLA turns a scatter of one row into an update for which its CPU backend copies the cache.
        row = jnp.concatenate([row, jnp.full_like(row, pages_end)], axis=1)
        rows = jnp.concatenate([rows, rows], axis=1)
    flat = cache.pages.reshape(-1, width).at[row].set(rows.astype(cache.pages.dtype), mode="drop")
    return dataclasses.replace(cache, pages=flat.reshape(cache.pages.shape))


def advance(cache: Cache, num_new: Int[Array, " B"] | Bool[Array, " B"]) -> Cache:
    """Counts the rows that `append` was given, whether or not there was room for them."""
    return dataclasses.replace(cache, lengths=cache.lengths + num_new.astype(jnp.int32))
