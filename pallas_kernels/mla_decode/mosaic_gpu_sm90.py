"""Paged absorbed MLA decode on Hopper: launch and schedules. NOTES.md has reasons and figures.

Two warpgroups compute, each with half of the output's columns, and a third one copies. The left one
also multiplies queries and keys and shares the probabilities with the right one. With many rows,
when matmuls are the limit, they take pairs of blocks instead, and each scores one of the pair.
"""

import functools
import math
from types import SimpleNamespace

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from pallas_kernels import mosaic_compat, varying
from pallas_kernels.mla_decode.combine_sm90 import combine, combine_in_xla
from pallas_kernels.mla_decode.config_sm90 import (
    BLOCK_KV,
    ROW_ALIGNMENT,
    WARPGROUP,
    CombineConfig,
    Config,
)
from pallas_kernels.mla_decode.parts_sm90 import (
    ROW,
    for_each_request,
    mask,
    row_tile,
    rows_of,
    softmax,
    start_softmax,
    store_half,
    store_lse,
    unmasked_end,
    zero_tail,
)
from pallas_kernels.mla_decode.plan import ROW_TILE, mla_decode_plan

LN2 = math.log(2)
LEFT, RIGHT = range(2)  # the warpgroups that compute
DECAY, HIGHEST, TOTAL = range(3)  # of stats_smem, for every slot
INPUTS = (
    "q kv_pages page_table lengths begin_request begin_page end_request end_page begin_split"
    " num_splits"
).split()
OUTPUTS = "out lse partial_out partial_lse".split()


def mla_decode_sm90(q, kv_pages, page_table, lengths, *, latent_dim, scale, causal, plan):
    """See `mla_decode`."""
    if plan is None:
        num_rows = q.shape[1] * q.shape[2]
        plan = mla_decode_plan(lengths, num_rows=num_rows, page_size=kv_pages.shape[1])
    config = Config.of(q, latent_dim=latent_dim, scale=scale, causal=causal)
    page_table, lengths = (jnp.asarray(x, jnp.int32) for x in (page_table, lengths))
    operands = (q, kv_pages, page_table, lengths)
    # One after the other under vmap: a plan is one batch's, and run_scoped has no rule.
    out, lse = sequential_vmap(functools.partial(_decode, config))(*operands, plan)
    return varying.align(*operands, out, lse)[-2:]


@functools.partial(jax.jit, static_argnums=0)
def _decode(config: Config, q, kv_pages, page_table, lengths, plan):
    B, T, N, X = q.shape
    M = T * N
    q_BMX = jnp.pad(q.reshape(B, M, X), ((0, 0), (0, -M % ROW_ALIGNMENT), (0, 0)))
    out, lse, partial_out, partial_lse = main_kernel(
        q_BMX, kv_pages, page_table, lengths, plan, config
    )
    if plan.begin_request.shape[0] > 1:
        merge = combine_in_xla
        if config.latent_dim % WARPGROUP == 0:
            merge = functools.partial(combine, config=CombineConfig.of(B, q_BMX.shape[1]))
        out, lse = merge(out, lse, partial_out, partial_lse, plan.num_splits)
    return out[:, :M].reshape(B, T, N, config.latent_dim), lse[:, :M].reshape(B, T, N)


