"""What every Hopper kernel uses: wgmma's layouts, broadcasts along rows and columns, matmuls.

Importing this is slow, because it imports Mosaic GPU: only files that define a kernel do.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_compat
from pallas_kernels.hardware import WGMMA_ROWS

Ref = Any  # Pallas's: an array in memory that a kernel reads and writes, or its barriers
Accumulator = plgpu.WGMMAAccumulatorRef
LOG2_E, LN_2 = math.log2(math.e), math.log(2)
# Layouts of registers: of a matrix, and of a vector with one number per row or column of it.
WGMMA = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)


def zeros(shape: tuple[int, int]) -> jax.Array:
    """A float32 matrix in registers."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)


def row_vector(value: float) -> jax.Array:
    """The same float32 number for every row of a warpgroup's matrix."""
    return plgpu.layout_cast(jnp.full((WGMMA_ROWS,), value, jnp.float32), PER_ROW)


def per_row(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A matrix whose row i is filled with vector[i]."""
    return lax.broadcast_in_dim(vector, shape, [0])


def per_column(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A matrix whose column j is filled with vector[j]."""
    return lax.broadcast_in_dim(vector, shape, [1])


def at_step(
    index: jax.Array | int,
    step: jax.Array,
    shift: Callable[[jax.Array, jax.Array], jax.Array] = lax.shift_right_logical,
) -> jax.Array:
    """`index` as a value that depends on the loop's step, which is never negative.

    The compiler then cannot compute addresses from it before the loop, where they would occupy
    registers throughout. Either right shift gives 0; which one leads to fewer instructions depends
    on the kernel.
    """
    return index + shift(step, jnp.int32(31))


def packed(x: jax.Array) -> jax.Array:
    """Keeps 16-bit values two per register; a later cast to float32 would give each its own."""
    return lax.optimization_barrier(x)


def matrices(shape: tuple[int, ...], dtype, columns: int | None = None) -> Any:
    """Shared memory for matrices that wgmma reads, `columns` of them at a time (None: all)."""
    width = columns or shape[-1]
    return plgpu.SMEM(shape, dtype, transforms=mosaic_compat.matmul_tiles(width, dtype))


def add_products(*sums: tuple[jax.Array, Any, Ref]) -> list[jax.Array]:
    """acc + a @ b for each (acc, a, b); all are issued before any is waited for.

    Index tiles in shared memory with `at_step`: pl.run_state takes no constant index.
    """

    def issue(refs):
        for ref, (_, a, b) in zip(refs, sums, strict=True):
            plgpu.wgmma(ref, a, b)

    add: Any = pl.run_state(issue)
    return add([Accumulator.init(acc) for acc, _, _ in sums])


def store(value: jax.Array, smem: Ref, gmem: Ref) -> None:
    """Stores through `smem`, which may be overwritten after wait_smem_to_gmem."""
    smem[...] = value.astype(smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, gmem)
