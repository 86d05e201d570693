"""Whether a mesh divides what the rules shard over it."""

from __future__ import annotations

import math

import jax

from jax_mla.sharding.placement import Placement


def check_split(
    tokens: jax.Array, placement: Placement | None, axes: tuple[str, ...] = ("batch", "sequence")
) -> None:
    """Every device of the mesh is given equally many sequences, and positions in equal stripes."""
    if placement is None:
        return
    for axis, size in zip(axes, tokens.shape, strict=False):
        if size % (parts := placement.num_parts(axis)):
            names, shards = "+".join(placement.axes(axis)), placement.num_shards(axis)
            stripes = f"in {parts} stripes " if parts > shards else ""
            raise ValueError(
                f"tokens of shape {tokens.shape} cannot be split {stripes}over {shards} devices of "
                f"mesh axis {names!r} ({axis})"
            )


def check_divides(path, shape, logical_axes, spec, mesh) -> None:
    """Every mesh axis divides the axis of the array that it splits."""
    for size, axis, entry in zip(shape, logical_axes, spec, strict=True):
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            raise ValueError(
                f"{jax.tree_util.keystr(path)}: axis {axis!r} of size {size} cannot be split "
                f"over {parts} devices of mesh axis {'+'.join(names)!r}"
            )
