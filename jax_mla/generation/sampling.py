"""Choosing the next token from logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sample(
    logits: Float[Array, "B V"],
    key: Array,
    *,
    temperature: float | Float[Array, " B"] = 1.0,
    top_k: int | Int[Array, " B"] | None = None,
    top_p: float | Float[Array, " B"] | None = None,
    min_p: float | Float[Array, " B"] | None = None,
) -> Int[Array, " B"]:
    """Draws one token a row from softmax(logits / temperature), cut to its likely part.

    The cuts apply in the order top_k, top_p, min_p, each to what the one before has left, and
    never remove the most likely token. Every option is a number or one number a row.

    Args:
      key: rows draw independently from it.
      temperature: above 0; 0 takes the most likely token.
      top_k: keep the k most likely tokens, and all that tie with the last of them.
      top_p: keep the smallest set of tokens whose probabilities sum to at least p; of equally
        likely tokens the first ones.
      min_p: keep tokens with at least p times the probability of the most likely one.
    """
    batch = logits.shape[0]
    temperature = _column(temperature, batch)
    scaled = logits.astype(jnp.float32) / jnp.where(temperature > 0, temperature, 1.0)
    kept = _cut(scaled, top_k, top_p, min_p)
    keys = jax.random.split(key, batch)
    drawn = jax.vmap(jax.random.categorical)(keys, kept)
    return jnp.where(temperature[:, 0] > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def _cut(scaled, top_k, top_p, min_p):
    batch = scaled.shape[0]
    kept = scaled
    if top_k is not None or top_p is not None:
        descending = -jnp.sort(-scaled, axis=-1)
    if top_k is not None:
        last = jnp.clip(_column(top_k, batch) - 1, 0, scaled.shape[-1] - 1).astype(jnp.int32)
        threshold = jnp.take_along_axis(descending, last, axis=-1)
        kept = jnp.where(scaled < threshold, -jnp.inf, kept)
        descending = jnp.where(descending < threshold, -jnp.inf, descending)
    if top_p is not None:
        probabilities = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        count = jnp.sum(before < _column(top_p, batch), axis=-1, keepdims=True)
        last = jnp.take_along_axis(descending, jnp.maximum(count - 1, 0), axis=-1)
        # Of the tokens that tie with the last one, the first few of the vocabulary.
        is_above, is_tie = scaled > last, scaled == last
        num_ties = count - jnp.sum(is_above, axis=-1, keepdims=True)
        is_kept = is_above | (is_tie & (jnp.cumsum(is_tie, axis=-1) <= num_ties))
        kept = jnp.where(is_kept, kept, -jnp.inf)
    if min_p is not None:
        best = jnp.max(scaled, axis=-1, keepdims=True)
        kept = jnp.where(scaled < best + jnp.log(_column(min_p, batch)), -jnp.inf, kept)
    return kept


def _column(option, batch):
    return jnp.broadcast_to(jnp.reshape(jnp.asarray(option), (-1, 1)), (batch, 1))
