"""One training step: gradients by micro-batch, the update, the router's bias."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jax_mla.checks.tokens import check_batch
from jax_mla.config.model import DeepSeekConfig
from jax_mla.params import Params, param_shardings
from jax_mla.sharding.rules import ShardingRules
from jax_mla.training.batch import Batch, check_rows
from jax_mla.training.loss import LossSums, NextTokenLoss, loss_sums
from jax_mla.training.optimizer import make_optimizer, square_sum
from jax_mla.training.recipe import Recipe
from jax_mla.training.router_bias import has_router_bias, update_router_bias
from jax_mla.training.state import TrainState, state_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """Metrics of one step, computed before the update; shared fields as in `NextTokenLoss`.

    Attributes:
      grad_norm: global norm of the gradients before clipping; float32.
      learning_rate: of this step.
      is_skipped: float16 gradients overflowed, and only the loss scale changed.
      num_skipped: steps of the run that were skipped, this one included.
      loss_scale: what the loss of this step was multiplied by; None unless it is float16.
    """

    loss: Float[Array, ""]
    load: Int[Array, "L E"] | None
    num_tokens: Int[Array, ""]
    z_loss: Float[Array, ""]
    balance_loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    is_skipped: Bool[Array, ""]
    num_skipped: Int[Array, ""]
    loss_scale: Float[Array, ""] | None = None
    num_dropped: Int[Array, ""] | None = None


@functools.partial(
    jax.jit, static_argnames=("config", "recipe", "mesh", "rules"), donate_argnames=("state",)
)
def train_step(
    state: TrainState,
    config: DeepSeekConfig,
    batch: Batch,
    *,
    recipe: Recipe,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> tuple[TrainState, StepMetrics]:
    """Updates the weights with one batch. Jitted; `state` is donated, so use only what is returned.

    Up to rounding, the result does not depend on `recipe.num_micro_batches`: means are over all
    tokens of the batch. The router's bias moves once, by the load of the whole batch.

    Args:
      batch: `place_batch` shards it over a mesh and can check token ids; here, under jit, only
        shapes and dtypes can be checked.
      mesh: shards gradients by `rules.gradients()` and the new state like the old one; None for a
        single device.

    Raises:
      ValueError: shapes or dtypes of the batch are not as in `next_token_loss`, its rows cannot be
        divided by the micro-batches and the devices of `rules.batch`, or the mesh has stages.
    """
    rules = ShardingRules() if rules is None else rules
    tokens, ids = check_batch(batch.tokens, config, batch.segment_ids, batch.loss_mask)
    batch = Batch(tokens, ids, batch.loss_mask)
    check_rows(*batch.tokens.shape, recipe=recipe, mesh=mesh, rules=rules)
    scale = 1.0 if state.loss_scale is None else state.loss_scale.scale
    num_tokens, num_rows = batch.is_counted().sum(), batch.num_rows()

    def gradients_of(batch: Batch) -> tuple[Params, LossSums]:
        def scaled_objective(params):
            by = None if mesh is None else rules
            _, sums = loss_sums(params, config, batch, recipe.pass_options, rules=by)
            return objective(sums, recipe, num_tokens, num_rows) * scale, sums

        gradients, sums = jax.grad(scaled_objective, has_aux=True)(state.params)
        gradients = jax.tree.map(lambda g: g.astype(recipe.precision.reduce), gradients)
        if mesh is not None:
            placed = param_shardings(config, mesh, rules.gradients())
            gradients = jax.lax.with_sharding_constraint(gradients, placed)
        return gradients, sums

    gradients, sums = _summed(gradients_of, batch, recipe.num_micro_batches)
    gradients = jax.tree.map(lambda g, p: (g / scale).astype(p.dtype), gradients, state.params)
    is_finite = jnp.array(True) if state.loss_scale is None else all_finite(gradients)
    new_state = updated(state, gradients, sums.load, recipe, is_finite)
    if mesh is not None:
        new_state = jax.lax.with_sharding_constraint(
            new_state, state_shardings(config, mesh, rules, recipe=recipe)
        )
    grad_norm = jnp.sqrt(square_sum(gradients))
    loss = sums.means(num_tokens, num_rows)
    return new_state, step_metrics(state, loss, grad_norm, is_finite, recipe)


def step_metrics(
    state: TrainState,
    loss: NextTokenLoss,
    grad_norm: Float[Array, ""],
    is_finite: Bool[Array, ""],
    recipe: Recipe,
) -> StepMetrics:
    """The metrics of the step that begins with `state`."""
    return StepMetrics(
        loss=loss.loss,
        load=loss.load,
        num_tokens=loss.num_tokens,
        z_loss=loss.z_loss,
        balance_loss=loss.balance_loss,
        num_dropped=loss.num_dropped,
        grad_norm=grad_norm,
        learning_rate=jnp.asarray(recipe.rate(state.step - state.num_skipped), jnp.float32),
        is_skipped=~is_finite,
        num_skipped=state.num_skipped + (~is_finite).astype(jnp.int32),
        # A copy: the state that holds the scale is donated.
        loss_scale=None if state.loss_scale is None else jnp.array(state.loss_scale.scale),
    )


def objective(
    sums: LossSums, recipe: Recipe, num_tokens: Int[Array, ""], num_rows: int | Array
) -> Float[Array, ""]:
    """This micro-batch's contribution to the training objective, from its sums.

    Args:
      num_tokens: tokens of the whole batch whose prediction is counted.
      num_rows: rows of the whole batch that hold more than padding.
    """
    count = jnp.maximum(num_tokens, 1).astype(jnp.float32)
    total = (sums.nll + recipe.z_loss * sums.squared_lse) / count
    return total + recipe.balance_loss * sums.balance / jnp.maximum(num_rows, 1).astype(jnp.float32)


def _summed(
    gradients_of: Callable[[Batch], tuple[Params, LossSums]], batch: Batch, num_micro_batches: int
) -> tuple[Params, LossSums]:
    """Gradients and sums, added up over micro-batches; one's activations exist at a time."""
    if num_micro_batches == 1:
        return gradients_of(batch)

    def split(x):
        # Micro-batch i takes the rows i, i + num_micro_batches, ...: where rows are sharded, every
        # device has rows of every micro-batch.
        return jnp.moveaxis(x.reshape(-1, num_micro_batches, *x.shape[1:]), 1, 0)

    micro_batches = jax.tree.map(split, batch)
    shapes = jax.eval_shape(gradients_of, jax.tree.map(lambda x: x[0], micro_batches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total, micro_batch):
        return jax.tree.map(jnp.add, total, gradients_of(micro_batch)), None

    return jax.lax.scan(add, zeros, micro_batches)[0]


def all_finite(gradients: Params) -> Bool[Array, ""]:
    return jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(gradients)]).all()


