"""A batch of token rows: checked, and placed on a mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Int, Integer

from jax_mla.checks.tokens import check_batch
from jax_mla.config.model import DeepSeekConfig
from jax_mla.sharding.mesh import check_mesh
from jax_mla.sharding.placement import placement_on
from jax_mla.sharding.rules import ShardingRules
from jax_mla.training.recipe import Recipe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of token rows, or a stack of micro-batches.

    `segment_ids` and `loss_mask` as in `next_token_loss`; a negative segment id marks padding.
    """

    tokens: Integer[Array | np.ndarray, "*parts B T"]
    segment_ids: Integer[Array | np.ndarray, "*parts B T"] | None = None
    loss_mask: Bool[Array | np.ndarray, "*parts B T"] | None = None

    def is_counted(self) -> Bool[Array, "B T"]:
        """Whether the prediction made at each position is of a token that counts."""
        is_counted = jnp.ones(self.tokens[:, 1:].shape, bool)
        if self.segment_ids is not None:
            before, after = self.segment_ids[:, :-1], self.segment_ids[:, 1:]
            is_counted &= (before == after) & (after >= 0)
        if self.loss_mask is not None:
            is_counted &= self.loss_mask[:, 1:].astype(bool)
        return jnp.pad(is_counted, ((0, 0), (0, 1)))

    def num_rows(self) -> int | Int[Array, ""]:
        """Rows that hold more than padding."""
        if self.segment_ids is None:
            return self.tokens.shape[0]
        return jnp.asarray(self.segment_ids >= 0).any(axis=1).sum(dtype=jnp.int32)


def place_batch(
    batch: Batch,
    mesh: Mesh | None,
    rules: ShardingRules | None = None,
    *,
    config: DeepSeekConfig | None = None,
) -> Batch:
    """Shards the rows of a batch over the devices of `rules.batch`; without a mesh, uses one.

    Args:
      batch: the whole batch, in every process.
      config: of the model that will read it, against which token ids are checked; None for a batch
        that was checked before, like those of `TokenRows`.

    Raises:
      ValueError: the batch is not valid input for `next_token_loss` (checked only if config is
        given).
    """
    if config is not None:
        check_batch(batch.tokens, config, batch.segment_ids, batch.loss_mask)
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    check_mesh(mesh, has_devices=True)
    sharding = NamedSharding(mesh, placement_on(mesh, rules).spec("batch", "sequence"))
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch
    )


def check_rows(
    num_rows: int,
    num_tokens: int,
    *,
    recipe: Recipe,
    mesh: Mesh | None,
    rules: ShardingRules | None,
) -> None:
    """Rows divide into micro-batches, and these over the mesh, which must have no stages."""
    num_micro_batches = recipe.num_micro_batches
    if num_rows % num_micro_batches:
        raise ValueError(
            f"{num_rows} rows cannot be divided into {num_micro_batches} micro-batches"
        )
    if mesh is None:
        return
    place = placement_on(mesh, rules)
    if (num_stages := mesh.shape.get("stage", 1)) > 1:
        raise ValueError(
            f"train_step needs a mesh with stage=1, got stage={num_stages}, each of which would "
            "compute all layers: pipeline_train_step is for stages"
        )
    for axis, size, what in (
        ("batch", num_rows // num_micro_batches, "rows of a micro-batch"),
        ("sequence", num_tokens, "tokens of a row"),
    ):
        place.check_divides(f"{size} {what}", size, axis)
