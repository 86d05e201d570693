"""How many pages fit into memory."""

from __future__ import annotations

import os

import jax

from jax_mla.config.model import DeepSeekConfig
from jax_mla.params import Params

# Of the memory that is free on an accelerator, the part that the pool takes.
POOL_PART = 0.85


def pages_that_fit(
    params: Params, config: DeepSeekConfig, page_size: int, max_batch: int, max_tokens: int
) -> int:
    """Pages of a pool for the memory that is free now.

    On an accelerator most of it; on a CPU what max_batch sequences of max_tokens need, and at most
    a quarter of it.

    Raises:
      ValueError: not even one page fits.
    """
    dtype = params["embed_tokens"]["weight"].dtype
    page_bytes = config.num_hidden_layers * page_size * config.cache_row_dim * dtype.itemsize
    device = min(jax.tree.leaves(params)[0].devices(), key=lambda device: device.id)
    memory = device.memory_stats()
    if memory and "bytes_limit" in memory:
        free = memory["bytes_limit"] - memory["bytes_in_use"]
        num_pages = int(free * POOL_PART) // page_bytes
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
        num_pages = min(free // page_bytes, max_batch * -(-max_tokens // page_size))
    if num_pages < 1:
        raise ValueError(f"a page of {page_bytes} bytes does not fit into the {free} that are free")
    return num_pages
