"""Flash attention forward on Hopper: two warpgroups of 64 queries take turns on the tensor cores.

A third warpgroup loads keys and values. Schedule and figures are in NOTES.md.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.config_sm90 import FORWARD, ROWS, TILE, Config, Problem
from pallas_kernels.flash_attention.parts_sm90 import (
    NUM_CONSUMERS,
    PER_ROW,
    Accumulator,
    Ring,
    at_step,
    for_each_block,
    for_each_tile,
    hide_keys,
    key_rings,
    load_keys,
    matrices,
    per_row,
    run_kernel,
    zeros,
)
from pallas_kernels.flash_attention.work_sm90 import Masks, key_rows, query_tiles


def forward(
    problem: Problem, masks: Masks, q, k, v, *, num_sms: int, config: Config | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns out "B T N H" and lse "B N T", T rounded up to whole tiles in lse."""
    config = config or FORWARD[problem.K, problem.H]
    tiles = query_tiles(problem, masks, config, num_sms)
    chunk = math.gcd(problem.K, problem.H)
    num_chunks = problem.K // chunk

    def body(*refs, **scratch):
        return _body(problem, config, *refs, **scratch)

    out, lse = run_kernel(
        body,
        "flash_attention_forward",
        config=config,
        num_ctas=min(num_sms, len(tiles)),
        out_type=[
            jax.ShapeDtypeStruct((problem.B, problem.T, problem.N, problem.H), q.dtype),
            jax.ShapeDtypeStruct((problem.B, problem.N, -(-problem.T // TILE) * TILE), jnp.float32),
        ],
        scratch_types={
            # In chunks of columns, so that a narrower result can lie in the queries' place.
            "q_smem": matrices((NUM_CONSUMERS, num_chunks, ROWS, chunk), q.dtype),
            "q_full": plgpu.Barrier(num_barriers=NUM_CONSUMERS, num_arrivals=num_chunks),
            **key_rings(problem, config, q.dtype),
            "turn": plgpu.Barrier(num_barriers=1, num_arrivals=NUM_CONSUMERS),
        },
    )(q, *key_rows(problem, masks, k, v), tiles, *masks)
    return out, lse


def _body(
    problem, config, q_gmem, k_gmem, v_gmem, tiles, key_ends, query_ids, key_ids, out_gmem,
    lse_gmem, *, q_smem, q_full, keys, values, turn,
):  # fmt: skip
    masks = Masks(key_ends, query_ids, key_ids)
    keys, values, turn = Ring(*keys), Ring(*values), turn.at[0]

    def load():
        load_keys(problem, config, masks, tiles, k_gmem, v_gmem, keys, values)

    def consume(wg):
        def attend_tile(read_tile, begin):
            tile = read_tile(begin)
            first_query = tile.place * TILE + wg * ROWS
            rows = tile.b, pl.ds(first_query, ROWS), tile.head
            own = q_smem.at[at_step(wg, begin)]
            _copy_in_chunks(q_gmem.at[rows], own, q_full.at[wg])

            def hide(step, scores):
                first_key = tile.masked_block(step - begin) * config.block
                return hide_keys(problem, masks, tile.b, first_query, first_key, scores)

            def meet(is_masked, step, state):
                hider = hide if is_masked else None
                own = q_smem.at[at_step(wg, step)]
                return _step(problem, step, state, own, keys, values, turn, hider)

            lowest = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), PER_ROW)
            total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW)
            state = zeros((ROWS, problem.H)), lowest, total
            state = for_each_block(tile, begin, meet, state)
            out, lse = _normalise(*state)
            lse_gmem[tile.b, tile.head, rows[1]] = lse
            _store_in_chunks(out.astype(out_gmem.dtype), own, out_gmem.at[rows])
            return begin + tile.num_blocks

        if wg == 1:
            _take_turn(turn)
        for_each_tile(tiles, attend_tile)
        if wg == 0:
            _take_turn(turn)

    return load, consume


def _step(problem, step, state, q_smem, keys, values, turn, hide):
    """One block of keys, with the consumers half a step apart: one multiplies meanwhile."""
    acc, highest, total = state
    log2_scale = problem.scale * math.log2(math.e)
    keys.wait(step)
    k_smem = keys.smems[0].at[keys.slot(step)]
    num_chunks, _, chunk = q_smem.shape

    def multiply_keys(ref):
        for c in range(num_chunks):
            plgpu.wgmma(ref, q_smem.at[c], k_smem.at[:, c * chunk : (c + 1) * chunk].T)
        _take_turn(turn)
        return ref[...]

    scores = pl.run_scoped(multiply_keys, Accumulator((ROWS, k_smem.shape[0]), jnp.float32))
    keys.release(step)
    scores = hide(step, scores) if hide else scores
    # The maximum is kept times log2(e) * scale: one multiply-add leads to the exponential.
    new_highest = jnp.maximum(highest, scores.max(axis=1) * log2_scale)
    shift = new_highest
    if hide:
        shift = jnp.where(new_highest == -jnp.inf, 0.0, new_highest)  # -inf - -inf is NaN
    decay = jnp.exp2(highest - shift)
    p = jnp.exp2(scores * log2_scale - per_row(shift, scores.shape))
    acc = acc * per_row(decay, acc.shape)
    total = total * decay + p.sum(axis=1)
    plgpu.barrier_arrive(turn)
    values.wait(step)
    plgpu.barrier_wait(turn)
    v_smem = values.smems[0].at[values.slot(step)]
    p = p.astype(v_smem.dtype)
    acc = pl.run_state(lambda ref: plgpu.wgmma(ref, p, v_smem))(Accumulator.init(acc))
    values.release(step)
    return acc, new_highest, total


def _take_turn(turn):
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def _normalise(acc, highest, total):
    """out and natural lse; 0 and -inf where nothing was seen."""
    is_empty = total == 0
    inverse = jnp.where(is_empty, 0.0, 1 / total)
    lse = jnp.where(is_empty, -jnp.inf, highest * math.log(2) + jnp.log(total))
    return acc * per_row(inverse, acc.shape), lse


def _copy_in_chunks(gmem, smem, barrier):
    num_chunks, _, chunk = smem.shape
    for c in range(num_chunks):
        plgpu.copy_gmem_to_smem(gmem.at[:, c * chunk : (c + 1) * chunk], smem.at[c], barrier)
    plgpu.barrier_wait(barrier)


def _store_in_chunks(value, smem, gmem):
    """Stores through `smem`, which may be overwritten on return."""
    chunk = smem.shape[-1]
    chunks = [slice(c, c + chunk) for c in range(0, value.shape[1], chunk)]
    for c, columns in enumerate(chunks):
        smem[c] = value[:, columns]
    plgpu.commit_smem()
    for c, columns in enumerate(chunks):
        plgpu.copy_smem_to_gmem(smem.at[c], gmem.at[:, columns])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