def main_kernel(q, kv_pages, page_table, lengths, plan, config: Config):
    """out, lse, and the partial results of requests that several parts read."""
    B, M, _ = q.shape
    tiles, parts = -(-M // ROW_TILE), plan.begin_request.shape[0]
    # A single part splits nothing, so there the kernel writes no partial result.
    splits = plan.max_splits if parts > 1 else 1
    # Fewer rows than a tile are written as they are, more in whole tiles: NOTES.md.
    partial_rows = M if M < ROW_TILE else tiles * ROW_TILE
    kernel = plgpu.kernel(
        functools.partial(_kernel, config=config),
        out_type=(
            jax.ShapeDtypeStruct((B, M, config.latent_dim), q.dtype),
            jax.ShapeDtypeStruct((B, M), jnp.float32),
            jax.ShapeDtypeStruct((splits, partial_rows, config.latent_dim), jnp.float32),
            jax.ShapeDtypeStruct((splits, M), jnp.float32),
        ),
        # Tiles of a part are neighbours: they read the same pages at the same time, out of L2.
        grid=(parts, tiles),
        grid_names=("part", "tile"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=_scratch(config, q.dtype),
        # Nothing but the barriers that the code names: NOTES.md says why they are enough.
        compiler_params=mosaic_compat.compiler_params(unsafe_no_auto_barriers=True),
        kernel_name="mla_decode",
    )
    return kernel(
        q,
        kv_pages,
        page_table,
        lengths,
        plan.begin_request,
        plan.begin_page,
        plan.end_request,
        plan.end_page,
        plan.begin_split,
        plan.num_splits,
    )


def _scratch(config, dtype):
    half, rope, slots = config.latent_dim // 2, config.rope_dim, config.num_slots
    # A copy's tile must divide a row in memory as well as its own part of it.
    tiled = mosaic_compat.matmul_tiles(math.gcd(half, config.latent_dim + rope), dtype)
    # Of 8 x 8: wider ones would need swaps of registers to be stored without bank conflicts.
    partial_tiles = (plgpu.TilingTransform((8, 8)),)
    barrier = functools.partial(plgpu.Barrier, num_barriers=slots)
    scratch = dict(
        # The two halves of the latent part; in the end the output on its way to memory, or half of
        # a partial one: float32 has twice the bytes.
        q_and_partial_smem=plgpu.RefUnion(
            plgpu.SMEM((1, 2, ROW_TILE, half), dtype, transforms=tiled),
            plgpu.SMEM((2, ROW_TILE, half // 2), jnp.float32, transforms=partial_tiles),
        ),
        q_rope_smem=plgpu.SMEM((1, ROW_TILE, rope), dtype, transforms=tiled),
        kv_smem=plgpu.SMEM((slots, 2, BLOCK_KV, half), dtype, transforms=tiled),
        k_rope_smem=plgpu.SMEM((slots, BLOCK_KV, rope), dtype, transforms=tiled),
        stats_smem=plgpu.SMEM((slots, 3, ROW_TILE), jnp.float32),
        lse_smem=plgpu.SMEM((ROW_TILE,), jnp.float32),
        q_full=barrier(num_barriers=1, num_arrivals=3),
        q_free=barrier(num_barriers=1, num_arrivals=2),
        left_full=barrier(),
        left_free=barrier(num_arrivals=2),  # no warpgroup may miss a phase of left_full
        right_full=barrier(num_arrivals=2),
        right_free=barrier(),
        # Of the left warpgroup's probabilities, then of the right one's.
        p_full=barrier(num_barriers=2 * slots),
    )
    if not config.reuses_rope:
        scratch["p_smem"] = plgpu.SMEM((slots, ROW_TILE, BLOCK_KV), dtype, transforms=tiled)
    return scratch


def _kernel(*gmem, config, **smem):
    names = [f"{name}_gmem" for name in INPUTS + OUTPUTS]
    smem["q_smem"], smem["partial_smem"] = smem.pop("q_and_partial_smem")
    if config.reuses_rope:
        smem["p_smem"] = smem["k_rope_smem"]
    refs = SimpleNamespace(**dict(zip(names, gmem, strict=True)), **smem)
    roles = [functools.partial(role, refs, config) for role in (_left, _right, _memory)]
    warpgroup = lax.axis_index("warpgroup")
    # Alternatives, not one after the other: what a later one needs would take an earlier one's
    # registers.
    lax.cond(warpgroup == LEFT, roles[0], lambda: lax.cond(warpgroup == RIGHT, *roles[1:]))


def _memory(refs, config):
    """Fetches queries and blocks of pages, as far ahead as there is space."""
    plgpu.set_max_registers(config.memory_registers, action="decrease")
    half, slots = config.latent_dim // 2, config.num_slots
    blocks_a_page = refs.kv_pages_gmem.shape[1] // BLOCK_KV

    def fetch_queries(request):
        plgpu.barrier_wait(refs.q_free.at[0])
        q_gmem, full = refs.q_gmem.at[request.index, row_tile()], refs.q_full.at[0]
        plgpu.copy_gmem_to_smem(q_gmem.at[:, :half], refs.q_smem.at[0, 0], full)
        plgpu.copy_gmem_to_smem(q_gmem.at[:, half : 2 * half], refs.q_smem.at[0, 1], full)
        plgpu.copy_gmem_to_smem(q_gmem.at[:, 2 * half :], refs.q_rope_smem.at[0], full)

    def fetch_block(i, page, step):
        slot = lax.rem(step, slots)
        tokens = pl.ds(lax.rem(i, blocks_a_page) * BLOCK_KV, BLOCK_KV)
        block = refs.kv_pages_gmem.at[page, tokens]
        left, right = refs.left_full.at[slot], refs.right_full.at[slot]
        plgpu.barrier_wait(refs.left_free.at[slot])
        plgpu.copy_gmem_to_smem(block.at[:, :half], refs.kv_smem.at[slot, 0], left)
        plgpu.barrier_wait(refs.right_free.at[slot])
        plgpu.copy_gmem_to_smem(block.at[:, half : 2 * half], refs.kv_smem.at[slot, 1], right)
        plgpu.copy_gmem_to_smem(block.at[:, 2 * half :], refs.k_rope_smem.at[slot], right)

    def fetch_request(request, step):
        last = jnp.maximum(request.end - 1, 0)

        def page_of(i):  # never an entry behind the last used one: it may hold anything
            return refs.page_table_gmem[request.index, lax.div(jnp.minimum(i, last), blocks_a_page)]

        def fetch(i, carry):
            step, page = carry
            next_page = page_of(i + 1)  # read a block ahead, so that no copy waits for the table
            fetch_block(i, page, step)
            return step + 1, next_page

        # Blocks that have a slot go before the queries, whose place the last output leaves late.
        ahead = jnp.minimum(request.begin + slots, request.end)
        carry = lax.fori_loop(request.begin, ahead, fetch, (step, page_of(request.begin)))
        fetch_queries(request)
        return lax.fori_loop(ahead, request.end, fetch, carry)[0]

    step = for_each_request(refs, fetch_request)
    # Every barrier ends observed.
    plgpu.barrier_wait(refs.q_free.at[0])
    for slot in (lax.rem(step + i, slots) for i in range(slots)):
        plgpu.barrier_wait(refs.left_free.at[slot])
        plgpu.barrier_wait(refs.right_free.at[slot])


def _left(refs, config):
    """Scores, softmax, and the left half of the output."""
    plgpu.set_max_registers(config.compute_registers, action="increase")
    plgpu.barrier_arrive(refs.q_free.at[0])
    for slot in range(config.num_slots):
        plgpu.barrier_arrive(refs.left_free.at[slot])

    def block(acc, request, is_masked, i, carry):
        step, highest, total = carry
        slot = lax.rem(step, config.num_slots)
        scores = _scores(refs, step, config)
        if is_masked:
            scores = mask(scores, request, i, config)
        top = scores.max(axis=1)
        decay, highest, total, p = softmax(scores, top, highest, total, config)
        p = _publish(refs, config, LEFT, slot, decay, highest, total, p)
        if is_masked:
            zero_tail(refs.kv_smem.at[slot, 0], request, i)
        _accumulate(acc, decay, p, refs.kv_smem.at[slot, 0])
        plgpu.barrier_arrive(refs.left_free.at[slot])
        return step + 1, highest, total

    def pair(acc, _, carry):
        step, *_ = block(acc, None, False, None, carry)
        slot = lax.rem(step, config.num_slots)
        _wait_block(refs, slot)
        decay, highest, total = _receive(refs, RIGHT, slot)
        _accumulate(acc, decay, refs.p_smem.at[slot], refs.kv_smem.at[slot, 0])
        plgpu.barrier_arrive(refs.left_free.at[slot])
        return step + 1, highest, total

    def attend(request, step):
        carry = (step, *start_softmax())
        (step, highest, total), acc = _walk(refs, config, request, block, pair, carry)
        is_empty, total = total == 0, _at_least_something(total)
        refs.lse_smem[...] = jnp.where(is_empty, -jnp.inf, (highest + jnp.log2(total)) * LN2)
        plgpu.commit_smem()
        store_lse(refs, request)
        store_half(refs, request, LEFT, acc * rows_of(1 / total, acc))
        return step

    for_each_request(refs, attend)


def _right(refs, config):
    """The right half of the output; in pairs also scores and softmax of every second block."""
    plgpu.set_max_registers(config.compute_registers, action="increase")
    plgpu.barrier_arrive(refs.q_free.at[0])
    for slot in range(config.num_slots):
        plgpu.barrier_arrive(refs.left_free.at[slot])
        plgpu.barrier_arrive(refs.right_free.at[slot])

    def block(acc, request, is_masked, i, carry):
        slot = lax.rem(carry[0], config.num_slots)
        _wait_block(refs, slot)
        plgpu.barrier_arrive(refs.left_free.at[slot])
        decay, _, total = _receive(refs, LEFT, slot)
        if is_masked:
            zero_tail(refs.kv_smem.at[slot, 1], request, i)
        _accumulate(acc, decay, refs.p_smem.at[slot], refs.kv_smem.at[slot, 1])
        plgpu.barrier_arrive(refs.right_free.at[slot])
        return carry[0] + 1, total

    def pair(acc, _, carry):
        step = carry[0]
        left, right = lax.rem(step, config.num_slots), lax.rem(step + 1, config.num_slots)
        scores = _scores(refs, step + 1, config)
        top = scores.max(axis=1)
        _wait_block(refs, left)
        plgpu.barrier_arrive(refs.left_free.at[left])
        plgpu.barrier_arrive(refs.left_free.at[right])
        left_decay, highest, total = _receive(refs, LEFT, left)
        decay, highest, total, p = softmax(scores, top, highest, total, config)
        p = _publish(refs, config, RIGHT, right, decay, highest, total, p)
        _accumulate(acc, left_decay, refs.p_smem.at[left], refs.kv_smem.at[left, 1])
        plgpu.barrier_arrive(refs.right_free.at[left])
        _accumulate(acc, decay, p, refs.kv_smem.at[right, 1])
        plgpu.barrier_arrive(refs.right_free.at[right])
        return step + 2, total

    def attend(request, step):
        carry = (step, start_softmax()[1])
        (step, total), acc = _walk(refs, config, request, block, pair, carry)
        store_half(refs, request, RIGHT, acc * rows_of(1 / _at_least_something(total), acc))
        return step

    for_each_request(refs, attend)


def _walk(refs, config, request, block, pair, carry):
    """The blocks of a request: whole ones, in pairs or singly, then those with hidden keys.

    Returns the carry and this warpgroup's half of the output, not yet divided by the sum.
    """

    def walk(acc):
        plgpu.barrier_wait(refs.q_full.at[0])
        begin, tail = request.begin, unmasked_end(request, config)
        if config.is_paired:
            pairs = lax.div(tail - begin, 2)
            tail = begin + 2 * pairs
            ends = lax.fori_loop(0, pairs, functools.partial(pair, acc), carry)
        else:
            ends = lax.fori_loop(begin, tail, functools.partial(block, acc, request, False), carry)
        masked = functools.partial(block, acc, request, True)
        return lax.fori_loop(tail, request.end, masked, ends), acc[...]

    half = (ROW_TILE, config.latent_dim // 2)
    return pl.run_scoped(walk, plgpu.WGMMAAccumulatorRef(half, jnp.float32))


def _at_least_something(total):
    """A divisor for rows that saw no key, whose output is 0 already."""
    return jnp.where(total == 0, 1.0, total)


def _wait_block(refs, slot):
    """For keys that are not multiplied here: a barrier is waited for in every phase or in none."""
    plgpu.barrier_wait(refs.left_full.at[slot])
    plgpu.barrier_wait(refs.right_full.at[slot])


def _scores(refs, step, config):
    """q @ k.T of a block, begun when its left half is there."""
    slot = lax.rem(step, config.num_slots)
    # 0, but not for the compiler: it would keep the address of every piece of q in registers, and
    # then there are none left.
    zero = lax.shift_right_arithmetic(step, 31)

    def multiply(acc):
        plgpu.barrier_wait(refs.left_full.at[slot])
        plgpu.wgmma(acc, refs.q_smem.at[zero, 0], refs.kv_smem.at[slot, 0].transpose((1, 0)))
        plgpu.barrier_wait(refs.right_full.at[slot])
        plgpu.wgmma(acc, refs.q_smem.at[zero, 1], refs.kv_smem.at[slot, 1].transpose((1, 0)))
        plgpu.wgmma(acc, refs.q_rope_smem.at[zero], refs.k_rope_smem.at[slot].transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROW_TILE, BLOCK_KV), jnp.float32))


def _publish(refs, config, side, slot, decay, highest, total, p):
    """Hands probabilities and the state of the softmax to the other warpgroup; returns p rounded.

    Nothing but the slot's own barriers guards them: they are read before the slot is freed.
    """
    p = p.astype(refs.p_smem.dtype)
    if config.reuses_rope:
        plgpu.commit_smem()  # a barrier: other warps may still multiply the keys in p's place
    refs.p_smem[slot] = p
    for name, value in ((DECAY, decay), (HIGHEST, highest), (TOTAL, total)):
        refs.stats_smem[slot, name] = value
    plgpu.commit_smem()
    plgpu.barrier_arrive(_p_full(refs, side, slot))
    return p


def _receive(refs, side, slot):
    plgpu.barrier_wait(_p_full(refs, side, slot))
    stats = (refs.stats_smem.at[slot, name] for name in (DECAY, HIGHEST, TOTAL))
    return tuple(mosaic_compat.load(stat, ROW) for stat in stats)


def _p_full(refs, side, slot):
    return refs.p_full.at[side * refs.stats_smem.shape[0] + slot]


def _accumulate(acc, decay, p, v_smem):
    """acc = acc * decay + p @ v."""
    acc[...] = acc[...] * rows_of(decay, acc)
    plgpu.wgmma(acc, p, v_smem)
    plgpu.wgmma_wait(0)
