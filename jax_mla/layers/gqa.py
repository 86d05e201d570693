"""Grouped-query attention, which is MHA, GQA and MQA, as a baseline for latent attention."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_mla.checks.arrays import check_dtype, check_hidden, concrete
from jax_mla.checks.sizes import check_positive
from jax_mla.layers.linear import Linear, RngsLike, as_rngs
from jax_mla.layers.rope import rope_tables, rotate
from pallas_kernels import flash_attention, merge_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of one layer: 2 * G * K numbers per token, G the number of kv heads.

    Attributes:
      lengths: tokens in cache; rows beyond are never read.
    """

    keys: Float[Array, "B S G K"]
    values: Float[Array, "B S G K"]
    lengths: Int[Array, " B"]

    @classmethod
    def empty(
        cls,
        batch: int,
        max_tokens: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: str = "float32",
    ) -> KeyValueCache:
        """A cache of no tokens.

        Args:
          num_kv_heads: G. head_dim: K.

        Raises:
          ValueError: a size is not positive, or dtype is not float32, bfloat16 or float16.
        """
        check_positive(
            batch=batch, max_tokens=max_tokens, num_kv_heads=num_kv_heads, head_dim=head_dim
        )
        shape, dtype = (batch, max_tokens, num_kv_heads, head_dim), check_dtype(dtype)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))


class GroupedQueryAttention(nnx.Module):
    """Softmax attention whose N query heads share G key/value heads.

    G = N is multi-head attention, G = 1 multi-query attention. Rotary pairs are halves of a head.

    Args:
      hidden_size: D. num_heads: N. num_kv_heads: G, a divisor of N. head_dim: K, width of a head.

    Raises:
      ValueError: a size is not positive, num_kv_heads does not divide num_heads, or head_dim is
        odd.

    Source: Ainslie et al., arXiv 2305.13245.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        rngs: RngsLike,
        rope_theta: float = 10000.0,
        stddev: float = 0.02,
        dtype: str = "float32",
    ) -> None:
        check_positive(
            hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads,
            head_dim=head_dim,
        )  # fmt: skip
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads must be a divisor of num_heads={num_heads}, got {num_kv_heads}"
            )
        if head_dim % 2:
            raise ValueError(f"head_dim must be even to be rotated in pairs, got {head_dim}")
        self.hidden_size, self.rope_theta = hidden_size, rope_theta
        axes = ("embed", "heads", "head_dim")
        linear = functools.partial(Linear, rngs=as_rngs(rngs), stddev=stddev, dtype=dtype)
        self.q_proj = linear("BTD,DNK->BTNK", (hidden_size, num_heads, head_dim), axes)
        self.k_proj = linear("BTD,DNK->BTNK", (hidden_size, num_kv_heads, head_dim), axes)
        self.v_proj = linear("BTD,DNK->BTNK", (hidden_size, num_kv_heads, head_dim), axes)
        self.o_proj = linear(
            "BTNH,NHD->BTD", (num_heads, head_dim, hidden_size), ("heads", "head_dim", "embed")
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        deterministic: bool = False,
    ) -> Float[Array, "B T D"]:
        """Causal attention of a whole sequence to itself.

        Args:
          segment_ids: tokens attend only to tokens with their own id (packed sequences).
          deterministic: of gradients, see `pallas_kernels.flash_attention`.
        """
        check_hidden(x, self.hidden_size, num_axes=3)
        positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
        options = {"segment_ids": segment_ids, "deterministic": deterministic}
        out = flash_attention(*self._project(x, positions), **options)
        return self.o_proj(out)

    def extend(
        self, x: Float[Array, "B T D"], cache: KeyValueCache
    ) -> tuple[Float[Array, "B T D"], KeyValueCache]:
        """Attends T new tokens to the cache and to themselves, and appends them.

        The returned cache counts them: its lengths are advanced by T, as by `MLA.prefill` and
        `MLA.decode`, and the positions of the next tokens count on from there. Under jit the
        cache's room cannot be checked: tokens beyond it are dropped, yet counted.

        Raises:
          ValueError: x is not of width D, the batches differ, or the cache has no room.
        """
        check_hidden(x, self.hidden_size, num_axes=3)
        batch, max_tokens = cache.keys.shape[:2]
        if x.shape[0] != batch:
            raise ValueError(f"x must have {batch} sequences, as the cache, got {x.shape[0]}")
        if (lengths := concrete(cache.lengths)) is not None:
            if (needed := int(lengths.max()) + x.shape[1]) > max_tokens:
                raise ValueError(
                    f"every sequence must fit into the cache, which has room for {max_tokens} "
                    f"tokens, got {needed}"
                )
        positions = cache.lengths[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        q, k, v = self._project(x, positions)
        new = flash_attention(q, k, v, return_lse=True)
        old = flash_attention(
            q, cache.keys.astype(q.dtype), cache.values.astype(q.dtype),
            causal=False, lengths=cache.lengths, return_lse=True,
        )  # fmt: skip
        out, _ = merge_attention(*old, *new)
        row = jnp.arange(batch)[:, None]
        cache = KeyValueCache(
            cache.keys.at[row, positions].set(k.astype(cache.keys.dtype), mode="drop"),
            cache.values.at[row, positions].set(v.astype(cache.values.dtype), mode="drop"),
            cache.lengths + x.shape[1],
        )
        return self.o_proj(out.astype(x.dtype)), cache

    def _project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N K"], Float[Array, "B T G K"], Float[Array, "B T G K"]]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        tables = rope_tables(positions, q.shape[-1], self.rope_theta)
        return rotate(q, *tables, interleaved=False), rotate(k, *tables, interleaved=False), v
