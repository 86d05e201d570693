"""Attention, a program of one device, mapped over a mesh: what each is given and what it gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jax_mla.cache.latent import PagedLatentCache
from jax_mla.cache.shards import cache_specs, renumber
from jax_mla.sharding.placement import Placement


def over_mesh(
    attend: Callable[..., Any], placement: Placement | None, sequence: str | None
) -> Callable[..., Any]:
    """attend(q_nope, q_pe, rows, k_b_proj, v_b_proj, segment_ids) of every device's share.

    Args:
      attend: returns the output and lse.
      placement: None for a single device.
      sequence: logical axis of the positions; None leaves them together.
    """
    if placement is None:
        return attend
    spec = placement.spec
    heads, weight = spec("batch", sequence, "heads", None), spec("heads", None, None)
    rows, tokens = spec("batch", sequence, None), spec("batch", sequence)
    return jax.shard_map(
        attend,
        mesh=placement.mesh,
        in_specs=(heads, heads, rows, weight, weight, tokens),
        out_specs=(heads, spec("batch", sequence, "heads")),
        check_vma=False,  # a kernel does not say over which axes its results vary
    )


def over_mesh_cached(
    attend: Callable[..., Any], placement: Placement | None, sequence: str | None
) -> Callable[..., Any]:
    """attend(the first five of `over_mesh`, cache, layer, num_new, plan), of every device's share.

    Args:
      attend: returns the output and the cache. Under a mesh it is given a paged one, whose table
        counts the device's own pages from 0.
    """
    if placement is None:
        return attend
    spec, page_axes = placement.spec, placement.axes("context") + placement.axes("batch")
    heads, weight = spec("batch", sequence, "heads", None), spec("heads", None, None)
    rows, batch, fields = spec("batch", sequence, None), spec("batch"), cache_specs(spec)
    plan = spec(("context", "batch"))

    def share(q_nope, q_pe, rows, k_b_proj, v_b_proj, fields, *others):
        own = renumber(PagedLatentCache(*fields), page_axes)
        out, own = attend(q_nope, q_pe, rows, k_b_proj, v_b_proj, own, *others)
        return out, own.pages

    mapped = jax.shard_map(
        share,
        mesh=placement.mesh,
        in_specs=(heads, heads, rows, weight, weight, fields, spec(), batch, plan),
        out_specs=(heads, fields[0]),
        check_vma=False,
    )

    def run(q_nope, q_pe, rows, k_b_proj, v_b_proj, cache, *others):
        fields = cache.pages, cache.lengths, cache.page_table
        out, pages = mapped(q_nope, q_pe, rows, k_b_proj, v_b_proj, fields, *others)
        return out, dataclasses.replace(cache, pages=pages)

    return run
