"""How the training loop runs a step: one program for the mesh, or a pipeline of stages."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

from jax.sharding import Mesh

from jax_mla.checks.tokens import check_rope
from jax_mla.config.model import DeepSeekConfig
from jax_mla.sharding.mesh import check_mesh
from jax_mla.sharding.rules import ShardingRules
from jax_mla.training.batch import Batch, check_rows, place_batch
from jax_mla.training.data import TokenRows
from jax_mla.training.pipeline.joining import States, join_state, split_state
from jax_mla.training.pipeline.schedule import ScheduleMaker, one_f_one_b
from jax_mla.training.pipeline.stages import Pipeline
from jax_mla.training.pipeline.step import pipeline_train_step
from jax_mla.training.recipe import Recipe
from jax_mla.training.state import TrainState
from jax_mla.training.step import StepMetrics, train_step


@runtime_checkable
class Driver(Protocol):
    """Runs the steps of a training loop.

    The loop holds whole-model state at its ends; between `split` and `join` the state is in the
    driver's own form.
    """

    @property
    def config(self) -> DeepSeekConfig: ...

    @property
    def recipe(self) -> Recipe: ...

    @property
    def mesh(self) -> Mesh | None: ...

    @property
    def joined_rules(self) -> ShardingRules | None:
        """The layout of the whole model's state on the mesh."""
        ...

    def check(self, data: TokenRows) -> None:
        """Refuses rows that the model cannot read, and batches that cannot be divided."""
        ...

    def split(self, state: TrainState) -> Any: ...

    def join(self, state: Any) -> TrainState: ...

    def step(self, state: Any, batch: Batch) -> tuple[Any, StepMetrics]:
        """The next state and the step's metrics; `state` is donated."""
        ...


@dataclasses.dataclass(frozen=True)
class OneProgram:
    """Steps of `train_step`: one program for all devices of the mesh, or for one device."""

    config: DeepSeekConfig
    recipe: Recipe
    mesh: Mesh | None
    joined_rules: ShardingRules | None

    def check(self, data: TokenRows) -> None:
        _check_data(data, self.config, self.recipe, self.mesh, self.joined_rules)

    def split(self, state: TrainState) -> TrainState:
        return state

    def join(self, state: TrainState) -> TrainState:
        return state

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        batch = place_batch(batch, self.mesh, self.joined_rules)
        options = {"recipe": self.recipe, "mesh": self.mesh, "rules": self.joined_rules}
        return train_step(state, self.config, batch, **options)


@dataclasses.dataclass(frozen=True)
class Stages:
    """Steps of `pipeline_train_step`."""

    pipeline: Pipeline
    recipe: Recipe
    schedule: ScheduleMaker

    @property
    def config(self) -> DeepSeekConfig:
        return self.pipeline.config

    @property
    def mesh(self) -> Mesh:
        return self.pipeline.mesh

    @property
    def joined_rules(self) -> ShardingRules:
        return self.pipeline.joined_rules

    def check(self, data: TokenRows) -> None:
        rules, mesh = self.pipeline.stage_rules, self.pipeline.meshes[0]
        _check_data(data, self.config, self.recipe, mesh, rules)

    def split(self, state: TrainState) -> States:
        return split_state(state, self.pipeline, recipe=self.recipe)

    def join(self, state: States) -> TrainState:
        return join_state(state, self.pipeline, recipe=self.recipe)

    def step(self, state: States, batch: Batch) -> tuple[States, StepMetrics]:
        options = {"recipe": self.recipe, "schedule": self.schedule}
        return pipeline_train_step(state, self.pipeline, batch, **options)


def _check_data(
    data: TokenRows,
    config: DeepSeekConfig,
    recipe: Recipe,
    mesh: Mesh | None,
    rules: ShardingRules | None,
) -> None:
    """The model can read every row, and a micro-batch can be divided over the mesh."""
    if data.vocab_size > config.vocab_size:
        raise ValueError(
            f"data of a vocabulary of {data.vocab_size} may hold ids that a model of "
            f"{config.vocab_size} does not have"
        )
    check_rope(data.row_tokens, config)
    check_rows(data.batch_rows, data.row_tokens, recipe=recipe, mesh=mesh, rules=rules)


def driver_for(
    config: DeepSeekConfig,
    recipe: Recipe,
    mesh: Mesh | None,
    rules: ShardingRules | None,
    pipeline_schedule: ScheduleMaker | None,
) -> Driver:
    """The driver for a mesh: `Stages` where its axis `stage` is above 1, else `OneProgram`.

    Args:
      pipeline_schedule: of the stages; None takes `one_f_one_b`.

    Raises:
      ValueError: there is a schedule and there are no stages, or the stages cannot be made.
    """
    if mesh is not None:
        check_mesh(mesh, has_devices=True)
    if mesh is not None and mesh.shape.get("stage", 1) > 1:
        pipeline = Pipeline(config, mesh, ShardingRules() if rules is None else rules)
        return Stages(pipeline, recipe, pipeline_schedule or one_f_one_b)
    if pipeline_schedule is not None:
        found = "none" if mesh is None else f"one of stage={mesh.shape.get('stage', 1)}"
        raise ValueError(f"pipeline_schedule needs a mesh with stage=2 or more, got {found}")
    return OneProgram(config, recipe, mesh, rules)
