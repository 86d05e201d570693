"""What mosaic_compat adds to Mosaic GPU: kernels that add to a sum in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from kernel_tools.aot import lower_for_cuda
from kernel_tools.interpreter import run_simulated
from numerics import normal

ROWS, COLUMNS = 64, 96


def block_sum(x, weight):
    """Twice the sum of weight * block over the blocks of rows of x, and a copy of x."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels import mosaic_compat

    def body(x_gmem, nothing, weight_gmem, total_gmem, copy_gmem, *, smem, full):
        assert nothing is None
        rows = pl.ds(lax.axis_index("cta") * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(x_gmem.at[rows], smem, full.at[0])
        plgpu.barrier_wait(full.at[0])
        plgpu.copy_smem_to_gmem(smem, copy_gmem.at[rows])
        plgpu.wait_smem_to_gmem(0)
        smem[...] = weight_gmem[0] * smem[...]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, total_gmem, reduction_op="add")
        plgpu.wait_smem_to_gmem(0)

    total, copy = mosaic_compat.summing_kernel(
        body,
        sum_type=jax.ShapeDtypeStruct((ROWS, COLUMNS), x.dtype),
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
        grid=(x.shape[0] // ROWS,),
        grid_names=("cta",),
        compiler_params=mosaic_compat.compiler_params(),
        scratch_types={
            "smem": plgpu.SMEM((ROWS, COLUMNS), x.dtype),
            "full": plgpu.Barrier(num_barriers=1),
        },
    )(x, None, weight)
    return 2 * total, copy


def test_summing_kernel_lowers_alone_and_under_vmap():
    x, weight = np.zeros((3, 2 * ROWS, COLUMNS), np.float32), np.zeros((1,), np.float32)
    for text in (
        lower_for_cuda(block_sum, x[0], weight),
        lower_for_cuda(jax.vmap(block_sum, (0, None)), x, weight),
    ):
        assert "output_operand_alias<output_tuple_indices = [1]" in text  # the sum, in place


@pytest.mark.kernel_sim
def test_summing_kernel_adds_to_zeros_alone_and_under_vmap(rng):
    x, weight = normal(rng, (3, 2 * ROWS, COLUMNS)), jnp.array([3.0])
    sums, copies = run_simulated(jax.vmap(block_sum, (0, None)), x, weight)
    alone = run_simulated(block_sum, x[1], weight)
    want = 6 * np.asarray(x).reshape(3, 2, ROWS, COLUMNS).sum(1)
    np.testing.assert_allclose(sums, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(copies, x)
    np.testing.assert_array_equal(alone[0], sums[1])
    np.testing.assert_array_equal(alone[1], x[1])
