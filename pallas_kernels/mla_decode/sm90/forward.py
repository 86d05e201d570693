"""The main kernel of paged absorbed MLA decode on Hopper. NOTES.md has reasons and figures.

Two warpgroups compute, each with half of the output's columns, and a third one copies. The left one
also multiplies queries and keys and hands the probabilities to the right one. With many rows, when
matmuls are the limit, they take pairs of blocks instead, and each scores one of the pair.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_compat
from pallas_kernels.hardware import WGMMA_ROWS
from pallas_kernels.mla_decode.plan import MLADecodePlan
from pallas_kernels.mla_decode.sm90.config import BLOCK_KV, Config
from pallas_kernels.mla_decode.sm90.operands import (
    Inputs,
    Outputs,
    Refs,
    Scratch,
    make_inputs,
    output_types,
    scratch_types,
)
from pallas_kernels.mla_decode.sm90.requests import (
    Request,
    for_each_request,
    own_rows,
    unmasked_end,
)
from pallas_kernels.mla_decode.sm90.results import store_half, store_lse
from pallas_kernels.mla_decode.sm90.softmax import (
    Softmax,
    add_scores,
    mask,
    start_softmax,
    zero_tail,
)
from pallas_kernels.sm90 import LN_2, PER_ROW, Accumulator, Ref, at_step, per_row

LEFT, RIGHT = range(2)  # the warpgroups that compute
DECAY, HIGHEST, TOTAL = range(3)  # rows of stats_smem in every slot


def forward(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    plan: MLADecodePlan,
    config: Config,
) -> Outputs:
    """out and lse of queries "B M X", and the partial results of requests that several parts read.

    Requests that are split have nothing in out and lse yet.
    """
    kernel = plgpu.kernel(
        functools.partial(_kernel, config=config),
        out_type=tuple(output_types(q, plan, config)),
        # Tiles of one part are neighbours: they read the same pages at the same time, out of L2.
        grid=(plan.num_parts, -(-q.shape[1] // WGMMA_ROWS)),
        grid_names=("part", "tile"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types={"scratch": scratch_types(config, q.dtype)},
        # No barriers but those that the code names: NOTES.md says why they are enough.
        compiler_params=mosaic_compat.compiler_params(unsafe_no_auto_barriers=True),
        kernel_name="mla_decode",
    )
    return Outputs(*kernel(make_inputs(q, kv_pages, page_table, lengths, plan)))


def _kernel(inputs: Inputs, *outputs: Ref, scratch: Scratch, config: Config) -> None:
    if config.reuses_rope:
        scratch = scratch._replace(p_smem=scratch.k_rope_smem)
    refs = Refs(inputs, Outputs(*outputs), scratch)
    left, right, memory = (
        functools.partial(role, refs, config) for role in (_left, _right, _memory)
    )
    warpgroup = lax.axis_index("warpgroup")
    # Alternatives, not one after the other: what a later one needs would take an earlier one's
    # registers.
    lax.cond(warpgroup == LEFT, left, lambda: lax.cond(warpgroup == RIGHT, right, memory))


def _memory(refs: Refs, config: Config) -> None:
    """Fetches queries and blocks of pages, as far ahead as there is space."""
    plgpu.set_max_registers(config.memory_registers, action="decrease")
    inputs, scratch = refs.inputs, refs.scratch
    half, slots = config.latent_dim // 2, config.num_slots
    blocks_per_page = inputs.kv_pages.shape[1] // BLOCK_KV

    def fetch_queries(request):
        plgpu.barrier_wait(scratch.q_free.at[0])
        q_gmem, full = inputs.q.at[request.index, own_rows()], scratch.q_full.at[0]
        plgpu.copy_gmem_to_smem(q_gmem.at[:, :half], scratch.q_smem.at[0, 0], full)
        plgpu.copy_gmem_to_smem(q_gmem.at[:, half : 2 * half], scratch.q_smem.at[0, 1], full)
        plgpu.copy_gmem_to_smem(q_gmem.at[:, 2 * half :], scratch.q_rope_smem.at[0], full)

    def fetch_block(i, page, step):
        slot = lax.rem(step, slots)
        tokens = pl.ds(lax.rem(i, blocks_per_page) * BLOCK_KV, BLOCK_KV)
        block = inputs.kv_pages.at[page, tokens]
        left, right = scratch.left_full.at[slot], scratch.right_full.at[slot]
        plgpu.barrier_wait(scratch.left_free.at[slot])
        plgpu.copy_gmem_to_smem(block.at[:, :half], scratch.kv_smem.at[slot, 0], left)
        plgpu.barrier_wait(scratch.right_free.at[slot])
        plgpu.copy_gmem_to_smem(block.at[:, half : 2 * half], scratch.kv_smem.at[slot, 1], right)
        plgpu.copy_gmem_to_smem(block.at[:, 2 * half :], scratch.k_rope_smem.at[slot], right)

    def fetch_request(request, step):
        last = jnp.maximum(request.end - 1, 0)

        def page_of(i):  # never an entry past the last used one: it may hold anything
            return inputs.page_table[request.index, lax.div(jnp.minimum(i, last), blocks_per_page)]

        def fetch(i, carry):
            step, page = carry
            next_page = page_of(i + 1)  # read a block ahead, so that no copy waits for the table
            fetch_block(i, page, step)
            return step + 1, next_page

        # Blocks that have a slot go before the queries, which wait for the last output to leave
        # their place.
        ahead = jnp.minimum(request.begin + slots, request.end)
        carry = lax.fori_loop(request.begin, ahead, fetch, (step, page_of(request.begin)))
        fetch_queries(request)
        return lax.fori_loop(ahead, request.end, fetch, carry)[0]

    step = for_each_request(inputs, fetch_request)
    # Every barrier ends observed.
    plgpu.barrier_wait(scratch.q_free.at[0])
    for slot in (lax.rem(step + i, slots) for i in range(slots)):
        plgpu.barrier_wait(scratch.left_free.at[slot])
        plgpu.barrier_wait(scratch.right_free.at[slot])


def _left(refs: Refs, config: Config) -> None:
    """Scores, softmax, and the left half of the output."""
    plgpu.set_max_registers(config.compute_registers, action="increase")
    scratch = refs.scratch
    plgpu.barrier_arrive(scratch.q_free.at[0])
    for slot in range(config.num_slots):
        plgpu.barrier_arrive(scratch.left_free.at[slot])

    def block(acc, request, is_masked, i, carry):
        step, softmax = carry
        slot = lax.rem(step, config.num_slots)
        scores = _scores(scratch, step, config)
        if is_masked:
            scores = mask(scores, request, i, config)
        top = scores.max(axis=1)
        decay, softmax, p = add_scores(scores, top, softmax, config)
        p = _publish(scratch, config, LEFT, slot, decay, softmax, p)
        if is_masked:
            zero_tail(scratch.kv_smem.at[slot, 0], request, i)
        _accumulate(acc, decay, p, scratch.kv_smem.at[slot, 0])
        plgpu.barrier_arrive(scratch.left_free.at[slot])
        return step + 1, softmax

    def pair(acc, _, carry):
        step, _ = block(acc, None, False, None, carry)
        slot = lax.rem(step, config.num_slots)
        _wait_block(scratch, slot)
        decay, softmax = _receive(scratch, RIGHT, slot)
        _accumulate(acc, decay, scratch.p_smem.at[slot], scratch.kv_smem.at[slot, 0])
        plgpu.barrier_arrive(scratch.left_free.at[slot])
        return step + 1, softmax

    def attend(request, step):
        carry = (step, start_softmax())
        (step, (highest, total)), acc = _walk(scratch, config, request, block, pair, carry)
        is_empty, total = total == 0, _or_one(total)
        scratch.lse_smem[...] = jnp.where(is_empty, -jnp.inf, (highest + jnp.log2(total)) * LN_2)
        plgpu.commit_smem()
        store_lse(refs, request)
        store_half(refs, request, LEFT, acc * per_row(1 / total, acc.shape))
        return step

    for_each_request(refs.inputs, attend)


def _right(refs: Refs, config: Config) -> None:
    """The right half of the output; in pairs also scores and softmax of every second block."""
    plgpu.set_max_registers(config.compute_registers, action="increase")
    scratch = refs.scratch
    plgpu.barrier_arrive(scratch.q_free.at[0])
    for slot in range(config.num_slots):
        plgpu.barrier_arrive(scratch.left_free.at[slot])
        plgpu.barrier_arrive(scratch.right_free.at[slot])

    def block(acc, request, is_masked, i, carry):
        slot = lax.rem(carry[0], config.num_slots)
        _wait_block(scratch, slot)
        plgpu.barrier_arrive(scratch.left_free.at[slot])
        decay, softmax = _receive(scratch, LEFT, slot)
        if is_masked:
            zero_tail(scratch.kv_smem.at[slot, 1], request, i)
        _accumulate(acc, decay, scratch.p_smem.at[slot], scratch.kv_smem.at[slot, 1])
        plgpu.barrier_arrive(scratch.right_free.at[slot])
        return carry[0] + 1, softmax.total

    def pair(acc, _, carry):
        step = carry[0]
        left, right = lax.rem(step, config.num_slots), lax.rem(step + 1, config.num_slots)
        scores = _scores(scratch, step + 1, config)
        top = scores.max(axis=1)
        _wait_block(scratch, left)
        plgpu.barrier_arrive(scratch.left_free.at[left])
        plgpu.barrier_arrive(scratch.left_free.at[right])
        left_decay, softmax = _receive(scratch, LEFT, left)
        decay, softmax, p = add_scores(scores, top, softmax, config)
        p = _publish(scratch, config, RIGHT, right, decay, softmax, p)
        _accumulate(acc, left_decay, scratch.p_smem.at[left], scratch.kv_smem.at[left, 1])
        plgpu.barrier_arrive(scratch.right_free.at[left])
        _accumulate(acc, decay, p, scratch.kv_smem.at[right, 1])
        plgpu.barrier_arrive(scratch.right_free.at[right])
        return step + 2, softmax.total

    def attend(request, step):
        carry = (step, start_softmax().total)
        (step, total), acc = _walk(scratch, config, request, block, pair, carry)
        store_half(refs, request, RIGHT, acc * per_row(1 / _or_one(total), acc.shape))
        return step

    for_each_request(refs.inputs, attend)


def _walk(
    scratch: Scratch,
    config: Config,
    request: Request,
    block: Callable[..., Any],
    pair: Callable[..., Any],
    carry: Any,
) -> tuple[Any, jax.Array]:
    """The blocks of a request: whole ones, in pairs or singly, then those with hidden keys.

    carry = pair(acc, index, carry), or block(acc, request, is_masked, i, carry) for block i.
    Returns the carry and this warpgroup's half of the output, not yet divided by the sum.
    """

    def walk(acc):
        plgpu.barrier_wait(scratch.q_full.at[0])
        begin, tail = request.begin, unmasked_end(request, config)
        if config.is_paired:
            pairs = lax.div(tail - begin, 2)
            tail = begin + 2 * pairs
            ends = lax.fori_loop(0, pairs, functools.partial(pair, acc), carry)
        else:
            ends = lax.fori_loop(begin, tail, functools.partial(block, acc, request, False), carry)
        masked = functools.partial(block, acc, request, True)
        return lax.fori_loop(tail, request.end, masked, ends), acc[...]

    half = (WGMMA_ROWS, config.latent_dim // 2)
    return pl.run_scoped(walk, Accumulator(half, jnp.float32))


def _or_one(total: jax.Array) -> jax.Array:
    """A divisor also for rows that saw no key, whose output is 0 already."""
    return jnp.where(total == 0, 1.0, total)


def _wait_block(scratch: Scratch, slot: jax.Array) -> None:
    """For keys that are not multiplied here: a waiter must see every phase of a barrier."""
    plgpu.barrier_wait(scratch.left_full.at[slot])
    plgpu.barrier_wait(scratch.right_full.at[slot])


def _scores(scratch: Scratch, step: jax.Array, config: Config) -> jax.Array:
    """q @ k.T of a block, begun when its left half is there."""
    slot = lax.rem(step, config.num_slots)
    # The addresses of all tiles of q would leave no registers.
    first = at_step(0, step, lax.shift_right_arithmetic)

    def multiply(acc):
        q_smem, kv_smem = scratch.q_smem, scratch.kv_smem
        plgpu.barrier_wait(scratch.left_full.at[slot])
        plgpu.wgmma(acc, q_smem.at[first, 0], kv_smem.at[slot, 0].transpose((1, 0)))
        plgpu.barrier_wait(scratch.right_full.at[slot])
        plgpu.wgmma(acc, q_smem.at[first, 1], kv_smem.at[slot, 1].transpose((1, 0)))
        k_rope = scratch.k_rope_smem.at[slot].transpose((1, 0))
        plgpu.wgmma(acc, scratch.q_rope_smem.at[first], k_rope)
        return acc[...]

    return pl.run_scoped(multiply, Accumulator((WGMMA_ROWS, BLOCK_KV), jnp.float32))


def _publish(
    scratch: Scratch,
    config: Config,
    side: int,
    slot: jax.Array,
    decay: jax.Array,
    softmax: Softmax,
    p: jax.Array,
) -> jax.Array:
    """Hands probabilities and softmax to the other warpgroup; returns p rounded.

    Only the slot's own barriers guard them: they are read before the slot is freed.
    """
    p = p.astype(scratch.p_smem.dtype)
    if config.reuses_rope:
        plgpu.commit_smem()  # a barrier: other warps may still multiply the keys in p's place
    scratch.p_smem[slot] = p
    for name, value in ((DECAY, decay), (HIGHEST, softmax.highest), (TOTAL, softmax.total)):
        scratch.stats_smem[slot, name] = value
    plgpu.commit_smem()
    plgpu.barrier_arrive(_p_full(scratch, side, slot))
    return p


def _receive(scratch: Scratch, side: int, slot: jax.Array) -> tuple[jax.Array, Softmax]:
    """The decay and the softmax that the other warpgroup published."""
    plgpu.barrier_wait(_p_full(scratch, side, slot))
    decay, highest, total = (
        mosaic_compat.load(scratch.stats_smem.at[slot, name], PER_ROW)
        for name in (DECAY, HIGHEST, TOTAL)
    )
    return decay, Softmax(highest, total)


def _p_full(scratch: Scratch, side: int, slot: jax.Array) -> Ref:
    return scratch.p_full.at[side * scratch.stats_smem.shape[0] + slot]


def _accumulate(acc: Ref, decay: jax.Array, p: jax.Array | Ref, v_smem: Ref) -> None:
    """acc = acc * decay + p @ v."""
    acc[...] = acc[...] * per_row(decay, acc.shape)
    plgpu.wgmma(acc, p, v_smem)
    plgpu.wgmma_wait(0)
