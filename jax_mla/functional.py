"""The model as functions: parameters are a plain dict, cache goes in and comes out, all jits.

`prefill` and `decode_step` check their arguments, which reads lengths and page tables back from
the device; `unchecked_prefill` and `unchecked_decode_step` are the same without checks.

In your own jit, `config`, `form`, `rules` and `has_context` are static: close over them, or name
them in `static_argnames` (all are hashable). Everything else may be traced.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from jax_mla.cache.check import check_cache, longest
from jax_mla.cache.latent import Cache
from jax_mla.cache.pages import advance, capacity
from jax_mla.checks.tokens import check_aligned, check_lengths, check_tokens
from jax_mla.config.model import DeepSeekConfig
from jax_mla.layers.mla.forms import Form, check_form, resolve_form
from jax_mla.model import ForwardTrace
from jax_mla.params import Params, bind
from jax_mla.sharding.placement import check_split, placement_of
from jax_mla.sharding.rules import ShardingRules


def forward(
    params: Params,
    config: DeepSeekConfig,
    tokens: Integer[Array | np.ndarray, "B T"] | Sequence[Sequence[int]],
    *,
    positions: Integer[Array | np.ndarray, "B T"] | Sequence[Sequence[int]] | None = None,
    segment_ids: Integer[Array | np.ndarray, "B T"] | Sequence[Sequence[int]] | None = None,
    form: Form | None = None,
    rules: ShardingRules | None = None,
) -> Float[Array, "B T V"]:
    """Logits of the next token at every position, float32.

    Args:
      positions: for the rotary embedding; None counts from 0, anew in each segment.
      segment_ids: tokens attend only to earlier tokens with their own id (packed sequences). A
        negative id marks padding, which goes to no expert and whose logits mean nothing.
      form: how latent attention is computed, "expanded" or "absorbed"; None takes the cheaper one.
      rules: the layout by which `params` were put on a mesh; None takes the defaults.

    Raises:
      ValueError: a token id is outside the vocabulary, shapes disagree, or the mesh does not divide
        them.
      NotImplementedError: the rules dispatch tokens by "ragged", and the mesh is of CPUs.

    Cost: 2 operations per token and active parameter, and attention's; logits of B * T * V float32
    numbers. Holds a copy of one layer's weights at a time, all experts included: up to 23 GB for
    V3 in bfloat16, divided by the number of devices that experts are sharded over. `prefill`
    copies no experts.
    """
    checked = _check_forward(params, config, tokens, positions, segment_ids, form, rules)
    return _forward(params, config, *checked, rules)


def _check_forward(params, config, tokens, positions, segment_ids, form, rules):
    """Tokens, positions, segment ids and form, checked, as int32; all but tokens may be None."""
    form, tokens = check_form(form), check_tokens(tokens, config)
    check_split(tokens, placement_of(params, rules))
    return tokens, *check_aligned(tokens, config, positions, segment_ids), form


@functools.partial(jax.jit, static_argnames=("config", "form", "rules"))
def _forward(params, config, tokens, positions, segment_ids, form, rules):
    model = bind(params, config, rules)
    return model(tokens, positions=positions, segment_ids=segment_ids, form=form)


def forward_trace(
    params: Params,
    config: DeepSeekConfig,
    tokens: Integer[Array | np.ndarray, "B T"] | Sequence[Sequence[int]],
    *,
    positions: Integer[Array | np.ndarray, "B T"] | Sequence[Sequence[int]] | None = None,
    segment_ids: Integer[Array | np.ndarray, "B T"] | Sequence[Sequence[int]] | None = None,
    form: Form | None = None,
    rules: ShardingRules | None = None,
) -> ForwardTrace:
    """`forward` with the hidden states and expert choices of every layer. Arguments as there."""
    checked = _check_forward(params, config, tokens, positions, segment_ids, form, rules)
    return _forward_trace(params, config, *checked, rules)


@functools.partial(jax.jit, static_argnames=("config", "form", "rules"))
def _forward_trace(params, config, tokens, positions, segment_ids, form, rules):
    model = bind(params, config, rules)
    return model.trace(tokens, positions=positions, segment_ids=segment_ids, form=form)


def prefill(
    params: Params,
    config: DeepSeekConfig,
    tokens: Integer[Array | np.ndarray, "B T"] | Sequence[Sequence[int]],
    cache: Cache,
    *,
    lengths: Integer[Array | np.ndarray, " B"] | Sequence[int] | None = None,
    form: Form | None = None,
    rules: ShardingRules | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Appends prompts, or further chunks of them, to a cache.

    Args:
      tokens: right-padded.
      cache: may hold earlier chunks. Not changed; donate it to your own jit to reuse its memory.
        Under jit its room cannot be checked: rows beyond it are dropped, yet counted.
      lengths: valid tokens of each row; None means all T. A row of length 0 keeps its cache, and
        its logits mean nothing.
      form: how latent attention is computed, "expanded" or "absorbed"; None takes the cheaper
        one for the longest cached sequence, or for a full cache where lengths are traced.
      rules: as in `forward`. Sequences and their pages are split over the mesh axes of `batch`: the
        table of a paged cache may name only pages of the shard that its sequence is in. Where
        `context` shards the pages of each sequence, make the cache with as many `num_shards`.

    Returns:
      Float32 logits of the token after each row's last valid one, and the cache.

    Raises:
      ValueError: a token id is outside the vocabulary, a prompt does not fit into the cache, or a
        page that is needed does not exist.
    """
    tokens = check_tokens(tokens, config)
    lengths = check_lengths(lengths, tokens)
    placement = placement_of(params, rules)
    check_split(tokens, placement)
    check_cache(cache, config, lengths, placement=placement)
    has_context = longest(cache) != 0
    form = _form(form, config, tokens.shape[1], cache)
    options = {"has_context": has_context, "form": form, "rules": rules}
    return unchecked_prefill(params, config, tokens, cache, lengths, **options)


