"""Whether a cache fits a model, a batch and a mesh, checked before any device work."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_mla.cache.latent import LatentCache, PagedLatentCache
from jax_mla.cache.pages import capacity
from jax_mla.checks.arrays import concrete
from jax_mla.checks.tokens import check_rope
from jax_mla.config.model import DTYPES, DeepSeekConfig
from jax_mla.sharding.placement import Placement


def check_cache(
    cache: LatentCache | PagedLatentCache,
    config: DeepSeekConfig,
    num_new,
    *,
    batch=None,
    placement: Placement | None = None,
) -> None:
    """The cache is of this model and batch and has room for `num_new` tokens of each sequence."""
    _check_fields(cache)
    layers, num_pages, page_size, width = cache.pages.shape
    if layers != config.num_hidden_layers or width != config.cache_row_dim:
        raise ValueError(
            f"the cache has {layers} layers of {width} numbers a token, the config "
            f"{config.num_hidden_layers} of {config.cache_row_dim}"
        )
    batch = np.shape(num_new)[0] if batch is None else batch
    if cache.lengths.shape[0] != batch:
        raise ValueError(f"the cache holds {cache.lengths.shape[0]} sequences, tokens have {batch}")
    num_shares, shards = _cache_shares(cache, placement)
    if num_pages % (num_shares * shards):
        raise ValueError(
            f"a cache of {num_pages} pages cannot be split over {num_shares * shards} devices"
        )
    old, new, table = (concrete(x) for x in (cache.lengths, num_new, cache.page_table))
    if old is None or new is None or table is None:
        check_rope(capacity(cache), config)
        return
    if old.min() < 0:
        raise ValueError(f"cache.lengths must be at least 0, got {old.min()}")
    needed = np.where(new > 0, old + new, 0)
    if (longest := needed.max()) > capacity(cache):
        row = needed.argmax()
        raise ValueError(
            f"sequence {row} would hold {longest} tokens, the cache has room for {capacity(cache)}"
        )
    check_rope(int(longest), config)
    _check_pages(table, num_pages, -(-needed // page_size), num_shares, shards)
    if isinstance(cache, PagedLatentCache):  # a dense cache's table counts
        _check_written(table, old // page_size, -(-(old + new) // page_size), new > 0)


def _cache_shares(cache, placement: Placement | None) -> tuple[int, int]:
    """Devices that split the pages of every sequence, and devices that split the sequences."""
    if placement is None:
        return 1, 1
    num_shares = placement.num_shards("context")
    if isinstance(cache, LatentCache) and cache.num_shares != num_shares:
        raise ValueError(
            f"the cache is numbered for num_shares={cache.num_shares}, the rules split it over "
            f"{num_shares} devices (context={placement.rules.context!r})"
        )
    return num_shares, placement.num_shards("batch")


def _check_fields(cache: LatentCache | PagedLatentCache) -> None:
    """Every field is an array of its own axes and dtype, and all are of one batch."""
    if not isinstance(cache, LatentCache | PagedLatentCache):
        raise ValueError(f"the cache must be a latent cache, got {type(cache).__name__}")
    for field in dataclasses.fields(cache):
        if field.name == "num_shares":
            continue
        name, array = f"cache.{field.name}", getattr(cache, field.name)
        if not isinstance(array, jax.Array | np.ndarray):
            raise ValueError(f"{name} must be an array, got {array!r:.60}")
        axes = {"pages": 4, "lengths": 1, "page_table": 2}[field.name]
        if array.ndim != axes or 0 in array.shape:
            raise ValueError(f"{name} must have {axes} axes, none empty, got shape {array.shape}")
        if field.name == "pages" and array.dtype.name not in DTYPES:
            raise ValueError(f"{name} has dtype {array.dtype}, not one of {', '.join(DTYPES)}")
        if field.name != "pages" and not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, got dtype {array.dtype}")
    batch, num_pages = cache.lengths.shape[0], cache.pages.shape[1]
    if isinstance(cache, LatentCache):
        if num_pages % (batch * cache.num_shares):
            shares = f" in {cache.num_shares} shares" if cache.num_shares > 1 else ""
            raise ValueError(
                f"{num_pages} pages cannot be a dense cache of {batch} sequences{shares}"
            )
    elif (rows := cache.page_table.shape[0]) != batch:
        raise ValueError(f"cache.page_table has {rows} rows, cache.lengths {batch}")


def _check_pages(
    table: np.ndarray, num_pages: int, num_used: np.ndarray, num_shares: int, shards: int
) -> None:
    """The first `num_used` entries of each row name pages, on the device that the entry is for."""
    slot = np.arange(table.shape[1])[None, :]
    is_used = slot < num_used[:, None]
    bad = is_used & ((table < 0) | (table >= num_pages))
    if bad.any():
        row, at = np.argwhere(bad)[0]
        raise ValueError(
            f"page_table[{row}, {at}] is {table[row, at]}, the cache has {num_pages} pages"
        )
    row = np.arange(len(table))[:, None]
    device = slot % num_shares * shards + row * shards // len(table)
    each = num_pages // (num_shares * shards)
    bad = is_used & (table // each != device)
    if bad.any():
        row, at = np.argwhere(bad)[0]
        begin = device[row, at] * each
        what = f"sequence {row} is" if num_shares == 1 else f"entry {at} of sequence {row} is"
        raise ValueError(
            f"page_table[{row}, {at}] is {table[row, at]}, {what} on devices that hold pages "
            f"{begin} to {begin + each - 1}"
        )


def _check_written(
    table: np.ndarray, first: np.ndarray, end: np.ndarray, is_new: np.ndarray | np.bool_
) -> None:
    """A page that will be written is in use once: sequences may share only what they read."""
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
            f"page_table[{row}, {slot}] and page_table[{other[0]}, {other[1]}] are both page "
            f"{page}, which would be written; only pages that are full may be shared"
        )


def longest(cache: LatentCache | PagedLatentCache) -> int | None:
    """Tokens of the longest sequence in the cache, or None where they cannot be seen."""
    lengths = concrete(cache.lengths)
    return None if lengths is None else int(lengths.max())
