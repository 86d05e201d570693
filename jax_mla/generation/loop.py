"""Generation: one jitted prefill, then one jitted loop over tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer, Key

from jax_mla.cache.latent import LatentCache
from jax_mla.cache.pages import advance
from jax_mla.checks.arrays import as_array, as_int32, concrete
from jax_mla.checks.tokens import (
    check_lengths,
    check_positions,
    check_right_padded,
    check_rope,
    check_tokens,
)
from jax_mla.config.model import DeepSeekConfig
from jax_mla.generation.buckets import bucket, prompt_bucket
from jax_mla.generation.keys import request_keys, token_keys
from jax_mla.generation.sampling import SamplingOptions, sample
from jax_mla.params import Params, bind, check_params
from jax_mla.sharding.placement import check_split, placement_of
from jax_mla.sharding.rules import ShardingRules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate` wrote.

    Attributes:
      tokens: continuations without their prompts; after a row's end they hold the pad id.
      lengths: tokens written in each row, including the one that ended it. Where `generate` is
        traced, a row whose logits are not finite ends before that token.
    """

    tokens: Int[Array, "B max_new_tokens"]
    lengths: Int[Array, " B"]


def generate(
    params: Params,
    config: DeepSeekConfig,
    tokens: Integer[Array | np.ndarray, "B T"] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    lengths: Integer[Array | np.ndarray, " B"] | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    key: Key[Array, ""] | Key[Array, " B"] | int | Sequence[int] | None = None,
    eos_token_ids: int | tuple[int, ...] | None = None,
    stream: Callable[[np.ndarray], None] | None = None,
    rules: ShardingRules | None = None,
) -> Generated:
    """Continues prompts until each has ended or `max_new_tokens` are written.

    Compiled once for all prompts whose lengths fall into the same bucket (64, 128, 256, then four
    even steps per octave), and the same for max_new_tokens; changing the value of a sampling option
    compiles nothing, turning one on or off does.

    Args:
      tokens: right-padded prompts.
      lengths: tokens of each prompt, at least 1; None means all T, none of which is padding.
      temperature, top_k, top_p, min_p: the fields of `SamplingOptions`, see `sample`; temperature
        0 always takes the most likely token, and the others then have no effect.
      key: a jax.random key or a seed from 0 to 2**32 - 1, from which row i takes fold_in(key, i);
        None is seed 0, so that equal calls write equal text. Or one per row, an array of keys or a
        list of seeds: a row then draws the same wherever it stands and whatever stands beside it.
      eos_token_ids: ids that end a row; None takes the config's, () never stops.
      stream: called once per step with the tokens just written, Int[B]; rows that have ended carry
        the pad id. The loop then runs on the host, one jitted step at a time, with equal results.
      rules: those by which `params` were put on a mesh; None takes the defaults.

    Under jit, vmap or scan `params`, `tokens`, `lengths` and `key` (a key, not a seed) may be
    traced; everything else is static. Prompts of traced lengths count as T tokens in the checks.

    Raises:
      ValueError: a prompt is empty, or padded on the left or without lengths; a token id is outside
        the vocabulary, prompt and continuation are more than config.max_position_embeddings, an
        option is out of its range, or the parameters are not those of the config; the message names
        the value.
      FloatingPointError: the logits of a row are not finite; the message names row and step. It
        cannot be raised where `generate` is traced: see `Generated`.
    """
    check_params(params, config, rules)
    tokens = check_tokens(tokens, config)
    check_right_padded(tokens, lengths, config)
    lengths = check_lengths(lengths, tokens)
    _check_sizes(config, lengths, tokens.shape[1], max_new_tokens)
    options = SamplingOptions(temperature, top_k, top_p, min_p).arrays()
    keys = request_keys(key, tokens.shape[0])
    eos = _ends(config.eos_token_id if eos_token_ids is None else eos_token_ids)
    pad = config.pad_token_id if config.pad_token_id is not None else eos[0] if eos else 0
    max_new_tokens = int(max_new_tokens)
    placement, new_bucket = placement_of(params, rules), bucket(max_new_tokens)
    check_split(tokens, placement, ("batch",))
    tokens = _pad(tokens, prompt_bucket(tokens.shape[1], placement))
    limit = jnp.asarray(max_new_tokens, jnp.int32)

    program = _Program(config, rules, eos, pad)
    draw = _Draw(keys, options) if options else None
    state = _start(params, program, tokens, lengths, draw, new_bucket)
    if stream is None:
        state = _loop(params, program, state, limit, draw)
    else:
        state = _stream(params, program, state, max_new_tokens, draw, stream)
    _check_finite(state.failed_at)
    return Generated(_cut(state.tokens, max_new_tokens), state.lengths)


@dataclasses.dataclass(frozen=True)
class _Program:
    """What a generation is compiled for, beside shapes."""

    config: DeepSeekConfig
    rules: ShardingRules | None
    eos: tuple[int, ...]
    pad: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Draw:
    """How tokens are drawn; None in its place takes the most likely ones."""

    keys: Key[Array, " B"]
    options: dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    cache: Any  # a LatentCache, or nothing where `_readable` takes the rest
    token: Int[Array, " B"]
    is_active: Bool[Array, " B"]
    step: Int[Array, ""]
    tokens: Int[Array, "B bucket"]
    lengths: Int[Array, " B"]
    failed_at: Int[Array, " B"]  # the step whose logits were not finite, or -1


