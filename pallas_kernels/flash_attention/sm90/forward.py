"""Flash attention forward on Hopper: two warpgroups of 64 queries take turns on the tensor cores.

A third warpgroup loads keys and values. NOTES.md has the schedule and its figures.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.sm90.config import FORWARD, TILE_ROWS, Config, Problem
from pallas_kernels.flash_attention.sm90.masking import hide_keys
from pallas_kernels.flash_attention.sm90.rings import Ring, key_rings, load_keys
from pallas_kernels.flash_attention.sm90.tiles import Masks, Rows, key_rows, query_tiles
from pallas_kernels.flash_attention.sm90.warpgroups import (
    NUM_CONSUMERS,
    Roles,
    for_each_block,
    for_each_tile,
    run_kernel,
)
from pallas_kernels.hardware import WGMMA_ROWS
from pallas_kernels.sm90 import (
    LN_2,
    LOG2_E,
    Accumulator,
    Ref,
    add_products,
    at_step,
    matrices,
    per_row,
    row_vector,
    zeros,
)

Softmax = tuple[jax.Array, jax.Array, jax.Array]  # unnormalised out, maximum, sum


class Inputs(NamedTuple):
    q: Ref
    k: Rows
    v: Rows
    tiles: Ref
    masks: Masks


class Outputs(NamedTuple):
    out: Ref
    lse: Ref


class Scratch(NamedTuple):
    keys: Ring
    q_full: Ref
    q_smem: Ref
    turn: Ref
    values: Ring


def forward(
    problem: Problem,
    masks: Masks,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    num_sms: int,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns out "B T N H" and lse "B N T", T rounded up to whole tiles in lse."""
    config = config or FORWARD[problem.K, problem.H]
    k_rows, v_rows = key_rows(problem, masks, k, v)
    tiles = query_tiles(problem, masks, config, num_sms)
    lse_rows = -(-problem.T // TILE_ROWS) * TILE_ROWS
    chunk = math.gcd(problem.K, problem.H)
    num_chunks = problem.K // chunk
    keys, values = key_rings(problem, config, q.dtype)
    out, lse = run_kernel(
        functools.partial(_body, problem, config),
        "flash_attention_forward",
        Inputs(q, k_rows, v_rows, tiles, masks),
        Outputs(
            jax.ShapeDtypeStruct((problem.B, problem.T, problem.N, problem.H), q.dtype),
            jax.ShapeDtypeStruct((problem.B, problem.N, lse_rows), jnp.float32),
        ),
        Scratch(
            keys=keys,
            q_full=plgpu.Barrier(num_barriers=NUM_CONSUMERS, num_arrivals=num_chunks),
            # In chunks of columns, so that a narrower result can take the queries' place.
            q_smem=matrices((NUM_CONSUMERS, num_chunks, WGMMA_ROWS, chunk), q.dtype),
            turn=plgpu.Barrier(num_barriers=1, num_arrivals=NUM_CONSUMERS),
            values=values,
        ),
        num_ctas=min(num_sms, len(tiles)),
        config=config,
    )
    return out, lse


def _body(
    problem: Problem, config: Config, inputs: Inputs, outputs: tuple[Ref, Ref], scratch: Scratch
) -> Roles:
    q_gmem, k_gmem, v_gmem, tiles, masks = inputs
    out_gmem, lse_gmem = outputs
    turn = scratch.turn.at[0]

    def load():
        load_keys(problem, config, masks, tiles, k_gmem, v_gmem, scratch.keys, scratch.values)

    def consume(wg):
        def attend_tile(read_tile, begin):
            tile = read_tile(begin)
            first_query = tile.place * TILE_ROWS + wg * WGMMA_ROWS
            rows = tile.b, pl.ds(first_query, WGMMA_ROWS), tile.head
            own = scratch.q_smem.at[at_step(wg, begin)]
            _copy_in_chunks(q_gmem.at[rows], own, scratch.q_full.at[wg])

            def hide(step, scores):
                first_key = tile.masked_block(step - begin) * config.block
                return hide_keys(problem, masks, tile.b, first_query, first_key, scores)

            def meet(is_masked, step, softmax):
                hider = hide if is_masked else None
                own = scratch.q_smem.at[at_step(wg, step)]
                return _step(problem, step, softmax, own, scratch, turn, hider)

            softmax = zeros((WGMMA_ROWS, problem.H)), row_vector(-jnp.inf), row_vector(0)
            softmax = for_each_block(tile, begin, meet, softmax)
            out, lse = _normalise(*softmax)
            lse_gmem[tile.b, tile.head, rows[1]] = lse
            _store_in_chunks(out.astype(out_gmem.dtype), own, out_gmem.at[rows])
            return begin + tile.num_blocks

        if wg == 1:
            _take_turn(turn)
        for_each_tile(tiles, attend_tile)
        if wg == 0:
            _take_turn(turn)

    return load, consume


def _step(
    problem: Problem,
    step: jax.Array,
    softmax: Softmax,
    q_smem: Ref,
    scratch: Scratch,
    turn: Ref,
    hide: Callable[[jax.Array, jax.Array], jax.Array] | None,
) -> Softmax:
    """One block of keys, with the consumers half a step apart: one multiplies meanwhile."""
    keys, values = scratch.keys, scratch.values
    acc, highest, total = softmax
    log2_scale = problem.scale * LOG2_E
    keys.wait(step)
    k_smem = keys.smems[0].at[keys.slot(step)]
    num_chunks, _, chunk = q_smem.shape

    def multiply_keys(ref):
        for c in range(num_chunks):
            plgpu.wgmma(ref, q_smem.at[c], k_smem.at[:, c * chunk : (c + 1) * chunk].T)
        _take_turn(turn)
        return ref[...]

    scores = pl.run_scoped(multiply_keys, Accumulator((WGMMA_ROWS, k_smem.shape[0]), jnp.float32))
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
    (acc,) = add_products((acc, p, v_smem))
    values.release(step)
    return acc, new_highest, total


def _take_turn(turn: Ref) -> None:
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def _normalise(acc: jax.Array, highest: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """out and natural lse; 0 and -inf where nothing was seen."""
    is_empty = total == 0
    inverse = jnp.where(is_empty, 0.0, 1 / total)
    lse = jnp.where(is_empty, -jnp.inf, highest * LN_2 + jnp.log(total))
    return acc * per_row(inverse, acc.shape), lse


def _copy_in_chunks(gmem: Ref, smem: Ref, barrier: Ref) -> None:
    num_chunks, _, chunk = smem.shape
    for c in range(num_chunks):
        plgpu.copy_gmem_to_smem(gmem.at[:, c * chunk : (c + 1) * chunk], smem.at[c], barrier)
    plgpu.barrier_wait(barrier)


def _store_in_chunks(value: jax.Array, smem: Ref, gmem: Ref) -> None:
    """Stores through `smem`, which may be overwritten on return."""
    chunk = smem.shape[-1]
    chunks = [slice(c, c + chunk) for c in range(0, value.shape[1], chunk)]
    for c, columns in enumerate(chunks):
        smem[c] = value[:, columns]
    plgpu.commit_smem()
    for c, columns in enumerate(chunks):
        plgpu.copy_smem_to_gmem(smem.at[c], gmem.at[:, columns])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
