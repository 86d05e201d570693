"""Latent attention on a mesh: shard_map around what one device computes, and its specs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Float32, Int

from jax_mla.cache.latent import PagedLatentCache
from jax_mla.cache.shards import cache_specs, own_lengths, renumber
from jax_mla.config.model import DeepSeekConfig
from jax_mla.layers.mla.attend import NewTokens
from jax_mla.layers.mla.stripes import exchange_from_stripes, exchange_to_stripes
from jax_mla.sharding.placement import Placement
from pallas_kernels import MLADecodePlan, mla_decode_plan


@runtime_checkable
class AttendFull(Protocol):
    """Attention of new tokens to themselves: output and lse."""

    def __call__(
        self, new: NewTokens, segment_ids: Int[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T N H_or_C"], Float32[Array, "B T N"]]: ...


@runtime_checkable
class AttendCached(Protocol):
    """Attention of new tokens to a cache, to which they are appended: output and cache."""

    def __call__(
        self,
        new: NewTokens,
        cache: Any,
        layer: int | Int[Array, ""],
        num_new: Int[Array, " B"],
        plan: Any,
    ) -> tuple[Float[Array, "B T N H_or_C"], Any]: ...


def full_on_mesh(attend: AttendFull, placement: Placement, sequence: str | None) -> AttendFull:
    """`attend` on each device's heads and sequences, and its positions if `sequence` names them."""
    spec = placement.spec
    return jax.shard_map(
        attend,
        mesh=placement.mesh,
        in_specs=(_new_specs(placement, sequence), spec("batch", sequence)),
        out_specs=(spec("batch", sequence, "heads", None), spec("batch", sequence, "heads")),
        check_vma=False,  # a kernel does not say over which axes its results vary
    )


def cached_on_mesh(
    attend: AttendCached, placement: Placement, sequence: str | None
) -> AttendCached:
    """`attend` on every device's heads, sequences and pages.

    A device sees a paged cache whose table counts its own pages from 0.
    """
    spec, page_axes = placement.spec, placement.axes("context") + placement.axes("batch")
    fields = cache_specs(spec)

    def on_device(new, fields, layer, num_new, plan):
        out, own = attend(new, renumber(PagedLatentCache(*fields), page_axes), layer, num_new, plan)
        return out, own.pages

    mapped = jax.shard_map(
        on_device,
        mesh=placement.mesh,
        in_specs=(
            _new_specs(placement, sequence),
            fields,
            spec(),
            spec("batch"),
            spec(("context", "batch")),
        ),
        out_specs=(spec("batch", sequence, "heads", None), fields[0]),
        check_vma=False,
    )

    def on_mesh(new, cache, layer, num_new, plan):
        fields = cache.pages, cache.lengths, cache.page_table
        out, pages = mapped(new, fields, layer, num_new, plan)
        return out, dataclasses.replace(cache, pages=pages)

    return on_mesh


def _new_specs(placement: Placement, sequence: str | None) -> Any:
    heads = placement.spec("batch", sequence, "heads", None)
    weight = placement.spec("heads", None, None)
    specs = heads, heads, placement.spec("batch", sequence, None), weight, weight
    return NewTokens._make(specs)


def decode_plan(
    lengths: Int[Array, " B"],
    num_new: int,
    page_size: int,
    config: DeepSeekConfig,
    placement: Placement | None,
) -> MLADecodePlan:
    """The plan of a decode step for all layers; on a mesh each device plans for its own tokens.

    Args:
      lengths: tokens of each sequence once `num_new` are appended.
    """
    heads = config.num_attention_heads // (placement.num_shards("heads") if placement else 1)
    plan = functools.partial(mla_decode_plan, num_rows=num_new * heads, page_size=page_size)
    if placement is None:
        return plan(lengths)
    context_axes = placement.axes("context")

    def plan_own(lengths):
        if context_axes:
            shard = jax.lax.axis_size(context_axes), jax.lax.axis_index(context_axes)
            lengths = own_lengths(lengths, page_size, *shard)
        return plan(lengths)

    return jax.shard_map(
        plan_own,
        mesh=placement.mesh,
        in_specs=placement.spec("batch"),
        out_specs=placement.spec(("context", "batch")),
        check_vma=False,
    )(lengths)


def to_stripes(x: Array, placement: Placement | None) -> Array:
    """x[B, T, ...] in the order of stripes; x itself where positions are not split."""
    return _exchanged(x, placement, exchange_to_stripes)


def from_stripes(x: Array, placement: Placement | None) -> Array:
    """x[B, T, ...] in the order of positions again."""
    return _exchanged(x, placement, exchange_from_stripes)


def _exchanged(x: Array, placement: Placement | None, exchange: Callable[..., Array]) -> Array:
    """`exchange` of every device's part; each sends its two stripes once, and nothing else."""
    if placement is None or "sequence" not in (tokens := placement.of_tokens(x)):
        return x
    if not (axes := placement.axes("sequence")):
        return x
    spec = placement.spec(*tokens)
    return jax.shard_map(
        functools.partial(exchange, axes=axes), mesh=placement.mesh, in_specs=spec, out_specs=spec
    )(x)
