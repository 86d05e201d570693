"""The programs of the engine, as functions of arrays: chunk, decode, choose, and those on pages.

`chunk` and `decode` append to the pool, which is donated, and return hidden states. `choose` makes
them tokens: only steps that choose any run it. Work arrays are those of `batch`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jax_mla.cache.latent import PagedLatentCache
from jax_mla.config.model import DeepSeekConfig
from jax_mla.generation.keys import token_keys
from jax_mla.generation.sampling import sample
from jax_mla.params import Params, bind
from jax_mla.serving.batch import INTEGERS, LAST_CHOSEN, NUMBERS
from jax_mla.serving.request import MAX_TOP_LOGPROBS
from jax_mla.sharding.placement import placement_of
from jax_mla.sharding.rules import ShardingRules

Pages = Float[Array, "L num_pages page_size X"]
# greedy: the most likely tokens. sampled: by SamplingOptions. full: also penalties, biases and log
# probabilities.
Variant = Literal["greedy", "sampled", "full"]


@dataclasses.dataclass(frozen=True)
class Model:
    """What programs are compiled for, beside shapes."""

    config: DeepSeekConfig
    rules: ShardingRules | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """What the device remembers of the requests that run.

    Attributes:
      token: the last one that each has chosen.
      history: for penalties, how often each token is in the continuation, times 2; plus 1 if it
        is in the prompt. Only kept where asked for.
    """

    token: Int32[Array, " slots"]
    history: Int32[Array, "slots V"]


class Chosen(NamedTuple):
    """The tokens of a step, -1 where logits are not finite. The others are of "full" alone."""

    token: Int32[Array, " B"]
    logprob: Float32[Array, " B"] | None = None
    top_token: Int32[Array, "B top"] | None = None
    top_logprob: Float32[Array, "B top"] | None = None


class _Work(NamedTuple):
    columns: dict[str, Int32[Array, " B"]]
    tokens: Int32[Array, "B T"]
    cache: PagedLatentCache


def chunk(
    params: Params, pages: Pages, work: Int32[Array, "B columns"], *, model: Model, num_tokens: int
) -> tuple[Float[Array, "B D"], Pages]:
    """Appends up to `num_tokens` of every row's prompt; hidden states of the last of them."""
    columns, tokens, cache = _unpack(pages, work, num_tokens)
    deepseek = bind(params, model.config, model.rules)
    phase = deepseek.prefilling(tokens, cache, columns["count"])
    out = deepseek.run(tokens, phase, cache)
    last = jnp.maximum(columns["count"] - 1, 0)[:, None, None]
    x = jnp.take_along_axis(out.x, last, axis=1)[:, 0]
    return _placed(x, out.cache.pages, params, model)


def decode(
    params: Params,
    pages: Pages,
    slots: Slots,
    work: Int32[Array, "B columns"],
    *,
    model: Model,
) -> tuple[Float[Array, "B D"], Pages]:
    """Appends one token of every row, given or the last that it chose; their hidden states."""
    columns, tokens, cache = _unpack(pages, work, 1)
    chosen = slots.token.at[columns["slot"]].get(mode="clip")[:, None]
    tokens = jnp.where(tokens == LAST_CHOSEN, chosen, tokens)
    deepseek = bind(params, model.config, model.rules)
    phase = deepseek.decoding(tokens, cache, valid=columns["count"][:, None] > 0)
    out = deepseek.run(tokens, phase, cache)
    return _placed(out.x[:, 0], out.cache.pages, params, model)


