"""How one part of the grid walks through its part of the plan, request by request."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.hardware import WGMMA_ROWS
from pallas_kernels.mla_decode.sm90.config import BLOCK_KV, Config
from pallas_kernels.mla_decode.sm90.operands import Inputs


class Request(NamedTuple):
    """A request as this part sees it, scalars in registers."""

    index: jax.Array
    length: jax.Array  # tokens in cache
    begin: jax.Array  # first block that this part reads
    end: jax.Array  # one past the last
    is_split: jax.Array  # whether other parts read it too
    split: jax.Array  # where this part's result goes then


def for_each_request(inputs: Inputs, body: Callable[[Request, jax.Array], jax.Array]) -> jax.Array:
    """`step = body(request, step)` for every request of this part; `step` counts blocks."""
    part = lax.axis_index("part")
    first, last = inputs.begin_request[part], inputs.end_request[part]
    begin_page, end_page = inputs.begin_page[part], inputs.end_page[part]
    begin_split = inputs.begin_split[part]
    page_size = inputs.kv_pages.shape[1]
    blocks_per_page = page_size // BLOCK_KV

    def visit(b, step):
        length = jnp.minimum(inputs.lengths[b], inputs.page_table.shape[1] * page_size)
        num_blocks = lax.div(length + (BLOCK_KV - 1), BLOCK_KV)
        # Lengths beyond the table's capacity count as all of it, but the plan does not know it.
        begin = jnp.where(b == first, jnp.minimum(begin_page * blocks_per_page, num_blocks), 0)
        end = jnp.where(b == last, jnp.minimum(end_page * blocks_per_page, num_blocks), num_blocks)
        slot = inputs.num_splits[b]
        request = Request(
            index=b,
            length=length,
            begin=begin,
            end=jnp.maximum(begin, end),  # whatever the plan says, no role counts backwards
            is_split=inputs.num_splits[b + 1] - slot > 1,
            split=slot + jnp.where(b == first, begin_split, 0),
        )
        return body(request, step)

    # `+ 0` for shard_map: what is read from memory has the type of an array that varies over the
    # mesh, a sum within a kernel has not, and a loop's counter may not change its type.
    return lax.fori_loop(first + 0, last + 1, visit, jnp.int32(0))


def own_rows() -> Any:
    """The query rows of this CTA's tile."""
    return pl.ds(lax.axis_index("tile") * WGMMA_ROWS, WGMMA_ROWS)


def unmasked_end(request: Request, config: Config) -> jax.Array:
    """Every row sees all keys of the blocks before this one."""
    hidden = config.num_queries - 1 if config.causal else 0
    end = lax.div(jnp.maximum(request.length - hidden, 0), BLOCK_KV)
    return jnp.clip(end, request.begin, request.end)
