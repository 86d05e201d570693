"""Whether mesh axes divide what they shard. No jax."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jax_mla.sharding.rules import MeshAxes, as_tuple


def num_devices(axes: MeshAxes, mesh: Mapping[str, int]) -> int:
    """How many shards these mesh axes make; axes that the mesh does not have are of size 1."""
    return math.prod(mesh.get(name, 1) for name in as_tuple(axes))


def check_divides(
    what: str, size: int, axes: MeshAxes, mesh: Mapping[str, int], *, stripes: int = 1
) -> None:
    """Every device along these mesh axes gets an equal shard, of `stripes` equal stripes.

    Args:
      what: the beginning of the message, with the size.
      mesh: sizes by axis.

    Raises:
      ValueError: the size is not a multiple of devices * stripes.
    """
    shards = num_devices(axes, mesh)
    if shards > 1 and size % (shards * stripes):
        into = f"in {shards * stripes} stripes " if stripes > 1 else ""
        raise ValueError(
            f"{what} cannot be split {into}over {shards} devices of mesh axis "
            f"{'+'.join(as_tuple(axes))!r}"
        )
