"""The two latent caches, dense and paged: one row of C + R numbers per token and layer, in pages.

A row holds the normalised latent, then the rotated key (first all first members of the rotary
pairs, then all second ones; see `layers/rope.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Integer

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
      num_shards: size of the context-parallel axes (`ShardingRules.context`). Page j of a sequence
        is stored on shard j % num_shards; each shard's pages are contiguous.
    """

    pages: Float[Array, "L num_pages page_size X"]
    lengths: Int[Array, " B"]
    num_shards: int = dataclasses.field(default=1, metadata={"static": True})

    @classmethod
    def empty(
        cls,
        config: DeepSeekConfig,
        batch: int,
        max_tokens: int,
        *,
        dtype: DTypeLike | None = None,
        page_size: int = DEFAULT_PAGE_SIZE,
        num_shards: int = 1,
    ) -> LatentCache:
        """A cache of no tokens.

        Args:
          max_tokens: longest sequence, prompt and continuation together.
          dtype: of the rows, float32, bfloat16 or float16; None takes config.dtype.
          num_shards: number of context-parallel shards; every sequence gets the same number of
            pages on each.

        Raises:
          ValueError: a size is not positive, or the dtype is another one.

        Cost: L * B * max_tokens * (C + R) numbers of memory.
        """
        sizes = {"batch": batch, "max_tokens": max_tokens, "page_size": page_size}
        check_positive(**_without_open(sizes), num_shards=num_shards)
        each = num_shards * -(-max_tokens // (page_size * num_shards))
        pages = _zero_pages(config, batch * each, page_size, dtype)
        return cls(pages, jnp.zeros(batch, jnp.int32), num_shards)

    @property
    def page_table(self) -> Int[Array, "B max_pages"]:
        return _counting_table(self.lengths.shape[0], self.pages.shape[1], self.num_shards)


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
        dtype: DTypeLike | None = None,
        num_shards: int = 1,
    ) -> PagedLatentCache:
        """A cache of no tokens whose pages are assigned to the sequences in order.

        Args:
          num_pages: pages in the pool. Every sequence gets the same number of them on each shard;
            what is left over stays unused.
          batch: sequences.
          dtype: of the rows, float32, bfloat16 or float16; None takes config.dtype.
          num_shards: number of context-parallel shards, see `LatentCache`.

        Raises:
          ValueError: the pool has fewer pages than sequences on a shard, a size is not positive, or
            the dtype is another one.

        Cost: L * num_pages * page_size * (C + R) numbers of memory.
        """
        sizes = {"num_pages": num_pages, "page_size": page_size, "batch": batch}
        check_positive(**_without_open(sizes), num_shards=num_shards)
        if num_pages < batch * num_shards:
            shards = f" and num_shards={num_shards}" if num_shards > 1 else ""
            raise ValueError(
                f"num_pages must be at least {batch * num_shards}, one page per sequence and shard "
                f"for batch={batch}{shards}, got {num_pages}"
            )
        return cls(
            _zero_pages(config, num_pages, page_size, dtype),
            jnp.zeros(batch, jnp.int32),
            _counting_table(batch, num_pages, num_shards),
        )

    @classmethod
    def with_table(
        cls,
        config: DeepSeekConfig,
        page_table: Integer[Array | np.ndarray, "B max_pages"] | Sequence[Sequence[int]],
        *,
        num_pages: int,
        page_size: int = DEFAULT_PAGE_SIZE,
        dtype: DTypeLike | None = None,
    ) -> PagedLatentCache:
        """A cache of no tokens that uses the pages of a table of one's own.

        Args:
          page_table: row b names the pages of sequence b. Under context parallelism column j must
            name pages of shard j % num_shards.
          num_pages: pages in the pool.
          dtype: as in `empty`.

        Raises:
          ValueError: the page table is not [B, max_pages] of integers that fit into 32 bits, a size
            is not positive, or the dtype is another one.
        """
        check_positive(num_pages=num_pages, page_size=page_size)
        table = as_array("page_table", page_table)
        if table.ndim != 2 or 0 in table.shape:
            raise ValueError(
                f"page_table must be Int[B max_pages], none of them 0, got shape {table.shape}"
            )
        table = as_int32("page_table", table)
        lengths = jnp.zeros(table.shape[0], jnp.int32)
        return cls(_zero_pages(config, num_pages, page_size, dtype), lengths, table)


Cache: TypeAlias = LatentCache | PagedLatentCache


def _without_open(sizes: dict[str, Any]) -> dict[str, Any]:
    """Without the sizes that `jax.export` leaves open, which are positive by its own rules."""
    return {name: size for name, size in sizes.items() if not is_symbolic_dim(size)}


def _zero_pages(
    config: DeepSeekConfig, num_pages: int, page_size: int, dtype: DTypeLike | None
) -> jax.Array:
    shape = (config.num_hidden_layers, num_pages, page_size, config.cache_row_dim)
    return jnp.zeros(shape, check_dtype(config.dtype if dtype is None else dtype))


def _counting_table(batch: int, num_pages: int, num_shards: int) -> Int[Array, "B max_pages"]:
    """Assigns pages in order, the same number per sequence and shard; remainders stay unused."""
    each = num_pages // (batch * num_shards)
    table = jnp.arange(num_shards * (num_pages // num_shards), dtype=jnp.int32)
    table = table.reshape(num_shards, -1)[:, : batch * each].reshape(num_shards, batch, each)
    return table.transpose(1, 2, 0).reshape(batch, each * num_shards)
