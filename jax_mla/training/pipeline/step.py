"""A training step of a pipeline: every stage updates its own layers with its own optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

from jax_mla.params import Params
from jax_mla.sharding.placement import partition_spec
from jax_mla.training.batch import Batch
from jax_mla.training.loss import NextTokenLoss
from jax_mla.training.pipeline import exchange, programs
from jax_mla.training.pipeline.execute import loss_and_gradients
from jax_mla.training.pipeline.joining import States
from jax_mla.training.pipeline.schedule import ScheduleMaker, one_f_one_b
from jax_mla.training.pipeline.stages import Pipeline
from jax_mla.training.recipe import Recipe
from jax_mla.training.state import TrainState
from jax_mla.training.step import StepMetrics, step_metrics


def pipeline_train_step(
    states: States,
    pipeline: Pipeline,
    batch: Batch,
    *,
    recipe: Recipe,
    schedule: ScheduleMaker = one_f_one_b,
) -> tuple[States, StepMetrics]:
    """`train_step` for a model in stages: equal up to rounding. Not jitted itself.

    The gradients' norm is over all stages; a float16 overflow in one of them skips the step in
    all, and each stage moves the bias of its routers by the load of the whole batch.

    Args:
      states: see `split_state`; donated, so use only what is returned.
      batch, schedule: as in `loss_and_gradients`.

    Raises:
      ValueError: as `loss_and_gradients`.
    """
    is_scaled = any(state is not None and state.loss_scale is not None for state in states)
    result = loss_and_gradients(
        [None if state is None else state.params for state in states],
        pipeline,
        batch,
        recipe=recipe,
        schedule=schedule,
        loss_scales=[_scale(state) for state in states] if is_scaled else None,
    )
    grad_norm, is_finite = norm_and_finiteness(result.gradients, pipeline, is_scaled=is_scaled)
    metrics = _metrics(states, pipeline, result.loss, grad_norm, is_finite, recipe)
    new_states = []
    for stage, state in enumerate(states):
        if state is not None:
            of_all = (exchange.on_stage(x, pipeline, stage) for x in (grad_norm, is_finite))
            options = {"pipeline": pipeline, "stage": stage, "recipe": recipe}
            args = (state, result.gradients[stage], result.loads[stage], *of_all)
            state = exchange.settled(programs.update(*args, **options), pipeline)
        new_states.append(state)
    return _tied(new_states, pipeline), metrics


def _metrics(
    states: States,
    pipeline: Pipeline,
    loss: NextTokenLoss,
    grad_norm: Array,
    is_finite: Array,
    recipe: Recipe,
) -> StepMetrics:
    """The metrics of a step; counters are computed on one device of the first stage that is here.

    On one device, because other processes with devices of that stage may have another first stage.
    """
    stage, state = next((i, state) for i, state in enumerate(states) if state is not None)
    counters = (state.step, state.num_skipped, state.loss_scale)
    step, num_skipped, loss_scale = jax.tree.map(lambda x: x.addressable_data(0), counters)
    state = TrainState({}, (), step, num_skipped, loss_scale)
    on_stage = exchange.on_stage(is_finite, pipeline, stage)
    assert on_stage is not None
    return step_metrics(state, loss, grad_norm, on_stage.addressable_data(0), recipe)


def _scale(state: TrainState | None) -> Any:
    return None if state is None or state.loss_scale is None else state.loss_scale.scale


def norm_and_finiteness(
    gradients: Sequence[Params | None], pipeline: Pipeline, *, is_scaled: bool
) -> tuple[Array, Array]:
    """The norm of the gradients of all stages, and whether all are finite; on all devices.

    Args:
      is_scaled: for float16; other gradients count as finite, as in `train_step`.
    """
    *others, last = gradients
    if pipeline.has_two_embeddings and last is not None:
        # The copy of the embedding counts once.
        gradients = [*others, {k: v for k, v in last.items() if k != "embed_tokens"}]
    seen = [
        part and exchange.settled(programs.square_sum_and_finiteness(part), pipeline)
        for part in gradients
    ]
    squares, finite = exchange.everywhere(seen, pipeline)
    return programs.norm_of(squares, finite, is_scaled=is_scaled)


def _tied(states: list[TrainState | None], pipeline: Pipeline) -> States:
    """The last stage's copy of a tied embedding becomes a copy of the first stage's."""
    if not pipeline.has_two_embeddings:
        return tuple(states)
    spec = partition_spec(pipeline.stage_rules, ("vocab", "embed"))
    parts = [None if state is None else state.params for state in states]
    *_, params = exchange.with_first_embedding(parts, pipeline, spec)
    *others, last = states
    return (*others, None if last is None else dataclasses.replace(last, params=params))
