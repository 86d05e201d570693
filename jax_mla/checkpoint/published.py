"""Which leaves each published tensor fills."""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np

from jax_mla.config.leaves import Leaf

Fills = tuple[tuple[Leaf, tuple[int, ...]], ...]


def published(leaves: tuple[Leaf, ...]) -> dict[str, Fills]:
    """For each published name, layer by layer, the leaves that it fills and where.

    Only `kv_b_proj` (and a fused `gate_up_proj`) fills two.
    """
    fills: dict[str, list[tuple[Leaf, tuple[int, ...]]]] = defaultdict(list)
    for layers, group in itertools.groupby(leaves, key=lambda leaf: leaf.layers):
        stack = list(group)
        for layer in np.ndindex(*(() if layers is None else (len(layers),))):
            for leaf in stack:
                for expert in np.ndindex(*leaf.lead_shape[len(layer) :]):
                    fills[leaf.name_at((*layer, *expert))].append((leaf, (*layer, *expert)))
    return {name: tuple(found) for name, found in fills.items()}
