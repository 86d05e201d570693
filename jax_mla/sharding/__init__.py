"""Meshes, the rules that shard arrays over them, and published layouts."""

import importlib
from typing import TYPE_CHECKING, Any

from jax_mla.sharding import layouts
from jax_mla.sharding.axes import MESH_AXES
from jax_mla.sharding.dispatch import ExpertDispatch
from jax_mla.sharding.rules import ShardingRules

# Of these two jax is needed, which the rules and layouts above do without.
_HOME = {"make_mesh": "mesh", "Placement": "placement"}

if TYPE_CHECKING:
    from jax_mla.sharding.mesh import make_mesh
    from jax_mla.sharding.placement import Placement

__all__ = ["MESH_AXES", "ExpertDispatch", "Placement", "ShardingRules", "layouts", "make_mesh"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
