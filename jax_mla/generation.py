"""Generation: one jitted prefill, then one jitted loop over tokens."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jax_mla import inputs
from jax_mla.cache import DEFAULT_PAGE_SIZE, LatentCache, advance
from jax_mla.config import DeepSeekConfig
from jax_mla.functional import Params, bind
from jax_mla.sampling import sample


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate` wrote.

    Attributes:
      tokens: continuations without their prompts; behind a row's end they hold the pad id.
      lengths: tokens written in each row, the one that ended it included.
    """

    tokens: Int[Array, "B max_new_tokens"]
    lengths: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    cache: LatentCache
    token: Int[Array, " B"]
    is_active: Bool[Array, " B"]
    step: Array
    tokens: Int[Array, "B bucket"]
    lengths: Int[Array, " B"]


def generate(
    params: Params,
    config: DeepSeekConfig,
    tokens: Int[Array | np.ndarray, "B T"],
    *,
    max_new_tokens: int,
    lengths: Int[Array | np.ndarray, " B"] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    key: Array | int | None = None,
    eos_token_ids: int | tuple[int, ...] | None = None,
    stream: Callable[[np.ndarray], None] | None = None,
) -> Generated:
    """Continues prompts until each has ended or `max_new_tokens` are written.

    Compiled once for all prompts whose lengths fall into the same bucket (64, 128, 256, then four
    even steps an octave), and the same for max_new_tokens; changing the value of a sampling option
    compiles nothing, turning one on or off does.

    Args:
      tokens: right-padded prompts.
      lengths: tokens of each prompt, at least 1; None means all T.
      temperature: 0 always takes the most likely token.
      top_k, top_p, min_p: see `sample`; without effect at temperature 0.
      key: a jax.random key or a seed; None is seed 0, so that equal calls write equal text.
      eos_token_ids: ids that end a row; None takes the config's, () never stops.
      stream: called once a step with the tokens just written, Int[B]; rows that have ended carry
        the pad id. The loop then runs on the host, one jitted step at a time, with equal results.

    Raises:
      ValueError: a prompt is empty, a token id is outside the vocabulary, or an option is out of
        its range; the message names the value.
    """
    tokens = inputs.check_tokens(tokens, config)
    lengths = inputs.check_lengths(lengths, tokens)
    _check_options(lengths, max_new_tokens, temperature, top_k, top_p, min_p)
    ends = config.eos_token_id if eos_token_ids is None else eos_token_ids
    eos = tuple(int(i) for i in np.ravel(ends))
    pad = config.pad_token_id if config.pad_token_id is not None else eos[0] if eos else 0
    if key is None or isinstance(key, int | np.integer):
        key = jax.random.key(key or 0)
    options = {} if temperature == 0 else {"temperature": temperature, "top_k": top_k,
                                           "top_p": top_p, "min_p": min_p}  # fmt: skip
    options = {
        name: jnp.asarray(value, jnp.int32 if name == "top_k" else jnp.float32)
        for name, value in options.items()
        if value is not None
    }
    max_new_tokens = int(max_new_tokens)
    prompt_bucket, new_bucket = _bucket(tokens.shape[1]), _bucket(max_new_tokens)
    tokens = _pad(tokens, prompt_bucket)
    limit = jnp.asarray(max_new_tokens, jnp.int32)

    state = _start(params, config, tokens, lengths, key, options, new_bucket, eos, pad)
    if stream is None:
        state = _loop(params, config, state, limit, key, options, eos, pad)
    else:
        state = _stream(params, config, state, max_new_tokens, key, options, eos, pad, stream)
    return Generated(_cut(state.tokens, max_new_tokens), state.lengths)


_STATIC = ("config", "eos", "pad")