@functools.partial(jax.jit, static_argnames=("config", "has_context", "form", "rules"))
def unchecked_prefill(
    params: Params,
    config: DeepSeekConfig,
    tokens: Int[Array, "B T"],
    cache: Cache,
    lengths: Int[Array, " B"],
    *,
    has_context: bool = True,
    form: Form | None = None,
    rules: ShardingRules | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """`prefill` that trusts its arguments: nothing is read back from the device.

    For loops that know what is in their cache. Ids, lengths and pages that are out of range give
    wrong numbers and no error.

    Args:
      has_context: False when the cache is known to be empty.
      form: None takes the cheaper one for a full cache.
    """
    model = bind(params, config, rules)
    phase = model.prefilling(tokens, cache, lengths, has_context=has_context, form=form)
    out = model.run(tokens, phase, cache)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    x = jnp.take_along_axis(out.x, last, axis=1)[:, 0]
    return model.head(x), advance(out.cache, lengths)


def _form(form: Form | None, config: DeepSeekConfig, num_queries: int, cache: Cache) -> Form:
    cached = longest(cache)
    if cached is None:
        cached = max(capacity(cache) - num_queries, 0)
    return resolve_form(form, config, num_queries, cached)


def decode_step(
    params: Params,
    config: DeepSeekConfig,
    token: Integer[Array | np.ndarray, "B ..."],
    cache: Cache,
    *,
    form: Form | None = None,
    rules: ShardingRules | None = None,
) -> tuple[Float[Array, "B ... V"], Cache]:
    """Appends one token to every sequence, or T of them, and predicts what follows each.

    Args:
      token: Int[B] for one token per sequence, Int[B T] for several (speculative decoding).
      cache: not changed, so it is copied, and its lengths are read back for the checks: in a loop
        call this from your own jit and donate the cache. Under jit its room cannot be checked:
        rows beyond it are not kept, yet counted.
      form, rules: as in `prefill`; one token per sequence is absorbed unless form="expanded".

    Returns:
      Float32 logits with the axes of `token` and V, and the cache.

    Raises:
      ValueError: as `prefill`.
    """
    token = check_tokens(token, config, num_axes=(1, 2))
    num_new = token.shape[1] if token.ndim == 2 else 1
    placement = placement_of(params, rules)
    check_split(token, placement, ("batch",))
    check_cache(cache, config, num_new, batch=token.shape[0], placement=placement)
    form = "absorbed" if form is None and num_new == 1 else _form(form, config, num_new, cache)
    return unchecked_decode_step(params, config, token, cache, form=form, rules=rules)


@functools.partial(jax.jit, static_argnames=("config", "form", "rules"))
def unchecked_decode_step(
    params: Params,
    config: DeepSeekConfig,
    token: Int[Array, "B ..."],
    cache: Cache,
    *,
    form: Form = "absorbed",
    rules: ShardingRules | None = None,
) -> tuple[Float[Array, "B ... V"], Cache]:
    """`decode_step` that trusts its arguments: nothing is read back from the device."""
    model = bind(params, config, rules)
    tokens = token.reshape(token.shape[0], -1)
    num_new = jnp.full(token.shape[0], tokens.shape[1], jnp.int32)
    if form == "absorbed":
        phase = model.decoding(tokens, cache)
    else:
        phase = model.prefilling(tokens, cache, num_new, form=form)
    out = model.run(tokens, phase, cache)
    return model.head(out.x).reshape(*token.shape, -1), advance(out.cache, num_new)
