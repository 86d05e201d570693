"""Checks of what a caller passes in, made before any device work where the values are concrete."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_mla.cache import LatentCache, PagedLatentCache, capacity
from jax_mla.config import DeepSeekConfig


def concrete(x) -> np.ndarray | None:
    """The values of x, or None while they are being traced or live on other hosts."""
    if isinstance(x, Tracer):
        return None
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return None
    return np.asarray(x)


def check_tokens(tokens, config: DeepSeekConfig, *, num_axes: tuple[int, ...] = (2,)) -> jax.Array:
    """Token ids as int32, all of them within the vocabulary."""
    tokens = tokens if hasattr(tokens, "dtype") else np.asarray(tokens)
    shape, dtype = np.shape(tokens), jnp.result_type(tokens)
    if len(shape) not in num_axes:
        expected = " or ".join("Int[B T]" if n == 2 else "Int[B]" for n in num_axes)
        raise ValueError(f"tokens must be {expected}, got shape {shape}")
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"tokens must be integers, got dtype {dtype}")
    if math.prod(shape) == 0:
        raise ValueError(f"tokens must hold at least one token, got shape {shape}")
    if (values := concrete(tokens)) is not None:
        outside = values[(values < 0) | (values >= config.vocab_size)]
        if outside.size:
            raise ValueError(
                f"token id {outside[0]} is outside the vocabulary of {config.vocab_size}"
            )
    return _as_int32(tokens)


def _as_int32(x) -> jax.Array:
    """Converted on the host where x is there: on a device each shape would compile a program."""
    return jnp.asarray(x.astype(np.int32) if isinstance(x, np.ndarray) else x, jnp.int32)


def check_params(params, expected) -> None:
    """The parameters have the names and shapes that the config asks for."""
    found, wanted = (
        {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}
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


def check_lengths(lengths, tokens: jax.Array) -> jax.Array:
    """Valid tokens of each row; all of them when None."""
    batch, num_tokens = tokens.shape
    if lengths is None:
        return jnp.asarray(np.full(batch, num_tokens, np.int32))
    if np.shape(lengths) != (batch,):
        raise ValueError(
            f"lengths have shape {np.shape(lengths)}, tokens {tokens.shape} need ({batch},)"
        )
    if not jnp.issubdtype(jnp.result_type(lengths), jnp.integer):
        raise ValueError(f"lengths must be integers, got dtype {jnp.result_type(lengths)}")
    if (values := concrete(lengths)) is not None:
        outside = values[(values < 0) | (values > num_tokens)]
        if outside.size:
            raise ValueError(
                f"length {outside[0]} is not between 0 and the {num_tokens} tokens given"
            )
    return _as_int32(lengths)


def check_cache(
    cache: LatentCache | PagedLatentCache, config: DeepSeekConfig, num_new, *, batch=None
) -> None:
    """The cache is of this model and batch and has room for `num_new` tokens of each sequence."""
    layers, num_pages, page_size, width = cache.pages.shape
    if layers != config.num_hidden_layers or width != config.cache_row_dim:
        raise ValueError(
            f"the cache has {layers} layers of {width} numbers a token, the config "
            f"{config.num_hidden_layers} of {config.cache_row_dim}"
        )
    batch = np.shape(num_new)[0] if batch is None else batch
    if cache.lengths.shape[0] != batch:
        raise ValueError(f"the cache holds {cache.lengths.shape[0]} sequences, tokens have {batch}")
    old, new, table = (concrete(x) for x in (cache.lengths, num_new, cache.page_table))
    if old is None or new is None or table is None:
        return
    needed = np.where(new > 0, old + new, 0)
    if (longest := needed.max()) > capacity(cache):
        row = needed.argmax()
        raise ValueError(
            f"sequence {row} would hold {longest} tokens, the cache has room for {capacity(cache)}"
        )
    is_used = np.arange(table.shape[1])[None, :] < -(-needed // page_size)[:, None]
    bad = is_used & ((table < 0) | (table >= num_pages))
    if bad.any():
        row, slot = np.argwhere(bad)[0]
        raise ValueError(
            f"page_table[{row}, {slot}] is {table[row, slot]}, the cache has {num_pages} pages"
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
