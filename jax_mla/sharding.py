"""Where arrays live: a mesh of named axes and the rules that map logical axes onto it."""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.sharding import Mesh, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "expert", "stage", "sequence")

MeshAxes = str | tuple[str, ...] | None


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
      ValueError: the mesh needs more devices than there are.
    """
    shape = (data, fsdp, tensor, expert, stage, sequence)
    needed = math.prod(shape)
    devices = jax.devices() if devices is None else devices
    if needed > len(devices):
        sizes = ", ".join(f"{axis}={n}" for axis, n in zip(MESH_AXES, shape, strict=True) if n > 1)
        raise ValueError(f"a mesh of {sizes} needs {needed} devices, found {len(devices)}")
    types = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices[:needed])


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The mesh axis (or axes, or None) that each logical axis of a parameter is split over.

    Changing the layout of the whole model is changing this one object.
    """

    layers: MeshAxes = None
    vocab: MeshAxes = "tensor"
    embed: MeshAxes = "fsdp"
    heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    q_latent: MeshAxes = None
    kv_latent: MeshAxes = None
    mlp: MeshAxes = "tensor"
    expert: MeshAxes = "expert"
    norm: MeshAxes = None

    def spec(self, logical_axes: tuple[str, ...]) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes.

        Raises:
          ValueError: an axis has no rule, or two axes of one array share a mesh axis.
        """
        entries = []
        for axis in logical_axes:
            if not hasattr(self, axis):
                raise ValueError(f"logical axis {axis!r} has no rule in {self}")
            entries.append(getattr(self, axis))
        used = [a for e in entries if e is not None for a in ((e,) if isinstance(e, str) else e)]
        for axis in used:
            if used.count(axis) > 1:
                raise ValueError(
                    f"logical axes {logical_axes} use mesh axis {axis!r} twice: {entries}"
                )
        return PartitionSpec(*entries)
