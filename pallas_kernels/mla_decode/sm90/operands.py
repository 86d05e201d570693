"""What the main kernel reads, writes and keeps in shared memory: types here, Refs inside of it."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hardware import WGMMA_ROWS
from pallas_kernels.mla_decode.plan import MLADecodePlan
from pallas_kernels.mla_decode.sm90.config import BLOCK_KV, Config
from pallas_kernels.sm90 import Ref, matrices


class Inputs(NamedTuple):
    """Arguments of `mla_decode`, queries as "B M X", and the fields of its plan."""

    q: Ref
    kv_pages: Ref
    page_table: Ref
    lengths: Ref
    begin_request: Ref
    begin_page: Ref
    end_request: Ref
    end_page: Ref
    begin_split: Ref
    num_splits: Ref


class Outputs(NamedTuple):
    """Results, and the float32 partial results of requests that several parts read."""

    out: Ref
    lse: Ref
    partial_out: Ref
    partial_lse: Ref


class Scratch(NamedTuple):
    """Shared memory and barriers; the latent part of queries and keys is stored in halves.

    Barriers: *_full once data has arrived, *_free once all readers are done with it. `left` stands
    for the left half of a block of keys, `right` for its right half and the rotary keys.
    """

    k_rope_smem: Ref  # "slots BLOCK_KV R"
    kv_smem: Ref  # "slots 2 BLOCK_KV C/2"
    left_free: Ref
    left_full: Ref
    lse_smem: Ref
    p_full: Ref  # of the left warpgroup's probabilities in every slot, then of the right one's
    p_smem: Ref  # None in the types where the probabilities take the place of k_rope_smem
    # The queries; at the end the output on its way to memory, or half of a partial one, because
    # float32 has twice the bytes. The Ref of a RefUnion is the tuple of its members.
    q_and_partial_smem: Ref
    q_free: Ref
    q_full: Ref
    q_rope_smem: Ref
    right_free: Ref
    right_full: Ref
    stats_smem: Ref  # "slots 3 WGMMA_ROWS"

    @property
    def q_smem(self) -> Ref:
        return self.q_and_partial_smem[0]

    @property
    def partial_smem(self) -> Ref:
        return self.q_and_partial_smem[1]


class Refs(NamedTuple):
    inputs: Inputs
    outputs: Outputs
    scratch: Scratch


def make_inputs(
    q: jax.Array, kv_pages: jax.Array, page_table: jax.Array, lengths: jax.Array,
    plan: MLADecodePlan,
) -> Inputs:  # fmt: skip
    """The operands of the main kernel."""
    return Inputs(
        q,
        kv_pages,
        page_table,
        lengths,
        plan.begin_request,
        plan.begin_page,
        plan.end_request,
        plan.end_page,
        plan.begin_split,
        plan.num_splits,
    )


def output_types(q: jax.Array, plan: MLADecodePlan, config: Config) -> Outputs:
    """Types of the results for queries "B M X"."""
    B, M, _ = q.shape
    # A single part splits nothing, so there the kernel writes no partial result.
    num_splits = plan.max_splits if plan.num_parts > 1 else 1
    # Fewer rows than a tile are written as they are, more in whole tiles: NOTES.md.
    partial_rows = M if M < WGMMA_ROWS else -(-M // WGMMA_ROWS) * WGMMA_ROWS
    return Outputs(
        out=jax.ShapeDtypeStruct((B, M, config.latent_dim), q.dtype),
        lse=jax.ShapeDtypeStruct((B, M), jnp.float32),
        partial_out=jax.ShapeDtypeStruct((num_splits, partial_rows, config.latent_dim), "float32"),
        partial_lse=jax.ShapeDtypeStruct((num_splits, M), jnp.float32),
    )


def scratch_types(config: Config, dtype) -> Scratch:
    """What the kernel allocates in shared memory."""
    half, rope, slots = config.latent_dim // 2, config.rope_dim, config.num_slots
    # A copy's tile must divide a row in memory as well as the half of it that is copied.
    columns = math.gcd(half, config.latent_dim + rope)
    tiled = functools.partial(matrices, dtype=dtype, columns=columns)
    # Of 8 x 8: wider ones would need swaps of registers to be stored without bank conflicts.
    partial_tiles = (plgpu.TilingTransform((8, 8)),)
    barrier = functools.partial(plgpu.Barrier, num_barriers=slots)
    return Scratch(
        k_rope_smem=tiled((slots, BLOCK_KV, rope)),
        kv_smem=tiled((slots, 2, BLOCK_KV, half)),
        left_free=barrier(num_arrivals=2),  # no warpgroup may miss a phase of left_full
        left_full=barrier(),
        lse_smem=plgpu.SMEM((WGMMA_ROWS,), jnp.float32),
        p_full=barrier(num_barriers=2 * slots),
        p_smem=None if config.reuses_rope else tiled((slots, WGMMA_ROWS, BLOCK_KV)),
        q_and_partial_smem=plgpu.RefUnion(
            tiled((1, 2, WGMMA_ROWS, half)),
            plgpu.SMEM((2, WGMMA_ROWS, half // 2), jnp.float32, transforms=partial_tiles),
        ),
        q_free=barrier(num_barriers=1, num_arrivals=2),
        q_full=barrier(num_barriers=1, num_arrivals=3),
        q_rope_smem=tiled((1, WGMMA_ROWS, rope)),
        right_free=barrier(),
        right_full=barrier(num_arrivals=2),
        stats_smem=plgpu.SMEM((slots, 3, WGMMA_ROWS), jnp.float32),
    )
