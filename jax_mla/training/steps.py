"""How the training loop goes from batch to batch: here, with one program for all devices."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from jax_mla import inputs
from jax_mla.config import DeepSeekConfig
from jax_mla.sharding import ShardingRules
from jax_mla.training.data import TokenRows
from jax_mla.training.recipe import Recipe
from jax_mla.training.state import TrainState
from jax_mla.training.step import Batch, StepMetrics, check_rows, place_batch, train_step

if TYPE_CHECKING:
    from jax_mla.pipeline.schedule import ScheduleMaker


@dataclasses.dataclass(frozen=True)
class Steps:
    """Steps of `train_step`; `pipeline.steps.PipelineSteps` has others.

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
        inputs.check_rope(data.row_tokens, self.config)
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
        from jax_mla.pipeline.steps import PipelineSteps  # which imports this package

        return PipelineSteps(config, recipe, mesh, rules, pipeline_schedule)
    if pipeline_schedule is not None:
        found = "none" if mesh is None else f"one of stage={mesh.shape.get('stage', 1)}"
        raise ValueError(f"pipeline_schedule needs a mesh with stage=2 or more, got {found}")
    return Steps(config, recipe, mesh, rules)
