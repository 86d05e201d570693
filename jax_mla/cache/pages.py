"""Pages of a latent cache: capacity, one layer's pages, appending rows, changing lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from jax_mla.cache.latent import Cache
from jax_mla.checks.arrays import as_array


def capacity(cache: Cache) -> int:
    """The most tokens that one sequence can hold."""
    return cache.page_table.shape[1] * cache.pages.shape[2]


def layer_pages(
    cache: Cache, layer: int | Int[Array, ""]
) -> tuple[Float[Array, "all_pages page_size X"], Int[Array, "B max_pages"]]:
    """All layers' pages as one pool, and the table of one layer in it. Copies nothing."""
    num_layers, num_pages, page_size, width = cache.pages.shape
    pool = cache.pages.reshape(num_layers * num_pages, page_size, width)
    return pool, cache.page_table + layer * num_pages


def append(
    cache: Cache,
    layer: int | Int[Array, ""],
    rows: Float[Array, "B T X"],
    num_new: Int[Array, " B"],
) -> Cache:
    """Writes the first `num_new[b]` of T rows after the cached ones of sequence b.

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
    """Advances lengths by num_new, including rows that `append` dropped because the cache was full.

    The passes of `DeepSeek` append and leave the lengths; `prefill` and `decode_step` advance them.
    """
    return dataclasses.replace(cache, lengths=cache.lengths + num_new.astype(jnp.int32))


def truncate(cache: Cache, lengths: Integer[Array | np.ndarray, " B"] | Sequence[int]) -> Cache:
    """Forgets all but the first `lengths[b]` tokens of every sequence b, as after a rejected draft.

    A sequence that holds no more keeps its length; a length below 0 counts as 0. Rows stay where
    they are until they are written over, and are never read. No length is read back from the
    device, so this works inside and outside of jit alike.

    Raises:
      ValueError: lengths are not one integer per sequence.
    """
    lengths = as_array("lengths", lengths)
    if lengths.shape != cache.lengths.shape:
        raise ValueError(
            f"lengths must be Int[B] for the {cache.lengths.shape[0]} sequences of the cache, got "
            f"shape {lengths.shape}"
        )
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths must be integers, got dtype {lengths.dtype}")
    kept = jnp.clip(jnp.asarray(lengths, jnp.int32), 0, cache.lengths)
    return dataclasses.replace(cache, lengths=kept)
