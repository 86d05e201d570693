"""Whether a cache fits a model, a batch and a mesh, checked before any device work."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from jax_mla.cache.latent import Cache, LatentCache, PagedLatentCache
from jax_mla.cache.pages import capacity
from jax_mla.checks.arrays import concrete
from jax_mla.checks.sizes import check_one_of
from jax_mla.checks.tokens import check_rope
from jax_mla.config.model import DTYPES, DeepSeekConfig
from jax_mla.sharding.placement import Placement

_NUM_AXES = {"pages": 4, "lengths": 1, "page_table": 2}


class _Shards(NamedTuple):
    """How many shards the rules split each sequence's pages into, and the batch into."""

    context: int
    batch: int


def check_cache(
    cache: Cache,
    config: DeepSeekConfig,
    num_new: int | Int[jax.Array | np.ndarray, " B"],
    *,
    batch: int | None = None,
    placement: Placement | None = None,
    layer: int | Int[jax.Array, ""] | None = None,
) -> None:
    """The cache fits this model and batch and has room for `num_new` tokens per sequence.

    Args:
      batch: number of sequences in the tokens; None takes the length of `num_new`.
      placement: the mesh that the pages are sharded on; None for a single device.
      layer: the one that a single module uses, of a cache of any number of layers; None for all
        layers of the model.

    Lengths and page table are read back from the device; where they are traced, only shapes and
    dtypes are checked, and the rotary embedding for a full cache.
    """
    shards = _Shards(1, 1)
    if placement is not None:
        shards = _Shards(placement.num_shards("context"), placement.num_shards("batch"))
    _check_fields(cache)
    num_layers = config.num_hidden_layers if layer is None else cache.pages.shape[0]
    if isinstance(layer, int) and not 0 <= layer < num_layers:
        raise ValueError(
            f"layer must be from 0 to {num_layers - 1}, those of the cache, got {layer}"
        )
    _check_sizes(cache, config, num_layers, np.shape(num_new)[0] if batch is None else batch)
    _check_shards(cache, shards, placement)
    lengths, new, table = (concrete(x) for x in (cache.lengths, num_new, cache.page_table))
    if lengths is None or new is None or table is None:
        check_rope(capacity(cache), config)
        return
    needed = _check_room(cache, lengths, new)
    check_rope(int(needed.max()), config)
    page_size = cache.pages.shape[2]
    _check_pages(table, cache.pages.shape[1], _num_pages(needed, page_size), shards)
    if isinstance(cache, PagedLatentCache):  # a dense cache uses every page once
        _check_written(table, lengths // page_size, _num_pages(lengths + new, page_size), new > 0)


def longest(cache: Cache) -> int | None:
    """Tokens of the longest sequence in the cache, or None where they cannot be seen."""
    lengths = concrete(cache.lengths)
    return None if lengths is None else int(lengths.max())


def _num_pages(num_tokens: np.ndarray, page_size: int) -> np.ndarray:
    return -(-num_tokens // page_size)


def _check_fields(cache: Cache) -> None:
    """Every field is an array with the right number of axes and kind of dtype."""
    if not isinstance(cache, Cache):
        raise ValueError(f"the cache must be a latent cache, got {type(cache).__name__}")
    for field in dataclasses.fields(cache):
        if field.name not in _NUM_AXES:  # num_shards
            continue
        name, array = f"cache.{field.name}", getattr(cache, field.name)
        if not isinstance(array, jax.Array | np.ndarray):
            raise ValueError(f"{name} must be an array, got {array!r:.60}")
        num_axes = _NUM_AXES[field.name]
        if array.ndim != num_axes or 0 in array.shape:
            raise ValueError(
                f"{name} must have {num_axes} axes, none empty, got shape {array.shape}"
            )
        if field.name == "pages":
            check_one_of("the dtype of cache.pages", array.dtype.name, DTYPES)
        elif not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, got dtype {array.dtype}")


def _check_sizes(cache: Cache, config: DeepSeekConfig, num_layers: int, batch: int) -> None:
    """Row width matches the config, sequences match the batch."""
    found, num_pages, _, width = cache.pages.shape
    if (found, width) != (num_layers, config.cache_row_dim):
        raise ValueError(
            f"the cache must have {num_layers} layers and {config.cache_row_dim} "
            f"numbers per token, as the config, got {found} and {width}"
        )
    num_sequences = cache.lengths.shape[0]
    if isinstance(cache, PagedLatentCache):
        if (num_rows := cache.page_table.shape[0]) != num_sequences:
            raise ValueError(
                f"cache.page_table must have a row for each of {num_sequences} cache.lengths, "
                f"got {num_rows}"
            )
    elif num_pages % (num_sequences * cache.num_shards):
        shards = f" in {cache.num_shards} shards" if cache.num_shards > 1 else ""
        raise ValueError(
            f"the pages of a dense cache of {num_sequences} sequences{shards} must be a multiple "
            f"of {num_sequences * cache.num_shards}, got {num_pages}"
        )
    if num_sequences != batch:
        raise ValueError(
            f"the cache must hold {batch} sequences, as many as the tokens, got {num_sequences}"
        )


def _check_shards(cache: Cache, shards: _Shards, placement: Placement | None) -> None:
    """The pages can be sharded over the mesh."""
    if placement is not None and isinstance(cache, LatentCache):
        if cache.num_shards != shards.context:
            raise ValueError(
                f"num_shards of the cache must be {shards.context} for "
                f"context={placement.rules.context!r}, got {cache.num_shards}"
            )
    num_pages, num_devices = cache.pages.shape[1], shards.context * shards.batch
    if num_pages % num_devices:
        raise ValueError(
            f"the pages of the cache must be a multiple of {num_devices}, the devices that hold "
            f"them, got {num_pages}"
        )


def _check_room(cache: Cache, lengths: np.ndarray, num_new: np.ndarray) -> np.ndarray:
    """Tokens that each sequence will hold, 0 where nothing is appended; checks the capacity."""
    if lengths.min() < 0:
        raise ValueError(f"cache.lengths must be at least 0, got {lengths.min()}")
    needed = np.where(num_new > 0, lengths + num_new, 0)
    if needed.max() > capacity(cache):
        row = needed.argmax()
        raise ValueError(
            f"sequence {row} must fit into the cache, which has room for {capacity(cache)} tokens, "
            f"got {needed[row]}"
        )
    return needed


def _check_pages(table: np.ndarray, num_pages: int, num_used: np.ndarray, shards: _Shards) -> None:
    """The first `num_used` entries of each row name pages, on the device that the entry is for."""
    slot = np.arange(table.shape[1])[None, :]
    is_used = slot < num_used[:, None]
    bad = is_used & ((table < 0) | (table >= num_pages))
    if bad.any():
        row, at = np.argwhere(bad)[0]
        raise ValueError(
            f"page_table[{row}, {at}] must be one of the cache's {num_pages} pages, "
            f"got {table[row, at]}"
        )
    row = np.arange(len(table))[:, None]
    device = slot % shards.context * shards.batch + row * shards.batch // len(table)
    pages_each = num_pages // (shards.context * shards.batch)
    bad = is_used & (table // pages_each != device)
    if bad.any():
        row, at = np.argwhere(bad)[0]
        begin = device[row, at] * pages_each
        what = f"entry {at} of sequence {row}" if shards.context > 1 else f"sequence {row}"
        raise ValueError(
            f"page_table[{row}, {at}] must be one of pages {begin} to {begin + pages_each - 1}, "
            f"on the devices of {what}, got {table[row, at]}"
        )


def _check_written(
    table: np.ndarray, first: np.ndarray, end: np.ndarray, is_new: np.ndarray | np.bool_
) -> None:
    """A page that will be written is in use once: sequences may share only what they read.

    Row b uses its entries [0, end[b]) and, where is_new, writes those from first[b] on.
    """
    slot = np.arange(table.shape[1])[None, :]
    is_used = slot < end[:, None]
    is_written = is_used & (slot >= first[:, None]) & np.reshape(is_new, (-1, 1))
    pages, uses = np.unique(table[is_used], return_counts=True)
    bad = is_written & np.isin(table, pages[uses > 1])
    if bad.any():
        row, slot = np.argwhere(bad)[0]
        page = table[row, slot]
        others = np.argwhere(is_used & (table == page))
        other = next(tuple(at.tolist()) for at in others if tuple(at) != (row, slot))
        raise ValueError(
            f"page_table[{row}, {slot}] and page_table[{other[0]}, {other[1]}] must differ, "
            f"got page {page} twice: it would be written, and only full pages may be shared"
        )
