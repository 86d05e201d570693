"""Checks of what a caller passes in, made before any device work where the values are concrete."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_mla.arrays import as_array, as_int32, concrete
from jax_mla.cache import LatentCache, PagedLatentCache, capacity
from jax_mla.config import DTYPES, DeepSeekConfig
from jax_mla.sharding import Placement


def check_config(config) -> None:
    if not isinstance(config, DeepSeekConfig):
        raise ValueError(f"config must be a DeepSeekConfig, got {type(config).__name__}")


def check_tokens(tokens, config: DeepSeekConfig, *, num_axes: tuple[int, ...] = (2,)) -> jax.Array:
    """Token ids as int32, all of them within the vocabulary."""
    check_config(config)
    tokens = as_array("tokens", tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers, got dtype {tokens.dtype}")
    if tokens.ndim not in num_axes:
        expected = " or ".join("Int[B T]" if n == 2 else "Int[B]" for n in num_axes)
        raise ValueError(f"tokens must be {expected}, got shape {tokens.shape}")
    if tokens.size == 0:
        raise ValueError(f"tokens must hold at least one token, got shape {tokens.shape}")
    if (values := concrete(tokens)) is not None:
        outside = values[(values < 0) | (values >= config.vocab_size)]
        if outside.size:
            raise ValueError(
                f"token id {outside[0]} is outside the vocabulary of {config.vocab_size}"
            )
    if tokens.ndim == 2:
        check_rope(tokens.shape[1], config)
    return as_int32("tokens", tokens)


def check_rope(num_tokens: int, config: DeepSeekConfig) -> None:
    """The rotary frequencies are right for sequences of this length."""
    limit = None if config.rope_scaling is None else config.rope_scaling.max_tokens
    if limit is not None and num_tokens > limit:
        raise ValueError(
            f"longrope computes up to original_max_position_embeddings={limit} tokens a sequence, "
            f"got {num_tokens}; longer ones need its long_factor, which is not supported"
        )


def check_params(params, expected) -> None:
    """The parameters have the names and shapes that the config asks for."""
    found, wanted = (
        {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (params, expected))
    )
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not expected" for name in found if name not in wanted]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"the parameters are not those of the config: {'; '.join(problems[:5])}{more}"
        )


def check_same_shape(tokens: jax.Array, **others) -> None:
    for name, other in others.items():
        if other is not None and np.shape(other) != tokens.shape:
            raise ValueError(f"{name} has shape {np.shape(other)}, tokens have {tokens.shape}")


def check_aligned(tokens: jax.Array, config: DeepSeekConfig, positions, segment_ids):
    """Positions and segment ids as int32, one for every token; None stays None."""
    check_same_shape(tokens, positions=positions, segment_ids=segment_ids)
    if positions is not None:
        positions = as_int32("positions", positions)
        if (values := concrete(positions)) is not None:
            check_rope(int(values.max()) + 1, config)
    return positions, None if segment_ids is None else as_int32("segment_ids", segment_ids)


def check_batch(
    tokens, config: DeepSeekConfig, segment_ids, loss_mask
) -> tuple[jax.Array, jax.Array | None]:
    """Tokens and segment ids of a batch to be trained on, as int32; None stays None."""
    tokens = check_tokens(tokens, config)
    _, segment_ids = check_aligned(tokens, config, None, segment_ids)
    check_same_shape(tokens, loss_mask=loss_mask)
    if loss_mask is not None and (dtype := jnp.result_type(loss_mask)) != np.bool_:
        raise ValueError(f"loss_mask must be true or false, got dtype {dtype}")
    if tokens.shape[1] < 2:
        raise ValueError(
            f"a loss needs at least 2 tokens a row, got tokens of shape {tokens.shape}"
        )
    return tokens, segment_ids


def check_lengths(lengths, tokens: jax.Array) -> jax.Array:
    """Valid tokens of each row; all of them when None."""
    batch, num_tokens = tokens.shape
    if lengths is None:
        return jnp.asarray(np.full(batch, num_tokens, np.int32))
    lengths = as_array("lengths", lengths)
    if lengths.shape != (batch,):
        raise ValueError(
            f"lengths have shape {lengths.shape}, tokens {tokens.shape} need ({batch},)"
        )
    if (values := concrete(lengths)) is not None:
        outside = values[(values < 0) | (values > num_tokens)]
        if outside.size:
            raise ValueError(
                f"length {outside[0]} is not between 0 and the {num_tokens} tokens given"
            )
    return as_int32("lengths", lengths)


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


def check_split(
    tokens: jax.Array, placement: Placement | None, axes: tuple[str, ...] = ("batch", "sequence")
) -> None:
    """Every device of the mesh is given equally many sequences, and positions in equal stripes."""
    if placement is None:
        return
    for axis, size in zip(axes, tokens.shape, strict=False):
        if size % (parts := placement.num_parts(axis)):
            names, shards = "+".join(placement.axes(axis)), placement.num_shards(axis)
            stripes = f"in {parts} stripes " if parts > shards else ""
            raise ValueError(
                f"tokens of shape {tokens.shape} cannot be split {stripes}over {shards} devices of "
                f"mesh axis {names!r} ({axis})"
            )


def longest(cache: LatentCache | PagedLatentCache) -> int | None:
    """Tokens of the longest sequence in the cache, or None where they cannot be seen."""
    lengths = concrete(cache.lengths)
    return None if lengths is None else int(lengths.max())


def check_divides(path, shape, logical_axes, spec, mesh) -> None:
    """Every mesh axis divides the axis of the array that it splits."""
    for size, axis, entry in zip(shape, logical_axes, spec, strict=True):
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            raise ValueError(
                f"{jax.tree_util.keystr(path)}: axis {axis!r} of size {size} cannot be split "
                f"over {parts} devices of mesh axis {'+'.join(names)!r}"
            )
