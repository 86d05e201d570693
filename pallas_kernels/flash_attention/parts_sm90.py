"""What the Hopper kernels share: their three warpgroups, rings of blocks, the walk over tiles."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_compat
from pallas_kernels.flash_attention.config_sm90 import TILE, Config, Problem
from pallas_kernels.flash_attention.work_sm90 import Masks, Rows, Tile

MATRIX = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)
Accumulator = plgpu.WGMMAAccumulatorRef
NUM_CONSUMERS = 2


def matrices(shape, dtype, columns=None):
    """Shared memory for matrices that wgmma reads, `columns` of them at a time (None: all)."""
    width = columns or shape[-1]
    return plgpu.SMEM(shape, dtype, transforms=mosaic_compat.matmul_tiles(width, dtype))


def ring(num_stages, *smems):
    """Scratch of a Ring; every one of `smems` is filled by one copy a step."""
    return (
        smems,
        plgpu.Barrier(num_barriers=num_stages, num_arrivals=len(smems)),
        plgpu.Barrier(num_barriers=num_stages, num_arrivals=NUM_CONSUMERS),
    )


@dataclasses.dataclass(frozen=True)
class Ring:
    """Stages in shared memory that the memory warpgroup fills and both consumers empty.

    Steps are numbered through all tiles of a CTA, for barriers keep their phase between tiles.
    """

    smems: Any
    full: Any
    free: Any

    def slot(self, step):
        num_stages = self.smems[0].shape[0]
        return at_step(0, step) if num_stages == 1 else lax.rem(step, jnp.int32(num_stages))

    def fill(self, step, *gmems):
        slot = self.slot(step)

        @pl.when(step >= self.smems[0].shape[0])
        def _():
            plgpu.barrier_wait(self.free.at[slot])

        for gmem, smem in zip(gmems, self.smems, strict=True):
            plgpu.copy_gmem_to_smem(gmem, smem.at[slot], self.full.at[slot])

    def wait(self, step):
        plgpu.barrier_wait(self.full.at[self.slot(step)])

    def release(self, step):
        plgpu.barrier_arrive(self.free.at[self.slot(step)])


def run_kernel(body, name, *, out_type, num_ctas, config: Config, scratch_types, sum_type=None):
    """`plgpu.kernel` whose body is a pair: what loads, and what each consumer does.

    With `sum_type`, one more result comes first: a sum that starts from zeros.
    """

    def kernel(*refs, **scratch):
        load, consume = body(*refs, **scratch)
        wg = lax.axis_index("wg")

        @pl.when(wg == NUM_CONSUMERS)
        def _():
            plgpu.set_max_registers(config.memory_registers, action="decrease")
            load()

        for consumer in range(NUM_CONSUMERS):  # a branch each: constant addresses save registers

            @pl.when(wg == consumer)
            def _(consumer=consumer):
                plgpu.set_max_registers(config.registers, action="increase")
                consume(consumer)

    launch: Any = plgpu.kernel
    if sum_type is not None:
        launch = functools.partial(mosaic_compat.summing_kernel, sum_type=sum_type)
    return launch(
        kernel,
        out_type=out_type,
        grid=(num_ctas,),
        grid_names=("cta",),
        num_threads=NUM_CONSUMERS + 1,
        thread_name="wg",
        kernel_name=name,
        compiler_params=mosaic_compat.compiler_params(),
        scratch_types=scratch_types,
    )


def for_each_tile(tiles_gmem, body):
    """`step = body(read_tile, step)` for this CTA's tiles, with step 0 for the first.

    read_tile(step) may be called again behind a loop, in which fields would occupy registers.
    """
    cta, num_ctas = lax.axis_index("cta"), lax.axis_size("cta")
    num_turns = (tiles_gmem.shape[0] - cta + num_ctas - 1) // num_ctas

    def visit(turn, step):
        def read_tile(step):
            index = at_step(turn * num_ctas + cta, step)
            return Tile(*(tiles_gmem[index, field] for field in range(len(Tile._fields))))

        return body(read_tile, step)

    lax.fori_loop(0, num_turns, visit, jnp.int32(0))


def key_rings(problem: Problem, config: Config, dtype) -> dict[str, Any]:
    """Scratch for the blocks of keys and values."""
    k_stages, v_stages = config.num_stages
    return {
        "keys": ring(k_stages, matrices((k_stages, config.block, problem.K), dtype)),
        "values": ring(v_stages, matrices((v_stages, config.block, problem.H), dtype)),
    }


def load_keys(
    problem: Problem, config: Config, masks: Masks, tiles, k_gmem: Rows, v_gmem: Rows, keys: Ring,
    values: Ring,
):  # fmt: skip
    """Fills the rings with the blocks of keys and values that the tiles of queries meet."""

    def load_tile(read_tile, begin):
        tile = read_tile(begin)
        b, g = tile.b, tile.head // problem.group
        key_end = masks.key_ends[b]  # here, for a load a block would delay every copy

        def load_block(step, _):
            j = tile.block(step - begin)

            def fill(k_rows, v_rows, j):
                block = b, pl.ds(j * config.block, config.block), g
                keys.fill(step, k_rows.at[block])
                values.fill(step, v_rows.at[block])

            def fill_from_whole():
                fill(k_gmem.whole, v_gmem.whole, j)

            def fill_from_last_tile():
                j_in_tile = lax.rem(j, jnp.int32(TILE // config.block))
                fill(k_gmem.last_tile, v_gmem.last_tile, j_in_tile)

            if k_gmem.last_tile is None:
                fill_from_whole()
            else:
                is_last = (j + 1) * config.block > key_end
                lax.cond(is_last, fill_from_last_tile, fill_from_whole)

        end = begin + tile.num_blocks
        lax.fori_loop(begin, end, load_block, None)
        return end

    for_each_tile(tiles, load_tile)


def query_rings(problem: Problem, config: Config, dtype, columns=None) -> dict[str, Any]:
    """Scratch for the blocks of queries, with what starts their sums, and of cotangents."""
    q_stages, dout_stages = config.num_stages
    q_smem = matrices((q_stages, config.block, problem.K), dtype, columns)
    dout_smem = matrices((dout_stages, config.block, problem.H), dtype)
    stats_smem = plgpu.SMEM((q_stages, 2, config.block), jnp.float32)
    return {"queries": ring(q_stages, q_smem, stats_smem), "douts": ring(dout_stages, dout_smem)}


def load_queries(
    problem: Problem, config: Config, tiles, q_gmem, dout_gmem, stats_gmem, queries: Ring,
    douts: Ring,
):  # fmt: skip
    """Fills the rings with the blocks of queries and cotangents that the tiles of keys meet."""

    def load_tile(read_tile, begin):
        tile = read_tile(begin)

        def load_head(head, begin):
            n = tile.head * problem.part + head

            def load_block(step, _):
                block = pl.ds(tile.block(step - begin) * config.block, config.block)
                queries.fill(step, q_gmem.at[tile.b, block, n], stats_gmem.at[tile.b, n, :, block])
                douts.fill(step, dout_gmem.at[tile.b, block, n])

            end = begin + tile.num_blocks
            lax.fori_loop(begin, end, load_block, None)
            return end

        return for_each_head(problem, load_head, begin)

    for_each_tile(tiles, load_tile)


def store(value, smem, gmem):
    """Stores through `smem`, which may be overwritten after wait_smem_to_gmem."""
    smem[...] = value.astype(smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, gmem)


def for_each_block(tile: Tile, begin, body, carry):
    """`carry = body(is_masked, step, carry)` for every block that the tile meets."""
    middle, end = begin + tile.num_masked, begin + tile.num_blocks
    carry = lax.fori_loop(begin, middle, functools.partial(body, True), carry)
    return lax.fori_loop(middle, end, functools.partial(body, False), carry)


def at_step(index: jax.Array | int, step):
    """`index` as a value of the step, so that addresses made of it are not computed in front of the
    loop, from where they would occupy registers."""
    return index + lax.shift_right_logical(step, jnp.int32(31))  # + 0


def for_each_head(problem: Problem, body, carry):
    """`carry = body(head, carry)` for the query heads of a part of a group."""
    if problem.part == 1:
        return body(0, carry)
    return lax.fori_loop(0, problem.part, body, carry)


def packed(x) -> jax.Array:
    """Keeps 16-bit values two a register; a later cast to float32 would keep each in its own."""
    return lax.optimization_barrier(x)


def zeros(shape) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), MATRIX)


def per_row(vector, shape) -> jax.Array:
    return lax.broadcast_in_dim(vector, shape, [0])


def per_column(vector, shape) -> jax.Array:
    return lax.broadcast_in_dim(vector, shape, [1])


def add_products(*sums) -> list[Any]:
    """acc + a @ b for each (acc, a, b), all issued before the wait.

    Rows of tiles in shared memory come from `at_step`: pl.run_state takes no constant index.
    """

    def issue(refs):
        for ref, (_, a, b) in zip(refs, sums, strict=True):
            plgpu.wgmma(ref, a, b)

    return pl.run_state(issue)([Accumulator.init(acc) for acc, _, _ in sums])


def hide_keys(problem: Problem, masks: Masks, b, first_query, first_key, scores) -> jax.Array:
    """Scores "queries keys" of one block, -inf where the definition of the op hides a key."""
    shape = scores.shape
    scores = _hide_other_segments(scores, masks.query_ids, masks.key_ids, b, first_query, first_key)
    # One bound a row: a difference of two iotas would be kept in a register an element.
    bound = jnp.broadcast_to(masks.key_ends[b], shape[:1])
    if problem.causal:
        query = first_query + plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=PER_ROW)
        bound = jnp.minimum(bound, query + (problem.offset + 1))
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
    return jnp.where(column < per_row(bound - first_key, shape), scores, -jnp.inf)


def hide_queries(problem: Problem, masks: Masks, b, first_query, first_key, scores) -> jax.Array:
    """The same for transposed scores "keys queries"."""
    shape = scores.shape
    scores = _hide_other_segments(scores, masks.key_ids, masks.query_ids, b, first_key, first_query)
    key = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=PER_ROW)
    # The first query of the block that sees a key: none if the key is hidden from all.
    first = key + (first_key - problem.offset - first_query) if problem.causal else 0 * key
    num_seen = masks.key_ends[b] - first_key
    first = jnp.where(key < num_seen, first, shape[1])
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
    return jnp.where(column >= per_row(first, shape), scores, -jnp.inf)


def _hide_other_segments(scores, row_ids, column_ids, b, first_row, first_column):
    if row_ids is None:
        return scores
    shape = scores.shape
    rows = row_ids.at[b, pl.ds(first_row, shape[0])]
    columns = column_ids.at[b, pl.ds(first_column, shape[1])]
    rows = mosaic_compat.load(rows, PER_ROW, is_optimized=False)
    columns = mosaic_compat.load(columns, PER_COLUMN, is_optimized=False)
    return jnp.where(per_row(rows, shape) == per_column(columns, shape), scores, -jnp.inf)
