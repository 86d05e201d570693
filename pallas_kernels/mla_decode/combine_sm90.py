"""The merge of partial results of MLA decode on Hopper, for requests that several parts read."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic_compat
from pallas_kernels.mla_decode.config_sm90 import LOWEST, CombineConfig


def combine(out, lse, partial_out, partial_lse, num_splits, config: CombineConfig):
    """`out` and `lse`, with the rows of split requests replaced by the merge of their partials.

    The merge of results (out_s, lse_s) over disjoint keys is sum(w_s * out_s) / sum(w_s), where
    w_s = exp(lse_s - max(lse)). Rows of other requests stay: both arrays are updated in place.
    """
    B, M, _ = out.shape
    # pl.kernel, because on 0.10 plgpu.kernel takes no arrays that are updated in place.
    merge = pl.kernel(
        functools.partial(mla_decode_combine, config=config),
        out_type=(),
        mesh=plgpu.Mesh(
            grid=(B, M // config.rows),
            grid_names=("request", "row_group"),
            num_threads=config.num_warpgroups,
            thread_name="warpgroup",
        ),
        compiler_params=mosaic_compat.compiler_params(),
    )

    def update(refs):
        merge(partial_out, partial_lse, num_splits, *refs)  # pyright: ignore[reportCallIssue]

    # Not jax.new_ref, which 0.10 does not take under the caller's rule for vmap.
    return pl.run_state(update)((out, lse))


def combine_in_xla(out, lse, partial_out, partial_lse, num_splits):
    """`combine` for rows that do not spread evenly over the threads of a warpgroup."""
    B, M, _ = out.shape
    slot, is_split = jnp.arange(partial_lse.shape[0]), jnp.diff(num_splits) > 1
    request = jnp.clip(jnp.searchsorted(num_splits, slot, side="right") - 1, 0, B - 1)
    # What no split has written may hold anything.
    is_used = (slot < num_splits[-1]) & is_split[request]
    own_lse = jnp.where(is_used[:, None], partial_lse, -jnp.inf)
    highest = jnp.maximum(jax.ops.segment_max(own_lse, request, B), LOWEST)
    weight = jnp.exp(own_lse - highest[request])
    own_out = jnp.where(weight[:, :, None] > 0, partial_out[:, :M], 0)
    total = jax.ops.segment_sum(weight, request, B)
    acc = jax.ops.segment_sum(weight[:, :, None] * own_out, request, B)
    is_empty = total == 0
    total = jnp.where(is_empty, 1.0, total)
    merged_lse = jnp.where(is_empty, -jnp.inf, highest + jnp.log(total))
    merged = (acc / total[:, :, None]).astype(out.dtype)
    return (
        jnp.where(is_split[:, None, None], merged, out),
        jnp.where(is_split[:, None], merged_lse, lse),
    )


def mla_decode_combine(*gmem, config):
    """Every warpgroup merges its share of a request's splits; the first one merges theirs."""
    # From jax 0.11 on this also tells the launch not to wait for the main kernel's last block.
    plgpu.griddepcontrol_wait()
    others, C = config.num_warpgroups - 1, gmem[0].shape[2]
    if others == 0:
        return _merge_splits(*gmem, config=config)
    pl.run_scoped(
        functools.partial(_merge_splits, *gmem, config=config),
        acc_smem=plgpu.SMEM((others, config.rows, C), jnp.float32),
        highest_smem=plgpu.SMEM((others, config.rows), jnp.float32),
        total_smem=plgpu.SMEM((others, config.rows), jnp.float32),
        full=plgpu.Barrier(num_barriers=1, num_arrivals=others),
        collective_axes="warpgroup",
    )


def _merge_splits(
    partial_out_gmem, partial_lse_gmem, num_splits_gmem, out_gmem, lse_gmem, *, config, **shared
):
    b, warpgroup = lax.axis_index("request"), lax.axis_index("warpgroup")
    rows = [lax.axis_index("row_group") * config.rows + i for i in range(config.rows)]
    begin, end = num_splits_gmem[b], num_splits_gmem[b + 1]
    stride = config.num_warpgroups

    def merge(i, states):
        split = begin + warpgroup + i * stride
        return [
            _merge(state, (partial_lse_gmem[split, row], 1.0, partial_out_gmem[split, row, :]))
            for row, state in zip(rows, states, strict=True)
        ]

    @pl.when(end - begin > 1)
    def _():
        nothing = (jnp.float32(LOWEST), jnp.float32(0), jnp.zeros(out_gmem.shape[2:], jnp.float32))
        count = lax.div(end - begin - warpgroup + stride - 1, stride)
        states = lax.fori_loop(0, count, merge, [nothing] * config.rows)

        @pl.when(warpgroup > 0)
        def _():
            if shared:
                _share(states, warpgroup - 1, **shared)

        @pl.when(warpgroup == 0)
        def _():
            merged = _gather(states, **shared) if shared else states
            for row, state in zip(rows, merged, strict=True):
                highest, total, acc = state
                is_empty = total == 0
                total = jnp.where(is_empty, 1.0, total)
                out_gmem[b, row, :] = (acc / total).astype(out_gmem.dtype)
                lse_gmem[b, row] = jnp.where(is_empty, -jnp.inf, highest + jnp.log(total))


def _merge(a, b):
    """Two results, each as maximum of lse, sum of weights, weighted sum of out."""
    highest = jnp.maximum(a[0], b[0])
    weight_a, weight_b = jnp.exp(a[0] - highest), jnp.exp(b[0] - highest)
    return highest, a[1] * weight_a + b[1] * weight_b, a[2] * weight_a + b[2] * weight_b


def _share(states, i, highest_smem, total_smem, acc_smem, full):
    for row, (highest, total, acc) in enumerate(states):
        highest_smem[i, row], total_smem[i, row], acc_smem[i, row] = highest, total, acc
    plgpu.barrier_arrive(full.at[0])


def _gather(states, highest_smem, total_smem, acc_smem, full):
    plgpu.barrier_wait(full.at[0])
    for i in range(acc_smem.shape[0]):
        states = [
            _merge(state, (highest_smem[i, row], total_smem[i, row], acc_smem[i, row]))
            for row, state in enumerate(states)
        ]
    return states
