"""Meshes of named axes."""

from __future__ import annotations

import math

import jax
from jax.sharding import Mesh

from jax_mla.checks.sizes import check_positive
from jax_mla.sharding.axes import MESH_AXES


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
