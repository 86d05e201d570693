"""Grouped matmul in jnp: the definition of the op, and its implementation "xla".

A loop over blocks of rows that starts a new block with every group. Its trip count is the number of
blocks that the group sizes really make, so that work does not grow with the number of groups.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import varying

MAX_BLOCK = 256  # rows; measured in NOTES.md


@functools.partial(jax.jit, static_argnames=("preferred_element_type",))
def grouped_matmul_reference(lhs, rhs, group_sizes, *, first_group=0, preferred_element_type):
    """See `grouped_matmul`."""
    group_sizes, first_group = (jnp.asarray(x, jnp.int32) for x in (group_sizes, first_group))
    operands = varying.align(lhs, rhs, group_sizes, first_group)
    return _matmul(preferred_element_type, *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(dtype, lhs, rhs, group_sizes, first_group):
    out = _multiply_rows("MK,KN->MN", lhs, rhs, group_sizes, first_group, rhs.shape[2])
    return out.astype(dtype)


def _matmul_fwd(dtype, lhs, rhs, group_sizes, first_group):
    residuals = lhs, rhs, group_sizes, first_group
    return _matmul(dtype, *residuals), residuals


def _matmul_bwd(dtype, residuals, dout):
    lhs, rhs, group_sizes, first_group = residuals
    dout = dout.astype(lhs.dtype)
    dlhs = _multiply_rows("MN,KN->MK", dout, rhs, group_sizes, first_group, rhs.shape[1])
    drhs = _multiply_groups(lhs, dout, rhs, group_sizes, first_group)
    return dlhs.astype(lhs.dtype), drhs.astype(rhs.dtype), None, None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _multiply_rows(subscripts, rows, rhs, group_sizes, first_group, num_columns):
    """float32 product of every row with its group's matrix; 0 for rows past the last group."""
    M = rows.shape[0]
    size = block_size(M, len(group_sizes))
    count, expert, begin, _ = row_blocks(M, size, group_sizes)
    rows = jnp.pad(rows, [(0, size), (0, 0)])

    def multiply(i, out):
        block = jax.lax.dynamic_slice_in_dim(rows, begin[i], size)
        block = _einsum(subscripts, block, rhs[first_group + expert[i]])
        # Behind its group's end the block is wrong, until the next group's block overwrites that.
        return jax.lax.dynamic_update_slice_in_dim(out, block, begin[i], axis=0)

    out = jax.lax.full_like(rows, 0, jnp.float32, shape=(M + size, num_columns))
    out = jax.lax.fori_loop(0, count, multiply, out)[:M]
    return jnp.where((jnp.arange(M) < jnp.sum(group_sizes))[:, None], out, 0)


def _multiply_groups(lhs, dout, rhs, group_sizes, first_group):
    """float32 lhs.T @ dout of every group's rows, "E K N"; 0 for a group without rows."""
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


def block_size(M, E):
    """Rows of a block: a power of two near the average group, so that few rows are wasted."""
    return min(1 << max(M // E - 1, 0).bit_length(), MAX_BLOCK)


def row_blocks(M, size, group_sizes):
    """Number of blocks; and of each block its group, its first row and the end of its group."""
    num_blocks = -(-group_sizes // size)
    end, end_block = jnp.cumsum(group_sizes), jnp.cumsum(num_blocks)
    block = jnp.arange(M // size + len(group_sizes))  # there are never more
    expert = jnp.searchsorted(end_block, block, side="right")
    expert = jnp.minimum(expert, len(group_sizes) - 1)
    inside = block - (end_block - num_blocks)[expert]
    return end_block[-1], expert, (end - group_sizes)[expert] + inside * size, end[expert]


def _einsum(subscripts, a, b):
    return jnp.einsum(subscripts, a, b, precision="highest", preferred_element_type=jnp.float32)
