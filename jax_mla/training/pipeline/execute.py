"""Runs a schedule: the host hands micro-batches from stage to stage."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from jax_mla.checks.tokens import check_batch
from jax_mla.params import Params, check_params
from jax_mla.sharding.placement import partition_spec
from jax_mla.training.batch import Batch, check_rows
from jax_mla.training.loss import LossSums, NextTokenLoss
from jax_mla.training.pipeline import exchange, programs
from jax_mla.training.pipeline.schedule import Schedule, ScheduleMaker, one_f_one_b
from jax_mla.training.pipeline.stage_queue import StageQueue, WholeBatch
from jax_mla.training.pipeline.stages import Pipeline
from jax_mla.training.pipeline.timeline import Timeline, simulate
from jax_mla.training.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Execution:
    """What was measured while a schedule ran; tuples have one entry per stage.

    Attributes:
      peak_held: peak number of micro-batch inputs held, counting those received but not yet
        started; hence up to one more than `Schedule.num_held` after stage 0.
      peak_held_bytes: of those inputs: hidden states and tokens, over all devices of the stage.
        Activations of the op that runs, and gradients on their way back, come on top.
      forward_seconds, backward_seconds: mean duration of a stage's ops, run one at a time; None
        without `measure`.
    """

    schedule: Schedule
    peak_held: tuple[int, ...]
    peak_held_bytes: tuple[int, ...]
    forward_seconds: tuple[float, ...] | None = None
    backward_seconds: tuple[float, ...] | None = None

    def timeline(self) -> Timeline:
        """The schedule with the measured mean durations, and no time for moving data.

        Raises:
          ValueError: nothing was measured.
        """
        if self.forward_seconds is None or self.backward_seconds is None:
            raise ValueError("no durations were measured: run with measure=True, got measure=False")
        return simulate(self.schedule, forward=self.forward_seconds, backward=self.backward_seconds)


@dataclasses.dataclass(frozen=True)
class PipelinedGradients:
    """The loss of a batch, its gradients on the stages, and how they were computed.

    Attributes:
      loss: on all devices of the mesh.
      gradients: per stage, of its own parameters and in their dtypes; None for a stage of which
        this process has no device.
      loads: per stage, its part of `NextTokenLoss.load`; None without MoE layers, and where
        `gradients` is.
    """

    loss: NextTokenLoss
    gradients: tuple[Params | None, ...]
    loads: tuple[Array | None, ...]
    execution: Execution


def loss_and_gradients(
    params: Sequence[Params | None],
    pipeline: Pipeline,
    batch: Batch,
    *,
    recipe: Recipe,
    schedule: ScheduleMaker = one_f_one_b,
    loss_scales: Sequence[Any] | None = None,
    measure: bool = False,
) -> PipelinedGradients:
    """The loss and the gradients that `train_step` computes, of `recipe.num_micro_batches` parts.

    The objective is loss + z_loss + balance_loss with the recipe's factors, a mean over the whole
    batch. A stage keeps no more of a micro-batch than its input; the backward op recomputes the
    stage's layers from it, and within that follows `recipe.remat`. Both schedules sum gradients in
    the order of the micro-batches, and so agree to the bit where the devices are deterministic.
    Several processes call this together, with equal arguments.

    Args:
      params: of each stage, on its devices, see `split_params`.
      batch: the whole batch, in every process, on the host or on any device.
      schedule: `gpipe`, `one_f_one_b`, or your own function of the numbers of stages and
        micro-batches.
      loss_scales: for float16, one per stage on its devices; gradients are divided by it again.
      measure: times every op by waiting for it before the next begins, in one process only. Call
        once before, or the times include compilation.

    Raises:
      ValueError: the batch is not valid input for `next_token_loss`, its rows cannot be divided
        into micro-batches or over a stage's devices, the schedule is for other numbers of stages or
        micro-batches, the parameters are not those of the stages or not on their devices, or
        several processes are to measure.

    Cost: two forward passes and one backward pass of every micro-batch, and a bubble; B * T * D
    numbers move between each two stages, and as many back.
    """
    tokens, ids = check_batch(batch.tokens, pipeline.config, batch.segment_ids, batch.loss_mask)
    first_mesh, rules = pipeline.meshes[0], pipeline.stage_rules
    check_rows(*tokens.shape, recipe=recipe, mesh=first_mesh, rules=rules)
    ordered = _schedule_of(pipeline, recipe, schedule)
    if measure and pipeline.mesh.is_multi_process:
        raise ValueError(
            f"measure=True needs all stages in one process, {jax.process_count()} have a part"
        )
    _check_params(params, pipeline)
    batch = jax.tree.map(np.asarray, Batch(tokens, ids, batch.loss_mask))
    whole = WholeBatch(batch, *map(np.asarray, (batch.is_counted().sum(), batch.num_rows())))
    scales = [np.float32(1)] * pipeline.num_stages if loss_scales is None else loss_scales
    queues = [
        StageQueue(pipeline, stage, recipe, whole, params[stage], scales[stage], measure)
        for stage in range(pipeline.num_stages)
    ]
    _run(ordered, queues, pipeline, recipe, whole)

    gradients = _tied([queue.gradients for queue in queues], pipeline)
    sums = [programs.added_up(queue.sums) if queue.sums else None for queue in queues]
    return PipelinedGradients(
        loss=_mean_loss(sums, pipeline, whole),
        gradients=tuple(
            None if of_stage is None else programs.unscaled(of_stage, params[stage], scales[stage])
            for stage, of_stage in enumerate(gradients)
        ),
        loads=tuple(None if of_stage is None else of_stage.load for of_stage in sums),
        execution=Execution(
            ordered,
            peak_held=tuple(queue.peak_held for queue in queues),
            peak_held_bytes=tuple(queue.peak_held_bytes for queue in queues),
            forward_seconds=_means([q.forward_seconds for q in queues]) if measure else None,
            backward_seconds=_means([q.backward_seconds for q in queues]) if measure else None,
        ),
    )


def _schedule_of(pipeline: Pipeline, recipe: Recipe, make: ScheduleMaker) -> Schedule:
    num_stages, num_micro_batches = pipeline.num_stages, recipe.num_micro_batches
    schedule = make(num_stages, num_micro_batches)
    if (schedule.num_stages, schedule.num_micro_batches) != (num_stages, num_micro_batches):
        raise ValueError(
            f"the schedule is for {schedule.num_stages} stages and {schedule.num_micro_batches} "
            f"micro-batches, the pipeline has {num_stages} and the recipe {num_micro_batches}"
        )
    return schedule


def _means(seconds: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(map(statistics.mean, seconds))


def _run(
    schedule: Schedule,
    queues: Sequence[StageQueue],
    pipeline: Pipeline,
    recipe: Recipe,
    whole: WholeBatch,
) -> None:
    """Runs all ops in order, and moves their results from stage to stage."""
    num_rows, num_tokens = whole.batch.tokens.shape
    shape = (num_rows // recipe.num_micro_batches, num_tokens, pipeline.config.hidden_size)
    hidden = jax.ShapeDtypeStruct(shape, recipe.precision.compute)
    spec = partition_spec(pipeline.stage_rules, ("batch", "sequence", None))

    def move(x: Array | None, source: int, target: int) -> Array | None:
        return exchange.move(x, hidden, pipeline, source, target, spec)

    for stage, (kind, i) in schedule.order:
        if kind == "forward":
            if stage == 0:
                queues[0].receive(i, None, hidden)
            y = queues[stage].forward(i)
            if stage + 1 < schedule.num_stages:
                queues[stage + 1].receive(i, move(y, stage, stage + 1), hidden)
        else:
            of_x = queues[stage].backward(i)
            if stage > 0:
                queues[stage - 1].receive_gradient(i, move(of_x, stage, stage - 1))


def _mean_loss(
    sums: Sequence[LossSums | None], pipeline: Pipeline, whole: WholeBatch
) -> NextTokenLoss:
    """The loss of the batch, from the sums of every stage."""
    num_moe = tuple(
        len(pipeline.stacks(stage).get("moe_layers", ())) for stage in range(pipeline.num_stages)
    )
    even = [
        None if of_stage is None else programs.evened(of_stage, pipeline.config, max(num_moe))
        for of_stage in sums
    ]
    has_capacity = (
        pipeline.stage_rules.dispatch.capacity is not None and pipeline.meshes[0].size > 1
    )
    return programs.mean_loss(
        exchange.everywhere(even, pipeline),
        whole.num_tokens,
        whole.num_rows,
        num_moe=num_moe,
        counts_dropped=has_capacity and any(num_moe),
    )


def _check_params(params: Sequence[Params | None], pipeline: Pipeline) -> None:
    """Every stage with devices of this process has its own parameters, on its own devices."""
    if len(params) != pipeline.num_stages:
        raise ValueError(
            f"parameters of {len(params)} stages were given, the pipeline has {pipeline.num_stages}"
        )
    for stage, of_stage in enumerate(params):
        if not pipeline.is_here(stage):
            continue
        of_stage = {} if of_stage is None else of_stage
        layers, devices = pipeline.layers[stage], set(pipeline.meshes[stage].devices.flat)
        try:
            check_params(of_stage, pipeline.config, pipeline.stage_rules, layers)
        except ValueError as error:
            raise ValueError(f"stage {stage} of layers {layers}: {error}") from None
        for leaf in jax.tree.leaves(of_stage):
            found = leaf.devices() if isinstance(leaf, jax.Array) else set()
            if found != devices:
                ids, needed = (sorted(device.id for device in of) for of in (found, devices))
                raise ValueError(
                    f"parameters of stage {stage} are on devices {ids}, the stage has {needed}"
                )


def _tied(gradients: list[Params | None], pipeline: Pipeline) -> list[Params | None]:
    """Both copies of a tied embedding get the sum of their gradients."""
    if not pipeline.has_two_embeddings:
        return gradients
    first, *others = gradients
    spec = partition_spec(pipeline.stage_rules.gradients(), ("vocab", "embed"))
    of_first, of_last = (
        None if part is None else part["embed_tokens"]["weight"] for part in (first, others[-1])
    )
    like = of_last if of_first is None else of_first
    moved = exchange.move(of_last, like, pipeline, pipeline.num_stages - 1, 0, spec)
    if first is not None and of_first is not None:
        first = first | {"embed_tokens": {"weight": of_first + moved}}
    return exchange.with_first_embedding([first, *others], pipeline, spec)
