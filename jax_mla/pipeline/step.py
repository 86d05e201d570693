"""A training step of a pipeline: every stage updates its own part with its own optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jax_mla.functional import Params
from jax_mla.pipeline import programs
from jax_mla.pipeline.execute import loss_and_gradients
from jax_mla.pipeline.schedule import Schedule, one_f_one_b
from jax_mla.pipeline.stages import Pipeline
from jax_mla.training.recipe import Recipe
from jax_mla.training.state import TrainState
from jax_mla.training.step import Batch, StepMetrics, step_metrics

States = tuple[TrainState, ...]


def split_state(state: TrainState, pipeline: Pipeline, *, recipe: Recipe) -> States:
    """The TrainState of every stage, copied to its devices; counters are in all of them."""
    states = []
    for stage in range(pipeline.num_stages):
        shardings = programs.stage_shardings(pipeline, stage, recipe)
        # device_put may hand on the buffers of `state`, and steps delete what they are given.
        part = jax.device_put(pipeline.part(state, stage), shardings)
        states.append(programs.copied(part, pipeline=pipeline, stage=stage, recipe=recipe))
    return tuple(states)


def join_state(states: Sequence[TrainState], pipeline: Pipeline) -> TrainState:
    """The state of the whole model in the host's memory, as `train_step` takes it."""
    return pipeline.join(states)


def pipeline_train_step(
    states: States,
    pipeline: Pipeline,
    batch: Batch,
    *,
    recipe: Recipe,
    schedule: Callable[[int, int], Schedule] = one_f_one_b,
) -> tuple[States, StepMetrics]:
    """`train_step` for a model in stages: the same numbers but for rounding. Not jitted itself.

    The gradients' norm is that of all stages, an overflow of float16 in one of them skips the step
    in all, and each stage moves the bias of its routers by the load of the whole batch.

    Args:
      states: see `split_state`; donated, so use only what returns.
      batch, schedule: as in `loss_and_gradients`.

    Raises:
      ValueError: as `loss_and_gradients`.
    """
    scales = [state.loss_scale.scale for state in states if state.loss_scale is not None]
    result = loss_and_gradients(
        [state.params for state in states],
        pipeline,
        batch,
        recipe=recipe,
        schedule=schedule,
        loss_scales=scales or None,
    )
    grad_norm, is_finite = norm_and_finiteness(result.gradients, pipeline, is_scaled=bool(scales))
    metrics = step_metrics(states[0], result.loss, grad_norm, is_finite, recipe)
    new_states = []
    for stage, state in enumerate(states):
        everywhere = jax.device_put((grad_norm, is_finite), pipeline.sharding(stage))
        options = {"pipeline": pipeline, "stage": stage, "recipe": recipe}
        args = (state, result.gradients[stage], result.loads[stage], *everywhere)
        new_states.append(programs.update(*args, **options))
    return _tied(new_states, pipeline), metrics


def norm_and_finiteness(gradients: Sequence[Params], pipeline: Pipeline, *, is_scaled: bool):
    """The norm of the gradients of all stages, and whether all are finite; on the first stage.

    Args:
      is_scaled: of float16; others count as finite, as in `train_step`.
    """
    if pipeline.config.tie_word_embeddings and pipeline.num_stages > 1:
        *others, last = gradients  # the copy of the embedding counts once
        gradients = [*others, {k: v for k, v in last.items() if k != "embed_tokens"}]
    here = pipeline.sharding(0)
    squares = jax.device_put([programs.square_sum(g) for g in gradients], here)
    grad_norm = jnp.sqrt(sum(squares))
    if not is_scaled:
        return grad_norm, jax.device_put(jnp.array(True), here)
    finite = jax.device_put([programs.is_finite(g) for g in gradients], here)
    return grad_norm, jnp.stack(finite).all()


def _tied(states: list[TrainState], pipeline: Pipeline) -> States:
    """The last stage's copy of a tied embedding is the first stage's, to the bit."""
    if pipeline.config.tie_word_embeddings and pipeline.num_stages > 1:
        first, last = states[0].params["embed_tokens"], states[-1].params
        copy = jax.device_put(first, last["embed_tokens"].sharding)
        states[-1] = dataclasses.replace(states[-1], params=last | {"embed_tokens": copy})
    return tuple(states)
