"""A batch of token rows: checked, and placed on a mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Int

from jax_mla.checks.tokens import check_batch
from jax_mla.config.model import DeepSeekConfig
from jax_mla.sharding.placement import Placement, partition_spec
from jax_mla.sharding.rules import ShardingRules
from jax_mla.training.recipe import Recipe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens; the other two fields as in `next_token_loss`. Or several such parts."""

    tokens: Int[Array | np.ndarray, "*parts B T"]
    segment_ids: Int[Array | np.ndarray, "*parts B T"] | None = None
    loss_mask: Bool[Array | np.ndarray, "*parts B T"] | None = None


def place_batch(
    batch: Batch,
    mesh: Mesh | None,
    rules: ShardingRules | None = None,
    *,
    config: DeepSeekConfig | None = None,
) -> Batch:
    """Puts the rows of a batch on the devices of `rules.batch`, or on one without a mesh.

    Args:
      batch: the whole of it, in every process.
      config: of the model that is to read it, whose vocabulary must have its token ids; None for a
        batch that was checked, as those of `TokenRows` are.

    Raises:
      ValueError: there is a config, and the batch is none for `next_token_loss`.
    """
    if config is not None:
        check_batch(batch.tokens, config, batch.segment_ids, batch.loss_mask)
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    rules = ShardingRules() if rules is None else rules
    sharding = NamedSharding(mesh, partition_spec(rules, ("batch", "sequence")))
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda part: x[part]), batch
    )


def check_rows(
    num_rows: int,
    num_tokens: int,
    *,
    recipe: Recipe,
    mesh: Mesh | None,
    rules: ShardingRules | None,
) -> None:
    """A batch can be divided into micro-batches, and those over a mesh, which has no stages."""
    num_parts = recipe.num_micro_batches
    if num_rows % num_parts:
        raise ValueError(f"{num_rows} rows cannot be divided into {num_parts} micro-batches")
    if mesh is None:
        return
    if (num_stages := mesh.shape.get("stage", 1)) > 1:
        raise ValueError(
            f"train_step needs a mesh with stage=1, got stage={num_stages}, each of which would "
            "compute all layers: pipeline_train_step is for stages"
        )
    place = Placement(mesh.abstract_mesh, ShardingRules() if rules is None else rules)
    for axis, size, what in (
        ("batch", num_rows // num_parts, "rows of a micro-batch"),
        ("sequence", num_tokens, "tokens of a row"),
    ):
        if size % (parts := place.num_parts(axis)):
            devices = place.num_shards(axis)
            stripes = f"in {parts} stripes " if parts > devices else ""
            raise ValueError(
                f"{size} {what} cannot be divided {stripes}over {devices} devices of mesh axis "
                f"{'+'.join(place.axes(axis))!r}"
            )
