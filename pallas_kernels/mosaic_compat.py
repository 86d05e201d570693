"""Mosaic GPU as this package uses it: the differences between JAX 0.10, 0.11 and 0.12 in one place.

Importing this is slow, because it imports Mosaic GPU: only files that define a kernel do.
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])


def compiler_params(**options) -> plgpu.CompilerParams:
    """Warpgroup semantics, which is the default from 0.11 on; fast exp2; no reduction scratch.

    The scratch is for reductions across warps, so a kernel that reduces rows only needs none.
    """
    options = {"approx_math": True, "reduction_scratch_bytes": 0} | options
    return plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        **options,
    )


def load(ref, layout=None, *, is_optimized: bool = True) -> jax.Array:
    """Reads a whole ref into registers; 0.10 wants an index that 0.12 refuses."""
    index = () if VERSION >= (0, 11) else ((),)
    return plgpu.load(ref, *index, layout=layout, optimized=is_optimized)


def matmul_tiles(width: int, dtype) -> tuple:
    """Transforms of a shared-memory matrix of `width` columns that wgmma reads.

    The widest swizzle that divides a row: 128 bytes have the fewest bank conflicts.
    """
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = next(size for size in (128, 64, 32) if width * itemsize % size == 0)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)
