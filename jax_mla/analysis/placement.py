"""How parameters are sharded over devices, as a table."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jax_mla.analysis.collectives import aligned
from jax_mla.config.leaves import leaves_of
from jax_mla.config.model import DeepSeekConfig
from jax_mla.params import Params
from jax_mla.sharding.rules import as_tuple


@dataclasses.dataclass(frozen=True)
class Placed:
    """One array. replicated_bytes: bytes per device beyond an even split.

    That is bytes_per_device - total bytes / devices: what some other device holds as well.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    logical_axes: tuple[str | None, ...]
    mesh_axes: tuple[Any, ...]
    bytes_per_device: int
    replicated_bytes: int


def explain_sharding(
    params: Params, config: DeepSeekConfig | None = None
) -> tuple[list[Placed], str]:
    """The sharding of every parameter and its bytes per device, as rows and as a table.

    Args:
      params: arrays, or ShapeDtypeStructs with a sharding.
      config: names the logical axes; None leaves them out.

    Raises:
      ValueError: an array has no NamedSharding, or is not a parameter of the config.
    """
    rows = [
        _placed(path, leaf, config) for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    total = sum(row.bytes_per_device for row in rows)
    wasted = sum(row.replicated_bytes for row in rows)
    table = [("tensor", "shape", "logical axes", "mesh axes", "MB/device", "replicated MB")]
    table += [
        (
            row.name,
            "x".join(map(str, row.shape)),
            " ".join(axis or "-" for axis in row.logical_axes),
            " ".join(("+".join(axis) or "-") for axis in row.mesh_axes),
            f"{row.bytes_per_device / 1e6:.3f}",
            f"{row.replicated_bytes / 1e6:.3f}",
        )
        for row in rows
    ]
    table.append(("total", "", "", "", f"{total / 1e6:.3f}", f"{wasted / 1e6:.3f}"))
    return rows, aligned(table)


def _placed(path: Any, leaf: Any, config: DeepSeekConfig | None) -> Placed:
    name, sharding = ".".join(str(key.key) for key in path), leaf.sharding
    if not isinstance(sharding, NamedSharding):
        raise ValueError(f"{name} must be on a mesh, got sharding {sharding}")
    itemsize = np.dtype(leaf.dtype).itemsize
    of_device = math.prod(sharding.shard_shape(leaf.shape)) * itemsize
    even = math.prod(leaf.shape) * itemsize // sharding.mesh.size
    spec = tuple(sharding.spec) + (None,) * (leaf.ndim - len(sharding.spec))
    mesh_axes = tuple(_larger_than_one(entry, sharding.mesh.shape) for entry in spec)
    axes = () if config is None else _logical_axes(name, config)
    name_of_dtype = np.dtype(leaf.dtype).name
    return Placed(name, leaf.shape, name_of_dtype, axes, mesh_axes, of_device, of_device - even)


def _logical_axes(name: str, config: DeepSeekConfig) -> tuple[str | None, ...]:
    axes = {".".join(leaf.path): leaf.axes for leaf in leaves_of(config)}
    if name not in axes:
        raise ValueError(f"{name} is not a parameter of this config")
    return axes[name]


def _larger_than_one(entry: Any, sizes: Any) -> tuple[str, ...]:
    return tuple(name for name in as_tuple(entry) if sizes[name] > 1)
