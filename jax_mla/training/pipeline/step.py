"""A training step of a pipeline: every stage updates its own part with its own optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax import Array

from jax_mla.params import Params
from jax_mla.sharding.placement import partition_spec
from jax_mla.training.batch import Batch
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
    """`train_step` for a model in stages: the same numbers but for rounding. Not jitted itself.

    The gradients' norm is that of all stages, an overflow of float16 in one of them skips the step
    in all, and each stage moves the bias of its routers by the load of the whole batch.

    Args:
      states: see `split_state`; donated, so use only what returns.
      batch, schedule: as in `loss_and_gradients`.

    Raises:
      ValueError: as `loss_and_gradients`.
    """
    here = next(state for state in states if state is not None)
    is_scaled = here.loss_scale is not None
    result = loss_and_gradients(
        [None if state is None else state.params for state in states],
        pipeline,
        batch,
        recipe=recipe,
        schedule=schedule,
        loss_scales=[_scale(state) for state in states] if is_scaled else None,
    )
    grad_norm, is_finite = norm_and_finiteness(result.gradients, pipeline, is_scaled=is_scaled)
    # On one device: not all processes of a stage need have it as their first.
    counts = {name: getattr(here, name).addressable_data(0) for name in ("step", "num_skipped")}
    here = dataclasses.replace(here, **counts)
    metrics = step_metrics(here, result.loss, grad_norm, is_finite, recipe)
    new_states = []
    for stage, state in enumerate(states):
        if state is not None:
            of_all = (exchange.on_stage(x, pipeline, stage) for x in (grad_norm, is_finite))
            options = {"pipeline": pipeline, "stage": stage, "recipe": recipe}
            args = (state, result.gradients[stage], result.loads[stage], *of_all)
            state = exchange.settled(programs.update(*args, **options), pipeline)
        new_states.append(state)
    return _tied(new_states, pipeline), metrics


def _scale(state: TrainState | None) -> Any:
    return None if state is None or state.loss_scale is None else state.loss_scale.scale


def norm_and_finiteness(
    gradients: Sequence[Params | None], pipeline: Pipeline, *, is_scaled: bool
) -> tuple[Array, Array]:
    """The norm of the gradients of all stages, and whether all are finite; on all devices.

    Args:
      is_scaled: of float16; others count as finite, as in `train_step`.
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
    """The last stage's copy of a tied embedding is the first stage's, to the bit."""
    if not pipeline.has_two_embeddings:
        return tuple(states)
    spec = partition_spec(pipeline.stage_rules, ("vocab", "embed"))
    parts = [None if state is None else state.params for state in states]
    *_, params = exchange.with_first_embedding(parts, pipeline, spec)
    *others, last = states
    return (*others, None if last is None else dataclasses.replace(last, params=params))
