"""The Hopper kernels as one function: what they refuse, padding, the merge of partial results.

The kernels themselves are imported when they are first called, because Mosaic GPU is slow to
import.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Float32, Integer

from pallas_kernels import hardware, varying
from pallas_kernels.derivatives import not_differentiable
from pallas_kernels.mla_decode.plan import MLADecodePlan, mla_decode_plan
from pallas_kernels.mla_decode.sm90.config import (
    ROW_ALIGNMENT,
    WARPGROUP,
    CombineConfig,
    Config,
    refusal,
)


def why_not(
    q, kv_pages, page_table, lengths, *, latent_dim: int, scale: float, **options: Any
) -> str | None:
    """Why the Hopper kernels cannot run these arguments here, or None."""
    del page_table, lengths, options
    sizes = q.shape[3], str(q.dtype), kv_pages.shape[1], latent_dim, scale
    return refusal(*sizes) or hardware.missing_gpu(hardware.SM90)


def mla_decode_sm90(
    q: Float[Array, "B T N X"],
    kv_pages: Float[Array, "num_pages page_size X"],
    page_table: Integer[Array | np.ndarray, "B max_pages"],
    lengths: Integer[Array | np.ndarray, " B"],
    *,
    latent_dim: int,
    scale: float,
    causal: bool,
    plan: MLADecodePlan | None,
) -> tuple[Float[Array, "B T N C"], Float32[Array, "B T N"]]:
    """Returns out and lse, see `mla_decode`."""
    if plan is None:
        num_rows = q.shape[1] * q.shape[2]
        plan = mla_decode_plan(lengths, num_rows=num_rows, page_size=kv_pages.shape[1])
    config = Config.of(q, latent_dim=latent_dim, scale=scale, causal=causal)
    page_table, lengths = (jnp.asarray(x, jnp.int32) for x in (page_table, lengths))
    operands = (q, kv_pages, page_table, lengths)
    out, lse = varying.align(*operands, *_decode(config, *operands, plan))[-2:]
    return out, lse


@functools.partial(
    not_differentiable,
    reason="mla_decode: the kernels of 'mosaic_gpu' have no derivative; use implementation='xla',"
    " which has one in forward mode (jax.jvp), or flash_attention",
)
def _decode(config: Config, *operands: Any) -> tuple[jax.Array, jax.Array]:
    # One after the other under vmap: a plan belongs to one batch, and run_scoped has no rule.
    return sequential_vmap(functools.partial(_decode_batch, config))(*operands)


@functools.partial(jax.jit, static_argnums=0)
def _decode_batch(
    config: Config, q, kv_pages, page_table, lengths, plan: MLADecodePlan
) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.mla_decode.sm90.combine import combine, combine_in_xla
    from pallas_kernels.mla_decode.sm90.forward import forward

    B, T, N, X = q.shape
    M = T * N
    q_BMX = jnp.pad(q.reshape(B, M, X), ((0, 0), (0, -M % ROW_ALIGNMENT), (0, 0)))
    out, lse, partial_out, partial_lse = forward(q_BMX, kv_pages, page_table, lengths, plan, config)
    if plan.num_parts > 1:
        merge = combine_in_xla
        if config.latent_dim % WARPGROUP == 0:
            merge = functools.partial(combine, config=CombineConfig.of(B, q_BMX.shape[1]))
        out, lse = merge(out, lse, partial_out, partial_lse, jnp.asarray(plan.num_splits))
    return out[:, :M].reshape(B, T, N, config.latent_dim), lse[:, :M].reshape(B, T, N)
