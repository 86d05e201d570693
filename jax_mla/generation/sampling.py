"""Choosing the next token from logits, and the options that say how."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key, UInt32

from jax_mla.generation.keys import request_keys


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How one request chooses its tokens: the most likely one, or drawn at random.

    `generate` takes the fields by name, `sample` says what each of them does.

    Attributes:
      temperature: 0 always takes the most likely token, and the other options have no effect.
      top_k, top_p, min_p: None is off.

    Raises:
      ValueError: an option is out of its range; the message names the value.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        given = {name: _number(name, x) for name, x in vars(self).items() if x is not None}
        if self.temperature is None or not 0 <= given["temperature"] < math.inf:
            raise ValueError(f"temperature must be a number of at least 0, got {self.temperature}")
        if "top_k" in given and not (1 <= (k := given["top_k"]) < math.inf and k == int(k)):
            raise ValueError(f"top_k must be an integer of at least 1, got {self.top_k}")
        for name in ("top_p", "min_p"):
            if name in given and not 0 < given[name] <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {given[name]}")

    def arrays(self) -> dict[str, Array]:
        """The options that are on, as `sample` takes them; empty at temperature 0."""
        if self.temperature == 0:
            return {}
        arrays = {n: jnp.asarray(x, jnp.float32) for n, x in vars(self).items() if x is not None}
        if self.top_k is not None:  # beyond any vocabulary it keeps everything
            arrays["top_k"] = jnp.asarray(min(int(self.top_k), np.iinfo(np.int32).max), jnp.int32)
        return arrays


def sample(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"] | UInt32[Array, "B words"] | Sequence[int],
    *,
    temperature: float | Float[Array, ""] | Float[Array, " B"] = 1.0,
    top_k: int | Int[Array, ""] | Int[Array, " B"] | None = None,
    top_p: float | Float[Array, ""] | Float[Array, " B"] | None = None,
    min_p: float | Float[Array, ""] | Float[Array, " B"] | None = None,
) -> Int[Array, " B"]:
    """Draws one token per row from softmax(logits / temperature), truncated to likely tokens.

    Truncations apply in the order top_k, top_p, min_p, each to what the one before has left, and
    never remove the most likely token. Every option is a number or one number per row; None turns
    it off for all rows, and top_k = V, top_p = 1 and min_p = 0 turn it off for one.

    A row depends on its own logits, key and options only, not on the other rows. (Keys of JAX's
    default generator, threefry; others draw differently when they are batched.)

    Args:
      keys: one jax.random key per row, each used once: `jax.random.split(key, B)`, or
        `jax.random.fold_in` of a request's key and the position of the token. Or a list of seeds,
        one per row.
      temperature: above 0; 0 takes the most likely token.
      top_k: keeps the k most likely tokens, and all that tie with the last of them.
      top_p: keeps the smallest set of tokens whose probabilities sum to at least p; of equally
        likely tokens the first ones.
      min_p: keeps tokens with at least p times the probability of the most likely one.

    Raises:
      ValueError: logits, keys or an option have another shape.

    Cost: top_k and top_p sort each row.
    """
    is_seeds = isinstance(keys, list | tuple) and np.ndim(logits) == 2
    of_rows: Any = request_keys(keys, len(logits)) if is_seeds else keys
    _check_shapes(logits, of_rows)
    batch = logits.shape[0]
    temperature = _column("temperature", temperature, batch, jnp.float32)
    scaled = logits.astype(jnp.float32) / jnp.where(temperature > 0, temperature, 1.0)
    kept = _truncate(scaled, top_k, top_p, min_p)
    drawn = jax.vmap(jax.random.categorical)(of_rows, kept)
    return jnp.where(temperature[:, 0] > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def _truncate(scaled, top_k, top_p, min_p):
    """The scaled logits, -inf for tokens that are left out."""
    batch, vocab_size = scaled.shape
    kept = scaled
    if top_k is not None or top_p is not None:
        descending = -jnp.sort(-scaled, axis=-1)
    if top_k is not None:
        last = jnp.clip(_column("top_k", top_k, batch, jnp.int32), 1, vocab_size) - 1
        threshold = jnp.take_along_axis(descending, last, axis=-1)
        kept = jnp.where(scaled < threshold, -jnp.inf, kept)
        descending = jnp.where(descending < threshold, -jnp.inf, descending)
    if top_p is not None:
        p = _column("top_p", top_p, batch, jnp.float32)
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # Rounded, a sum may reach 1 before its last term: at 1 everything is kept by rule.
        count = jnp.sum((before < p) | (p >= 1), axis=-1, keepdims=True)
        last = jnp.take_along_axis(descending, jnp.maximum(count - 1, 0), axis=-1)
        # Of the tokens that tie with the last one, the first few of the vocabulary.
        is_above, is_tie = scaled > last, scaled == last
        num_ties = count - jnp.sum(is_above, axis=-1, keepdims=True)
        is_kept = is_above | (is_tie & (jnp.cumsum(is_tie, axis=-1) <= num_ties))
        kept = jnp.where(is_kept, kept, -jnp.inf)
    if min_p is not None:
        best = jnp.max(scaled, axis=-1, keepdims=True)
        threshold = best + jnp.log(_column("min_p", min_p, batch, jnp.float32))
        kept = jnp.where(scaled < threshold, -jnp.inf, kept)
    return kept


def _check_shapes(logits, keys) -> None:
    if np.ndim(logits) != 2 or 0 in np.shape(logits):
        raise ValueError(f"logits must be Float[B V], none of them 0, got shape {np.shape(logits)}")
    batch = logits.shape[0]
    is_typed = isinstance(keys, jax.Array) and jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    is_raw = isinstance(keys, jax.Array | np.ndarray) and keys.dtype == jnp.uint32
    if not (is_typed or is_raw) or keys.ndim != (1 if is_typed else 2) or keys.shape[0] != batch:
        found = f"{keys.dtype} of shape {keys.shape}" if is_typed or is_raw else f"{keys!r:.60}"
        raise ValueError(
            f"keys must be {batch} jax.random keys or a list of {batch} seeds, one per row of "
            f"logits, got {found}"
        )


def _column(name: str, option, batch: int, dtype) -> Array:
    """One number per row, as [B, 1]."""
    option = jnp.asarray(option)
    if option.shape not in ((), (batch,)):
        raise ValueError(
            f"{name} must be a number or {batch} of them, one per row, got shape {option.shape}"
        )
    return jnp.broadcast_to(jnp.reshape(option, (-1, 1)).astype(dtype), (batch, 1))


def _number(name: str, value: Any) -> int | float:
    if isinstance(value, Tracer):
        raise ValueError(f"{name} decides what is compiled: it cannot be traced, got {value}")
    array = np.asarray(value)
    is_real = jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating)
    if array.shape != () or not is_real:
        raise ValueError(f"{name} must be a number, got {value!r}")
    return array.item()