@functools.partial(jax.jit, static_argnames=("program", "new_bucket"))
def _start(
    params, program: _Program, tokens, lengths, draw: _Draw | None, new_bucket: int
) -> _State:
    """Prefills an empty cache and writes the first token."""
    batch, num_tokens = tokens.shape
    model = bind(params, program.config, program.rules)
    cache = LatentCache.empty(
        program.config,
        batch,
        num_tokens + new_bucket,
        dtype=params["embed_tokens"]["weight"].dtype,
        num_shards=1 if model.placement is None else model.placement.num_shards("context"),
    )
    phase = model.prefilling(tokens, cache, lengths, has_context=False)
    out = model.run(tokens, phase, cache)
    last = jnp.take_along_axis(out.x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    state = _State(
        cache=advance(out.cache, lengths),
        token=jnp.zeros(batch, jnp.int32),
        is_active=jnp.ones(batch, bool),
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full((batch, new_bucket), program.pad, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        failed_at=jnp.full(batch, -1, jnp.int32),
    )
    return _readable(_write(state, model.head(last), program, draw), params, program)


def _step(params, program: _Program, state: _State, draw: _Draw | None) -> _State:
    """Feeds the last token and writes the next one."""
    model = bind(params, program.config, program.rules)
    token = state.token[:, None]
    # A row that has ended goes to no expert, where it would take up room.
    phase = model.decoding(token, state.cache, valid=state.is_active[:, None])
    out = model.run(token, phase, state.cache)
    # A row that has ended keeps its length: its last cache row is rewritten and never counted.
    state = dataclasses.replace(state, cache=advance(out.cache, state.is_active))
    return _readable(_write(state, model.head(out.x[:, 0]), program, draw), params, program)


def _readable(state: _State, params, program: _Program) -> _State:
    """The state with everything but its cache on every device: each process reads the tokens."""
    if (placement := placement_of(params, program.rules)) is None:
        return state
    small = jax.tree.map(placement.constrain, dataclasses.replace(state, cache=()))
    return dataclasses.replace(small, cache=state.cache)


def _write(state: _State, logits, program: _Program, draw: _Draw | None) -> _State:
    """Chooses the next token of every row that has not ended, and writes it down."""
    if draw is None:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        token = sample(logits, token_keys(draw.keys, state.step), **draw.options)
    # Of any NaN the maximum is NaN; one that is infinite leaves no probabilities.
    is_finite = jnp.isfinite(jnp.max(logits, axis=-1))
    is_written = state.is_active & is_finite
    token = jnp.where(is_written, token, program.pad)
    has_ended = functools.reduce(
        jnp.logical_or, [token == i for i in program.eos], jnp.zeros_like(is_written)
    )
    return dataclasses.replace(
        state,
        token=token,
        tokens=jax.lax.dynamic_update_slice(
            state.tokens, token[:, None], (jnp.int32(0), state.step)
        ),
        lengths=state.lengths + is_written.astype(jnp.int32),
        is_active=is_written & ~has_ended,
        failed_at=jnp.where(state.is_active & ~is_finite, state.step, state.failed_at),
        step=state.step + 1,
    )


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def _loop(params, program: _Program, state: _State, limit, draw: _Draw | None) -> _State:
    return jax.lax.while_loop(
        lambda state: (state.step < limit) & state.is_active.any(),
        lambda state: _step(params, program, state, draw),
        state,
    )


_step_on_host = jax.jit(_step, static_argnames="program", donate_argnames="state")


def _stream(params, program, state: _State, max_new_tokens: int, draw, stream) -> _State:
    for step in range(max_new_tokens):
        if step:
            state = _step_on_host(params, program, state, draw)
        token, is_active, failed_at = jax.device_get(
            (state.token, state.is_active, state.failed_at)
        )
        _check_finite(failed_at)
        stream(token)
        if not is_active.any():
            break
    return state


def _check_finite(failed_at) -> None:
    """No row has stopped at logits that are not finite; unknown while traced."""
    failed_at = concrete(failed_at)
    if failed_at is None or not (has_failed := failed_at >= 0).any():
        return
    row = int(np.where(has_failed, failed_at, np.iinfo(np.int32).max).argmin())
    raise FloatingPointError(
        f"the logits of row {row} are not finite at step {failed_at[row]} of its continuation: "
        "the parameters hold NaN or infinity, or overflow in their dtype"
    )


# Out of jit both work on the host; on the device every length would compile a program.
def _pad(tokens: Array, size: int) -> Array:
    values = concrete(tokens)
    pad = jnp.pad if values is None else np.pad
    values = tokens if values is None else values
    return jnp.asarray(pad(values, ((0, 0), (0, size - tokens.shape[1]))))


def _cut(tokens: Array, size: int) -> Array:
    values = concrete(tokens)
    return tokens[:, :size] if values is None else jax.device_put(values[:, :size].copy())


def _check_sizes(config, lengths, num_tokens: int, max_new_tokens) -> None:
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int | np.integer):
        raise ValueError(f"max_new_tokens must be an integer, got {max_new_tokens!r}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if (values := concrete(lengths)) is not None:
        if (values < 1).any():
            raise ValueError(f"every prompt needs at least 1 token, got length {values.min()}")
        num_tokens = int(values.max())
    num_cached = num_tokens + int(max_new_tokens) - 1  # the last one is not fed back
    if num_cached > (limit := np.iinfo(np.int32).max):
        raise ValueError(
            f"a prompt of {num_tokens} tokens and max_new_tokens={max_new_tokens} need a cache of "
            f"{num_cached}, positions end at {limit}"
        )
    check_rope(num_cached, config)
    check_positions(num_tokens, int(max_new_tokens), config)


def _ends(eos_token_ids: Any) -> tuple[int, ...]:
    ids = as_array("eos_token_ids", eos_token_ids)
    if ids.size == 0:
        return ()
    if (values := concrete(ids)) is None:
        raise ValueError(f"eos_token_ids decide what is compiled: they cannot be traced, got {ids}")
    as_int32("eos_token_ids", values)  # refuses what is no integer of 32 bits
    return tuple(values.ravel().tolist())
