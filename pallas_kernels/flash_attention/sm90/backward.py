"""Gradients of flash attention on Hopper, bitwise reproducible: one kernel for q, one for k and v.

Both recompute the probabilities p and the gradients ds of the scores, as `backward_keys.py` says.
NOTES.md has the derivation, the schedule and its figures.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_compat
from pallas_kernels.flash_attention.sm90.backward_keys import (
    Hide,
    Inputs,
    KeyGradients,
    OwnKeys,
    for_each_key_tile,
    key_gradient_types,
    meet_queries,
    probabilities,
    score_gradients,
)
from pallas_kernels.flash_attention.sm90.config import (
    BACKWARD,
    MAX_GRADIENT_COLUMNS,
    TILE_ROWS,
    Config,
    Problem,
)
from pallas_kernels.flash_attention.sm90.masking import hide_keys
from pallas_kernels.flash_attention.sm90.rings import (
    Ring,
    key_rings,
    load_keys,
    load_queries,
    query_rings,
)
from pallas_kernels.flash_attention.sm90.tiles import Masks, Rows, key_tiles, query_tiles
from pallas_kernels.flash_attention.sm90.warpgroups import (
    NUM_CONSUMERS,
    Roles,
    for_each_block,
    for_each_tile,
    run_kernel,
)
from pallas_kernels.hardware import WGMMA_ROWS
from pallas_kernels.sm90 import (
    LOG2_E,
    PER_ROW,
    Ref,
    add_products,
    at_step,
    matrices,
    packed,
    per_row,
    store,
    zeros,
)


class QueryScratch(NamedTuple):
    dout_smem: Ref
    keys: Ring
    q_smem: Ref
    tile_full: Ref
    values: Ring


class KeyScratch(NamedTuple):
    douts: Ring
    own: OwnKeys
    queries: Ring


def query_gradient(
    problem: Problem,
    masks: Masks,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    stats: jax.Array,
    *,
    num_sms: int,
    config: Config | None = None,
) -> jax.Array:
    """dq "B T N K"; arguments as in Inputs."""
    config = config or BACKWARD[problem.K, problem.H]
    tiles = query_tiles(problem, masks, config, num_sms)
    keys, values = key_rings(problem, config, q.dtype)
    (dq,) = run_kernel(
        functools.partial(_query_body, problem, config),
        "flash_attention_dq",
        Inputs(q, k, v, dout, stats, tiles, masks),
        (jax.ShapeDtypeStruct((problem.B, problem.T, problem.N, problem.K), q.dtype),),
        QueryScratch(
            dout_smem=matrices((NUM_CONSUMERS, WGMMA_ROWS, problem.H), q.dtype),
            keys=keys,
            q_smem=matrices((NUM_CONSUMERS, WGMMA_ROWS, problem.K), q.dtype),
            tile_full=plgpu.Barrier(num_barriers=NUM_CONSUMERS, num_arrivals=2),
            values=values,
        ),
        num_ctas=min(num_sms, len(tiles)),
        config=config,
    )
    return dq


def _query_body(
    problem: Problem, config: Config, inputs: Inputs, outputs: tuple[Ref], scratch: QueryScratch
) -> Roles:
    (dq_gmem,) = outputs
    tiles, masks, keys, values = inputs.tiles, inputs.masks, scratch.keys, scratch.values
    log2_scale = problem.scale * LOG2_E

    def load():
        k_rows, v_rows = Rows(inputs.k), Rows(inputs.v)
        load_keys(problem, config, masks, tiles, k_rows, v_rows, keys, values)

    def consume(wg):
        full = scratch.tile_full.at[wg]

        def differentiate_tile(read_tile, begin):
            tile = read_tile(begin)
            own = at_step(wg, begin)
            q_tile, dout_tile = scratch.q_smem.at[own], scratch.dout_smem.at[own]
            first_query = tile.place * TILE_ROWS + wg * WGMMA_ROWS
            rows = tile.b, pl.ds(first_query, WGMMA_ROWS), tile.head
            plgpu.copy_gmem_to_smem(inputs.q.at[rows], q_tile, full)
            plgpu.copy_gmem_to_smem(inputs.dout.at[rows], dout_tile, full)
            lse, delta = (
                mosaic_compat.load(
                    inputs.stats.at[tile.b, tile.head, i, rows[1]], PER_ROW, is_optimized=False
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
                start = per_row(lse, (WGMMA_ROWS, config.block))
                (scores,) = add_products((start, scratch.q_smem.at[own], k_smem.T))
                if is_masked:
                    first_key = tile.masked_block(step - begin) * config.block
                    scores = hide_keys(problem, masks, tile.b, first_query, first_key, scores)
                p = packed(jnp.exp2(scores * log2_scale).astype(k_smem.dtype))
                start = per_row(delta, (WGMMA_ROWS, config.block))
                (dp,) = add_products((start, scratch.dout_smem.at[own], v_smem.T))
                values.release(step)
                ds = (p.astype(jnp.float32) * dp).astype(k_smem.dtype)
                (dq,) = add_products((dq, ds, k_smem))
                keys.release(step)
                return dq

            dq = for_each_block(tile, begin, meet, zeros((WGMMA_ROWS, problem.K)))
            store(problem.scale * dq, q_tile, dq_gmem.at[rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            return begin + tile.num_blocks

        for_each_tile(tiles, differentiate_tile)

    return load, consume


def key_gradients(
    problem: Problem,
    masks: Masks,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    stats: jax.Array,
    *,
    num_sms: int,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """dk "B S splits K" and dv "B S splits H", summed over the query heads of a group's split.

    Arguments as in Inputs.
    """
    config = config or BACKWARD[problem.K, problem.H]
    tiles = key_tiles(problem, masks, config, num_sms)
    dk_type, dv_type = key_gradient_types(problem, q.dtype)
    queries, douts = query_rings(problem, config, q.dtype)

    def launch(*out_type):
        return run_kernel(
            functools.partial(_key_body, problem, config),
            "flash_attention_dk_dv",
            Inputs(q, k, v, dout, stats, tiles, masks),
            out_type,
            KeyScratch(
                douts=douts,
                own=OwnKeys(
                    k_smem=matrices((NUM_CONSUMERS, WGMMA_ROWS, problem.K), q.dtype),
                    v_smem=matrices((NUM_CONSUMERS, WGMMA_ROWS, problem.H), q.dtype),
                    full=plgpu.Barrier(num_barriers=NUM_CONSUMERS, num_arrivals=2),
                ),
                queries=queries,
            ),
            num_ctas=min(num_sms, len(tiles)),
            config=config,
        )

    if problem.K + problem.H <= MAX_GRADIENT_COLUMNS:
        dk, dv = launch(dk_type, dv_type)
    else:
        (dk, _), (_, dv) = launch(dk_type, None), launch(None, dv_type)
    return dk, dv


def _key_body(
    problem: Problem, config: Config, inputs: Inputs, outputs: KeyGradients, scratch: KeyScratch
) -> Roles:
    dk_gmem, dv_gmem = outputs
    own = scratch.own

    def load():
        load_queries(
            problem, config, inputs.tiles, inputs.q, inputs.dout, inputs.stats, scratch.queries,
            scratch.douts,
        )  # fmt: skip

    def consume(wg):
        def meet_tile(tile, begin):
            def meet(step, _, hide, gradients):
                i = at_step(wg, step)
                tiles = own.k_smem.at[i], own.v_smem.at[i]
                return _key_step(problem, step, gradients, *tiles, scratch, hide)

            # None for what another launch computes.
            dk: Any = None if dk_gmem is None else zeros((WGMMA_ROWS, problem.K))
            dv: Any = None if dv_gmem is None else zeros((WGMMA_ROWS, problem.H))
            return meet_queries(problem, config, inputs.masks, wg, tile, begin, meet, (dk, dv))

        for_each_key_tile(problem, inputs, outputs, own, wg, meet_tile)

    return load, consume


def _key_step(
    problem: Problem,
    step: jax.Array,
    gradients: KeyGradients,
    k_tile: Ref,
    v_tile: Ref,
    scratch: KeyScratch,
    hide: Hide,
) -> KeyGradients:
    """One block of queries."""
    queries, douts = scratch.queries, scratch.douts
    dk, dv = gradients
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
