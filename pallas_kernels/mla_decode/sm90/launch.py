"""The Hopper kernels as one function: what they refuse, padding, the merge of partial results.

The kernels themselves are imported when they are first called, because Mosaic GPU is slow to
import.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from pallas_kernels import hardware, varying
from pallas_kernels.mla_decode.plan import mla_decode_plan
from pallas_kernels.mla_decode.sm90.config import (
    ROW_ALIGNMENT,
    WARPGROUP,
    CombineConfig,
    Config,
    refusal,
)


def why_not(q, kv_pages, page_table, lengths, *, latent_dim, scale, causal, plan) -> str | None:
    """Why the Hopper kernels cannot run these arguments here, or None."""
    return hardware.missing_gpu(hardware.SM90) or refusal(
        q.shape[3], str(q.dtype), kv_pages.shape[1], latent_dim, scale
    )


def mla_decode_sm90(q, kv_pages, page_table, lengths, *, latent_dim, scale, causal, plan):
    """See `mla_decode`."""
    if plan is None:
        num_rows = q.shape[1] * q.shape[2]
        plan = mla_decode_plan(lengths, num_rows=num_rows, page_size=kv_pages.shape[1])
    config = Config.of(q, latent_dim=latent_dim, scale=scale, causal=causal)
    page_table, lengths = (jnp.asarray(x, jnp.int32) for x in (page_table, lengths))
    operands = (q, kv_pages, page_table, lengths)
    # One after the other under vmap: a plan belongs to one batch, and run_scoped has no rule.
    out, lse = sequential_vmap(functools.partial(_decode, config))(*operands, plan)
    return varying.align(*operands, out, lse)[-2:]


@functools.partial(jax.jit, static_argnums=0)
def _decode(config: Config, q, kv_pages, page_table, lengths, plan):
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
        out, lse = merge(out, lse, partial_out, partial_lse, plan.num_splits)
    return out[:, :M].reshape(B, T, N, config.latent_dim), lse[:, :M].reshape(B, T, N)
