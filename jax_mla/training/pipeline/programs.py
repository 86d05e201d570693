"""The programs of a stage's devices: forward, backward, the reduction of gradients, the update."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jax_mla.config.model import DeepSeekConfig
from jax_mla.params import Params
from jax_mla.sharding.placement import constrain_tokens, placement_of
from jax_mla.training.batch import Batch
from jax_mla.training.loss import LossSums, NextTokenLoss, loss_sums
from jax_mla.training.optimizer import clipped, square_sum
from jax_mla.training.pipeline.stages import Pipeline
from jax_mla.training.recipe import Recipe
from jax_mla.training.state import TrainState, state_shardings
from jax_mla.training.step import all_finite, objective, updated

_STATIC = ("pipeline", "stage", "recipe")
_of_stage = functools.partial(jax.jit, static_argnames=_STATIC)


@_of_stage
def forward(
    params: Params, x: Array | None, batch: Batch, *, pipeline: Pipeline, stage: int, recipe: Recipe
) -> tuple[Array | None, LossSums]:
    """Hidden states for the next stage (None after the last), and this stage's sums of the loss.

    Args:
      x: hidden states of a micro-batch; None in the first stage.

    Returns:
      Sums replicated over the stage, so that programs that read them need no collectives.
    """
    x, sums = _forward(params, x, batch, pipeline, stage, recipe)
    return x, jax.lax.with_sharding_constraint(sums, pipeline.sharding(stage))


def _forward(params, x, batch, pipeline, stage, recipe):
    x, sums = loss_sums(
        params,
        pipeline.config,
        batch,
        recipe.pass_options,
        rules=pipeline.stage_rules,
        layers=pipeline.layers[stage],
        x=x,
    )
    if stage == pipeline.num_stages - 1:
        return None, sums
    return constrain_tokens(x, placement_of(params, pipeline.stage_rules)), sums


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames=("gradients",))
def backward(
    params: Params,
    gradients: Params,
    x: Array | None,
    batch: Batch,
    output_gradient: Array | None,
    num_tokens: Array,
    num_rows: Array,
    loss_scale: Array,
    *,
    pipeline: Pipeline,
    stage: int,
    recipe: Recipe,
) -> tuple[Params, Array | None]:
    """Adds a micro-batch's gradients and returns the gradient of x; recomputes the stage."""

    def run(params, x):
        y, sums = _forward(params, x, batch, pipeline, stage, recipe)
        return y, objective(sums, recipe, num_tokens, num_rows) * loss_scale

    _, pull_back = jax.vjp(run, params, x)
    of_params, of_x = pull_back((output_gradient, jnp.ones(())))
    added = jax.tree.map(lambda total, g: total + g.astype(total.dtype), gradients, of_params)
    if of_x is not None:  # sharded like x, as the stage before made it
        of_x = constrain_tokens(of_x, placement_of(params, pipeline.stage_rules))
    return jax.lax.with_sharding_constraint(added, _gradient_shardings(pipeline, stage)), of_x


@_of_stage
def no_gradients(params: Params, *, pipeline: Pipeline, stage: int, recipe: Recipe) -> Params:
    """Zeros in `Precision.reduce`, sharded like gradients."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, recipe.precision.reduce), params)
    return jax.lax.with_sharding_constraint(zeros, _gradient_shardings(pipeline, stage))


def _gradient_shardings(pipeline: Pipeline, stage: int) -> Params:
    return pipeline.param_shardings(stage, pipeline.stage_rules.gradients())


@jax.jit
def unscaled(gradients: Params, params: Params, loss_scale: Array) -> Params:
    """Gradients of the loss itself, in the dtypes of the weights."""
    return jax.tree.map(lambda g, p: (g / loss_scale).astype(p.dtype), gradients, params)


@jax.jit
def square_sum_and_finiteness(gradients: Params) -> tuple[Array, Array]:
    return square_sum(gradients), all_finite(gradients)


@functools.partial(jax.jit, static_argnames="is_scaled")
def norm_of(squares: Array, finite: Array, *, is_scaled: bool) -> tuple[Array, Array]:
    """The global norm from the stages' sums of squares, and whether all gradients are finite."""
    return jnp.sqrt(squares.sum()), finite.all() if is_scaled else jnp.array(True)


@jax.jit
def added_up(sums: list[LossSums]) -> LossSums:
    """The sums of all micro-batches in one stage."""
    return jax.tree.map(lambda *x: sum(x), *sums)


@functools.partial(jax.jit, static_argnames=("config", "num_layers"))
def evened(sums: LossSums, config: DeepSeekConfig, num_layers: int) -> LossSums:
    """Sums padded to the same shapes in every stage: a load of `num_layers` layers."""
    load = jnp.zeros((num_layers, config.n_routed_experts or 0), jnp.int32)
    if sums.load is not None:
        load = load.at[: len(sums.load)].set(sums.load)
    dropped = jnp.int32(0) if sums.num_dropped is None else sums.num_dropped
    return dataclasses.replace(sums, load=load, num_dropped=dropped)


@functools.partial(jax.jit, static_argnames=("num_moe", "counts_dropped"))
def mean_loss(
    sums: LossSums,
    num_tokens: Array,
    num_rows: Array,
    *,
    num_moe: tuple[int, ...],
    counts_dropped: bool,
) -> NextTokenLoss:
    """The loss of a batch from the results of `evened` of every stage.

    Args:
      sums: with a leading axis of stages.
      num_moe: MoE layers per stage.
    """
    assert sums.load is not None and sums.num_dropped is not None  # `evened` filled them in
    loads = [load[:n] for load, n in zip(sums.load, num_moe, strict=True)]
    return LossSums(
        nll=sums.nll[-1],
        squared_lse=sums.squared_lse[-1],
        balance=sums.balance.sum(),
        load=jnp.concatenate(loads) if any(num_moe) else None,
        num_dropped=sums.num_dropped.sum() if counts_dropped else None,
    ).means(num_tokens, num_rows)


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames=("state",))
def update(
    state: TrainState,
    gradients: Params,
    load: Array | None,
    grad_norm: Array,
    is_finite: Array,
    *,
    pipeline: Pipeline,
    stage: int,
    recipe: Recipe,
) -> TrainState:
    """A stage's next state; gradients are clipped by the norm of all stages."""
    if (limit := recipe.clip_norm) is not None:
        # The optimizer clips too, by the norm of this stage alone, which is no larger: it then has
        # nothing left to clip.
        gradients = clipped(gradients, grad_norm, limit)
    new_state = updated(state, gradients, load, recipe, is_finite)
    return jax.lax.with_sharding_constraint(new_state, stage_shardings(pipeline, stage, recipe))


def stage_shardings(pipeline: Pipeline, stage: int, recipe: Recipe) -> Any:
    """The tree of a stage's TrainState with NamedShardings instead of arrays."""
    whole = state_shardings(
        pipeline.config, pipeline.meshes[stage], pipeline.stage_rules, recipe=recipe
    )
    return pipeline.part(whole, stage, take=lambda sharding, first, end: sharding)
