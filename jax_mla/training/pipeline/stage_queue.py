"""One stage while a schedule runs: what it holds of micro-batches, and what it has summed."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

from jax_mla.params import Params
from jax_mla.training.batch import Batch, place_batch
from jax_mla.training.loss import LossSums
from jax_mla.training.pipeline import exchange, programs
from jax_mla.training.pipeline.stages import Pipeline
from jax_mla.training.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class WholeBatch:
    """The whole batch on the host, and what its means divide by."""

    batch: Batch
    num_tokens: np.ndarray
    num_rows: np.ndarray

    def micro_batch(self, i: int, recipe: Recipe) -> Batch:
        """The rows i, i + num_micro_batches, ..., as in `train_step`."""
        return jax.tree.map(lambda a: a[i :: recipe.num_micro_batches], self.batch)


class StageQueue:
    """The micro-batches that a stage holds, and its sums over the finished ones.

    Attributes:
      sums, gradients: over the micro-batches so far; empty and None where `is_here` is False.
      peak_held, peak_held_bytes, forward_seconds, backward_seconds: see `Execution`.
      is_here: whether a device of the stage is this process's.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        stage: int,
        recipe: Recipe,
        whole: WholeBatch,
        params: Params | None,
        loss_scale: Any,
        measure: bool,
    ) -> None:
        self._pipeline, self._stage, self._recipe = pipeline, stage, recipe
        self._whole, self._params, self._loss_scale = whole, params, loss_scale
        self._measure = measure
        self._static = {"pipeline": pipeline, "stage": stage, "recipe": recipe}
        self._held: dict[int, tuple[Array | None, Batch]] = {}
        self._output_gradients: dict[int, Array | None] = {}
        self.sums: list[LossSums] = []
        self.peak_held = 0
        self.peak_held_bytes = 0
        self.forward_seconds: list[float] = []
        self.backward_seconds: list[float] = []
        self.is_here = pipeline.is_here(stage)
        self.gradients = programs.no_gradients(params, **self._static) if self.is_here else None

    def receive(self, i: int, x: Array | None, like: jax.ShapeDtypeStruct) -> None:
        """Holds micro-batch i: its rows, and its hidden states unless this is the first stage."""
        rows = self._whole.micro_batch(i, self._recipe)
        num_bytes = sum(a.nbytes for a in jax.tree.leaves(rows))
        if self._stage > 0:
            num_bytes += math.prod(like.shape) * like.dtype.itemsize
        if self.is_here:
            mesh, rules = self._pipeline.meshes[self._stage], self._pipeline.stage_rules
            rows = place_batch(rows, mesh, rules)
        self._held[i] = x, rows
        self.peak_held = max(self.peak_held, len(self._held))
        self.peak_held_bytes = max(self.peak_held_bytes, len(self._held) * num_bytes)

    def receive_gradient(self, i: int, of_y: Array | None) -> None:
        """Holds the gradient of what `forward` returned for micro-batch i."""
        self._output_gradients[i] = of_y

    def forward(self, i: int) -> Array | None:
        """Hidden states of micro-batch i for the next stage; None after the last, or elsewhere."""
        if not self.is_here:
            return None
        args = (self._params, *self._held[i])
        y, sums = self._call(programs.forward, args, self.forward_seconds)
        self.sums.append(sums)
        return y

    def backward(self, i: int) -> Array | None:
        """The gradient of micro-batch i's input, which is no longer held; None as in `forward`."""
        x, rows = self._held.pop(i)
        of_y = self._output_gradients.pop(i, None)
        if not self.is_here:
            return None
        means = (self._whole.num_tokens, self._whole.num_rows, self._loss_scale)
        args = (self._params, self.gradients, x, rows, of_y, *means)
        self.gradients, of_x = self._call(programs.backward, args, self.backward_seconds)
        return of_x

    def _call(
        self, program: Callable[..., Any], args: tuple[Any, ...], seconds: list[float]
    ) -> Any:
        if not self._measure:
            return exchange.settled(program(*args, **self._static), self._pipeline)
        jax.block_until_ready(args)
        start = time.perf_counter()
        result = jax.block_until_ready(program(*args, **self._static))
        seconds.append(time.perf_counter() - start)
        return result