@functools.partial(jax.jit, static_argnames=(*_STATIC, "new_bucket"))
def _start(params, config, tokens, lengths, key, options, new_bucket, eos, pad) -> _State:
    """Prefills an empty cache and writes the first token."""
    batch, num_tokens = tokens.shape
    cache = LatentCache.empty(
        config, batch, num_tokens + new_bucket, dtype=params["embed_tokens"].dtype
    )
    model = bind(params, config)
    x, cache = model.prefill(tokens, cache, num_new=lengths, has_context=False)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    state = _State(
        cache=advance(cache, lengths),
        token=jnp.zeros(batch, jnp.int32),
        is_active=jnp.ones(batch, bool),
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full((batch, new_bucket), pad, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
    )
    return _write(state, model.head(last), key, options, eos, pad)


def _step(params, config, state: _State, key, options, eos, pad) -> _State:
    """Feeds the last token and writes the next one."""
    model = bind(params, config)
    x, cache = model.decode(state.token[:, None], state.cache)
    # A row that has ended keeps its length: its last cache row is rewritten and never counted.
    state = dataclasses.replace(state, cache=advance(cache, state.is_active))
    return _write(state, model.head(x[:, 0]), key, options, eos, pad)


def _write(state: _State, logits, key, options, eos, pad) -> _State:
    if options:
        token = sample(logits, jax.random.fold_in(key, state.step), **options)
    else:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    token = jnp.where(state.is_active, token, pad)
    has_ended = functools.reduce(
        jnp.logical_or, [token == i for i in eos], jnp.zeros_like(state.is_active)
    )
    return dataclasses.replace(
        state,
        token=token,
        tokens=jax.lax.dynamic_update_slice(
            state.tokens, token[:, None], (jnp.int32(0), state.step)
        ),
        lengths=state.lengths + state.is_active,
        is_active=state.is_active & ~has_ended,
        step=state.step + 1,
    )


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="state")
def _loop(params, config, state, limit, key, options, eos, pad) -> _State:
    return jax.lax.while_loop(
        lambda state: (state.step < limit) & state.is_active.any(),
        lambda state: _step(params, config, state, key, options, eos, pad),
        state,
    )


_step_on_host = jax.jit(_step, static_argnames=_STATIC, donate_argnames="state")


def _stream(params, config, state, max_new_tokens, key, options, eos, pad, stream) -> _State:
    for step in range(max_new_tokens):
        if step:
            state = _step_on_host(params, config, state, key, options, eos, pad)
        stream(np.asarray(state.token))
        if not np.asarray(state.is_active).any():
            break
    return state


def _bucket(size: int) -> int:
    """64, 128, 256, then four even steps an octave: never 25 % more than is needed."""
    if size <= 4 * DEFAULT_PAGE_SIZE:
        return max(DEFAULT_PAGE_SIZE, 1 << (size - 1).bit_length())
    step = 1 << ((size - 1).bit_length() - 3)
    return -(-size // step) * step


# Out of jit both work on the host: as operations of a device each would compile a program a length.
def _pad(tokens: Array, size: int) -> Array:
    values = inputs.concrete(tokens)
    pad = jnp.pad if values is None else np.pad
    values = tokens if values is None else values
    return jnp.asarray(pad(values, ((0, 0), (0, size - tokens.shape[1]))))


def _cut(tokens: Array, size: int) -> Array:
    values = inputs.concrete(tokens)
    return tokens[:, :size] if values is None else jax.device_put(values[:, :size].copy())


def _check_options(lengths: Any, max_new_tokens, temperature, top_k, top_p, min_p) -> None:
    if not isinstance(max_new_tokens, int | np.integer):
        raise ValueError(f"max_new_tokens must be an integer, got {max_new_tokens!r}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number of at least 0, got {temperature}")
    if top_k is not None and (top_k < 1 or top_k != int(top_k)):
        raise ValueError(f"top_k must be an integer of at least 1, got {top_k}")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
    if (values := inputs.concrete(lengths)) is not None and (values < 1).any():
        raise ValueError(f"every prompt needs at least 1 token, got length {values.min()}")
