"""Parameters as a plain dict: made, checked, sharded and bound to the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array, Key, UInt32

from jax_mla.checks.arrays import as_key
from jax_mla.checks.problems import differences, refuse
from jax_mla.config.leaf_types import LeafType, leaf_type
from jax_mla.config.model import DeepSeekConfig, check_config
from jax_mla.model import DeepSeek
from jax_mla.sharding.divide import check_divides
from jax_mla.sharding.placement import Placement, note_unused_axes, placement_of, placement_on
from jax_mla.sharding.rules import ShardingRules

Params = dict[str, Any]


@functools.lru_cache
def split_abstract(
    config: DeepSeekConfig,
    placement: Placement | None = None,
    layers: tuple[int, int] | None = None,
) -> tuple[nnx.GraphDef, nnx.State]:
    """GraphDef and State of the model with shapes instead of arrays. Needs no devices."""
    options = {"placement": placement, "layers": layers}
    return nnx.split(nnx.eval_shape(lambda: DeepSeek(config, rngs=nnx.Rngs(0), **options)))


def bind(
    params: Params,
    config: DeepSeekConfig,
    rules: ShardingRules | None = None,
    *,
    layers: tuple[int, int] | None = None,
) -> DeepSeek:
    """Builds the module over `params`, on the mesh they are sharded over. It copies nothing.

    Call it inside jit: a jitted loop of one's own is this and the methods of `DeepSeek`.

    Args:
      rules: those by which the parameters were put on their mesh; None takes the defaults.
      layers: half-open range [first, end) that `params` covers; None for all.

    Raises:
      ValueError: the parameters are not those of the config, every difference is listed; or there
        are rules and no mesh.
    """
    check_params(params, config, rules, layers)
    graphdef, abstract = split_abstract(config, placement_of(params, rules), layers)
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


def check_params(
    params: Params,
    config: DeepSeekConfig,
    rules: ShardingRules | None,
    layers: tuple[int, int] | None = None,
) -> None:
    """The parameters have the names and shapes that the config asks for."""
    check_config(config)
    _, abstract = split_abstract(config, placement_of(params, rules), layers)
    check_shapes(params, nnx.to_pure_dict(abstract))


def check_shapes(params: Params, expected: Params) -> None:
    """The parameters have the names and shapes of another tree of parameters."""
    found, wanted = (
        {
            jax.tree_util.keystr(path, simple=True, separator="."): np.shape(leaf)
            for path, leaf in leaves
        }
        for leaves in map(jax.tree_util.tree_leaves_with_path, (params, expected))
    )
    refuse("the parameters are not those of the config", differences(found, wanted))


def init(key: Key[Array, ""] | UInt32[Array, " words"] | int, config: DeepSeekConfig) -> Params:
    """Random parameters: weights normal with stddev config.initializer_range, norms 1, biases 0.

    Args:
      key: a jax.random key or a seed.

    Returns:
      A nested dict of arrays in config.dtype. Layers of one kind are stacked: every leaf below
      `dense_layers` and `moe_layers` has a leading layer axis.

    Raises:
      ValueError: key is neither a jax.random key nor a seed from 0 to 2**32 - 1.
    """
    check_config(config)
    return _init(as_key(key), config)


@functools.partial(jax.jit, static_argnames="config")
def _init(key: Key[Array, ""], config: DeepSeekConfig) -> Params:
    return nnx.to_pure_dict(nnx.state(DeepSeek(config, rngs=nnx.Rngs(key))))


def param_shardings(
    config: DeepSeekConfig, mesh: Mesh | AbstractMesh, rules: ShardingRules | None = None
) -> Params:
    """The tree of `init`, holding a NamedSharding where `init` holds an array.

    Args:
      mesh: of `make_mesh`, or with some of its axes. An abstract one, of no devices, serves for
        shapes and for lowering.
      rules: None takes the defaults of ShardingRules. An axis of the mesh that they leave unused
        duplicates work, which the log of "jax_mla" says once.

    Raises:
      ValueError: a mesh axis does not divide the axis that it is to split; both sizes are named. Or
        the mesh has axes of other names or types.
    """
    placement = placement_on(mesh, rules)
    _, state = split_abstract(config)

    def place(path, variable):
        axes = variable.get_metadata("logical_axes")
        spec = placement.spec(*axes)
        name = jax.tree_util.keystr(path)
        for size, axis, names in zip(variable.get_value().shape, axes, spec, strict=True):
            check_divides(f"{name}: axis {axis!r} of size {size}", size, names, mesh.shape)
        return NamedSharding(mesh, spec)

    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    placed = jax.tree_util.tree_map_with_path(place, state, is_leaf=is_variable)
    placed = nnx.to_pure_dict(placed)
    note_unused_axes(placement, (sharding.spec for sharding in jax.tree.leaves(placed)))
    return placed


def map_leaves(function: Callable[[LeafType, Any], Any], params: Params) -> Params:
    """function(type, array) of every leaf, as the table of leaves knows it.

    Raises:
      ValueError: the table has no such leaf.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: function(leaf_type(tuple(key.key for key in path)), x), params
    )
