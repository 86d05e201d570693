"""A latent cache on a mesh: how its pages are sharded, and one device's view of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from jax_mla.cache.latent import Cache, PagedLatentCache


def cache_specs(
    spec: Callable[..., PartitionSpec],
) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """Of pages, lengths and page table: sequences and their pages are sharded by `batch`, the pages
    of each sequence by `context`."""
    return spec(None, ("context", "batch"), None, None), spec("batch"), spec("batch", None)


def renumber(cache: PagedLatentCache, axes: tuple[str, ...]) -> PagedLatentCache:
    """Page numbers of the whole pool to those of this device's shard; others are out of range.

    Inside of shard_map, where `axes` shard the pages.
    """
    if not axes:
        return cache
    first_page = jax.lax.axis_index(axes) * cache.pages.shape[1]
    return dataclasses.replace(cache, page_table=cache.page_table - first_page)


def own_tokens(cache: Cache, axes: tuple[str, ...]) -> Cache:
    """The local view of a context-sharded cache: this device's pages as one contiguous sequence.

    Inside of shard_map, after `renumber`, where `axes` shard the pages of each sequence.
    """
    if not axes:
        return cache
    num_shards, rank = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    padding = -cache.page_table.shape[1] % num_shards  # columns that no token of a length is in
    table = jnp.pad(cache.page_table, ((0, 0), (0, padding)))
    table = table.reshape(len(table), -1, num_shards)
    lengths = own_lengths(cache.lengths, cache.pages.shape[2], num_shards, rank)
    table = jax.lax.dynamic_index_in_dim(table, rank, axis=2, keepdims=False)
    return PagedLatentCache(cache.pages, lengths, table)


def own_lengths(
    lengths: Int[Array, " B"], page_size: int, num_shards: int, rank: int | Int[Array, ""]
) -> Int[Array, " B"]:
    """How many of the first lengths[b] tokens are in pages rank, rank + num_shards, ..."""
    num_full, rest = lengths // page_size, lengths % page_size
    own_full = (num_full - rank + num_shards - 1) // num_shards
    return own_full * page_size + jnp.where(num_full % num_shards == rank, rest, 0)
