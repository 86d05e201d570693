"""Grouped matmul in jnp: the definition of the op, and its implementation "xla".

A loop over blocks of rows that starts a new block with every group. Its trip count is the number of
blocks that the group sizes really make, so that work does not grow with the number of groups.

Letters: M K N E as in `grouped_matmul`; P matrices in rhs, E of them used.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float, Float32, Int, Int32, Integer

from pallas_kernels import varying
from pallas_kernels.derivatives import differentiable

MAX_BLOCK = 256  # rows; measured in NOTES.md


@functools.partial(jax.jit, static_argnames=("preferred_element_type",))
def grouped_matmul_reference(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "P K N"],
    group_sizes: Integer[Array, " E"],
    *,
    first_group: int | Integer[Array, ""] = 0,
    preferred_element_type: Any,
) -> Float[Array, "M N"]:
    """See `grouped_matmul`."""
    group_sizes, first_group = (jnp.asarray(x, jnp.int32) for x in (group_sizes, first_group))
    operands = varying.align(lhs, rhs, group_sizes, first_group)
    return _matmul(preferred_element_type, *operands)[0]


class Operands(NamedTuple):
    lhs: Float[Array, "M K"]
    rhs: Float[Array, "P K N"]
    group_sizes: Int32[Array, " E"]
    first_group: Int32[Array, ""]


def _forward(dtype: Any, *operands: Any) -> tuple[Float[Array, "M N"]]:
    """The product of Operands."""
    return (_multiply_rows("MK,KN->MN", *operands).astype(dtype),)


def _push_forward(dtype: Any, operands: Operands, tangents: tuple) -> tuple[Float[Array, "M N"]]:
    dlhs, drhs = tangents
    groups = operands.group_sizes, operands.first_group
    dout = _multiply_rows("MK,KN->MN", dlhs, operands.rhs, *groups)
    dout += _multiply_rows("MK,KN->MN", operands.lhs, drhs, *groups)
    return (dout.astype(dtype),)


def _pull_back(
    dtype: Any, operands: Operands, cotangents: tuple
) -> tuple[Float[Array, "M K"], Float[Array, "P K N"]]:
    del dtype
    lhs, rhs, *groups = operands
    dout = cotangents[0].astype(lhs.dtype)
    dlhs = _multiply_rows("MN,KN->MK", dout, rhs, *groups)
    drhs = _multiply_groups(lhs, dout, rhs, *groups)
    return dlhs.astype(lhs.dtype), drhs.astype(rhs.dtype)


_matmul = differentiable(
    _forward,
    residuals=lambda operands, _: Operands(*operands),
    push_forward=_push_forward,
    pull_back=_pull_back,
    num_differentiable=2,
)


def _multiply_rows(
    subscripts: str,
    rows: Float[Array, "M _"],
    rhs: Float[Array, "P K N"],
    group_sizes: Int32[Array, " E"],
    first_group: Int32[Array, ""],
) -> Float32[Array, "M _"]:
    """Product of every row with its group's matrix; 0 for rows past the last group."""
    num_columns = rhs.shape[1 + "KN".index(subscripts[-1])]
    M = rows.shape[0]
    size = block_size(M, len(group_sizes))
    count, expert, begin, _ = row_blocks(M, size, group_sizes)
    rows = jnp.pad(rows, [(0, size), (0, 0)])

    def multiply(i, out):
        block = jax.lax.dynamic_slice_in_dim(rows, begin[i], size)
        block = _einsum(subscripts, block, rhs[first_group + expert[i]])
        # Past its group's end the block is wrong, until the next group's block overwrites that.
        return jax.lax.dynamic_update_slice_in_dim(out, block, begin[i], axis=0)

    out = jax.lax.full_like(rows, 0, jnp.float32, shape=(M + size, num_columns))
    out = jax.lax.fori_loop(0, count, multiply, out)[:M]
    return jnp.where((jnp.arange(M) < jnp.sum(group_sizes))[:, None], out, 0)


def _multiply_groups(
    lhs: Float[Array, "M K"],
    dout: Float[Array, "M N"],
    rhs: Float[Array, "P K N"],
    group_sizes: Int32[Array, " E"],
    first_group: Int32[Array, ""],
) -> Float32[Array, "P K N"]:
    """lhs.T @ dout of every group's rows; 0 for a matrix without rows."""
    M = lhs.shape[0]
    size = block_size(M, len(group_sizes))
    count, expert, begin, end = row_blocks(M, size, group_sizes)
    lhs, dout = (jnp.pad(x, [(0, size), (0, 0)]) for x in (lhs, dout))

    def multiply(i, drhs):
        is_own = (begin[i] + jnp.arange(size) < end[i])[:, None]
        block, dblock = (
            jnp.where(is_own, jax.lax.dynamic_slice_in_dim(x, begin[i], size), 0)
            for x in (lhs, dout)
        )
        return drhs.at[first_group + expert[i]].add(_einsum("MK,MN->KN", block, dblock))

    drhs = jnp.zeros_like(rhs, dtype=jnp.float32)
    return jax.lax.fori_loop(0, count, multiply, drhs)


def block_size(M: int, E: int) -> int:
    """Rows of a block: a power of two near the average group, so that few rows are wasted."""
    if is_symbolic_dim(M):  # of a batch that an export leaves open
        return MAX_BLOCK
    return min(1 << max(M // E - 1, 0).bit_length(), MAX_BLOCK)


def row_blocks(
    M: int, size: int, group_sizes: Integer[Array, " E"]
) -> tuple[Int[Array, ""], Int[Array, "max"], Int[Array, "max"], Int[Array, "max"]]:
    """Number of blocks; and for each block its group, its first row and the end of its group."""
    num_blocks = -(-group_sizes // size)
    end, end_block = jnp.cumsum(group_sizes), jnp.cumsum(num_blocks)
    block = jnp.arange(M // size + len(group_sizes))  # there are never more
    expert = jnp.searchsorted(end_block, block, side="right")
    expert = jnp.minimum(expert, len(group_sizes) - 1)
    inside = block - (end_block - num_blocks)[expert]
    return end_block[-1], expert, (end - group_sizes)[expert] + inside * size, end[expert]


def _einsum(subscripts: str, a: Array, b: Array) -> Float32[Array, "..."]:
    return jnp.einsum(subscripts, a, b, precision="highest", preferred_element_type=jnp.float32)
