"""Rows sorted by expert, each multiplied by the matrix of its expert."""

from typing import Literal

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

from pallas_kernels import dispatch
from pallas_kernels.checks import (
    host_values,
    require,
    require_float,
    require_integer,
    require_rank,
    require_shape,
)
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference

IMPLEMENTATIONS = (dispatch.Implementation("xla", grouped_matmul_reference),)


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "num_matrices K N"],
    group_sizes: Integer[Array | np.ndarray, " E"],
    *,
    first_group: int | Integer[Array, ""] | None = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: Literal["mosaic_gpu", "xla"] | None = None,
) -> Float[Array, "M N"]:
    """Multiplies every row by the matrix of its group.

    out[m] = lhs[m] @ rhs[e], where the first group_sizes[0] rows belong to e = 0, the next
    group_sizes[1] to e = 1, and so on. Matrices are counted from first_group.

    Differentiable in lhs and rhs, in reverse and in forward mode (jax.jvp of jax.grad included).
    Works under jit, vmap and shard_map.

    Args:
      lhs: rows sorted by group; float32, bfloat16 or float16. Rows past sum(group_sizes) belong to
        no group: their result is 0, and they may hold NaN.
      rhs: one matrix per group; lhs' dtype. A matrix without rows gets gradient 0.
      group_sizes: rows of every group, 0 <= group_sizes, sum(group_sizes) <= M.
      first_group: for an rhs with the matrices of more groups, such as the experts of all layers:
        group e multiplies by rhs[first_group + e].
      preferred_element_type: dtype of the result; None is lhs' dtype. Sums are float32 either way.
      implementation: None chooses the fastest that can run here; a name insists on it.

    Raises:
      ValueError: sizes or dtypes disagree; the message names both with their values.
      NotImplementedError: the named implementation cannot run here; the message says why.

    Cost: 2 * M * K * N floating-point operations, whatever E is; backward twice that.
    """
    _check(lhs, rhs, group_sizes, first_group)
    return dispatch.call(
        "grouped_matmul",
        IMPLEMENTATIONS,
        implementation,
        lhs,
        rhs,
        group_sizes,
        first_group=0 if first_group is None else first_group,
        preferred_element_type=np.dtype(preferred_element_type or lhs.dtype),
    )


def _check(lhs, rhs, group_sizes, first_group):
    op = "grouped_matmul"
    require_rank(op, lhs=(lhs, 2), rhs=(rhs, 3), group_sizes=(group_sizes, 1))
    require_float(op, lhs=lhs, rhs=rhs)
    require_integer(op, group_sizes=group_sizes)
    M, K = lhs.shape
    E, num_matrices = group_sizes.shape[0], rhs.shape[0]
    require_shape(op, "rhs", rhs, (num_matrices, K, rhs.shape[2]), f"lhs {lhs.shape}")
    if first_group is None:
        require_shape(op, "group_sizes", group_sizes, (num_matrices,), f"rhs {rhs.shape}")
    elif (first := host_values(first_group)) is not None:
        require(
            bool(0 <= first <= num_matrices - E),
            f"{op}: first_group must be within 0 and {num_matrices - E} for {E} groups of"
            f" {num_matrices} matrices, got {first}",
        )
    require(min(E, K, rhs.shape[2]) > 0, f"{op}: all sizes must be positive, got rhs {rhs.shape}")
    if (values := host_values(group_sizes)) is not None:
        require(
            values.min() >= 0 and values.sum() <= M,
            f"{op}: group_sizes must be 0 or more, with a sum of at most the {M} rows of lhs, got"
            f" {values.min()} as the smallest and {values.sum()} as the sum",
        )
