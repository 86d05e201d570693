"""The rules that map the logical axes of arrays onto the axes of a mesh."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from jax_mla.sharding.axes import MESH_AXES

MeshAxes = str | tuple[str, ...] | None
LogicalAxis = str | tuple[str, ...] | None
ExpertDispatch = Literal["dense", "a2a", "ragged"]


# The fields of ShardingRules that hold mesh axes: those of logical axes, and those that replace
# some of them for gradients and optimizer state.
LOGICAL_AXES = (
    "layers", "vocab", "embed", "heads", "head_dim", "latent", "q_latent", "kv_latent", "mlp",
    "expert", "norm", "batch", "sequence", "context",
)  # fmt: skip
SPLITS = ("gradient_split", "optimizer_split")


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The mesh axis (or axes, or None) that each logical axis of an array is split over.

    Changing the layout of the whole model is changing this one object; `sharding.layouts` has the
    published ones. `layers` to `norm` are axes of parameters, `batch` and `sequence` of tokens,
    `context` of cached tokens. `latent` is the axis of a latent that is read (by q_b, k_b and v_b),
    `q_latent` and `kv_latent` the same axes where they are written, so that an array never meets
    one mesh axis twice.

    Attributes:
      sequence: splits the positions of prompts and of training into two stripes a device, see
        `layers/stripes`.
      context: splits the pages of every sequence in a cache, page j going to device j mod n, for
        sequences that are too long for one device. Each attends to its own, and the results are
        merged. None, the axes of `sequence`, or axes that split neither tokens nor heads.
      gradient_split, optimizer_split: the mesh axes over which `embed` and `latent` of gradients
        and of the optimizer's state are split instead (ZeRO stages 2 and 1); None: as parameters.
      expert_dispatch: how tokens reach the devices of their experts, see `layers/expert_parallel`.
      expert_capacity: of "a2a", the room for what one device may send to another, in units of the
        mean M * A / devices of its M tokens. Of the rows for one device the first fit, in the order
        of the tokens, and the experts of the others are left out: `forward_trace` and `train_step`
        report how many. None leaves room for all.

    Raises:
      ValueError: a mesh axis or a dispatcher has no such name, context shares an axis that it must
        not, or expert_capacity is not above 0 or given to another dispatcher.
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
    expert_dispatch: ExpertDispatch = "dense"
    expert_capacity: float | int | None = None

    def __post_init__(self) -> None:
        if self.expert_dispatch not in (known := get_args(ExpertDispatch)):
            raise ValueError(
                f"expert_dispatch={self.expert_dispatch!r} is not one of {', '.join(known)}"
            )
        if self.expert_capacity is not None:
            self._check_capacity(self.expert_capacity)
        for name in LOGICAL_AXES + SPLITS:
            for axis in as_tuple(getattr(self, name)):
                if axis not in MESH_AXES:
                    known = ", ".join(MESH_AXES)
                    raise ValueError(f"{name}={axis!r} is not a mesh axis, those are {known}")
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

    def _check_capacity(self, capacity: float | int) -> None:
        is_number = isinstance(capacity, float | int) and not isinstance(capacity, bool)
        if not is_number or not 0 < capacity < math.inf:
            raise ValueError(f"expert_capacity must be a number above 0, got {capacity!r}")
        if self.expert_dispatch != "a2a":
            raise ValueError(
                f"expert_capacity={capacity} is of expert_dispatch='a2a', which drops tokens, not "
                f"of {self.expert_dispatch!r}"
            )

    def gradients(self) -> ShardingRules:
        """The rules of gradients."""
        return self._split_over(self.gradient_split)

    def optimizer(self) -> ShardingRules:
        """The rules of the optimizer's state."""
        return self._split_over(self.optimizer_split)

    def _split_over(self, axes: MeshAxes) -> ShardingRules:
        return self if axes is None else dataclasses.replace(self, embed=axes, latent=axes)


def as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of a rule."""
    return () if axes is None else (axes,) if isinstance(axes, str) else axes
