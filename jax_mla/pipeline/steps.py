"""The training loop's steps on a mesh with stages."""

from __future__ import annotations

import dataclasses
import functools

from jax.sharding import Mesh

from jax_mla.pipeline.schedule import ScheduleMaker, one_f_one_b
from jax_mla.pipeline.stages import Pipeline
from jax_mla.pipeline.step import States, join_state, pipeline_train_step, split_state
from jax_mla.sharding import ShardingRules
from jax_mla.training.state import TrainState
from jax_mla.training.step import Batch, StepMetrics
from jax_mla.training.steps import Steps


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