def choose(
    params: Params,
    slots: Slots,
    x: Float[Array, "B D"],
    head: Int32[Array, "B integers"],
    numbers: Float32[Array, "B numbers"],
    biases: tuple[Int32[Array, "B biased"], Float32[Array, "B biased"]] | None,
    *,
    model: Model,
    variant: Variant,
) -> tuple[Chosen, Slots]:
    """The next token of every row. Rows with is_last remember it."""
    columns = dict(zip(INTEGERS, head.T, strict=True))
    options = dict(zip(NUMBERS, numbers.T, strict=True))
    place = placement_of(params, model.rules)
    # Whole on every device: every process reads the tokens.
    everywhere = place.constrain if place is not None else lambda x: x
    raw = logits = everywhere(bind(params, model.config, model.rules).head(x))
    # Of any NaN the maximum is NaN; one that is infinite leaves no probabilities.
    is_finite = jnp.isfinite(jnp.max(raw, axis=-1))
    if biases is not None:  # with "full"
        history = slots.history.at[columns["slot"]].get(mode="clip")
        logits = _penalized(logits, history, options)
        rows = jnp.arange(len(logits))[:, None]
        logits = logits.at[rows, biases[0]].add(biases[1], mode="drop")
    if variant == "greedy":
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        seeds = jax.lax.bitcast_convert_type(columns["seed"], jnp.uint32)
        keys = token_keys(jax.vmap(jax.random.key)(seeds), columns["position"])
        drawn = {name: options[name] for name in ("temperature", "top_p", "min_p")}
        token = sample(logits, keys, top_k=columns["top_k"], **drawn)
    slot = jnp.where(columns["is_last"] > 0, columns["slot"], len(slots.token))  # dropped
    remembered = everywhere(slots.token.at[slot].set(token, mode="drop"))
    token = jnp.where(is_finite, token, -1)
    if variant != "full":
        return Chosen(token), dataclasses.replace(slots, token=remembered)
    written = slots.history.at[slot, jnp.maximum(token, 0)].add(2, mode="drop")
    logprobs = jax.nn.log_softmax(raw, axis=-1)
    of_token = jnp.take_along_axis(logprobs, jnp.maximum(token, 0)[:, None], axis=1)[:, 0]
    top, ids = jax.lax.top_k(logprobs, min(MAX_TOP_LOGPROBS, raw.shape[1]))
    return Chosen(token, of_token, ids.astype(jnp.int32), top), Slots(
        remembered, everywhere(written)
    )


def remember(
    slots: Slots,
    slot: Int32[Array, ""],
    tokens: Int32[Array, " N"],
    is_prompt: Int32[Array, " N"],
    is_first: Int32[Array, ""],
) -> Slots:
    """Adds tokens of a request to its history, prompt first; ids beyond V are padding."""
    row = jnp.where(is_first > 0, 0, slots.history[slot])
    beyond = len(row)
    row = row.at[jnp.where(is_prompt > 0, tokens, beyond)].max(1, mode="drop")
    row = row.at[jnp.where(is_prompt > 0, beyond, tokens)].add(2, mode="drop")
    return dataclasses.replace(slots, history=slots.history.at[slot].set(row))


def copy_pages(pages: Pages, source: Int32[Array, " N"], target: Int32[Array, " N"]) -> Pages:
    """Copies pages of all layers; targets that name no page are dropped."""
    return pages.at[:, target].set(pages.at[:, source].get(mode="clip"), mode="drop")


def poison_pages(pages: Pages, target: Int32[Array, " N"]) -> Pages:
    """Fills pages with NaN: whoever reads what was not written is found."""
    return pages.at[:, target].set(jnp.nan, mode="drop")


def _unpack(pages: Pages, work: Int32[Array, "B columns"], num_tokens: int) -> _Work:
    columns = dict(zip(INTEGERS, work[:, : len(INTEGERS)].T, strict=True))
    tokens = work[:, len(INTEGERS) : len(INTEGERS) + num_tokens]
    table = work[:, len(INTEGERS) + num_tokens :]
    return _Work(columns, tokens, PagedLatentCache(pages, columns["start"], table))


def _placed(
    x: Float[Array, "B D"], pages: Pages, params: Params, model: Model
) -> tuple[Float[Array, "B D"], Pages]:
    """Hidden states and the pool on every device."""
    if (place := placement_of(params, model.rules)) is None:
        return x, pages
    return place.constrain(x), place.constrain(pages)


def _penalized(
    logits: Float32[Array, "B V"], history: Int32[Array, "B V"], options: dict[str, Array]
) -> Float32[Array, "B V"]:
    by_row = {name: column[:, None] for name, column in options.items()}
    count = history >> 1
    repetition = by_row["repetition_penalty"]
    divided = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(history > 0, divided, logits)
    logits -= by_row["presence_penalty"] * (count > 0)
    return logits - by_row["frequency_penalty"] * count
