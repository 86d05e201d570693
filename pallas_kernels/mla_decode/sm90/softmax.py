"""The online softmax of one block of scores, in base 2, and what hides keys from it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_compat
from pallas_kernels.hardware import WGMMA_ROWS
from pallas_kernels.mla_decode.sm90.config import BLOCK_KV, LOWEST, Config
from pallas_kernels.mla_decode.sm90.requests import Request
from pallas_kernels.sm90 import LOG2_E, PER_ROW, WGMMA, Ref, per_row, row_vector


class Softmax(NamedTuple):
    """One number per row: the running maximum in base 2, and the sum of exponentials."""

    highest: jax.Array
    total: jax.Array


def start_softmax() -> Softmax:
    """Maximum and sum of no scores."""
    return Softmax(row_vector(LOWEST), row_vector(0))


def add_scores(
    scores: jax.Array, top: jax.Array, softmax: Softmax, config: Config
) -> tuple[jax.Array, Softmax, jax.Array]:
    """Adds one block of scores; `top` is its maximum per row.

    Returns the factor by which all earlier sums decay, the new softmax, and the probabilities.
    """
    scale = config.scale * LOG2_E
    highest = jnp.maximum(softmax.highest, top * scale)
    decay = jnp.exp2(softmax.highest - highest)
    p = jnp.exp2(scores * scale - per_row(highest, scores.shape))
    return decay, Softmax(highest, softmax.total * decay + p.sum(axis=1)), p


def mask(scores: jax.Array, request: Request, i: jax.Array, config: Config) -> jax.Array:
    """-inf where a row may not see a key: past the length, or after the row's own token."""
    column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=WGMMA)
    border = request.length - i * BLOCK_KV
    if config.causal and config.num_queries > 1:
        row = plgpu.broadcasted_iota(jnp.int32, (WGMMA_ROWS,), 0, layout=PER_ROW)
        query = lax.div(row + lax.axis_index("tile") * WGMMA_ROWS, config.num_heads)
        border = per_row(border - (config.num_queries - 1 - query), scores.shape)
    return jnp.where(column < border, scores, -jnp.inf)


def zero_tail(v_smem: Ref, request: Request, i: jax.Array) -> None:
    """Zeroes values past the length: their probability is 0, but 0 * NaN is NaN."""
    used = request.length - i * BLOCK_KV

    @pl.when(used < BLOCK_KV)
    def _():
        width = math.gcd(v_smem.shape[1], 64)
        for column in range(0, v_smem.shape[1], width):
            columns = v_smem.at[:, column : column + width]
            token = plgpu.broadcasted_iota(jnp.int32, columns.shape, 0, layout=WGMMA)
            values = mosaic_compat.load(columns, WGMMA)
            columns[...] = jnp.where(token < used, values, jnp.zeros_like(values))
        plgpu.commit_smem()
