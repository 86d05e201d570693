"""What a training run changes: weights, optimizer state and counters, and their shardings."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key, UInt32

from jax_mla.checks.arrays import as_key
from jax_mla.config.model import DeepSeekConfig
from jax_mla.params import Params, check_shapes, init, param_shardings
from jax_mla.sharding.mesh import check_mesh
from jax_mla.sharding.rules import ShardingRules
from jax_mla.training.optimizer import make_optimizer
from jax_mla.training.recipe import Recipe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a training step consumes and returns.

    The same tree may hold ShapeDtypeStructs or NamedShardings.

    Attributes:
      params: the weights in `Precision.param`; a router's correction bias in float32.
      opt_state: from optax.
      step: batches seen, which is the position in the data.
      num_skipped: batches that changed nothing because float16 gradients overflowed.
      loss_scale: what float16 losses are multiplied by; None for other formats.
    """

    params: Params
    opt_state: optax.OptState
    step: Int[Array, ""]
    num_skipped: Int[Array, ""]
    loss_scale: DynamicScale | None


def init_state(
    key: Key[Array, ""] | UInt32[Array, " words"] | int,
    config: DeepSeekConfig,
    *,
    recipe: Recipe,
    params: Params | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> TrainState:
    """The state before the first step, computed directly into its shards.

    Args:
      key: a jax.random key or a seed.
      params: weights to start from, for fine-tuning; they are copied. None draws them with `key`.
      mesh: shards the state by `rules`; None leaves it on one device.

    Raises:
      ValueError: the parameters are not those of the config, or key or mesh are none.
    """
    if mesh is not None:
        check_mesh(mesh, has_devices=True)
    if params is not None:
        check_shapes(params, _abstract(config, recipe).params)
    return _maker(config, recipe, mesh, rules)(as_key(key), params)


@functools.lru_cache
def _maker(config, recipe, mesh, rules):
    """`_make`, jitted once for all runs of a recipe."""
    shardings = None if mesh is None else state_shardings(config, mesh, rules, recipe=recipe)
    return jax.jit(lambda key, params: _make(key, params, config, recipe), out_shardings=shardings)


def _make(key, params: Params | None, config: DeepSeekConfig, recipe: Recipe) -> TrainState:
    precision = recipe.precision
    new = dataclasses.replace(config, dtype=precision.param)
    params = precision.to_param(init(key, new) if params is None else params)
    scale = None
    if precision.compute == "float16":
        scale = DynamicScale(
            fin_steps=jnp.zeros((), jnp.int32),  # pyright: ignore[reportArgumentType]
            scale=jnp.full((), 2.0**16, jnp.float32),  # pyright: ignore[reportArgumentType]
        )
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, make_optimizer(recipe).init(params), zero, zero, scale)


def abstract_state(
    config: DeepSeekConfig,
    *,
    recipe: Recipe,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> TrainState:
    """`init_state` with ShapeDtypeStructs instead of arrays, with shardings if there is a mesh."""
    shapes = _abstract(config, recipe)
    if mesh is None:
        return shapes
    shardings = state_shardings(config, mesh, rules, recipe=recipe)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


@functools.lru_cache
def _abstract(config: DeepSeekConfig, recipe: Recipe) -> TrainState:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key: _make(key, None, config, recipe), key)


def state_shardings(
    config: DeepSeekConfig, mesh: Mesh, rules: ShardingRules | None = None, *, recipe: Recipe
) -> TrainState:
    """The tree of `init_state` with NamedShardings instead of arrays.

    Weights are sharded by `rules`, the optimizer's moments by `rules.optimizer()`, and scalars are
    replicated.

    Raises:
      ValueError: the size of an axis is not divisible by the mesh axes that it is sharded over.
    """
    check_mesh(mesh)
    rules = ShardingRules() if rules is None else rules
    shapes, everywhere = _abstract(config, recipe), NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda _: everywhere, shapes)
    of_moments = {
        _names(path): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(
            param_shardings(config, mesh, rules.optimizer())
        )
    }

    def place(path, _):
        # A moment is in a tree like that of the weights, so its path ends with its weight's;
        # counters and Muon's coefficients are in none.
        names = _names(path)
        ends = (names[i:] for i in range(len(names)))
        return next((of_moments[end] for end in ends if end in of_moments), everywhere)

    return dataclasses.replace(
        placed,
        params=param_shardings(config, mesh, rules),
        opt_state=jax.tree_util.tree_map_with_path(place, shapes.opt_state),
    )


def _names(path) -> tuple[str, ...]:
    """The dict keys of a path, without the entries of optax's tuples between them."""
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
