"""Rotary position embedding, with the stretched frequencies of YaRN and LongRoPE."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jax_mla.config import RopeScaling


def inverse_frequencies(dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """The R / 2 angular frequencies in radians per token, float32.

    theta ** (-2 j / R); YaRN divides those below its ramp by `factor`, LongRoPE each by its own.
    """
    frequencies = 1.0 / np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
    if scaling is None:
        return frequencies
    if scaling.rope_type == "longrope":
        return frequencies / np.asarray(scaling.short_factor, np.float32)
    stretched = _yarn_ramp(dim, theta, scaling)
    return frequencies / np.float32(scaling.factor) * stretched + frequencies * (1 - stretched)


def _yarn_ramp(dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """1 where a frequency turns too rarely in the original context to be kept, 0 where often."""

    def index_of(rotations: float) -> float:
        original = scaling.original_max_position_embeddings
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    ramp = (np.arange(dim // 2, dtype=np.float32) - low) / (high - low)
    return np.clip(ramp, 0, 1).astype(np.float32)


def rope_tables(
    positions: Int[Array, "B T"], dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """cos and sin of every position's angles, float32."""
    angles = (
        positions[..., None].astype(jnp.float32)
        * inverse_frequencies(dim, theta, scaling)[None, None]
    )
    factor = 1.0 if scaling is None else scaling.cos_sin_factor
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "B T *N R"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    *,
    interleaved: bool,
) -> Float[Array, "B T *N R"]:
    """Turns each pair of numbers of x by its position's angle.

    Pairs are neighbours (x0, x1), (x2, x3), ... when `interleaved`, else (x0, x_{R/2}), ... The
    result always holds first all first members, then all second ones: scores do not depend on the
    order as long as queries and keys agree, and every cache then has one layout.
    """
    wide = x.astype(jnp.float32)
    half = x.shape[-1] // 2
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = wide[..., :half], wide[..., half:]
    shape = cos.shape[:2] + (1,) * (x.ndim - 3) + cos.shape[-1:]
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def positions_of(
    tokens: Shaped[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
) -> Int[Array, "B T"]:
    """0, 1, 2, ... from the first token of each row, or of each segment."""
    count = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    if segment_ids is None:
        return count
    is_first = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return count - jax.lax.cummax(jnp.where(is_first, count, 0), axis=1)
