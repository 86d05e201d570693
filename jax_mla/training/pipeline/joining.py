"""Trees of the whole model taken apart for the stages, and put together again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding

from jax_mla.training.pipeline import exchange

if TYPE_CHECKING:
    from jax_mla.training.pipeline.stages import Pipeline


@dataclasses.dataclass(frozen=True)
class Piece:
    """A leaf of the whole tree, or the layers of it from `first` to before `end`."""

    leaf: int
    first: int | None = None
    end: int | None = None


def pieces(pipeline: Pipeline, stage: int, tree: Any) -> Any:
    """The tree of a stage's part, with a Piece for every leaf."""
    structure = jax.tree.structure(tree)
    numbered = jax.tree.unflatten(structure, map(Piece, range(structure.num_leaves)))
    take = lambda piece, first, end: Piece(piece.leaf, first, end)  # noqa: E731
    return pipeline.part(numbered, stage, take=take)


def split(tree: Any, pipeline: Pipeline, *, inside: Any, joined: Any) -> tuple[Any, ...]:
    """What every stage has of a tree, copied to its devices; None where none is this process's.

    Args:
      tree: in the memory of every process, or on devices.
      inside: of that structure, NamedShardings of the whole mesh: how leaves lie in every stage.
      joined: where a leaf of the whole tree lies in between.
    """
    placed = jax.tree.leaves(inside)
    parts: list[Any] = []
    leaves = [
        exchange.settled(jax.device_put(x, sharding), pipeline)
        for x, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(joined), strict=True)
    ]
    for stage in range(pipeline.num_stages):

        def cut(piece: Piece, stage=stage) -> Array | None:
            x, sharding = leaves[piece.leaf], placed[piece.leaf]
            first, size = 0, None
            if piece.first is not None and piece.end is not None:
                first, size = piece.first, piece.end - piece.first
            part = exchange.settled(_cut(x, first, size=size, sharding=sharding), pipeline)
            return exchange.on_stage(part, pipeline, stage, sharding.spec)

        part = jax.tree.map(cut, pieces(pipeline, stage, tree))
        parts.append(part if pipeline.is_here(stage) else None)
    return tuple(parts)


@functools.partial(jax.jit, static_argnames=("size", "sharding"))
def _cut(x: Array, first, *, size: int | None, sharding: NamedSharding) -> Array:
    part = jnp.copy(x) if size is None else lax.dynamic_slice_in_dim(x, first, size)
    return lax.with_sharding_constraint(part, sharding)


def join(parts: Sequence[Any], pipeline: Pipeline, like: Any, *, inside: Any, joined: Any) -> Any:
    """The tree of the whole model on the whole mesh; of copies in several stages, the first.

    Args:
      parts: as from `split`.
      like: the whole tree, of anything with shapes and dtypes.
      inside, joined: as in `split`.
    """
    shapes, structure = jax.tree.flatten(like)
    found: list[list[tuple[int, Piece, Array | None]]] = [[] for _ in shapes]
    for stage, part in enumerate(parts):
        of_stage = jax.tree.leaves(pieces(pipeline, stage, like))
        values = [None] * len(of_stage) if part is None else jax.tree.leaves(part)
        for piece, x in zip(of_stage, values, strict=True):
            found[piece.leaf].append((stage, piece, x))
    leaves = [
        _joined(of_leaf, shape, pipeline, here.spec, there)
        for of_leaf, shape, here, there in zip(
            found, shapes, jax.tree.leaves(inside), jax.tree.leaves(joined), strict=True
        )
    ]
    return jax.tree.unflatten(structure, leaves)


def _joined(found, like, pipeline: Pipeline, spec, sharding: NamedSharding) -> Array:
    stage, piece, x = found[0]
    if piece.first is not None:
        whole = _zeros(like.shape, like.dtype, sharding)
        for stage, piece, x in found:
            shape = (piece.end - piece.first, *like.shape[1:])
            of_part = jax.ShapeDtypeStruct(shape, like.dtype)
            part = exchange.spread(x, of_part, pipeline, stage, spec, sharding)
            whole = _with_layers(whole, part, piece.first, sharding=sharding)
        return whole
    if like.shape:
        return exchange.spread(x, like, pipeline, stage, spec, sharding)
    shards = [s.data for _, _, x in found if x is not None for s in x.addressable_shards]
    copies = NamedSharding(pipeline.mesh, spec)
    x = jax.make_array_from_single_device_arrays(like.shape, copies, shards)
    return _cut(x, 0, size=None, sharding=sharding)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape, dtype, sharding: NamedSharding) -> Array:
    return lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="sharding")
def _with_layers(whole: Array, part: Array, first, *, sharding: NamedSharding) -> Array:
    whole = lax.dynamic_update_slice_in_dim(whole, part, first, 0)
    return lax.with_sharding_constraint(whole, sharding)
