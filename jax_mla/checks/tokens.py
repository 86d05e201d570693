"""Checks of tokens and what comes with them, before any device work where values are concrete."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_mla.checks.arrays import as_array, as_int32, concrete
from jax_mla.config.model import DeepSeekConfig, check_config


def check_tokens(tokens, config: DeepSeekConfig, *, num_axes: tuple[int, ...] = (2,)) -> jax.Array:
    """Token ids as int32, all of them within the vocabulary."""
    check_config(config)
    tokens = as_array("tokens", tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers, got dtype {tokens.dtype}")
    if tokens.ndim not in num_axes:
        expected = " or ".join("Int[B T]" if n == 2 else "Int[B]" for n in num_axes)
        raise ValueError(f"tokens must be {expected}, got shape {tokens.shape}")
    if tokens.size == 0:
        raise ValueError(f"tokens must hold at least one token, got shape {tokens.shape}")
    if (values := concrete(tokens)) is not None:
        outside = values[(values < 0) | (values >= config.vocab_size)]
        if outside.size:
            raise ValueError(
                f"token id {outside[0]} is outside the vocabulary of {config.vocab_size}"
            )
    if tokens.ndim == 2:
        check_rope(tokens.shape[1], config)
    return as_int32("tokens", tokens)


def check_rope(num_tokens: int, config: DeepSeekConfig) -> None:
    """The rotary frequencies are right for sequences of this length."""
    limit = None if config.rope_scaling is None else config.rope_scaling.max_tokens
    if limit is not None and num_tokens > limit:
        raise ValueError(
            f"longrope computes up to original_max_position_embeddings={limit} tokens a sequence, "
            f"got {num_tokens}; longer ones need its long_factor, which is not supported"
        )


def check_same_shape(tokens: jax.Array, **others) -> None:
    for name, other in others.items():
        if other is not None and np.shape(other) != tokens.shape:
            raise ValueError(f"{name} has shape {np.shape(other)}, tokens have {tokens.shape}")


def check_aligned(tokens: jax.Array, config: DeepSeekConfig, positions, segment_ids):
    """Positions and segment ids as int32, one for every token; None stays None."""
    check_same_shape(tokens, positions=positions, segment_ids=segment_ids)
    if positions is not None:
        positions = as_int32("positions", positions)
        if (values := concrete(positions)) is not None:
            check_rope(int(values.max()) + 1, config)
    return positions, None if segment_ids is None else as_int32("segment_ids", segment_ids)


def check_batch(
    tokens, config: DeepSeekConfig, segment_ids, loss_mask
) -> tuple[jax.Array, jax.Array | None]:
    """Tokens and segment ids of a batch to be trained on, as int32; None stays None."""
    tokens = check_tokens(tokens, config)
    _, segment_ids = check_aligned(tokens, config, None, segment_ids)
    check_same_shape(tokens, loss_mask=loss_mask)
    if loss_mask is not None and (dtype := jnp.result_type(loss_mask)) != np.bool_:
        raise ValueError(f"loss_mask must be true or false, got dtype {dtype}")
    if tokens.shape[1] < 2:
        raise ValueError(
            f"a loss needs at least 2 tokens a row, got tokens of shape {tokens.shape}"
        )
    return tokens, segment_ids


def check_lengths(lengths, tokens: jax.Array) -> jax.Array:
    """Valid tokens of each row; all of them when None."""
    batch, num_tokens = tokens.shape
    if lengths is None:
        return jnp.asarray(np.full(batch, num_tokens, np.int32))
    lengths = as_array("lengths", lengths)
    if lengths.shape != (batch,):
        raise ValueError(
            f"lengths have shape {lengths.shape}, tokens {tokens.shape} need ({batch},)"
        )
    if (values := concrete(lengths)) is not None:
        outside = values[(values < 0) | (values > num_tokens)]
        if outside.size:
            raise ValueError(
                f"length {outside[0]} is not between 0 and the {num_tokens} tokens given"
            )
    return as_int32("lengths", lengths)
