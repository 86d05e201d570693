"""The kinds of a pass through the model, as values: what attention reads, and what it appends."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels import MLADecodePlan

# How latent attention is computed, see `layers/mla/forms`.
Form = Literal["expanded", "absorbed"]

# cos and sin of the positions' angles.
Tables = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]

_static = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Full:
    """Whole sequences attend to themselves, without a cache.

    Attributes:
      segment_ids: tokens attend only to tokens with their own id (packed sequences).
      form: None takes the cheaper one.
      deterministic: of gradients, see `pallas_kernels.flash_attention`.
      valid: False for padding, which goes to no expert; None if there is none.
    """

    tables: Tables
    segment_ids: Int[Array, "B T"] | None = None
    form: Form | None = dataclasses.field(default=None, metadata=_static)
    deterministic: bool = dataclasses.field(default=False, metadata=_static)
    valid: Bool[Array, "B T"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefill:
    """Right-padded tokens are appended to a cache, and attend to it and to themselves.

    Attributes:
      num_new: valid tokens of each row; outputs after them mean nothing.
      has_context: False when the cache is known to be empty.
      form: None takes the cheaper one for a full cache.
      valid: as in `Full`.
    """

    tables: Tables
    num_new: Int[Array, " B"]
    has_context: bool = dataclasses.field(default=True, metadata=_static)
    form: Form | None = dataclasses.field(default=None, metadata=_static)
    valid: Bool[Array, "B T"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decode:
    """T tokens of every sequence are appended to a cache and attend to it, absorbed.

    Attributes:
      plan: made once per step for all layers; None makes one in every layer.
      valid: as in `Full`. A row without any appends nothing, and its output means nothing.
    """

    tables: Tables
    plan: MLADecodePlan | None = None
    valid: Bool[Array, "B T"] | None = None


def appended(x: Shaped[Array, "B T *rest"], valid: Bool[Array, "B T"] | None) -> Int[Array, " B"]:
    """Tokens that decoding appends to each sequence: all T, or 0 where none of them is valid."""
    every = jnp.full(x.shape[:1], x.shape[1], jnp.int32)
    return every if valid is None else jnp.where(valid.any(axis=1), every, 0)


Phase = Full | Prefill | Decode
