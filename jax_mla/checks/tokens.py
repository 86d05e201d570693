"""Checks of tokens and of the arrays beside them: positions, segment ids, masks, lengths.

All raise before any device work. Values are checked where the host can read them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jax_mla.checks.arrays import as_array, as_int32, concrete
from jax_mla.config.model import DeepSeekConfig, check_config


def check_tokens(
    tokens: Any, config: DeepSeekConfig, *, num_axes: tuple[int, ...] = (2,)
) -> Int[Array, ...]:
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
                f"token ids must be from 0 to {config.vocab_size - 1}, the vocabulary, "
                f"got {outside[0]}"
            )
    if tokens.ndim == 2:
        check_rope(tokens.shape[1], config)
    return as_int32("tokens", tokens)


def check_rope(num_tokens: int, config: DeepSeekConfig) -> None:
    """The rotary frequencies are right for sequences of this length."""
    limit = None if config.rope_scaling is None else config.rope_scaling.max_tokens
    if limit is not None and num_tokens > limit:
        raise ValueError(
            f"sequences must have at most original_max_position_embeddings={limit} tokens, got "
            f"{num_tokens}: longrope's long_factor, for longer ones, is not supported"
        )


def check_positions(num_tokens: int, max_new_tokens: int, config: DeepSeekConfig) -> None:
    """A prompt and its continuation fit into the positions of the model."""
    if num_tokens + max_new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"a prompt of {num_tokens} tokens and {max_new_tokens} new ones are more than the "
            f"{config.max_position_embeddings} positions that the model has"
        )


def check_same_shape(tokens: jax.Array, **others: Any) -> None:
    """Every other array has an entry per token; None is left out."""
    for name, other in others.items():
        if other is not None and np.shape(other) != tokens.shape:
            raise ValueError(
                f"{name} must have the shape of tokens, {tokens.shape}, got {np.shape(other)}"
            )


def check_aligned(
    tokens: Int[Array, "B T"], config: DeepSeekConfig, positions: Any, segment_ids: Any
) -> tuple[Int[Array, "B T"] | None, Int[Array, "B T"] | None]:
    """Positions and segment ids as int32, one per token; None stays None."""
    check_same_shape(tokens, positions=positions, segment_ids=segment_ids)
    if positions is not None:
        positions = as_int32("positions", positions)
        if (values := concrete(positions)) is not None:
            check_rope(int(values.max()) + 1, config)
    if segment_ids is not None:
        segment_ids = as_int32("segment_ids", segment_ids)
        if positions is None:
            _check_segments(segment_ids)
    return positions, segment_ids


def _check_segments(segment_ids: jax.Array) -> None:
    """Every segment is contiguous in its row, since positions restart where an id begins."""
    if (ids := concrete(segment_ids)) is None:
        return
    begins = np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    rows, columns = np.nonzero(begins & (ids >= 0))  # padding, below 0, may be anywhere
    segments = np.stack([rows, ids[rows, columns]], axis=1)
    found, counts = np.unique(segments, axis=0, return_counts=True)
    if (counts > 1).any():
        row, segment = found[counts > 1][0]
        raise ValueError(
            f"the tokens of a segment must follow each other, got segment id {segment} of row "
            f"{row} again after another id"
        )


def check_batch(
    tokens: Any, config: DeepSeekConfig, segment_ids: Any, loss_mask: Any
) -> tuple[Int[Array, "B T"], Int[Array, "B T"] | None]:
    """Tokens and segment ids of a training batch as int32; None stays None."""
    tokens = check_tokens(tokens, config)
    _, segment_ids = check_aligned(tokens, config, None, segment_ids)
    check_same_shape(tokens, loss_mask=loss_mask)
    if loss_mask is not None and (dtype := jnp.result_type(loss_mask)) != np.bool_:
        raise ValueError(f"loss_mask must be bool, got dtype {dtype}")
    if tokens.shape[1] < 2:
        raise ValueError(
            f"tokens must have at least 2 per row for a loss, got shape {tokens.shape}"
        )
    return tokens, segment_ids


def check_right_padded(tokens: Int[Array, "B T"], lengths: Any, config: DeepSeekConfig) -> None:
    """No prompt begins with padding, nor ends with it where no lengths say so.

    Where prompts may end with the token pad_token_id, lengths of T say that it is none of padding.
    """
    pad, num_tokens = config.pad_token_id, tokens.shape[1]
    values = concrete(tokens)
    if pad is None or values is None or num_tokens == 1:
        return
    counts = None if lengths is None else concrete(as_array("lengths", lengths))
    is_padded = np.full(len(values), True) if counts is None else counts < num_tokens
    is_at_end = (values[:, -1] == pad) & (lengths is None)
    is_at_begin = (values[:, 0] == pad) & is_padded & (pad != config.bos_token_id)
    for is_wrong, place in ((is_at_begin, "begin"), (is_at_end, "end")):
        if is_wrong.any():
            raise ValueError(
                f"prompts must be padded on the right and have lengths that count their tokens, "
                f"got pad_token_id {pad} at the {place} of row {is_wrong.argmax()}"
            )


def check_lengths(lengths: Any, tokens: Int[Array, "B T"]) -> Int[Array, " B"]:
    """Valid tokens of each row as int32; None means all."""
    batch, num_tokens = tokens.shape
    if lengths is None:
        # On a device each shape would compile a program. A traced batch may be left open.
        full = np.full if isinstance(batch, int) else jnp.full
        return jnp.asarray(full(batch, num_tokens, np.int32))
    lengths = as_array("lengths", lengths)
    if lengths.shape != (batch,):
        raise ValueError(
            f"lengths must have shape ({batch},), one per row of tokens, got {lengths.shape}"
        )
    if (values := concrete(lengths)) is not None:
        outside = values[(values < 0) | (values > num_tokens)]
        if outside.size:
            raise ValueError(
                f"lengths must be from 0 to {num_tokens}, the tokens of a row, got {outside[0]}"
            )
    return as_int32("lengths", lengths)
