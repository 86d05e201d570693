"""Gradients of flash attention on Hopper in one kernel: five matmuls, dq summed in memory.

A tile of keys meets all queries that see it, as for dk and dv alone. The two warpgroups exchange
the gradients of the scores through shared memory. Each computes half of what their 128 keys add to
dq, in float32, which TMA adds to an array in global memory. These sums happen in the order in which
blocks end: dq differs in its last bits from run to run. NOTES.md has the schedule and its figures.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.sm90.backward_keys import (
    Inputs,
    OwnKeys,
    for_each_key_tile,
    key_gradient_types,
    meet_queries,
    probabilities,
    score_gradients,
)
from pallas_kernels.flash_attention.sm90.config import FUSED, Config, Problem
from pallas_kernels.flash_attention.sm90.rings import Ring, load_queries, query_rings
from pallas_kernels.flash_attention.sm90.tiles import Masks, key_tiles
from pallas_kernels.flash_attention.sm90.warpgroups import NUM_CONSUMERS, Roles, run_kernel
from pallas_kernels.hardware import WGMMA_ROWS
from pallas_kernels.sm90 import Accumulator, Ref, add_products, at_step, matrices, zeros


class Scratch(NamedTuple):
    """Both consumers read ds and all keys of the tile, to compute dq."""

    douts: Ring
    dq_smem: Ref
    ds_free: Ref
    ds_full: Ref
    ds_smem: Ref
    own: OwnKeys
    queries: Ring


def gradients(
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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq "B T N K" in float32 and without its factor `scale`; dk and dv as `key_gradients`.

    Arguments as in Inputs.
    """
    config = config or FUSED[problem.K, problem.H]
    tiles = key_tiles(problem, masks, config, num_sms)
    width = _own_block(problem, config, 0)[1].stop  # columns of dq that a consumer computes
    queries, douts = query_rings(problem, config, q.dtype, width)
    dq, dk, dv = run_kernel(
        functools.partial(_body, problem, config),
        "flash_attention_backward",
        Inputs(q, k, v, dout, stats, tiles, masks),
        tuple(key_gradient_types(problem, q.dtype)),
        Scratch(
            douts=douts,
            dq_smem=matrices((NUM_CONSUMERS, WGMMA_ROWS, width), jnp.float32, config.sum_columns),
            ds_free=plgpu.Barrier(num_barriers=1, num_arrivals=NUM_CONSUMERS),
            ds_full=plgpu.Barrier(num_barriers=1, num_arrivals=NUM_CONSUMERS),
            ds_smem=matrices((NUM_CONSUMERS, WGMMA_ROWS, config.block), q.dtype, width),
            own=OwnKeys(
                k_smem=matrices((NUM_CONSUMERS, WGMMA_ROWS, problem.K), q.dtype, width),
                v_smem=matrices((NUM_CONSUMERS, WGMMA_ROWS, problem.H), q.dtype),
                full=plgpu.Barrier(num_barriers=NUM_CONSUMERS, num_arrivals=2),
            ),
            queries=queries,
        ),
        num_ctas=min(num_sms, len(tiles)),
        config=config,
        sum_type=jax.ShapeDtypeStruct(q.shape, jnp.float32),
    )
    return dq, dk, dv


def _own_block(problem: Problem, config: Config, wg: int) -> tuple[slice, slice]:
    """Rows and columns of dq's block that a consumer computes: 64 of the rows, or half of K."""
    if config.block == NUM_CONSUMERS * WGMMA_ROWS:
        return slice(wg * WGMMA_ROWS, (wg + 1) * WGMMA_ROWS), slice(0, problem.K)
    width = problem.K // NUM_CONSUMERS
    return slice(0, WGMMA_ROWS), slice(wg * width, (wg + 1) * width)


def _body(
    problem: Problem,
    config: Config,
    inputs: Inputs,
    outputs: tuple[Ref, Ref, Ref],
    scratch: Scratch,
) -> Roles:
    dq_gmem, *key_outputs = outputs
    queries, douts, own, ds_smem = scratch.queries, scratch.douts, scratch.own, scratch.ds_smem
    ds_full, ds_free = scratch.ds_full.at[0], scratch.ds_free.at[0]

    def load():
        load_queries(
            problem, config, inputs.tiles, inputs.q, inputs.dout, inputs.stats, queries, douts
        )

    def consume(wg):
        rows, columns = _own_block(problem, config, wg)

        def meet(tile, step, place, hide, key_gradients):
            n, first_query = place
            queries.wait(step)
            douts.wait(step)  # not later: a wait between the matmuls costs registers
            q_smem, stats = (smem.at[queries.slot(step)] for smem in queries.smems)
            dout_smem = douts.smems[0].at[douts.slot(step)]
            i = at_step(wg, step)
            p = probabilities(problem, own.k_smem.at[i], q_smem, stats.at[0], hide)
            ds = score_gradients(p, own.v_smem.at[i], dout_smem, stats.at[1])
            plgpu.barrier_wait(ds_free)
            ds_tile = ds_smem.at[i]
            ds_tile[...] = ds
            plgpu.commit_smem()  # also for the stats that ordinary loads have read
            plgpu.barrier_arrive(ds_full)
            dk, dv = key_gradients
            dk, dv = add_products((dk, ds, q_smem), (dv, p, dout_smem))
            douts.release(step)
            queries.release(step)
            plgpu.barrier_wait(ds_full)

            def sum_keys(ref):
                for half in range(NUM_CONSUMERS):
                    j = at_step(half, step)
                    ds_half, k_half = ds_smem.at[j, :, rows], own.k_smem.at[j, :, columns]
                    plgpu.wgmma(ref, ds_half.T, k_half)
                return ref[...]

            dq_tile = scratch.dq_smem.at[i]
            dq = pl.run_scoped(sum_keys, Accumulator(dq_tile.shape, jnp.float32))
            plgpu.barrier_arrive(ds_free)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous sum has left dq_tile
            dq_tile[...] = dq
            plgpu.commit_smem()
            block = pl.ds(first_query + rows.start, WGMMA_ROWS)
            sum_gmem = dq_gmem.at[tile.b, block, n, columns]
            plgpu.copy_smem_to_gmem(dq_tile, sum_gmem, reduction_op="add")
            return dk, dv

        def meet_tile(tile, begin):
            plgpu.barrier_arrive(ds_free)  # this consumer's keys are there
            sums = zeros((WGMMA_ROWS, problem.K)), zeros((WGMMA_ROWS, problem.H))

            def meet_block(step, place, hide, key_gradients):
                return meet(tile, step, place, hide, key_gradients)

            sums = meet_queries(problem, config, inputs.masks, wg, tile, begin, meet_block, sums)
            plgpu.barrier_wait(ds_free)  # the other consumer reads keys where dk will be
            return sums

        for_each_key_tile(problem, inputs, tuple(key_outputs), own, wg, meet_tile)

    return load, consume
