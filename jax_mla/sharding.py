"""Where arrays live: a mesh of named axes and the rules that map logical axes onto it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jax_mla.checks import MESH_AXES, check_positive

MeshAxes = str | tuple[str, ...] | None
LogicalAxis = str | tuple[str, ...] | None
ExpertDispatch = Literal["dense", "a2a", "ragged"]


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    expert: int = 1,
    stage: int = 1,
    sequence: int = 1,
    devices: list[jax.Device] | None = None,
) -> Mesh:
    """Builds a mesh with all six axes; those not named have size 1.

    All axes are of type Auto: shardings are stated at the jit boundary and XLA propagates them.

    Args:
      devices: the devices to use, in order; None takes the first ones of `jax.devices()`.

    Raises:
      ValueError: the mesh needs more devices than there are, or a size is not positive.
    """
    shape = (data, fsdp, tensor, expert, stage, sequence)
    check_positive(**dict(zip(MESH_AXES, shape, strict=True)))
    needed = math.prod(shape)
    devices = jax.devices() if devices is None else devices
    if needed > len(devices):
        sizes = ", ".join(f"{axis}={n}" for axis, n in zip(MESH_AXES, shape, strict=True) if n > 1)
        raise ValueError(f"a mesh of {sizes} needs {needed} devices, found {len(devices)}")
    types = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices[:needed])


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The mesh axis (or axes, or None) that each logical axis of an array is split over.

    Changing the layout of the whole model is changing this one object; `jax_mla.rules` has the
    published recipes. `layers` to `norm` are axes of parameters, `batch` and `sequence` of tokens,
    `context` of cached tokens. `latent` is the axis of a latent that is read (by q_b, k_b and v_b),
    `q_latent` and `kv_latent` the same axes where they are written, so that an array never meets
    one mesh axis twice.

    Attributes:
      sequence: splits the positions of prompts and of training into two stripes a device, see
        `layers/stripes`.
      context: splits the pages of every sequence in a cache, page j going to device j mod n, for
        sequences that are too long for one device. Each attends to its own, and the results are
        merged. None, the axes of `sequence`, or axes that split neither tokens nor heads.
      gradient_split, optimizer_split: the mesh axes over which `embed` and `latent` of gradients
        and of the optimizer's state are split instead (ZeRO stages 2 and 1); None: as parameters.
      expert_dispatch: how tokens reach the devices of their experts, see `layers/expert_parallel`.
      expert_capacity: of "a2a", the room for what one device may send to another, in units of the
        mean M * A / devices of its M tokens. Of the rows for one device the first fit, in the order
        of the tokens, and the experts of the others are left out: `forward_trace` and `train_step`
        report how many. None leaves room for all.

    Raises:
      ValueError: a mesh axis or a dispatcher has no such name, context shares an axis that it must
        not, or expert_capacity is not above 0 or given to another dispatcher.
    """

    layers: MeshAxes = None
    vocab: MeshAxes = "tensor"
    embed: MeshAxes = "fsdp"
    heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    latent: MeshAxes = "fsdp"
    q_latent: MeshAxes = None
    kv_latent: MeshAxes = None
    mlp: MeshAxes = "tensor"
    expert: MeshAxes = "expert"
    norm: MeshAxes = None
    batch: MeshAxes = ("data", "fsdp")
    sequence: MeshAxes = "sequence"
    context: MeshAxes = None
    gradient_split: MeshAxes = None
    optimizer_split: MeshAxes = None
    expert_dispatch: ExpertDispatch = "dense"
    expert_capacity: float | int | None = None

    def __post_init__(self) -> None:
        if self.expert_dispatch not in (known := get_args(ExpertDispatch)):
            raise ValueError(
                f"expert_dispatch={self.expert_dispatch!r} is not one of {', '.join(known)}"
            )
        if self.expert_capacity is not None:
            self._check_capacity(self.expert_capacity)
        for field in dataclasses.fields(self):
            axes = getattr(self, field.name) if field.type == "MeshAxes" else None
            for axis in as_tuple(axes):
                if axis not in MESH_AXES:
                    known = ", ".join(MESH_AXES)
                    raise ValueError(f"{field.name}={axis!r} is not a mesh axis, those are {known}")
        self._check_context()

    def _check_context(self) -> None:
        context = set(as_tuple(self.context))
        for name in ("batch", "heads", "sequence"):
            other = set(as_tuple(getattr(self, name)))
            if context & other and not (name == "sequence" and context == other):
                raise ValueError(
                    f"context={self.context!r} and {name}={getattr(self, name)!r} share mesh axis "
                    f"{min(context & other)!r}: a device would not see all keys of its queries"
                )

    def _check_capacity(self, capacity: float | int) -> None:
        is_number = isinstance(capacity, float | int) and not isinstance(capacity, bool)
        if not is_number or not 0 < capacity < math.inf:
            raise ValueError(f"expert_capacity must be a number above 0, got {capacity!r}")
        if self.expert_dispatch != "a2a":
            raise ValueError(
                f"expert_capacity={capacity} is of expert_dispatch='a2a', which drops tokens, not "
                f"of {self.expert_dispatch!r}"
            )

    def spec(self, logical_axes: Sequence[LogicalAxis]) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes; None is an axis never split.

        Args:
          logical_axes: several in a tuple share one axis of the array, the first one outermost.

        Raises:
          ValueError: an axis has no rule, or two axes of one array share a mesh axis.
        """
        entries = [self._mesh_axes(axis) for axis in logical_axes]
        used = [name for entry in entries for name in as_tuple(entry)]
        for axis in used:
            if used.count(axis) > 1:
                raise ValueError(
                    f"logical axes {tuple(logical_axes)} use mesh axis {axis!r} twice: {entries}"
                )
        return PartitionSpec(*entries)

    def _mesh_axes(self, axis: LogicalAxis) -> MeshAxes:
        if axis is None:
            return None
        if isinstance(axis, tuple):
            return tuple(name for part in axis for name in as_tuple(self._mesh_axes(part)))
        if axis not in {field.name for field in dataclasses.fields(self)}:
            raise ValueError(f"logical axis {axis!r} has no rule in {self}")
        return getattr(self, axis)

    def gradients(self) -> ShardingRules:
        """The rules of gradients."""
        return self._split_over(self.gradient_split)

    def optimizer(self) -> ShardingRules:
        """The rules of the optimizer's state."""
        return self._split_over(self.optimizer_split)

    def _split_over(self, axes: MeshAxes) -> ShardingRules:
        return self if axes is None else dataclasses.replace(self, embed=axes, latent=axes)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the rules of what lies where on it, as layers use them. Hashable.

    Raises:
      NotImplementedError: the mesh's platform lacks what the rules' expert_dispatch needs.
    """

    mesh: AbstractMesh
    rules: ShardingRules

    def __post_init__(self) -> None:
        device = self.mesh.abstract_device  # None for a mesh of no particular devices
        platform = device.platform if device else None
        if self.rules.expert_dispatch == "ragged" and self.axes("expert") and platform == "cpu":
            raise NotImplementedError(
                "expert_dispatch='ragged' cannot run on platform 'cpu', where XLA has no "
                "ragged_all_to_all: use 'a2a' or 'dense'"
            )

    def spec(self, *logical_axes: LogicalAxis) -> PartitionSpec:
        return self.rules.spec(logical_axes)

    def axes(self, logical_axis: str) -> tuple[str, ...]:
        """The mesh axes of more than one device that split a logical axis."""
        names = as_tuple(getattr(self.rules, logical_axis))
        return tuple(name for name in names if self.mesh.shape[name] > 1)

    def num_shards(self, logical_axis: str) -> int:
        return math.prod(self.mesh.shape[name] for name in self.axes(logical_axis))

    def num_parts(self, logical_axis: str) -> int:
        """What the size of an axis must be a multiple of: positions are split into two stripes a
        device."""
        shards = self.num_shards(logical_axis)
        return 2 * shards if logical_axis == "sequence" and shards > 1 else shards

    def of_tokens(self, x: jax.Array) -> tuple[str | None, ...]:
        """Logical axes of x[B, T, ...]; a T that does not divide, as in decoding, is not split."""
        splits = x.shape[1] % self.num_parts("sequence") == 0
        return ("batch", "sequence" if splits else None) + (None,) * (x.ndim - 2)

    def constrain(self, x: jax.Array, *logical_axes: LogicalAxis) -> jax.Array:
        """Asks the compiler to lay x out by the rules."""
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(self.mesh, self.spec(*logical_axes))
        )


def placement_of(params: Any, rules: ShardingRules | None) -> Placement | None:
    """Where parameters lie, concrete or traced; None for a single device, and inside shard_map.

    Raises:
      ValueError: rules were given for parameters that lie on no mesh, or on one with other axes.
      NotImplementedError: see `Placement`.
    """
    leaves = jax.tree.leaves(params)
    if not leaves:
        return None
    mesh = jax.typeof(leaves[0]).sharding.mesh
    if jax.sharding.AxisType.Manual in mesh.axis_types:
        return None  # inside of the caller's own shard_map or pmap: one device's share
    if mesh.empty and rules is not None:
        raise ValueError(f"rules say how to split over a mesh, the parameters lie on none: {rules}")
    if mesh.empty or mesh.size == 1:
        return None
    if set(mesh.axis_names) != set(MESH_AXES):
        raise ValueError(
            f"the parameters lie on a mesh of axes {mesh.axis_names}, make_mesh gives {MESH_AXES}"
        )
    return Placement(mesh, ShardingRules() if rules is None else rules)


def constrain_tokens(x: jax.Array, placement: Placement | None) -> jax.Array:
    """Activations x[B, T, ...] laid out by the rules; x itself without a mesh."""
    return x if placement is None else placement.constrain(x, *placement.of_tokens(x))


def as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of a rule."""
    return () if axes is None else (axes,) if isinstance(axes, str) else axes
