"""How a warpgroup writes lse and its half of the output: of a whole request, or of a split."""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hardware import WGMMA_ROWS
from pallas_kernels.mla_decode.sm90.operands import Refs
from pallas_kernels.mla_decode.sm90.requests import Request, own_rows


def store_lse(refs: Refs, request: Request) -> None:
    """Copies exactly the rows there are: a copy of plain bytes does not stop at a row's end."""
    lse_gmem, partial_lse_gmem = refs.outputs.lse, refs.outputs.partial_lse
    tile = lax.axis_index("tile")
    whole_tiles, rest = divmod(lse_gmem.shape[1], WGMMA_ROWS)

    def store(num_rows):
        source = refs.scratch.lse_smem.at[:num_rows]
        rows = pl.ds(tile * WGMMA_ROWS, num_rows)

        @pl.when(request.is_split)
        def _():
            plgpu.copy_smem_to_gmem(source, partial_lse_gmem.at[request.split, rows])

        @pl.when(~request.is_split)
        def _():
            plgpu.copy_smem_to_gmem(source, lse_gmem.at[request.index, rows])

    if whole_tiles:
        pl.when(tile < whole_tiles)(lambda: store(WGMMA_ROWS))
    if rest:
        pl.when(tile == whole_tiles)(lambda: store(rest))


def store_half(refs: Refs, request: Request, side: int, result: jax.Array) -> None:
    """Writes half of the output's columns: a split's in float32, a whole request's in q's dtype."""
    scratch, outputs = refs.scratch, refs.outputs
    half, width = result.shape[1], scratch.partial_smem.shape[2]

    def store(value, staged, target, column=0):
        # Where the queries were, which have been read. A tensor copy: it cuts off what it would
        # write after the last row.
        staged[...] = value.astype(staged.dtype)
        plgpu.commit_smem()
        columns = pl.ds(side * half + column, value.shape[1])
        plgpu.copy_smem_to_gmem(staged, target.at[own_rows(), columns])

    @pl.when(request.is_split)
    def _():
        target = outputs.partial_out.at[request.split]
        if target.shape[0] % WGMMA_ROWS == 0:  # nothing to cut off
            target[own_rows(), pl.ds(side * half, half)] = result
            return
        for column in range(0, half, width):
            if column > 0:  # the columns before these are still being read
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            columns = result[:, column : column + width]
            store(columns, scratch.partial_smem.at[side], target, column)

    @pl.when(~request.is_split)
    def _():
        store(result, scratch.q_smem.at[0, side], outputs.out.at[request.index])

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # also lse, where this warpgroup stored it
    plgpu.barrier_arrive(scratch.q_free.at[0])
