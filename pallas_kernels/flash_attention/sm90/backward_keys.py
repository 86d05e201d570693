"""What both backward kernels do with a tile of keys: the walk over its queries, and p and ds.

p = exp(scale * (q @ k.T - lse / scale)) and ds = p * (dout @ v.T - delta), transposed: a row per
key. The sums of both products start from -lse / scale and -delta, which then need no registers of
their own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_compat
from pallas_kernels.flash_attention.sm90.config import TILE_ROWS, Config, Problem
from pallas_kernels.flash_attention.sm90.masking import hide_queries
from pallas_kernels.flash_attention.sm90.tiles import Masks, Tile
from pallas_kernels.flash_attention.sm90.warpgroups import for_each_head, for_each_tile
from pallas_kernels.hardware import WGMMA_ROWS
from pallas_kernels.sm90 import (
    LOG2_E,
    PER_COLUMN,
    Ref,
    add_products,
    at_step,
    packed,
    per_column,
    store,
)

KeyGradients = tuple[Any, Any]  # dk and dv; None for what another launch computes
Hide = Callable[[jax.Array], jax.Array]


class Inputs(NamedTuple):
    """stats "B N 2 T" are -lse / scale and -delta."""

    q: Ref
    k: Ref
    v: Ref
    dout: Ref
    stats: Ref
    tiles: Ref
    masks: Masks


class OwnKeys(NamedTuple):
    """Shared memory for the keys and values of both consumers, and for dk and dv afterwards."""

    k_smem: Ref
    v_smem: Ref
    full: Ref


def key_gradient_types(problem: Problem, dtype) -> list[jax.ShapeDtypeStruct]:
    """Types of dk and dv; float32 and in whole tiles for every split of a group, if it has any."""
    shape = problem.B, problem.S, problem.G
    if problem.group_splits > 1:
        dtype = jnp.float32
        num_rows = -(-problem.S // TILE_ROWS) * TILE_ROWS
        shape = problem.B, num_rows, problem.G * problem.group_splits
    return [jax.ShapeDtypeStruct((*shape, size), dtype) for size in (problem.K, problem.H)]


def for_each_key_tile(
    problem: Problem,
    inputs: Inputs,
    outputs: KeyGradients,
    own: OwnKeys,
    wg: int,
    meet_tile: Callable[[Tile, jax.Array], KeyGradients],
) -> None:
    """Loads a consumer's keys and values, and stores dk and dv = meet_tile(tile, step)."""
    full = own.full.at[wg]

    def differentiate_tile(read_tile, begin):
        tile = read_tile(begin)
        rows = _own_rows(tile, wg, tile.head // problem.group_splits)
        plgpu.copy_gmem_to_smem(inputs.k.at[rows], own.k_smem.at[wg], full)
        plgpu.copy_gmem_to_smem(inputs.v.at[rows], own.v_smem.at[wg], full)
        plgpu.barrier_wait(full)
        dk, dv = meet_tile(tile, begin)
        end = begin + problem.heads_per_split * tile.num_blocks
        tile = read_tile(end)
        for value, scale, smem, gmem in zip(
            (dk, dv), (problem.scale, 1.0), (own.k_smem, own.v_smem), outputs, strict=True
        ):
            if value is None:
                continue
            rows = _own_rows(tile, wg, tile.head)
            if problem.group_splits > 1:
                gmem[rows] = scale * value
            else:
                store(scale * value, smem.at[wg], gmem.at[rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return end

    for_each_tile(inputs.tiles, differentiate_tile)


def _own_rows(tile: Tile, wg: int, head: Any) -> tuple:
    return tile.b, pl.ds(tile.place * TILE_ROWS + wg * WGMMA_ROWS, WGMMA_ROWS), head


def meet_queries(
    problem: Problem,
    config: Config,
    masks: Masks,
    wg: int,
    tile: Tile,
    begin: jax.Array,
    body: Callable[[jax.Array, tuple, Hide, KeyGradients], KeyGradients],
    gradients: KeyGradients,
) -> KeyGradients:
    """`gradients = body(step, (head, first query), hide, gradients)` for every block of a tile."""
    first_key = tile.place * TILE_ROWS + wg * WGMMA_ROWS

    def meet_head(head, gradients):
        first_step = begin + head * tile.num_blocks

        def meet(step, gradients):
            index = step - first_step
            first_query = tile.block(index) * config.block

            def hide_some(scores):
                b, key = at_step(tile.b, step), at_step(first_key, step)
                return hide_queries(problem, masks, b, first_query, key, scores)

            def hide(scores):  # a loop of its own for masked blocks would cost registers
                return lax.cond(index < tile.num_masked, hide_some, lambda x: x, scores)

            place = tile.head * problem.heads_per_split + head, first_query
            return body(step, place, hide, gradients)

        return lax.fori_loop(first_step, first_step + tile.num_blocks, meet, gradients)

    return for_each_head(problem, meet_head, gradients)


def probabilities(problem: Problem, k_tile: Ref, q_smem: Ref, start: Ref, hide: Hide) -> jax.Array:
    """p of one block, "keys queries"; start is -lse / scale."""
    shape = WGMMA_ROWS, q_smem.shape[0]
    first = per_column(mosaic_compat.load(start, PER_COLUMN), shape)
    (scores,) = add_products((first, k_tile, q_smem.T))
    log2_scale = problem.scale * LOG2_E
    return packed(jnp.exp2(hide(scores) * log2_scale).astype(q_smem.dtype))


def score_gradients(p: jax.Array, v_tile: Ref, dout_smem: Ref, start: Ref) -> jax.Array:
    """ds of one block, "keys queries"; start is -delta."""
    first = per_column(mosaic_compat.load(start, PER_COLUMN), p.shape)
    (dp,) = add_products((first, v_tile, dout_smem.T))
    return (p.astype(jnp.float32) * dp).astype(p.dtype)
