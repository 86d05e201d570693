"""Parameters and states of the whole model split into those of the stages, and joined again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding

from jax_mla.params import Params, init, param_shardings
from jax_mla.training.pipeline import exchange
from jax_mla.training.pipeline.stages import Pipeline
from jax_mla.training.recipe import Recipe
from jax_mla.training.state import TrainState, abstract_state, state_shardings

States = tuple[TrainState | None, ...]


def split_params(params: Params, pipeline: Pipeline) -> tuple[Params | None, ...]:
    """The parameters of every stage, copied to its devices.

    Args:
      params: in the memory of every process, or on devices; laid out by `Pipeline.joined_rules`
        they need the least memory.

    Returns:
      None for a stage that has no device in this process.
    """
    return _split(params, pipeline, **_param_shardings(pipeline))


def join_params(parts: Sequence[Params | None], pipeline: Pipeline) -> Params:
    """Parameters of the whole model on the whole mesh, laid out by `Pipeline.joined_rules`.

    Args:
      parts: from `split_params`; or gradients that are laid out like parameters.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    like = jax.eval_shape(functools.partial(init, config=pipeline.config), key)
    return _join(parts, pipeline, like, **_param_shardings(pipeline))


def split_state(state: TrainState, pipeline: Pipeline, *, recipe: Recipe) -> States:
    """The TrainState of every stage, copied to its devices; every stage has the counters.

    Returns:
      None for a stage that has no device in this process.
    """
    return _split(state, pipeline, **_state_shardings(pipeline, recipe))


def join_state(states: States, pipeline: Pipeline, *, recipe: Recipe) -> TrainState:
    """The state of the whole model on the whole mesh, laid out by `Pipeline.joined_rules`."""
    like = abstract_state(pipeline.config, recipe=recipe)
    return _join(states, pipeline, like, **_state_shardings(pipeline, recipe))


def _param_shardings(pipeline: Pipeline) -> dict[str, Params]:
    """Of parameters in the stages, and of the whole model between steps."""
    return {
        "inside": param_shardings(pipeline.config, pipeline.mesh, pipeline.stage_rules),
        "joined": param_shardings(pipeline.config, pipeline.mesh, pipeline.joined_rules),
    }


def _state_shardings(pipeline: Pipeline, recipe: Recipe) -> dict[str, TrainState]:
    """Shardings of a state while stages hold it, and of the whole model's between steps."""
    config, mesh = pipeline.config, pipeline.mesh
    return {
        "inside": state_shardings(config, mesh, pipeline.stage_rules, recipe=recipe),
        "joined": state_shardings(config, mesh, pipeline.joined_rules, recipe=recipe),
    }


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A leaf of the whole tree, or its layers in the half-open range [first, end)."""

    leaf: int
    first: int | None = None
    end: int | None = None


def _pieces(pipeline: Pipeline, stage: int, tree: Any) -> Any:
    """The tree of a stage's part, with a _Piece for every leaf."""
    structure = jax.tree.structure(tree)
    numbered = jax.tree.unflatten(structure, map(_Piece, range(structure.num_leaves)))

    def take(whole: _Piece, first: int, end: int) -> _Piece:
        return _Piece(whole.leaf, first, end)

    return pipeline.part(numbered, stage, take=take)


def _split(tree: Any, pipeline: Pipeline, *, inside: Any, joined: Any) -> tuple[Any, ...]:
    """Every stage's part of a tree, copied to its devices; None without a device of this process.

    Args:
      tree: in the memory of every process, or on devices.
      inside: a tree of the same structure of NamedShardings on the whole mesh, whose specs are the
        layout of leaves in every stage.
      joined: NamedShardings of the leaves of the whole tree, on the way.
    """
    placed = jax.tree.leaves(inside)
    parts: list[Any] = []
    leaves = [
        exchange.settled(jax.device_put(x, sharding), pipeline)
        for x, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(joined), strict=True)
    ]
    for stage in range(pipeline.num_stages):

        def cut(piece: _Piece, stage=stage) -> Array | None:
            x, sharding = leaves[piece.leaf], placed[piece.leaf]
            first, size = 0, None
            if piece.first is not None and piece.end is not None:
                first, size = piece.first, piece.end - piece.first
            part = exchange.settled(_cut(x, first, size=size, sharding=sharding), pipeline)
            return exchange.on_stage(part, pipeline, stage, sharding.spec)

        part = jax.tree.map(cut, _pieces(pipeline, stage, tree))
        parts.append(part if pipeline.is_here(stage) else None)
    return tuple(parts)


@functools.partial(jax.jit, static_argnames=("size", "sharding"))
def _cut(x: Array, first, *, size: int | None, sharding: NamedSharding) -> Array:
    part = jnp.copy(x) if size is None else lax.dynamic_slice_in_dim(x, first, size)
    return lax.with_sharding_constraint(part, sharding)


def _join(parts: Sequence[Any], pipeline: Pipeline, like: Any, *, inside: Any, joined: Any) -> Any:
    """The tree of the whole model on the whole mesh; of copies in several stages, the first.

    Args:
      parts: from `_split`.
      like: the whole tree, of anything with shapes and dtypes.
      inside, joined: as in `_split`.
    """
    shapes, structure = jax.tree.flatten(like)
    found: list[list[tuple[int, _Piece, Array | None]]] = [[] for _ in shapes]
    for stage, part in enumerate(parts):
        of_stage = jax.tree.leaves(_pieces(pipeline, stage, like))
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
