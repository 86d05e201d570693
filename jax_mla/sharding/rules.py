"""The rules that map the logical axes of arrays onto the axes of a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from jax_mla.checks.sizes import check_one_of
from jax_mla.sharding.axes import MESH_AXES
from jax_mla.sharding.dispatch import ExpertDispatch

MeshAxes = str | tuple[str, ...] | None
LogicalAxis = str | tuple[str, ...] | None


# The fields of ShardingRules that hold mesh axes: those of the logical axes of parameters and of
# tokens, and the fields that replace some of them for gradients and optimizer state.
PARAM_AXES = (
    "layers", "vocab", "embed", "heads", "head_dim", "latent", "q_latent", "kv_latent", "mlp",
    "expert", "norm",
)  # fmt: skip
LOGICAL_AXES = (*PARAM_AXES, "batch", "sequence", "context")
SPLITS = ("gradient_split", "optimizer_split")


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The mesh axis (or axes, or None) that each logical axis of an array is sharded over.

    Changing the layout of the whole model is changing this one object; `sharding.layouts` has the
    published ones. `layers` to `norm` are axes of parameters, `batch` and `sequence` of tokens,
    `context` of cached tokens. `latent` is the input axis of q_b, k_b and v_b; `q_latent` and
    `kv_latent` are the output axes of the down-projections. They have separate names so that no
    weight ever uses one mesh axis twice.

    Attributes:
      sequence: shards the positions of prompts and of training, two stripes per device; see
        `layers/mla/stripes`.
      context: shards the cached pages of every sequence, page j on device j mod n, for sequences
        that are too long for one device. Each device attends to its own pages, and the results are
        merged. None, the axes of `sequence`, or axes that shard neither tokens nor heads.
      gradient_split, optimizer_split: the mesh axes that shard `embed` and `latent` of gradients
        and of the optimizer's state instead (ZeRO stages 2 and 1); None: as parameters.
      dispatch: how tokens reach the devices of their experts.

    Raises:
      ValueError: a mesh axis has no such name, context shares an axis that it must not, or dispatch
        is no ExpertDispatch.
    """

    layers: MeshAxes = None
    vocab: MeshAxes = "tensor"
    embed: MeshAxes = "fsdp"
    heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    latent: MeshAxes = "fsdp"
    q_latent: MeshAxes = None
    kv_latent: MeshAxes = None
    mlp: MeshAxes = "tensor"
    expert: MeshAxes = "expert"
    norm: MeshAxes = None
    batch: MeshAxes = ("data", "fsdp")
    sequence: MeshAxes = "sequence"
    context: MeshAxes = None
    gradient_split: MeshAxes = None
    optimizer_split: MeshAxes = None
    dispatch: ExpertDispatch = ExpertDispatch()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if not isinstance(self.dispatch, ExpertDispatch):
            raise ValueError(f"dispatch must be an ExpertDispatch, got {self.dispatch!r}")
        for name in LOGICAL_AXES + SPLITS:
            for axis in as_tuple(getattr(self, name)):
                check_one_of(f"mesh axis of {name}", axis, MESH_AXES)
        self._check_context()

    def _check_context(self) -> None:
        context = set(as_tuple(self.context))
        for name in ("batch", "heads", "sequence"):
            other = set(as_tuple(getattr(self, name)))
            if context & other and not (name == "sequence" and context == other):
                raise ValueError(
                    f"context={self.context!r} and {name}={getattr(self, name)!r} share mesh axis "
                    f"{min(context & other)!r}: a device would not see all keys of its queries"
                )

    def gradients(self) -> ShardingRules:
        """The rules of gradients."""
        return self._split_over(self.gradient_split)

    def optimizer(self) -> ShardingRules:
        """The rules of the optimizer's state."""
        return self._split_over(self.optimizer_split)

    def on(self, axis_names: Collection[str]) -> ShardingRules:
        """The rules on a mesh of these axes: one that it lacks shards nothing, as if of size 1."""
        kept = {}
        for name in LOGICAL_AXES + SPLITS:
            axes = as_tuple(value := getattr(self, name))
            if any(axis not in axis_names for axis in axes):
                value = tuple(axis for axis in axes if axis in axis_names)
            kept[name] = value  # () of a split means sharded over nothing, and None as parameters
        return dataclasses.replace(self, **kept)

    def _split_over(self, axes: MeshAxes) -> ShardingRules:
        return self if axes is None else dataclasses.replace(self, embed=axes, latent=axes)


def as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of a rule."""
    return () if axes is None else (axes,) if isinstance(axes, str) else axes