def updated(
    state: TrainState,
    gradients: Params,
    load: Int[Array, "L E"] | None,
    recipe: Recipe,
    is_finite: Bool[Array, ""],
) -> TrainState:
    """The next state; it keeps the old weights where float16 gradients are not finite."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes its int32 counters with floats
        updates, opt_state = make_optimizer(recipe).update(gradients, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
    if load is not None and recipe.router_bias_rate and has_router_bias(params):
        params = update_router_bias(params, load, recipe.router_bias_rate)
    step = state.step + 1
    if state.loss_scale is None:
        return TrainState(params, opt_state, step, state.num_skipped, None)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(is_finite, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    num_skipped = state.num_skipped + (~is_finite).astype(jnp.int32)
    scale = next_loss_scale(state.loss_scale, is_finite)
    return TrainState(params, opt_state, step, num_skipped, scale)


def next_loss_scale(scale: DynamicScale, is_finite: Bool[Array, ""]) -> DynamicScale:
    """Flax's rule, for gradients that were summed outside of `DynamicScale.value_and_grad`.

    The scale is halved by an overflow, and doubled after growth_interval steps without one.
    """
    # Its own value_and_grad, of a function whose gradient is 0 or, after an overflow, infinite.
    slope = jnp.where(is_finite, 0.0, jnp.inf)
    new_scale, *_ = scale.value_and_grad(lambda x: x * slope)(jnp.ones(()))
    return new_scale
