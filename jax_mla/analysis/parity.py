"""Parity: whether a model computes what it should, tensor by tensor in the order of computation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from jax_mla.cache.latent import LatentCache
from jax_mla.checks.tokens import check_tokens
from jax_mla.config.leaves import routed_layers
from jax_mla.config.model import DeepSeekConfig
from jax_mla.functional import decode_step, forward_trace, prefill
from jax_mla.generation import generate
from jax_mla.params import Params

if TYPE_CHECKING:
    from jax_mla.model import ForwardTrace

DEFAULT_ATOL = 5e-5  # what float32 on a CPU keeps to against torch
NUM_SELF_CHECK_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One tensor against its expected value.

    Attributes:
      tensor: its name, with the layer.
      measure: what `error` and `bound` count: the largest error, or tokens that differ.
    """

    tensor: str
    measure: str
    error: float
    bound: float

    @property
    def is_ok(self) -> bool:
        """Whether the error is within its bound; NaN is not."""
        return bool(self.error <= self.bound)


def compare_with_golden(
    params: Params,
    config: DeepSeekConfig,
    golden: Mapping[str, np.ndarray],
    *,
    atol: float = DEFAULT_ATOL,
) -> list[Comparison]:
    """Compares a model with arrays that a reference wrote: the first one not `is_ok` is the fault.

    Arrays that are absent are not compared. A wrong layer makes all layers after it wrong.

    Args:
      params: float32, for the bound to make sense.
      atol: largest error allowed, times a tensor's root mean square where that exceeds 1.
      golden: input_ids [B T]; logits [B T V]; hidden_states [layers + 1, B T D];
        router_idx_LAYER and router_w_LAYER [B * T, A], sorted by expert; gen_ids [B, T + new] and
        step_logits [B new V], a greedy continuation with a cache.

    Raises:
      ValueError: there are no input_ids, nothing to compare with, or an array is not of the
        model's sizes or comes without the one that belongs to it.
    """
    if "input_ids" not in golden:
        raise ValueError(f"golden data needs input_ids, found {sorted(golden)}")
    tokens = check_tokens(golden["input_ids"], config)
    _check_golden(golden, config, *tokens.shape)
    rows = _compare_traces(
        forward_trace(params, config, tokens),
        config,
        atol,
        hidden_states=golden.get("hidden_states"),
        routing={
            layer: (golden[f"router_idx_{layer}"], golden[f"router_w_{layer}"])
            for layer in range(config.num_hidden_layers)
            if f"router_idx_{layer}" in golden  # and then router_w, too
        },
        logits=golden.get("logits"),
    )
    if "gen_ids" in golden:
        rows += _compare_generation(params, config, tokens, golden, atol)
    if not rows:
        raise ValueError(f"golden data has nothing to compare with, found {sorted(golden)}")
    return rows


def _check_golden(golden: Mapping[str, np.ndarray], config: DeepSeekConfig, B: int, T: int) -> None:
    L, D, V = config.num_hidden_layers, config.hidden_size, config.vocab_size
    routing = (B * T, config.num_experts_per_tok)
    wanted = {"logits": (B, T, V), "hidden_states": (L + 1, B, T, D)}
    pairs = [("step_logits", "gen_ids")]
    for layer in routed_layers(config):
        index, weight = f"router_idx_{layer}", f"router_w_{layer}"
        wanted |= {index: routing, weight: routing}
        pairs += [(index, weight), (weight, index)]
    for name, other in pairs:
        if name in golden and other not in golden:
            raise ValueError(f"golden data has {name}, but no {other}")
    if "gen_ids" in golden:
        shape = golden["gen_ids"].shape
        if len(shape) != 2 or shape[0] != B or shape[1] <= T:
            raise ValueError(f"gen_ids has shape {shape}, the prompts ({B}, {T}) must be in front")
        wanted["step_logits"] = (B, shape[1] - T, V)
        check_tokens(golden["gen_ids"], config)
    for name in wanted.keys() & golden.keys():
        array = golden[name]
        if array.dtype.kind not in "iuf":
            raise ValueError(f"{name} must hold numbers, the golden data has dtype {array.dtype}")
        if array.shape != wanted[name]:
            raise ValueError(f"{name} has shape {wanted[name]}, the golden data {array.shape}")


