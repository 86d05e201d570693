"""A mesh and its rules, as layers use them."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jax_mla.sharding.divide import check_divides, num_devices
from jax_mla.sharding.mesh import check_axis_types, check_mesh
from jax_mla.sharding.rules import (
    LOGICAL_AXES,
    SPLITS,
    LogicalAxis,
    MeshAxes,
    ShardingRules,
    as_tuple,
)

_LOG = logging.getLogger("jax_mla")


def partition_spec(rules: ShardingRules, logical_axes: Sequence[LogicalAxis]) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes; None is an axis never split.

    Args:
      logical_axes: several in a tuple share one axis of the array, the first one outermost.

    Raises:
      ValueError: an axis has no rule, or two axes of one array share a mesh axis.
    """
    entries = [_mesh_axes(rules, axis) for axis in logical_axes]
    used = [name for entry in entries for name in as_tuple(entry)]
    for axis in used:
        if used.count(axis) > 1:
            raise ValueError(
                f"logical axes {tuple(logical_axes)} use mesh axis {axis!r} twice: {entries}"
            )
    return PartitionSpec(*entries)


def _mesh_axes(rules: ShardingRules, axis: LogicalAxis) -> MeshAxes:
    if axis is None:
        return None
    if isinstance(axis, tuple):
        return tuple(name for part in axis for name in as_tuple(_mesh_axes(rules, part)))
    if axis not in LOGICAL_AXES:
        raise ValueError(f"logical axis {axis!r} has no rule in {rules}")
    return getattr(rules, axis)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the rules that shard arrays over it, as layers use them. Hashable.

    Attributes:
      mesh: with the axes of `make_mesh`, or some of them.
      rules: without the axes that the mesh lacks, see `ShardingRules.on`.

    Raises:
      ValueError: the mesh is none, or has other axes, or axes that are not of type Auto.
    """

    mesh: AbstractMesh
    rules: ShardingRules

    def __post_init__(self) -> None:
        check_mesh(self.mesh)
        object.__setattr__(self, "rules", self.rules.on(self.mesh.axis_names))

    def spec(self, *logical_axes: LogicalAxis) -> PartitionSpec:
        return partition_spec(self.rules, logical_axes)

    def axes(self, logical_axis: str) -> tuple[str, ...]:
        """The mesh axes of more than one device that shard a logical axis."""
        names = as_tuple(getattr(self.rules, logical_axis))
        return tuple(name for name in names if self.mesh.shape[name] > 1)

    def num_shards(self, logical_axis: str) -> int:
        return num_devices(self.axes(logical_axis), self.mesh.shape)

    def stripes(self, logical_axis: str) -> int:
        """How many pieces of an axis each device holds: two of positions, one of all else."""
        return 2 if logical_axis == "sequence" and self.axes("sequence") else 1

    def num_parts(self, logical_axis: str) -> int:
        """What the size of an axis must be a multiple of."""
        return self.num_shards(logical_axis) * self.stripes(logical_axis)

    def check_divides(self, what: str, size: int, logical_axis: str) -> None:
        """The mesh divides an axis of this size; `what` begins the message of the ValueError."""
        axes, stripes = self.axes(logical_axis), self.stripes(logical_axis)
        check_divides(what, size, axes, self.mesh.shape, stripes=stripes)

    def of_tokens(self, x: jax.Array) -> tuple[str | None, ...]:
        """Logical axes of x[B, T, ...]; a T that does not divide, as in decoding, is not split."""
        splits = x.shape[1] % self.num_parts("sequence") == 0
        return ("batch", "sequence" if splits else None) + (None,) * (x.ndim - 2)

    def constrain(self, x: jax.Array, *logical_axes: LogicalAxis) -> jax.Array:
        """Asks the compiler to lay x out by the rules."""
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(self.mesh, self.spec(*logical_axes))
        )


def placement_on(mesh: Mesh | AbstractMesh, rules: ShardingRules | None) -> Placement:
    """What a caller's `mesh` and `rules` mean; no rules are the defaults of ShardingRules.

    Raises:
      ValueError: as `Placement`.
    """
    check_mesh(mesh)
    return Placement(mesh.abstract_mesh, ShardingRules() if rules is None else rules)


def placement_of(params: Any, rules: ShardingRules | None) -> Placement | None:
    """Mesh and layout of parameters, concrete or traced; None on one device or in shard_map.

    Raises:
      ValueError: rules were given for parameters on no mesh, or `Placement` refuses their mesh.
    """
    leaves = jax.tree.leaves(params)
    if not leaves:
        return None
    mesh = jax.typeof(leaves[0]).sharding.mesh
    if jax.sharding.AxisType.Manual in mesh.axis_types:
        return None  # inside of the caller's own shard_map or pmap: one device's share
    if mesh.empty and rules is not None:
        raise ValueError(f"rules say how to split over a mesh, the parameters lie on none: {rules}")
    if mesh.empty:
        return None
    if mesh.size == 1:  # a single device, whatever its axis is called
        check_axis_types(mesh)
        return None
    return placement_on(mesh, rules)


def note_unused_axes(placement: Placement, specs: Iterable[PartitionSpec]) -> None:
    """Says in the log which mesh axes shard neither parameters of these specs nor tokens.

    The axis `stage` is left out: a pipeline shards the layers over it by itself.
    """
    rules, used = placement.rules, {"stage"}
    for axes in (rules.batch, rules.sequence, rules.context, *(getattr(rules, s) for s in SPLITS)):
        used |= {*as_tuple(axes)}
    for spec in specs:
        used |= {name for axes in spec for name in as_tuple(axes)}
    for axis, size in placement.mesh.shape.items():
        if size > 1 and axis not in used:
            _note(
                f"mesh axis {axis!r} of size {size} shards nothing by these rules: the devices "
                "along it all compute the same"
            )


@functools.cache  # said once, however often shardings are asked for
def _note(text: str) -> None:
    _LOG.warning(text)


def constrain_tokens(x: jax.Array, placement: Placement | None) -> jax.Array:
    """Activations x[B, T, ...] laid out by the rules; x itself without a mesh."""
    return x if placement is None else placement.constrain(x, *placement.of_tokens(x))


def check_split(
    tokens: jax.Array, placement: Placement | None, axes: tuple[str, ...] = ("batch", "sequence")
) -> None:
    """Every device of the mesh gets equally many sequences, and positions in equal stripes."""
    if placement is not None:
        for axis, size in zip(axes, tokens.shape, strict=False):
            placement.check_divides(f"axis {axis!r} of tokens of shape {tokens.shape}", size, axis)
