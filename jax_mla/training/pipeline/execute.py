"""Runs a schedule: a queue on the host that hands micro-batches from stage to stage."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jax_mla.checks.tokens import check_batch
from jax_mla.params import Params, check_params
from jax_mla.sharding.placement import partition_spec
from jax_mla.training.batch import Batch, check_rows, place_batch
from jax_mla.training.loss import LossSums, NextTokenLoss, counted
from jax_mla.training.pipeline import exchange, programs
from jax_mla.training.pipeline.schedule import Schedule, ScheduleMaker, one_f_one_b
from jax_mla.training.pipeline.stages import Pipeline
from jax_mla.training.pipeline.timeline import Timeline, simulate
from jax_mla.training.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Execution:
    """What was seen while a schedule ran; a tuple has one entry a stage.

    Attributes:
      peak_held: the most micro-batches whose input a stage held at one time, from its arrival until
        the micro-batch has gone backward. One that has arrived and waits is counted, so that a
        stage after the first may hold one more than `Schedule.num_held`.
      peak_held_bytes: of those inputs: hidden states and tokens, in the whole stage. On top come
        what an op computes on the way, for one micro-batch at a time, and gradients on their way
        back.
      forward_seconds, backward_seconds: the mean of a stage's ops, which ran one at a time; None
        where that was not asked for.
    """

    schedule: Schedule
    peak_held: tuple[int, ...]
    peak_held_bytes: tuple[int, ...]
    forward_seconds: tuple[float, ...] | None = None
    backward_seconds: tuple[float, ...] | None = None

    def timeline(self) -> Timeline:
        """The schedule with the mean durations that were measured, and no time for moving data.

        Raises:
          ValueError: nothing was measured.
        """
        if self.forward_seconds is None or self.backward_seconds is None:
            raise ValueError("no durations were measured: run with measure=True, got measure=False")
        return simulate(self.schedule, forward=self.forward_seconds, backward=self.backward_seconds)


@dataclasses.dataclass(frozen=True)
class PipelinedGradients:
    """The loss of a batch, its gradients where the stages are, and how they were made.

    Attributes:
      loss: on all devices of the mesh.
      gradients: of each stage, of its part of the parameters and in their dtypes; None where no
        device of the stage is this process's.
      loads: of each stage, its part of `NextTokenLoss.load`; None without MoE layers, and where the
        gradients are.
    """

    loss: NextTokenLoss
    gradients: tuple[Params | None, ...]
    loads: tuple[Any, ...]
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

    What is minimised is loss + z_loss + balance_loss with the recipe's factors, a mean over the
    whole batch. A stage keeps no more of a micro-batch than its input; going backward it computes
    its layers again from there, and within that by `recipe.remat`. Both schedules add gradients up
    in the order of the micro-batches, and so agree to the bit where the devices are deterministic.
    Several processes call this together, with equal arguments.

    Args:
      params: of each stage, on its devices, see `Pipeline.split`.
      batch: in the host's memory or on any device; the whole of it, in every process.
      schedule: `gpipe`, `one_f_one_b` or your own, given the numbers of stages and micro-batches.
      loss_scales: of float16, for each stage on its devices; gradients are divided by it again.
      measure: waits for every op before the next begins and takes its time, in one process only.
        Call once before, or the time includes compilation.

    Raises:
      ValueError: the batch is none for `next_token_loss`, rows cannot be divided into micro-batches
        or over a stage's devices, the schedule is one for other numbers, the parameters are not
        those of the stages or not on their devices, or several processes are to measure.

    Cost: two forward passes and one backward pass of every micro-batch, of which a bubble comes on
    top; between two stages B * T * D numbers go there and as many back.
    """
    tokens, ids = check_batch(batch.tokens, pipeline.config, batch.segment_ids, batch.loss_mask)
    num_rows, num_parts = tokens.shape[0], recipe.num_micro_batches
    check_rows(*tokens.shape, recipe=recipe, mesh=pipeline.meshes[0], rules=pipeline.stage_rules)
    plan = schedule(pipeline.num_stages, num_parts)
    if (plan.num_stages, plan.num_micro_batches) != (pipeline.num_stages, num_parts):
        raise ValueError(
            f"the schedule is for {plan.num_stages} stages and {plan.num_micro_batches} "
            f"micro-batches, the pipeline has {pipeline.num_stages} and the recipe {num_parts}"
        )
    if measure and pipeline.mesh.is_multi_process:
        raise ValueError(
            f"measure=True needs all stages in one process, {jax.process_count()} have a part"
        )
    _check_params(params, pipeline)
    batch = jax.tree.map(np.asarray, Batch(tokens, ids, batch.loss_mask))
    num_tokens = np.asarray(counted(batch.tokens, batch.segment_ids, batch.loss_mask).sum())
    scales = [np.float32(1)] * plan.num_stages if loss_scales is None else loss_scales
    run = _Run(params, pipeline, batch, recipe, scales, num_tokens, measure)
    for stage, op in plan.order:
        (run.forward if op.kind == "forward" else run.backward)(stage, op.micro_batch)

    gradients = _tied(run.gradients, pipeline)
    sums = [programs.added_up(of_stage) if of_stage else None for of_stage in run.sums]
    return PipelinedGradients(
        loss=_mean_loss(sums, pipeline, num_tokens, num_rows),
        gradients=tuple(
            None if gs is None else programs.unscaled(gs, of_stage, scale)
            for gs, of_stage, scale in zip(gradients, params, scales, strict=True)
        ),
        loads=tuple(None if of_stage is None else of_stage.load for of_stage in sums),
        execution=run.execution(plan),
    )


