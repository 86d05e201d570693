"""Transfers between stages, whose devices may belong to several processes.

Every process runs the same Python in the same order, but it runs a stage's programs only if it has
a device of the stage; for other stages it holds None. A program that sends from stage to stage is
run by all processes of both stages, as nothing else synchronises them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_mla.params import Params
from jax_mla.sharding.rules import as_tuple
from jax_mla.training.pipeline.stages import Pipeline


def move(
    x: Array | None, like: Any, pipeline: Pipeline, source: int, target: int, spec: PartitionSpec
) -> Array | None:
    """Transfers x from one stage to another, shard by shard.

    Args:
      x: None in a process without devices of `source`.
      like: anything with the shape and the dtype of x; unused without devices of either stage.
      spec: of x, in both stages.

    Returns:
      None in a process without devices of `target`.
    """
    if not pipeline.mesh.is_multi_process:
        return jax.device_put(x, NamedSharding(pipeline.meshes[target], spec))
    if not (pipeline.is_here(source) or pipeline.is_here(target)):
        return None
    return passed_on(x, like, pipeline, source, target, spec)


def with_first_embedding(
    parts: Sequence[Params | None], pipeline: Pipeline, spec: PartitionSpec
) -> list[Params | None]:
    """The same parts, with the last stage's tied embedding replaced by a copy of the first stage's.

    Args:
      parts: parameters or gradients per stage; None for a stage that has no device in this
        process.
      spec: of the embedding, in both stages.
    """
    (first, *between, last), end = parts, pipeline.num_stages - 1
    of_first, of_last = (
        None if part is None else part["embed_tokens"]["weight"] for part in (first, last)
    )
    like = of_last if of_first is None else of_first
    copy = move(of_first, like, pipeline, 0, end, spec)
    return [first, *between, None if last is None else last | {"embed_tokens": {"weight": copy}}]


def settled(x: Any, pipeline: Pipeline) -> Any:
    """Blocks on x on multi-process CPU, where overlapping collectives can deadlock; else returns x.

    To be called on the results of every program with collectives. CPUs have no streams: two
    programs that wait for other devices could each hold threads that the other one needs.
    """
    platform = pipeline.mesh.devices.flat[0].platform
    return jax.block_until_ready(x) if platform == "cpu" and pipeline.mesh.is_multi_process else x


def passed_on(x, like, pipeline: Pipeline, source: int, target: int, spec: PartitionSpec) -> Any:
    """`move` by a program over the devices of both stages."""
    stages = (source, target)
    meshes = [pipeline.meshes[stage] for stage in stages]
    axis = pipeline.mesh.axis_names.index("stage")
    both = Mesh(
        np.concatenate([mesh.devices for mesh in meshes], axis),
        pipeline.mesh.axis_names,
        axis_types=pipeline.mesh.axis_types,
    )
    stacked = settled(_stacked(x, like, pipeline, source, stages, spec, both), pipeline)
    passed = settled(_permuted(stacked, sharding_of(both, spec)), pipeline)
    if not pipeline.is_here(target):
        return None
    return _of_devices(passed, like.shape, NamedSharding(meshes[1], spec))


@functools.partial(jax.jit, static_argnames="sharding")
def _permuted(x: Array, sharding: NamedSharding) -> Array:
    return jax.shard_map(
        lambda x: lax.ppermute(x, "stage", [(0, 1)]),
        mesh=sharding.mesh,
        in_specs=sharding.spec,
        out_specs=sharding.spec,
    )(x)


def spread(
    x: Array | None, like: Any, pipeline: Pipeline, stage: int, spec: PartitionSpec, sharding
) -> Array:
    """An array of one stage as an array on the whole mesh.

    Args:
      x: None in a process without devices of the stage.
      like: anything with the shape and the dtype of x.
      spec: of x in its stage.
      sharding: of the result.
    """
    stages = range(pipeline.num_stages)
    stacked = _stacked(x, like, pipeline, stage, stages, spec, pipeline.mesh)
    total = _summed(stacked, num_stages=pipeline.num_stages, sharding=sharding)
    return settled(total, pipeline)


@functools.partial(jax.jit, static_argnames=("num_stages", "sharding"))
def _summed(x: Array, num_stages: int, sharding: NamedSharding) -> Array:
    # Summed as integers, so that every bit is kept: 0.0 + -0.0 is 0.0.
    bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    total = bits.reshape(num_stages, -1, *x.shape[1:]).sum(0, dtype=bits.dtype)
    total = lax.bitcast_convert_type(total, x.dtype)
    return lax.with_sharding_constraint(total, sharding)


def _stacked(x, like, pipeline, source: int, stages: Sequence[int], spec, mesh: Mesh) -> Array:
    """x and zeros concatenated: each stage has one block of the first axis."""
    shards = []
    for stage in filter(pipeline.is_here, stages):
        if stage == source:  # no copy if x has this sharding already
            block = jax.device_put(x, NamedSharding(pipeline.meshes[stage], spec))
        else:
            block = _nothing(like.shape, like.dtype, pipeline.meshes[stage], spec)
        shards += [shard.data for shard in block.addressable_shards]
    shape = (len(stages) * like.shape[0], *like.shape[1:])
    return jax.make_array_from_single_device_arrays(shape, sharding_of(mesh, spec), shards)


def sharding_of(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    """Of arrays sharded by `spec` in every stage, concatenated along the first axis."""
    first, *others = spec or (None,)  # an empty spec shards nothing
    return NamedSharding(mesh, PartitionSpec(("stage", *as_tuple(first)), *others))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _nothing(shape, dtype, mesh: Mesh, spec: PartitionSpec) -> Array:
    return lax.with_sharding_constraint(jnp.zeros(shape, dtype), NamedSharding(mesh, spec))


def everywhere(parts: Sequence[Any], pipeline: Pipeline) -> Any:
    """Small arrays of every stage, stacked along a leading axis and replicated over the whole mesh.

    Args:
      parts: a tree of arrays per stage, equal in structure, shapes and dtypes, replicated over the
        stage; None for a stage that has no device in this process.
    """
    here = [part for part in parts if part is not None]

    def gather(*same: Array) -> Array:
        shape, num_stages = same[0].shape, pipeline.num_stages
        shards = [shard.data[None] for x in same for shard in x.addressable_shards]
        sharding = NamedSharding(pipeline.mesh, PartitionSpec("stage"))
        x = jax.make_array_from_single_device_arrays((num_stages, *shape), sharding, shards)
        return settled(_replicated(x, NamedSharding(pipeline.mesh, PartitionSpec())), pipeline)

    return jax.tree.map(gather, *here)


@functools.partial(jax.jit, static_argnums=1)
def _replicated(x: Array, sharding: NamedSharding) -> Array:
    return lax.with_sharding_constraint(x, sharding)


def on_stage(
    x: Array, pipeline: Pipeline, stage: int, spec: PartitionSpec | None = None
) -> Array | None:
    """A stage's local view of an array replicated over stages.

    Args:
      spec: of x in every stage; None: replicated.

    Returns:
      None in a process without devices of the stage.
    """
    if not pipeline.is_here(stage):
        return None
    sharding = NamedSharding(pipeline.meshes[stage], PartitionSpec() if spec is None else spec)
    return _of_devices(x, x.shape, sharding)


def _of_devices(x: Array, shape, sharding: NamedSharding) -> Array:
    """The shards of x on the devices of a sharding, as an array of that shape."""
    shards = [shard.data for shard in x.addressable_shards if shard.device in sharding.device_set]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)
