"""Masks on a block of scores in registers: the causal border, segments and lengths."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_compat
from pallas_kernels.flash_attention.sm90.config import Problem
from pallas_kernels.flash_attention.sm90.tiles import Masks, Scalar
from pallas_kernels.sm90 import PER_COLUMN, PER_ROW, WGMMA, Ref, per_column, per_row


def hide_keys(
    problem: Problem, masks: Masks, b: Scalar, first_query: Scalar, first_key: Scalar,
    scores: jax.Array,
) -> jax.Array:  # fmt: skip
    """Scores "queries keys" of one block, -inf where the definition of the op hides a key."""
    shape = scores.shape
    scores = _hide_other_segments(scores, masks.query_ids, masks.key_ids, b, first_query, first_key)
    # One bound per row: a difference of two iotas would take one register per element.
    bound = jnp.broadcast_to(masks.key_ends[b], shape[:1])
    if problem.causal:
        query = first_query + plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=PER_ROW)
        bound = jnp.minimum(bound, query + (problem.offset + 1))
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
    return jnp.where(column < per_row(bound - first_key, shape), scores, -jnp.inf)


def hide_queries(
    problem: Problem, masks: Masks, b: Scalar, first_query: Scalar, first_key: Scalar,
    scores: jax.Array,
) -> jax.Array:  # fmt: skip
    """The same for transposed scores "keys queries"."""
    shape = scores.shape
    scores = _hide_other_segments(scores, masks.key_ids, masks.query_ids, b, first_key, first_query)
    key = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=PER_ROW)
    # The first query of the block that sees a key: none if the key is hidden from all.
    first = key + (first_key - problem.offset - first_query) if problem.causal else 0 * key
    num_seen = masks.key_ends[b] - first_key
    first = jnp.where(key < num_seen, first, shape[1])
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
    return jnp.where(column >= per_row(first, shape), scores, -jnp.inf)


def _hide_other_segments(
    scores: jax.Array, row_ids: Ref | None, column_ids: Ref | None, b: Scalar, first_row: Scalar,
    first_column: Scalar,
) -> jax.Array:  # fmt: skip
    if row_ids is None or column_ids is None:
        return scores
    shape = scores.shape
    rows = row_ids.at[b, pl.ds(first_row, shape[0])]
    columns = column_ids.at[b, pl.ds(first_column, shape[1])]
    rows = mosaic_compat.load(rows, PER_ROW, is_optimized=False)
    columns = mosaic_compat.load(columns, PER_COLUMN, is_optimized=False)
    return jnp.where(per_row(rows, shape) == per_column(columns, shape), scores, -jnp.inf)
