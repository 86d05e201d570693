"""Mosaic GPU as this package uses it: all differences between JAX 0.10, 0.11 and 0.12.

Importing this is slow, because it imports Mosaic GPU: only files that define a kernel do.
"""

import inspect

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl

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


def summing_kernel(body, *, sum_type, out_type, grid, grid_names, **options):
    """`plgpu.kernel` that also returns a sum: an array of zeros that the kernel may add to.

    `body` takes the operands, the sum, the other results and the scratch; the function returns the
    sum and a list of the other results. 0.10 calls the compiled kernel `new_body`, whatever its
    name.

    The sum is a Ref that kernel and caller share. `plgpu.kernel` takes one from 0.11 on, but not
    under vmap. The function inside its vmap rule takes one in 0.10 too, so that is called here, and
    this has a vmap rule of its own.
    """

    @custom_vmap
    def run(*operands):
        kernel = plgpu.kernel(body, out_type=out_type, grid=grid, grid_names=grid_names, **options)

        def call(refs):
            total, *results = refs
            for ref, result in zip(results, inspect.unwrap(kernel)(*operands, total), strict=True):
                ref[...] = result

        return pl.run_state(call)([jnp.zeros(x.shape, x.dtype) for x in (sum_type, *out_type)])

    @run.def_vmap
    def _(axis_size, is_batched, *operands):
        axis = object()

        def batched_body(*refs, **scratch):
            index = lax.axis_index(axis)
            inputs, results = refs[: len(operands)], refs[len(operands) :]
            inputs = jax.tree.map(lambda x, b: x.at[index] if b else x, inputs, tuple(is_batched))
            body(*inputs, *(x.at[index] for x in results), **scratch)

        def batched(x):
            return jax.ShapeDtypeStruct((axis_size, *x.shape), x.dtype)

        results = summing_kernel(
            batched_body,
            sum_type=batched(sum_type),
            out_type=[batched(x) for x in out_type],
            grid=(axis_size, *grid),
            grid_names=(axis, *grid_names),
            **options,
        )(*operands)
        return results, [True] * len(results)

    return run
