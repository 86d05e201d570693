"""The language-modelling loss."""

from __future__ import annotations

import dataclasses

import jax
import optax
from jaxtyping import Array, Float, Int

from jax_mla.config import DeepSeekConfig
from jax_mla.functional import Params, forward_trace
from jax_mla.training.router_bias import expert_load


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NextTokenLoss:
    """The loss of a batch, and how many of its tokens went to each expert.

    Attributes:
      loss: mean negative log-likelihood in nats a token.
      load: tokens of each expert of each MoE layer; None without MoE layers.
    """

    loss: Float[Array, ""]
    load: Int[Array, "L E"] | None


def next_token_loss(
    params: Params,
    config: DeepSeekConfig,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> NextTokenLoss:
    """Mean of -log p(tokens[:, t + 1] | tokens[:, : t + 1]) over all positions but the last.

    Args:
      segment_ids: of packed sequences; the step from one segment to the next is not counted.

    Raises:
      ValueError: rows hold fewer than 2 tokens.
    """
    if tokens.shape[1] < 2:
        raise ValueError(
            f"a loss needs at least 2 tokens a row, got tokens of shape {tokens.shape}"
        )
    trace = forward_trace(params, config, tokens, segment_ids=segment_ids)
    losses = optax.softmax_cross_entropy_with_integer_labels(trace.logits[:, :-1], tokens[:, 1:])
    is_counted = None if segment_ids is None else segment_ids[:, 1:] == segment_ids[:, :-1]
    load = None if trace.expert_index is None else expert_load(trace.expert_index, config)
    return NextTokenLoss(losses.mean(where=is_counted), load)
