"""The number formats of training."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import jax.numpy as jnp

from jax_mla.checks.sizes import check_one_of
from jax_mla.config.fields import dtype_name
from jax_mla.params import Params, map_leaves

FloatName = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True)
class Precision:
    """The dtypes of training; the default keeps float32 weights and computes in bfloat16.

    Norms, softmax and the router always compute in float32. With `compute="float16"` the loss is
    scaled, see `TrainState.loss_scale`.

    Attributes:
      param: of the weights that the optimizer updates, and of its moments.
      compute: of weights and activations in the forward and backward pass.
      reduce: of gradients after the backward pass, while those of micro-batches are summed; the
        optimizer takes the sum in `param`. Sums over devices come before that, where XLA places
        them.
      logits: that logits are rounded to before the loss, which sums in float32.

    Raises:
      ValueError: a name is none of these formats, or `param` is float16, which loses small
        updates.
    """

    param: FloatName = "float32"
    compute: FloatName = "bfloat16"
    reduce: FloatName = "float32"
    logits: FloatName = "float32"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, dtype_name(getattr(self, field.name)))
            check_one_of(field.name, getattr(self, field.name), get_args(FloatName))
        if self.param == "float16":
            raise ValueError(
                f"param 'float16' cannot hold the weights of an optimizer: with compute "
                f"{self.compute!r}, take param 'float32'"
            )

    def to_compute(self, params: Params) -> Params:
        """The weights in the dtype of the forward pass; the router's keep theirs."""

        def narrow(leaf, x):
            return x.astype(self.compute) if leaf.dtype == "any" else x

        return map_leaves(narrow, params)

    def to_param(self, params: Params) -> Params:
        """The weights as the optimizer holds them; a router's bias is always float32."""

        return map_leaves(lambda leaf, x: jnp.asarray(x, leaf.stored_dtype(self.param)), params)
