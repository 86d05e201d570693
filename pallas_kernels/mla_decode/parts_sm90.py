"""Pieces of the Hopper kernel of MLA decode that both schedules share: work, softmax, results."""

import math
from types import SimpleNamespace

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic_compat
from pallas_kernels.mla_decode.config_sm90 import BLOCK_KV, LOWEST
from pallas_kernels.mla_decode.plan import ROW_TILE

TILE = plgpu.Layout.WGMMA
ROW = TILE.reduce(1)  # one number a row of a TILE
LOG2_E = math.log2(math.e)


def for_each_request(refs, body):
    """Calls body(request, step) -> step for every request of this part; `step` counts blocks."""
    part = lax.axis_index("part")
    first, last = refs.begin_request_gmem[part], refs.end_request_gmem[part]
    begin_page, end_page = refs.begin_page_gmem[part], refs.end_page_gmem[part]
    begin_split = refs.begin_split_gmem[part]
    page_size = refs.kv_pages_gmem.shape[1]
    blocks_a_page = page_size // BLOCK_KV

    def visit(b, step):
        length = jnp.minimum(refs.lengths_gmem[b], refs.page_table_gmem.shape[1] * page_size)
        num_blocks = lax.div(length + (BLOCK_KV - 1), BLOCK_KV)
        # Lengths beyond the table's capacity count as all of it, but the plan does not know it.
        begin = jnp.where(b == first, jnp.minimum(begin_page * blocks_a_page, num_blocks), 0)
        end = jnp.where(b == last, jnp.minimum(end_page * blocks_a_page, num_blocks), num_blocks)
        slot = refs.num_splits_gmem[b]
        request = SimpleNamespace(
            index=b,
            length=length,
            begin=begin,
            end=jnp.maximum(begin, end),  # whatever the plan says, no role counts backwards
            is_split=refs.num_splits_gmem[b + 1] - slot > 1,
            split=slot + jnp.where(b == first, begin_split, 0),
        )
        return body(request, step)

    # `+ 0` for shard_map: what is read from memory has the type of an array that varies over the
    # mesh, a sum within a kernel has not, and a loop's counter may not change its type.
    return lax.fori_loop(first + 0, last + 1, visit, jnp.int32(0))


def row_tile():
    return pl.ds(lax.axis_index("tile") * ROW_TILE, ROW_TILE)


def unmasked_end(request, config):
    """The blocks before this one are seen whole by every row."""
    hidden = config.num_queries - 1 if config.causal else 0
    end = lax.div(jnp.maximum(request.length - hidden, 0), BLOCK_KV)
    return jnp.clip(end, request.begin, request.end)


def mask(scores, request, i, config):
    """-inf where a row may not see a key: behind the length, or behind the row's own token."""
    column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=TILE)
    border = request.length - i * BLOCK_KV
    if config.causal and config.num_queries > 1:
        row = plgpu.broadcasted_iota(jnp.int32, (ROW_TILE,), 0, layout=ROW)
        query = lax.div(row + lax.axis_index("tile") * ROW_TILE, config.num_heads)
        border = rows_of(border - (config.num_queries - 1 - query), scores)
    return jnp.where(column < border, scores, -jnp.inf)


def zero_tail(v_smem, request, i):
    """Zeroes values behind the length: their probability is 0, but 0 * NaN is NaN."""
    used = request.length - i * BLOCK_KV

    @pl.when(used < BLOCK_KV)
    def _():
        width = math.gcd(v_smem.shape[1], 64)
        for column in range(0, v_smem.shape[1], width):
            piece = v_smem.at[:, column : column + width]
            token = plgpu.broadcasted_iota(jnp.int32, piece.shape, 0, layout=TILE)
            values = mosaic_compat.load(piece, TILE)
            piece[...] = jnp.where(token < used, values, jnp.zeros_like(values))
        plgpu.commit_smem()


def start_softmax():
    """Maximum and sum of no scores."""
    highest = plgpu.layout_cast(jnp.full((ROW_TILE,), LOWEST, jnp.float32), ROW)
    return highest, plgpu.layout_cast(jnp.zeros((ROW_TILE,), jnp.float32), ROW)


def softmax(scores, top, highest, total, config):
    """One step of the online softmax in base 2, where `top` is the scores' maximum in a row.

    Returns what all before it decays by, the new maximum and sum, and the probabilities.
    """
    scale = config.scale * LOG2_E
    old, highest = highest, jnp.maximum(highest, top * scale)
    decay = jnp.exp2(old - highest)
    p = jnp.exp2(scores * scale - rows_of(highest, scores))
    return decay, highest, total * decay + p.sum(axis=1), p


def rows_of(vector, matrix):
    """The vector's numbers, one a row, as a matrix of this shape."""
    return lax.broadcast_in_dim(vector, matrix.shape, [0])


def store_lse(refs, request):
    """Copies exactly the rows there are: a copy of plain bytes does not stop at a row's end."""
    tile = lax.axis_index("tile")
    whole_tiles, rest = divmod(refs.lse_gmem.shape[1], ROW_TILE)

    def store(num_rows):
        source, rows = refs.lse_smem.at[:num_rows], pl.ds(tile * ROW_TILE, num_rows)

        @pl.when(request.is_split)
        def _():
            plgpu.copy_smem_to_gmem(source, refs.partial_lse_gmem.at[request.split, rows])

        @pl.when(~request.is_split)
        def _():
            plgpu.copy_smem_to_gmem(source, refs.lse_gmem.at[request.index, rows])

    if whole_tiles:
        pl.when(tile < whole_tiles)(lambda: store(ROW_TILE))
    if rest:
        pl.when(tile == whole_tiles)(lambda: store(rest))


def store_half(refs, request, side, result):
    """Writes half of the output's columns: a split's in float32, a whole request's in q's dtype."""
    half, width = result.shape[1], refs.partial_smem.shape[2]

    def store(value, staged, target, column=0):
        # Where the queries were, which have been read. A tensor copy: what it would write behind
        # the last row is cut off.
        staged[...] = value.astype(staged.dtype)
        plgpu.commit_smem()
        columns = pl.ds(side * half + column, value.shape[1])
        plgpu.copy_smem_to_gmem(staged, target.at[row_tile(), columns])

    @pl.when(request.is_split)
    def _():
        target = refs.partial_out_gmem.at[request.split]
        if target.shape[0] % ROW_TILE == 0:  # nothing to cut off
            target[row_tile(), pl.ds(side * half, half)] = result
            return
        for column in range(0, half, width):
            if column > 0:  # the piece before it is still being read
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            piece = result[:, column : column + width]
            store(piece, refs.partial_smem.at[side], target, column)

    @pl.when(~request.is_split)
    def _():
        store(result, refs.q_smem.at[0, side], refs.out_gmem.at[request.index])

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # also lse, where this warpgroup stored it
    plgpu.barrier_arrive(refs.q_free.at[0])
