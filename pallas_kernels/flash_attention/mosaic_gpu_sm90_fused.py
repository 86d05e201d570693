"""Gradients of flash attention on Hopper in one kernel: five matmuls, dq summed in memory.

A tile of keys meets all queries that see it, as for dk and dv alone. The two warpgroups exchange
the gradients of the scores through shared memory, and each computes a part of what their 128 keys
add to dq, in float32, which TMA adds to an array in global memory. The order of these sums is that
of time: dq differs in its last bits from run to run. Schedule and figures are in NOTES.md.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.config_sm90 import FUSED, ROWS, Config, Problem
from pallas_kernels.flash_attention.mosaic_gpu_sm90_backward import (
    for_each_key_tile,
    key_gradient_types,
    meet_queries,
    probabilities,
    score_gradients,
)
from pallas_kernels.flash_attention.parts_sm90 import (
    NUM_CONSUMERS,
    Accumulator,
    Ring,
    add_products,
    at_step,
    load_queries,
    matrices,
    query_rings,
    run_kernel,
    zeros,
)
from pallas_kernels.flash_attention.work_sm90 import Masks, key_tiles


def gradients(
    problem: Problem, masks: Masks, q, k, v, dout, stats, *, num_sms, config: Config | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq "B T N K" in float32 and without its factor `scale`; dk and dv as `key_gradients`."""
    config = config or FUSED[problem.K, problem.H]
    tiles = key_tiles(problem, masks, config, num_sms)
    width = _part(problem, config, 0)[1].stop  # columns of dq that a consumer computes

    def body(*refs, **scratch):
        return _body(problem, config, *refs, **scratch)

    return run_kernel(
        body,
        "flash_attention_backward",
        config=config,
        num_ctas=min(num_sms, len(tiles)),
        sum_type=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        out_type=key_gradient_types(problem, q.dtype),
        scratch_types={
            "k_smem": matrices((NUM_CONSUMERS, ROWS, problem.K), q.dtype, width),
            "v_smem": matrices((NUM_CONSUMERS, ROWS, problem.H), q.dtype),
            "ds_smem": matrices((NUM_CONSUMERS, ROWS, config.block), q.dtype, width),
            "dq_smem": matrices((NUM_CONSUMERS, ROWS, width), jnp.float32, config.sum_columns),
            "tile_full": plgpu.Barrier(num_barriers=NUM_CONSUMERS, num_arrivals=2),
            "ds_full": plgpu.Barrier(num_barriers=1, num_arrivals=NUM_CONSUMERS),
            "ds_free": plgpu.Barrier(num_barriers=1, num_arrivals=NUM_CONSUMERS),
            **query_rings(problem, config, q.dtype, width),
        },
    )(q, k, v, dout, stats, tiles, *masks)


def _part(problem: Problem, config: Config, wg: int) -> tuple[slice, slice]:
    """Rows and columns of a block of dq that a consumer computes: 64 rows, or all but half of K."""
    if config.block == NUM_CONSUMERS * ROWS:
        return slice(wg * ROWS, (wg + 1) * ROWS), slice(0, problem.K)
    width = problem.K // NUM_CONSUMERS
    return slice(0, ROWS), slice(wg * width, (wg + 1) * width)


def _body(
    problem, config, q_gmem, k_gmem, v_gmem, dout_gmem, stats_gmem, tiles, key_ends, query_ids,
    key_ids, dq_gmem, dk_gmem, dv_gmem, *, k_smem, v_smem, ds_smem, dq_smem, tile_full, ds_full,
    ds_free, queries, douts,
):  # fmt: skip
    masks = Masks(key_ends, query_ids, key_ids)
    queries, douts = Ring(*queries), Ring(*douts)
    # What both consumers read, to compute dq: ds, and all keys of the tile.
    ds_full, ds_free = ds_full.at[0], ds_free.at[0]

    def load():
        load_queries(problem, config, tiles, q_gmem, dout_gmem, stats_gmem, queries, douts)

    def consume(wg):
        rows, columns = _part(problem, config, wg)

        def meet(tile, step, place, hide, state):
            n, first_query = place
            queries.wait(step)
            douts.wait(step)  # not later: a wait between the matmuls costs registers
            q_smem, stats = (smem.at[queries.slot(step)] for smem in queries.smems)
            dout_smem = douts.smems[0].at[douts.slot(step)]
            own = at_step(wg, step)
            p = probabilities(problem, k_smem.at[own], q_smem, stats.at[0], hide)
            ds = score_gradients(p, v_smem.at[own], dout_smem, stats.at[1])
            plgpu.barrier_wait(ds_free)
            ds_tile = ds_smem.at[own]
            ds_tile[...] = ds
            plgpu.commit_smem()  # also for the stats that ordinary loads have read
            plgpu.barrier_arrive(ds_full)
            dk, dv = state
            dk, dv = add_products((dk, ds, q_smem), (dv, p, dout_smem))
            douts.release(step)
            queries.release(step)
            plgpu.barrier_wait(ds_full)

            def sum_keys(ref):
                for i in range(NUM_CONSUMERS):
                    half = at_step(i, step)
                    ds_half, k_half = ds_smem.at[half, :, rows], k_smem.at[half, :, columns]
                    plgpu.wgmma(ref, ds_half.T, k_half)
                return ref[...]

            dq_tile = dq_smem.at[own]
            dq = pl.run_scoped(sum_keys, Accumulator(dq_tile.shape, jnp.float32))
            plgpu.barrier_arrive(ds_free)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous sum has left dq_tile
            dq_tile[...] = dq
            plgpu.commit_smem()
            block = pl.ds(first_query + rows.start, ROWS)
            sum_gmem = dq_gmem.at[tile.b, block, n, columns]
            plgpu.copy_smem_to_gmem(dq_tile, sum_gmem, reduction_op="add")
            return dk, dv

        def meet_tile(tile, begin):
            plgpu.barrier_arrive(ds_free)  # this consumer's keys are there
            state = zeros((ROWS, problem.K)), zeros((ROWS, problem.H))

            def meet_block(step, place, hide, state):
                return meet(tile, step, place, hide, state)

            state = meet_queries(problem, config, masks, wg, tile, begin, meet_block, state)
            plgpu.barrier_wait(ds_free)  # the other consumer reads keys where dk will be
            return state

        inputs, outputs = (k_gmem, v_gmem), (dk_gmem, dv_gmem)
        smems = k_smem, v_smem, tile_full
        for_each_key_tile(problem, tiles, inputs, outputs, smems, wg, meet_tile)

    return load, consume
