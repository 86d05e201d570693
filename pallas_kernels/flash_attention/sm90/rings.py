"""Rings of blocks in shared memory, and the warpgroup that fills them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.sm90.config import TILE_ROWS, Config, Problem
from pallas_kernels.flash_attention.sm90.tiles import Masks, Rows
from pallas_kernels.flash_attention.sm90.warpgroups import (
    NUM_CONSUMERS,
    for_each_head,
    for_each_tile,
)
from pallas_kernels.sm90 import Ref, at_step, matrices


class Ring(NamedTuple):
    """Stages in shared memory that the memory warpgroup fills and both consumers empty.

    Steps are numbered through all tiles of a CTA, because barriers keep their phase between tiles.
    The same tuple holds the types of the scratch before the kernel runs.
    """

    smems: tuple[Ref, ...]
    full: Ref
    free: Ref

    def slot(self, step: jax.Array) -> jax.Array:
        num_stages = self.smems[0].shape[0]
        return at_step(0, step) if num_stages == 1 else lax.rem(step, jnp.int32(num_stages))

    def fill(self, step: jax.Array, *gmems: Ref) -> None:
        slot = self.slot(step)

        @pl.when(step >= self.smems[0].shape[0])
        def _():
            plgpu.barrier_wait(self.free.at[slot])

        for gmem, smem in zip(gmems, self.smems, strict=True):
            plgpu.copy_gmem_to_smem(gmem, smem.at[slot], self.full.at[slot])

    def wait(self, step: jax.Array) -> None:
        plgpu.barrier_wait(self.full.at[self.slot(step)])

    def release(self, step: jax.Array) -> None:
        plgpu.barrier_arrive(self.free.at[self.slot(step)])


def ring(num_stages: int, *smems: Ref) -> Ring:
    """Scratch of a Ring; one copy per step fills each of `smems`."""
    return Ring(
        smems,
        plgpu.Barrier(num_barriers=num_stages, num_arrivals=len(smems)),
        plgpu.Barrier(num_barriers=num_stages, num_arrivals=NUM_CONSUMERS),
    )


def key_rings(problem: Problem, config: Config, dtype) -> tuple[Ring, Ring]:
    """Scratch for the blocks of keys and of values."""
    k_stages, v_stages = config.num_stages
    return (
        ring(k_stages, matrices((k_stages, config.block, problem.K), dtype)),
        ring(v_stages, matrices((v_stages, config.block, problem.H), dtype)),
    )


def load_keys(
    problem: Problem, config: Config, masks: Masks, tiles: Ref, k_gmem: Rows, v_gmem: Rows,
    keys: Ring, values: Ring,
) -> None:  # fmt: skip
    """Fills the rings with the blocks of keys and values that the tiles of queries meet."""

    def load_tile(read_tile, begin):
        tile = read_tile(begin)
        b, g = tile.b, tile.head // problem.group
        key_end = masks.key_ends[b]  # here, because a load per block would delay every copy

        def load_block(step, _):
            j = tile.block(step - begin)

            def fill(k_rows, v_rows, j):
                block = b, pl.ds(j * config.block, config.block), g
                keys.fill(step, k_rows.at[block])
                values.fill(step, v_rows.at[block])

            def fill_from_whole():
                fill(k_gmem.whole, v_gmem.whole, j)

            def fill_from_last_tile():
                j_in_tile = lax.rem(j, jnp.int32(TILE_ROWS // config.block))
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


def query_rings(
    problem: Problem, config: Config, dtype, columns: int | None = None
) -> tuple[Ring, Ring]:
    """Scratch for the blocks of queries, with what starts their sums, and of cotangents."""
    q_stages, dout_stages = config.num_stages
    q_smem = matrices((q_stages, config.block, problem.K), dtype, columns)
    dout_smem = matrices((dout_stages, config.block, problem.H), dtype)
    stats_smem = plgpu.SMEM((q_stages, 2, config.block), jnp.float32)
    return ring(q_stages, q_smem, stats_smem), ring(dout_stages, dout_smem)


def load_queries(
    problem: Problem, config: Config, tiles: Ref, q_gmem: Ref, dout_gmem: Ref, stats_gmem: Ref,
    queries: Ring, douts: Ring,
) -> None:  # fmt: skip
    """Fills the rings with the blocks of queries and cotangents that the tiles of keys meet."""

    def load_tile(read_tile, begin):
        tile = read_tile(begin)

        def load_head(head, begin):
            n = tile.head * problem.heads_per_split + head

            def load_block(step, _):
                block = pl.ds(tile.block(step - begin) * config.block, config.block)
                queries.fill(step, q_gmem.at[tile.b, block, n], stats_gmem.at[tile.b, n, :, block])
                douts.fill(step, dout_gmem.at[tile.b, block, n])

            end = begin + tile.num_blocks
            lax.fori_loop(begin, end, load_block, None)
            return end

        return for_each_head(problem, load_head, begin)

    for_each_tile(tiles, load_tile)
