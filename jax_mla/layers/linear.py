"""Where a weight meets an activation: every matmul of the model, and what multiplies by it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Shaped, UInt32

from jax_mla.checks.arrays import as_key
from pallas_kernels import grouped_matmul

# Where a module's weights are drawn from: streams of keys, one key, or a seed.
RngsLike = nnx.Rngs | Key[Array, ""] | UInt32[Array, " words"] | int


def as_rngs(rngs: RngsLike) -> nnx.Rngs:
    """Streams of keys, made from a key or a seed unless they are such already."""
    return rngs if isinstance(rngs, nnx.Rngs) else nnx.Rngs(as_key(rngs))


class Linear(nnx.Module):
    """A weight and an optional bias.

    y = einsum(equation, x, weight) + bias

    Its leaves carry the names of published checkpoints, `weight` and `bias`. What a weight is
    stored as, or what is added to its product, is the business of this class alone.

    Args:
      equation: einsum of x and the weight, with the letters of `jax_mla`.
      shape: of the weight.
      logical_axes: of the weight, see `ShardingRules`; a metadata key of our own, because Flax's
        `out_sharding` would demand a mesh here.
      stddev: of the normal distribution that the weight is drawn from.
      bias_axis: logical axis of a bias along the last axis of y, which starts at 0; None: no bias.
    """

    def __init__(
        self,
        equation: str,
        shape: tuple[int, ...],
        logical_axes: tuple[str | None, ...],
        *,
        rngs: RngsLike,
        stddev: float,
        dtype: str,
        bias_axis: str | None = None,
    ) -> None:
        self.equation = equation
        self.weight = _normal(as_rngs(rngs), shape, logical_axes, stddev=stddev, dtype=dtype)
        if bias_axis is not None:
            self.bias = constant(0.0, shape[-1:], (bias_axis,), dtype=dtype)

    def __call__(self, x: Float[Array, ...], dtype: str | None = None) -> Float[Array, ...]:
        """The product in x's dtype, or accumulated and returned in `dtype`."""
        y = project(self.equation, x, self.array(), dtype)
        if hasattr(self, "bias"):
            bias = self.bias[...].astype(y.dtype)
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y

    def array(self) -> Float[Array, ...]:
        """The weight, for products that are not `equation`."""
        return self.weight[...]

    def rows(self, index: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Rows of a table of embeddings."""
        return self.array()[index]


class GroupedLinear(nnx.Module):
    """A weight per expert: rows of x are multiplied by the weight of their expert.

    Args:
      shape: [E, in, out].
      logical_axes, stddev: as in `Linear`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        logical_axes: tuple[str | None, ...],
        *,
        rngs: RngsLike,
        stddev: float,
        dtype: str,
    ) -> None:
        self.weight = _normal(as_rngs(rngs), shape, logical_axes, stddev=stddev, dtype=dtype)

    def pool(self) -> ExpertPool:
        """The matmul with it; the weight may also hold all layers, [L, E, in, out]."""
        weight = self.weight[...]
        return ExpertPool(weight if weight.ndim == 4 else weight[None])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertPool:
    """One projection of the experts of all layers, or of one layer: L is 1. Passes shard_map."""

    weight: Shaped[Array, "L E I O"]

    @property
    def num_experts(self) -> int:
        return self.weight.shape[1]

    def layer(self, layer: int | Int[Array, ""]) -> ExpertPool:
        """The pool of a single layer."""
        return ExpertPool(jax.lax.dynamic_slice_in_dim(self.weight, layer, 1))

    def gather(self, axes: tuple[str, ...], axis: int) -> ExpertPool:
        """The whole of an axis that mesh axes shard. Inside shard_map."""
        return ExpertPool(jax.lax.all_gather(self.weight, axes, axis=axis, tiled=True))

    def matmul(
        self,
        rows: Float[Array, "M I"],
        group_sizes: Int[Array, " E"],
        layer: int | Int[Array, ""],
    ) -> Float[Array, "M O"]:
        """Rows sorted by expert, each times its expert's weight, in their dtype."""
        num_groups = self.weight.shape[0] * self.num_experts
        weight = self.weight.reshape(num_groups, *self.weight.shape[2:]).astype(rows.dtype)
        return grouped_matmul(rows, weight, group_sizes, first_group=layer * self.num_experts)


def _normal(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    logical_axes: tuple[str | None, ...],
    *,
    stddev: float,
    dtype: str,
) -> nnx.Param:
    value = stddev * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value.astype(dtype), logical_axes=logical_axes)


def constant(
    value: float,
    shape: tuple[int, ...],
    logical_axes: tuple[str | None, ...],
    *,
    dtype: str,
    kind: type[nnx.Variable] = nnx.Param,
) -> nnx.Variable:
    """A parameter that starts at one value: norm scales at 1, biases at 0."""
    return kind(jnp.full(shape, value, dtype), logical_axes=logical_axes)


def project(
    equation: str, x: Float[Array, ...], w: Float[Array, ...], dtype: str | None = None
) -> Float[Array, ...]:
    """einsum in x's dtype; float32 stays float32, where a GPU would take TF32 by default."""
    highest = jax.lax.Precision.HIGHEST
    w = w.astype(x.dtype)
    return jnp.einsum(equation, x, w, precision=highest, preferred_element_type=dtype)
