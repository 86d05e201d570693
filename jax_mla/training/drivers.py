"""How the training loop runs a step: one program for the mesh, or a pipeline of stages."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from jax.sharding import Mesh

from jax_mla.checks.tokens import check_rope
from jax_mla.config.model import DeepSeekConfig
from jax_mla.sharding.rules import ShardingRules
from jax_mla.training.batch import Batch, check_rows, place_batch
from jax_mla.training.data import TokenRows
from jax_mla.training.pipeline.schedule import ScheduleMaker, one_f_one_b
from jax_mla.training.pipeline.stages import Pipeline
from jax_mla.training.pipeline.step import States, join_state, pipeline_train_step, split_state
from jax_mla.training.recipe import Recipe
from jax_mla.training.state import TrainState
from jax_mla.training.step import StepMetrics, train_step


@dataclasses.dataclass(frozen=True)
class Steps:
    """Steps of `train_step`; `PipelineSteps` has those of a pipeline.

    A state is begun, saved and returned as that of the whole model. What lies between `split` and
    `join` is in the form that the steps take.
    """

    config: DeepSeekConfig
    recipe: Recipe
    mesh: Mesh | None
    rules: ShardingRules | None

    @property
    def row_mesh(self) -> Mesh | None:
        """The mesh that the rows of a micro-batch are divided over."""
        return self.mesh

    @property
    def joined_rules(self) -> ShardingRules | None:
        """Where the state of the whole model lies on the mesh."""
        return self.rules

    def check(self, data: TokenRows) -> None:
        """Refuses rows that the model cannot read, and batches that cannot be divided."""
        if data.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"data of a vocabulary of {data.vocab_size} may hold ids that a model of "
                f"{self.config.vocab_size} does not have"
            )
        check_rope(data.row_tokens, self.config)
        shape = data.batch_rows, data.row_tokens
        check_rows(*shape, recipe=self.recipe, mesh=self.row_mesh, rules=self.rules)

    def split(self, state: TrainState) -> Any:
        return state

    def join(self, state: Any) -> TrainState:
        return state

    def __call__(self, state: Any, batch: Batch) -> tuple[Any, StepMetrics]:
        """The next state and what was seen; uses up the state that it is given."""
        batch = place_batch(batch, self.mesh, self.rules)
        options = {"recipe": self.recipe, "mesh": self.mesh, "rules": self.rules}
        return train_step(state, self.config, batch, **options)


@dataclasses.dataclass(frozen=True)
class PipelineSteps(Steps):
    """Steps of `pipeline_train_step`, by a schedule; None takes `one_f_one_b`.

    Raises:
      ValueError: as `Pipeline`.
    """

    schedule: ScheduleMaker | None = None

    def __post_init__(self) -> None:
        self.pipeline  # noqa: B018 - raises where the stages cannot be made

    @functools.cached_property
    def pipeline(self) -> Pipeline:
        assert self.mesh is not None
        return Pipeline(self.config, self.mesh, self.rules or ShardingRules())

    @property
    def row_mesh(self) -> Mesh:
        return self.pipeline.meshes[0]

    @property
    def joined_rules(self) -> ShardingRules:
        return self.pipeline.joined_rules

    def split(self, state: TrainState) -> States:
        return split_state(state, self.pipeline, recipe=self.recipe)

    def join(self, state: States) -> TrainState:
        return join_state(state, self.pipeline, recipe=self.recipe)

    def __call__(self, state: States, batch: Batch) -> tuple[States, StepMetrics]:
        options = {"recipe": self.recipe, "schedule": self.schedule or one_f_one_b}
        return pipeline_train_step(state, self.pipeline, batch, **options)


def steps_on(
    config: DeepSeekConfig,
    recipe: Recipe,
    mesh: Mesh | None,
    rules: ShardingRules | None,
    pipeline_schedule: ScheduleMaker | None,
) -> Steps:
    """The steps for a mesh; where it has stages, those of a pipeline.

    Raises:
      ValueError: there is a schedule and there are no stages, or the stages cannot be made.
    """
    if mesh is not None and mesh.shape.get("stage", 1) > 1:
        return PipelineSteps(config, recipe, mesh, rules, pipeline_schedule)
    if pipeline_schedule is not None:
        found = "none" if mesh is None else f"one of stage={mesh.shape.get('stage', 1)}"
        raise ValueError(f"pipeline_schedule needs a mesh with stage=2 or more, got {found}")
    return Steps(config, recipe, mesh, rules)
