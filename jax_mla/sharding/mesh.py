"""Meshes of named axes."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

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
    types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices[:needed])


def check_mesh(mesh: Any, *, has_devices: bool = False) -> None:
    """A mesh is one of `make_mesh`, or has some of its axes.

    Args:
      has_devices: whether an abstract mesh, of no devices, is refused as well.

    Raises:
      ValueError: it is no mesh, or has an axis of another name, or of a type other than Auto.
    """
    if not isinstance(mesh, Mesh if has_devices else Mesh | AbstractMesh):
        raise ValueError(
            f"mesh must be a mesh of devices, as from jax_mla.make_mesh, got {mesh!r:.80}"
        )
    for axis in mesh.axis_names:
        if axis not in MESH_AXES:
            raise ValueError(
                f"mesh axes must be some of {', '.join(MESH_AXES)}, as in jax_mla.make_mesh, got "
                f"{axis!r} among {mesh.axis_names}"
            )
    check_axis_types(mesh)


def check_axis_types(mesh: Mesh | AbstractMesh) -> None:
    """All axes are of type Auto: with another one, JAX asks for the sharding of every result."""
    for axis, axis_type in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if axis_type != AxisType.Auto:
            raise ValueError(
                f"mesh axes must be of type Auto, as in jax_mla.make_mesh, got {axis_type.name} "
                f"for {axis!r}: jax.make_mesh takes axis_types"
            )