def _mean_loss(sums: Sequence[LossSums | None], pipeline: Pipeline, num_tokens, num_rows: int):
    """The loss of the batch, from the sums of every stage."""
    num_moe = tuple(
        len(pipeline.stacks(stage).get("moe_layers", ())) for stage in range(pipeline.num_stages)
    )
    even = [
        None if of_stage is None else programs.evened(of_stage, pipeline.config, max(num_moe))
        for of_stage in sums
    ]
    has_capacity = pipeline.stage_rules.expert_capacity is not None and pipeline.meshes[0].size > 1
    return programs.mean_loss(
        exchange.everywhere(even, pipeline),
        num_tokens,
        num_rows=num_rows,
        num_moe=num_moe,
        counts_dropped=has_capacity and any(num_moe),
    )


def _check_params(params: Sequence[Params | None], pipeline: Pipeline) -> None:
    """Every stage that is here has parameters: its own, on its own devices."""
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


class _Run:
    """What the stages hold, pass on and add up while a schedule runs."""

    def __init__(self, params, pipeline, batch, recipe, loss_scales, num_tokens, measure):
        self.params, self.pipeline, self.batch, self.recipe = params, pipeline, batch, recipe
        self.num_tokens, self.loss_scales, self.measure = num_tokens, loss_scales, measure
        stages = range(pipeline.num_stages)
        num_rows, num_tokens = batch.tokens.shape
        shape = (num_rows // recipe.num_micro_batches, num_tokens, pipeline.config.hidden_size)
        self.hidden = jax.ShapeDtypeStruct(shape, recipe.precision.compute)
        self.held = [{} for _ in stages]  # micro-batch: its input
        self.output_gradients = [{} for _ in stages]
        self.sums: list[list[LossSums]] = [[] for _ in stages]
        self.seconds = {"forward": [[] for _ in stages], "backward": [[] for _ in stages]}
        self.peak_held, self.peak_held_bytes = ([0] * len(stages) for _ in range(2))
        self.gradients = [
            programs.no_gradients(of_stage, pipeline=pipeline, stage=stage, recipe=recipe)
            if pipeline.is_here(stage)
            else None
            for stage, of_stage in enumerate(params)
        ]

    def forward(self, stage: int, i: int) -> None:
        if stage == 0:
            self._receive(0, i, None)
        y = None
        if self.pipeline.is_here(stage):
            y, sums = self._call("forward", stage, self.params[stage], *self.held[stage][i])
            self.sums[stage].append(sums)
        if stage + 1 < self.pipeline.num_stages:
            self._receive(stage + 1, i, self._move(y, stage, stage + 1))

    def backward(self, stage: int, i: int) -> None:
        held, of_y, of_x = self.held[stage].pop(i), self.output_gradients[stage].pop(i, None), None
        if self.pipeline.is_here(stage):
            self.gradients[stage], of_x = self._call(
                "backward",
                stage,
                self.params[stage],
                self.gradients[stage],
                *held,
                of_y,
                self.num_tokens,
                len(self.batch.tokens),
                self.loss_scales[stage],
            )
        if stage > 0:
            self.output_gradients[stage - 1][i] = self._move(of_x, stage, stage - 1)

    def _move(self, x, source: int, target: int):
        """Hidden states, or their gradients, on another stage."""
        spec = partition_spec(self.pipeline.stage_rules, ("batch", "sequence", None))
        return exchange.move(x, self.hidden, self.pipeline, source, target, spec)

    def execution(self, schedule: Schedule) -> Execution:
        means = {
            f"{kind}_seconds": tuple(map(statistics.mean, of_stages)) if self.measure else None
            for kind, of_stages in self.seconds.items()
        }
        return Execution(schedule, tuple(self.peak_held), tuple(self.peak_held_bytes), **means)

    def _receive(self, stage: int, i: int, x) -> None:
        """Holds a micro-batch's hidden states, and its rows on the devices of a stage."""
        # Micro-batch i has the rows i, i + num_parts, ..., as in `train_step`.
        rows = jax.tree.map(lambda a: a[i :: self.recipe.num_micro_batches], self.batch)
        num_bytes = sum(a.nbytes for a in jax.tree.leaves(rows))
        if stage > 0:
            num_bytes += math.prod(self.hidden.shape) * self.hidden.dtype.itemsize
        if self.pipeline.is_here(stage):
            rows = place_batch(rows, self.pipeline.meshes[stage], self.pipeline.stage_rules)
        held = self.held[stage]
        held[i] = x, rows
        self.peak_held[stage] = max(self.peak_held[stage], len(held))
        self.peak_held_bytes[stage] = max(self.peak_held_bytes[stage], len(held) * num_bytes)

    def _call(self, kind: str, stage: int, *args):
        run = functools.partial(
            getattr(programs, kind), pipeline=self.pipeline, stage=stage, recipe=self.recipe
        )
        if not self.measure:
            return exchange.settled(run(*args), self.pipeline)
        jax.block_until_ready(args)
        start = time.perf_counter()
        result = jax.block_until_ready(run(*args))
        self.seconds[kind][stage].append(time.perf_counter() - start)
        return result


def _tied(gradients: list[Params | None], pipeline: Pipeline) -> list[Params | None]:
    """Both copies of a tied embedding get the gradients of both."""
    if not pipeline.has_two_embeddings:
        return gradients
    first, *others = gradients
    spec = partition_spec(pipeline.stage_rules.gradients(), ("vocab", "embed"))
    of_first, of_last = (
        None if part is None else part["embed_tokens"]["weight"] for part in (first, others[-1])
    )
    like = of_last if of_first is None else of_first
    given = exchange.move(of_last, like, pipeline, pipeline.num_stages - 1, 0, spec)
    if first is not None and of_first is not None:
        first = first | {"embed_tokens": {"weight": of_first + given}}
    return exchange.with_first_embedding([first, *others], pipeline, spec)