def compare_with_itself(
    params: Params, config: DeepSeekConfig, *, atol: float = DEFAULT_ATOL, seed: int = 0
) -> list[Comparison]:
    """Compares the expanded form of attention with the absorbed one and with cached decoding.

    Args:
      params: float32, for the bound to make sense.
      atol: as in `compare_with_golden`.
      seed: of the random tokens, two sequences of 16.
    """
    shape = (2, NUM_SELF_CHECK_TOKENS)
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(config.vocab_size, size=shape, dtype=np.int32))
    expanded = forward_trace(params, config, tokens, form="expanded")
    absorbed = forward_trace(params, config, tokens, form="absorbed")
    rows = _compare_traces(
        absorbed,
        config,
        atol,
        hidden_states=np.asarray(expanded.hidden_states),
        routing={layer: sorted_routing(expanded, config, layer) for layer in routed_layers(config)},
        logits=np.asarray(expanded.logits),
    )
    rows = [dataclasses.replace(row, tensor=f"absorbed {row.tensor}") for row in rows]
    half = NUM_SELF_CHECK_TOKENS // 2
    decoded = _decoded_logits(params, config, tokens[:, :half], tokens[:, half:-1])
    expected = np.asarray(expanded.logits)[:, half - 1 : -1]
    return [*rows, _largest("cached decode logits", decoded, expected, atol)]


def _compare_traces(
    trace: ForwardTrace, config: DeepSeekConfig, atol: float, *, hidden_states, routing, logits
) -> list[Comparison]:
    """The embedding, each layer's experts and output, then logits."""
    rows = []
    if hidden_states is not None:
        rows.append(_largest("embedding", trace.hidden_states[0], hidden_states[0], atol))
    for layer in range(config.num_hidden_layers):
        if layer in routing:
            index, weight = sorted_routing(trace, config, layer)
            expected_index, expected_weight = routing[layer]
            name = f"layer {layer} experts"
            rows.append(_differing(name, "tokens that differ", index, expected_index))
            if rows[-1].is_ok:
                rows.append(
                    _largest(f"layer {layer} expert weights", weight, expected_weight, atol)
                )
        if hidden_states is not None:
            name, at = f"layer {layer} output", layer + 1
            if at == config.num_hidden_layers:
                name += ", normed"
            rows.append(_largest(name, trace.hidden_states[at], hidden_states[at], atol))
    if logits is not None:
        rows.append(_largest("logits", trace.logits, logits, atol))
    return rows


def _compare_generation(params, config, tokens, golden, atol) -> list[Comparison]:
    """Logits of the golden continuation, decoded with a cache, and our own greedy tokens."""
    new = jnp.asarray(golden["gen_ids"][:, tokens.shape[1] :], jnp.int32)
    rows = []
    if "step_logits" in golden:
        logits = _decoded_logits(params, config, tokens, new[:, :-1])
        rows.append(_largest("cached decode logits", logits, golden["step_logits"], atol))
    out = generate(params, config, tokens, max_new_tokens=new.shape[1], eos_token_ids=())
    ours = np.asarray(out.tokens)
    return [*rows, _differing("greedy tokens", "sequences that differ", ours, new)]


def _decoded_logits(params, config, prompt, continuation) -> np.ndarray:
    """Logits after the prompt and after each token of the continuation, one step per token."""
    num_tokens = prompt.shape[1] + continuation.shape[1]
    cache = LatentCache.empty(config, prompt.shape[0], num_tokens)
    logits, cache = prefill(params, config, prompt, cache)
    steps = [logits]
    for token in continuation.T:
        logits, cache = decode_step(params, config, token, cache)
        steps.append(logits)
    return np.stack([np.asarray(step) for step in steps], axis=1)


def sorted_routing(
    trace: ForwardTrace, config: DeepSeekConfig, layer: int
) -> tuple[np.ndarray, np.ndarray]:
    """Expert ids and weights of every token, in order of expert: their order has no meaning."""
    routed = routed_layers(config)
    if trace.expert_index is None or trace.expert_weight is None or layer not in routed:
        raise ValueError(f"golden data has routing for layer {layer}, which has no router")
    at = routed.index(layer)
    index = np.asarray(trace.expert_index[at]).reshape(-1, trace.expert_index.shape[-1])
    weight = np.asarray(trace.expert_weight[at]).reshape(index.shape)
    order = np.argsort(index, axis=-1)
    return np.take_along_axis(index, order, -1), np.take_along_axis(weight, order, -1)


def _largest(tensor: str, got, want, atol: float) -> Comparison:
    """The largest error; the bound grows with the tensor's root mean square above 1."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    scale = max(1.0, float(np.sqrt(np.mean(np.square(want)))))
    return Comparison(tensor, "largest error", float(np.max(np.abs(got - want))), atol * scale)


def _differing(tensor: str, measure: str, got, want) -> Comparison:
    got, want = np.asarray(got), np.asarray(want)
    return Comparison(tensor, measure, float(np.sum(np.any(got != want, axis=-1))), 0.0)
