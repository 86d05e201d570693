"""Merges the partial results of requests that several parts of the main kernel have read."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import mosaic_compat
from pallas_kernels.mla_decode.sm90.config import LOWEST, CombineConfig
from pallas_kernels.sm90 import Ref


class Partial(NamedTuple):
    """A row of a result: the maximum of its lse, the sum of weights, the weighted sum of out."""

    highest: Any
    total: Any
    acc: Any


class Shared(NamedTuple):
    """Shared memory through which the other warpgroups hand their rows to the first."""

    highest_smem: Ref
    total_smem: Ref
    acc_smem: Ref
    full: Ref


def combine(
    out: Float[Array, "B M C"],
    lse: Float32[Array, "B M"],
    partial_out: Float32[Array, "splits rows C"],
    partial_lse: Float32[Array, "splits M"],
    num_splits: Int32[Array, " B_and_one"],
    config: CombineConfig,
) -> tuple[jax.Array, jax.Array]:
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


def combine_in_xla(
    out: Float[Array, "B M C"],
    lse: Float32[Array, "B M"],
    partial_out: Float32[Array, "splits rows C"],
    partial_lse: Float32[Array, "splits M"],
    num_splits: Int32[Array, " B_and_one"],
) -> tuple[jax.Array, jax.Array]:
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


def mla_decode_combine(*gmem: Ref, config: CombineConfig) -> None:
    """Each warpgroup merges some of a request's splits; the first one then merges the results."""
    # From jax 0.11 on this also tells the launch not to wait for the main kernel's last CTA.
    plgpu.griddepcontrol_wait()
    others, C = config.num_warpgroups - 1, gmem[0].shape[2]
    if others == 0:
        return _merge_splits(*gmem, config=config, shared=None)
    pl.run_scoped(
        functools.partial(_merge_splits, *gmem, config=config),
        shared=Shared(
            highest_smem=plgpu.SMEM((others, config.rows), jnp.float32),
            total_smem=plgpu.SMEM((others, config.rows), jnp.float32),
            acc_smem=plgpu.SMEM((others, config.rows, C), jnp.float32),
            full=plgpu.Barrier(num_barriers=1, num_arrivals=others),
        ),
        collective_axes="warpgroup",
    )


def _merge_splits(
    partial_out_gmem: Ref,
    partial_lse_gmem: Ref,
    num_splits_gmem: Ref,
    out_gmem: Ref,
    lse_gmem: Ref,
    *,
    config: CombineConfig,
    shared: Shared | None,
) -> None:
    b, warpgroup = lax.axis_index("request"), lax.axis_index("warpgroup")
    rows = [lax.axis_index("row_group") * config.rows + i for i in range(config.rows)]
    begin, end = num_splits_gmem[b], num_splits_gmem[b + 1]
    stride = config.num_warpgroups

    def merge(i, merged):
        split = begin + warpgroup + i * stride
        return [
            _merge(one, Partial(partial_lse_gmem[split, row], 1.0, partial_out_gmem[split, row, :]))
            for row, one in zip(rows, merged, strict=True)
        ]

    @pl.when(end - begin > 1)
    def _():
        acc = jnp.zeros(out_gmem.shape[2:], jnp.float32)
        nothing = Partial(jnp.float32(LOWEST), jnp.float32(0), acc)
        count = lax.div(end - begin - warpgroup + stride - 1, stride)
        merged = lax.fori_loop(0, count, merge, [nothing] * config.rows)

        @pl.when(warpgroup > 0)
        def _():
            if shared is not None:
                _hand_over(merged, warpgroup - 1, shared)

        @pl.when(warpgroup == 0)
        def _():
            whole = merged if shared is None else _gather(merged, shared)
            for row, (highest, total, acc) in zip(rows, whole, strict=True):
                is_empty = total == 0
                total = jnp.where(is_empty, 1.0, total)
                out_gmem[b, row, :] = (acc / total).astype(out_gmem.dtype)
                lse_gmem[b, row] = jnp.where(is_empty, -jnp.inf, highest + jnp.log(total))


def _merge(a: Partial, b: Partial) -> Partial:
    highest = jnp.maximum(a.highest, b.highest)
    weight_a, weight_b = jnp.exp(a.highest - highest), jnp.exp(b.highest - highest)
    total = a.total * weight_a + b.total * weight_b
    return Partial(highest, total, a.acc * weight_a + b.acc * weight_b)


def _hand_over(merged: list[Partial], i: jax.Array, shared: Shared) -> None:
    for row, (highest, total, acc) in enumerate(merged):
        shared.highest_smem[i, row], shared.total_smem[i, row] = highest, total
        shared.acc_smem[i, row] = acc
    plgpu.barrier_arrive(shared.full.at[0])


def _gather(merged: list[Partial], shared: Shared) -> list[Partial]:
    highest_smem, total_smem, acc_smem, full = shared
    plgpu.barrier_wait(full.at[0])
    for i in range(acc_smem.shape[0]):
        merged = [
            _merge(one, Partial(highest_smem[i, row], total_smem[i, row], acc_smem[i, row]))
            for row, one in enumerate(merged)
        ]
    return merged
