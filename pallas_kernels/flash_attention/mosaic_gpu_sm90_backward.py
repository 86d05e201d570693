"""Gradients of flash attention on Hopper, bitwise reproducible: one kernel for q, one for k and v.

Both recompute the probabilities p = exp(scale * (q @ k.T - lse / scale)) and the gradient of the
scores, ds = p * (dout @ v.T - delta). The sums of both products start from -lse / scale and -delta,
which then need no registers of their own. Derivation, schedule and figures are in NOTES.md.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_compat
from pallas_kernels.flash_attention.config_sm90 import (
    BACKWARD_KEYS,
    BACKWARD_QUERIES,
    MAX_GRADIENT_COLUMNS,
    ROWS,
    TILE,
    Config,
    Problem,
)
from pallas_kernels.flash_attention.parts_sm90 import (
    NUM_CONSUMERS,
    PER_COLUMN,
    PER_ROW,
    Ring,
    add_products,
    at_step,
    for_each_block,
    for_each_head,
    for_each_tile,
    hide_keys,
    hide_queries,
    key_rings,
    load_keys,
    load_queries,
    matrices,
    packed,
    per_column,
    per_row,
    query_rings,
    run_kernel,
    store,
    zeros,
)
from pallas_kernels.flash_attention.work_sm90 import Masks, Rows, key_tiles, query_tiles


def query_gradient(
    problem: Problem, masks: Masks, q, k, v, dout, stats, *, num_sms, config: Config | None = None
) -> jax.Array:
    """dq "B T N K". stats "B N 2 T" are -lse / scale and -delta."""
    config = config or BACKWARD_QUERIES[problem.K, problem.H]
    tiles = query_tiles(problem, masks, config, num_sms)

    def body(*refs, **scratch):
        return _query_body(problem, config, *refs, **scratch)

    return run_kernel(
        body,
        "flash_attention_dq",
        config=config,
        num_ctas=min(num_sms, len(tiles)),
        out_type=jax.ShapeDtypeStruct((problem.B, problem.T, problem.N, problem.K), q.dtype),
        scratch_types={
            "q_smem": matrices((NUM_CONSUMERS, ROWS, problem.K), q.dtype),
            "dout_smem": matrices((NUM_CONSUMERS, ROWS, problem.H), q.dtype),
            "tile_full": plgpu.Barrier(num_barriers=NUM_CONSUMERS, num_arrivals=2),
            **key_rings(problem, config, q.dtype),
        },
    )(q, Rows(k), Rows(v), dout, stats, tiles, *masks)


def _query_body(
    problem, config, q_gmem, k_gmem, v_gmem, dout_gmem, stats_gmem, tiles, key_ends, query_ids,
    key_ids, dq_gmem, *, q_smem, dout_smem, tile_full, keys, values,
):  # fmt: skip
    masks = Masks(key_ends, query_ids, key_ids)
    keys, values = Ring(*keys), Ring(*values)
    log2_scale = problem.scale * math.log2(math.e)

    def load():
        load_keys(problem, config, masks, tiles, k_gmem, v_gmem, keys, values)

    def consume(wg):
        full = tile_full.at[wg]

        def differentiate_tile(read_tile, begin):
            tile = read_tile(begin)
            own = at_step(wg, begin)
            q_tile, dout_tile = q_smem.at[own], dout_smem.at[own]
            first_query = tile.place * TILE + wg * ROWS
            rows = tile.b, pl.ds(first_query, ROWS), tile.head
            plgpu.copy_gmem_to_smem(q_gmem.at[rows], q_tile, full)
            plgpu.copy_gmem_to_smem(dout_gmem.at[rows], dout_tile, full)
            lse, delta = (
                mosaic_compat.load(
                    stats_gmem.at[tile.b, tile.head, i, rows[1]], PER_ROW, is_optimized=False
                )
                for i in range(2)
            )
            plgpu.barrier_wait(full)

            def meet(is_masked, step, dq):
                keys.wait(step)
                values.wait(step)
                k_smem = keys.smems[0].at[keys.slot(step)]
                v_smem = values.smems[0].at[values.slot(step)]
                own = at_step(wg, step)
                start = per_row(lse, (ROWS, config.block))
                (scores,) = add_products((start, q_smem.at[own], k_smem.T))
                if is_masked:
                    first_key = tile.masked_block(step - begin) * config.block
                    scores = hide_keys(problem, masks, tile.b, first_query, first_key, scores)
                p = packed(jnp.exp2(scores * log2_scale).astype(k_smem.dtype))
                start = per_row(delta, (ROWS, config.block))
                (dp,) = add_products((start, dout_smem.at[own], v_smem.T))
                values.release(step)
                ds = (p.astype(jnp.float32) * dp).astype(k_smem.dtype)
                (dq,) = add_products((dq, ds, k_smem))
                keys.release(step)
                return dq

            dq = for_each_block(tile, begin, meet, zeros((ROWS, problem.K)))
            store(problem.scale * dq, q_tile, dq_gmem.at[rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            return begin + tile.num_blocks

        for_each_tile(tiles, differentiate_tile)

    return load, consume


def key_gradients(
    problem: Problem, masks: Masks, q, k, v, dout, stats, *, num_sms, config: Config | None = None
) -> tuple[jax.Array, jax.Array]:
    """dk "B S parts K" and dv "B S parts H", summed over the query heads of a part of a group."""
    config = config or BACKWARD_KEYS[problem.K, problem.H]
    tiles = key_tiles(problem, masks, config, num_sms)
    dk_type, dv_type = key_gradient_types(problem, q.dtype)

    def body(*refs, **scratch):
        return _key_body(problem, config, *refs, **scratch)

    def launch(*out_type):
        return run_kernel(
            body,
            "flash_attention_dk_dv",
            config=config,
            num_ctas=min(num_sms, len(tiles)),
            out_type=out_type,
            scratch_types={
                "k_smem": matrices((NUM_CONSUMERS, ROWS, problem.K), q.dtype),
                "v_smem": matrices((NUM_CONSUMERS, ROWS, problem.H), q.dtype),
                "tile_full": plgpu.Barrier(num_barriers=NUM_CONSUMERS, num_arrivals=2),
                **query_rings(problem, config, q.dtype),
            },
        )(q, k, v, dout, stats, tiles, *masks)

    if problem.K + problem.H <= MAX_GRADIENT_COLUMNS:
        dk, dv = launch(dk_type, dv_type)
    else:
        (dk, _), (_, dv) = launch(dk_type, None), launch(None, dv_type)
    return dk, dv


def key_gradient_types(problem: Problem, dtype) -> list[jax.ShapeDtypeStruct]:
    """Of dk and dv; for every part of a group, if there are several, whole tiles in float32."""
    shape = problem.B, problem.S, problem.G
    if problem.group_parts > 1:
        dtype = jnp.float32
        shape = problem.B, -(-problem.S // TILE) * TILE, problem.G * problem.group_parts
    return [jax.ShapeDtypeStruct((*shape, size), dtype) for size in (problem.K, problem.H)]


def _key_body(
    problem, config, q_gmem, k_gmem, v_gmem, dout_gmem, stats_gmem, tiles, key_ends, query_ids,
    key_ids, dk_gmem, dv_gmem, *, k_smem, v_smem, tile_full, queries, douts,
):  # fmt: skip
    masks = Masks(key_ends, query_ids, key_ids)
    queries, douts = Ring(*queries), Ring(*douts)

    def load():
        load_queries(problem, config, tiles, q_gmem, dout_gmem, stats_gmem, queries, douts)

    def consume(wg):
        def meet_tile(tile, begin):
            def meet(step, _, hide, state):
                own = at_step(wg, step)
                tiles = k_smem.at[own], v_smem.at[own]
                return _key_step(problem, step, state, *tiles, queries, douts, hide)

            # None for what another launch computes.
            dk: Any = None if dk_gmem is None else zeros((ROWS, problem.K))
            dv: Any = None if dv_gmem is None else zeros((ROWS, problem.H))
            return meet_queries(problem, config, masks, wg, tile, begin, meet, (dk, dv))

        inputs, outputs = (k_gmem, v_gmem), (dk_gmem, dv_gmem)
        smems = k_smem, v_smem, tile_full
        for_each_key_tile(problem, tiles, inputs, outputs, smems, wg, meet_tile)

    return load, consume


def for_each_key_tile(problem: Problem, tiles, inputs, outputs, smems, wg, meet_tile):
    """Loads a consumer's keys and values, and stores dk and dv = meet_tile(tile, step)."""
    *tile_smems, tile_full = smems

    def differentiate_tile(read_tile, begin):
        tile = read_tile(begin)
        rows = _own_keys(tile, wg, tile.head // problem.group_parts)
        for gmem, smem in zip(inputs, tile_smems, strict=True):
            plgpu.copy_gmem_to_smem(gmem.at[rows], smem.at[wg], tile_full.at[wg])
        plgpu.barrier_wait(tile_full.at[wg])
        dk, dv = meet_tile(tile, begin)
        end = begin + problem.part * tile.num_blocks
        tile = read_tile(end)
        for value, scale, smem, gmem in zip(
            (dk, dv), (problem.scale, 1.0), tile_smems, outputs, strict=True
        ):
            if value is None:
                continue
            rows = _own_keys(tile, wg, tile.head)
            if problem.group_parts > 1:
                gmem[rows] = scale * value
            else:
                store(scale * value, smem.at[wg], gmem.at[rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return end

    for_each_tile(tiles, differentiate_tile)


def _own_keys(tile, wg, head):
    return tile.b, pl.ds(tile.place * TILE + wg * ROWS, ROWS), head


def meet_queries(problem: Problem, config: Config, masks: Masks, wg, tile, begin, body, state):
    """`state = body(step, (head, first query), hide, state)` for every block that a tile meets."""
    first_key = tile.place * TILE + wg * ROWS

    def meet_head(head, state):
        first_step = begin + head * tile.num_blocks

        def meet(step, state):
            index = step - first_step
            first_query = tile.block(index) * config.block

            def hide_some(scores):
                b, key = at_step(tile.b, step), at_step(first_key, step)
                return hide_queries(problem, masks, b, first_query, key, scores)

            def hide(scores):  # a loop of its own for masked blocks would cost registers
                return lax.cond(index < tile.num_masked, hide_some, lambda x: x, scores)

            place = tile.head * problem.part + head, first_query
            return body(step, place, hide, state)

        return lax.fori_loop(first_step, first_step + tile.num_blocks, meet, state)

    return for_each_head(problem, meet_head, state)


def probabilities(problem: Problem, k_tile, q_smem, start, hide) -> jax.Array:
    """Of a block, "keys queries"; start is -lse / scale."""
    shape = ROWS, q_smem.shape[0]
    start = per_column(mosaic_compat.load(start, PER_COLUMN), shape)
    (scores,) = add_products((start, k_tile, q_smem.T))
    log2_scale = problem.scale * math.log2(math.e)
    return packed(jnp.exp2(hide(scores) * log2_scale).astype(q_smem.dtype))


def score_gradients(p, v_tile, dout_smem, start) -> jax.Array:
    """Of a block, "keys queries"; start is -delta."""
    start = per_column(mosaic_compat.load(start, PER_COLUMN), p.shape)
    (dp,) = add_products((start, v_tile, dout_smem.T))
    return (p.astype(jnp.float32) * dp).astype(p.dtype)


def _key_step(problem, step, state, k_tile, v_tile, queries, douts, hide):
    """One block of queries."""
    dk, dv = state
    queries.wait(step)
    q_smem, stats = (smem.at[queries.slot(step)] for smem in queries.smems)
    p = probabilities(problem, k_tile, q_smem, stats.at[0], hide)
    douts.wait(step)
    dout_smem = douts.smems[0].at[douts.slot(step)]
    if dk is None:
        (dv,) = add_products((dv, p, dout_smem))
    else:
        ds = score_gradients(p, v_tile, dout_smem, stats.at[1])
        if dv is None:
            (dk,) = add_products((dk, ds, q_smem))
        else:
            dk, dv = add_products((dk, ds, q_smem), (dv, p, dout_smem))
    douts.release(step)
    plgpu.commit_smem()  # stats were read by ordinary loads, TMA will overwrite them
    queries.release(step)
    return dk, dv
