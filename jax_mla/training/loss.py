"""The language-modelling loss, in chunks: no array of all logits ever exists."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jax_mla.checks.tokens import check_batch
from jax_mla.config.model import DeepSeekConfig
from jax_mla.layers.block import Remat
from jax_mla.params import Params, bind
from jax_mla.sharding.divide import check_split
from jax_mla.sharding.placement import placement_of
from jax_mla.sharding.rules import ShardingRules
from jax_mla.training.precision import Precision


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NextTokenLoss:
    """The loss of a batch, and how many of its tokens went to each expert.

    Attributes:
      loss: mean negative log-likelihood in nats a token.
      load: tokens of each expert of each MoE layer; None without MoE layers.
      num_tokens: tokens whose prediction is counted.
      z_loss: mean of log(sum(exp(logits))) ** 2, to be added with a small factor (1e-4).
      balance_loss: `sequence_balance` added up over layers, mean over rows; 0 without MoE layers.
      num_dropped: (token, expert) pairs left out for want of the rules' expert_capacity, in all
        layers; None without one.
    """

    loss: Float[Array, ""]
    load: Int[Array, "L E"] | None
    num_tokens: Int[Array, ""]
    z_loss: Float[Array, ""]
    balance_loss: Float[Array, ""]
    num_dropped: Int[Array, ""] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """The same before division, so that parts of a batch can be added up; or all shapes of it."""

    nll: Any
    squared_lse: Any
    balance: Any
    load: Any
    num_dropped: Any = None

    def means(self, num_tokens: Int[Array, ""], num_rows: int) -> NextTokenLoss:
        """The loss of a batch of which these are the sums."""
        count = jnp.maximum(num_tokens, 1)
        return NextTokenLoss(
            loss=self.nll / count,
            load=self.load,
            num_tokens=num_tokens,
            z_loss=self.squared_lse / count,
            balance_loss=self.balance / num_rows,
            num_dropped=self.num_dropped,
        )


def next_token_loss(
    params: Params,
    config: DeepSeekConfig,
    tokens: Int[Array | np.ndarray, "B T"],
    *,
    segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    loss_mask: Bool[Array | np.ndarray, "B T"] | None = None,
    precision: Precision | None = None,
    remat: Remat = "none",
    chunk_tokens: int = 4096,
    deterministic: bool = False,
    rules: ShardingRules | None = None,
) -> NextTokenLoss:
    """Mean of -log p(tokens[:, t + 1] | tokens[:, : t + 1]) over all positions but the last.

    Args:
      segment_ids: of packed sequences; the step from one segment to the next is not counted.
      loss_mask: True for tokens whose prediction counts: the answers, and not the prompts, of
        supervised fine-tuning. All are read as context. A batch without any has loss 0.
      precision: None computes in the dtype of the parameters.
      remat: what of each block the backward pass computes again: "none", "dots" (all but the
        outputs of projections) or "full".
      chunk_tokens: the most tokens of a device whose logits exist at one time, here and in the
        backward pass, which computes them again; but at least one position of every row. Devices
        add up the head's gradient anew for every chunk.
      deterministic: of attention's gradients, see `Recipe`.
      rules: those by which the parameters lie on their mesh; None takes the defaults.

    Raises:
      ValueError: rows hold fewer than 2 tokens, shapes disagree, segment ids are not integers, the
        mask is not of booleans, chunk_tokens is below 1, or the mesh does not divide the rows or
        their positions.

    Cost: that of `forward`, and chunk_tokens * V float32 numbers a device instead of its logits, or
    those of one position of every row where that is more.
    """
    tokens, segment_ids = check_batch(tokens, config, segment_ids, loss_mask)
    check_split(tokens, placement_of(params, rules))
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    options = {
        "precision": precision,
        "remat": remat,
        "chunk_tokens": chunk_tokens,
        "deterministic": deterministic,
        "rules": rules,
    }
    return _next_token_loss(params, config, tokens, segment_ids, loss_mask, **options)


@functools.partial(
    jax.jit,
    static_argnames=("config", "precision", "remat", "chunk_tokens", "deterministic", "rules"),
)
def _next_token_loss(params, config, tokens, segment_ids, loss_mask, **options):
    is_counted = counted(tokens, segment_ids, loss_mask)
    _, sums = loss_sums(params, config, tokens, is_counted, segment_ids, **options)
    return sums.means(is_counted.sum(), tokens.shape[0])


def counted(
    tokens: Int[Array | np.ndarray, "B T"],
    segment_ids: Int[Array | np.ndarray, "B T"] | None,
    loss_mask: Bool[Array | np.ndarray, "B T"] | None,
) -> Bool[Array, "B T"]:
    """Whether the prediction made at each position is of a token that counts."""
    is_counted = jnp.ones(tokens[:, 1:].shape, bool)
    if segment_ids is not None:
        is_counted &= segment_ids[:, 1:] == segment_ids[:, :-1]
    if loss_mask is not None:
        is_counted &= loss_mask[:, 1:].astype(bool)
    return jnp.pad(is_counted, ((0, 0), (0, 1)))


def loss_sums(
    params: Params,
    config: DeepSeekConfig,
    tokens: Int[Array | np.ndarray, "B T"],
    is_counted: Bool[Array | np.ndarray, "B T"],
    segment_ids: Int[Array | np.ndarray, "B T"] | None,
    *,
    precision: Precision | None,
    remat: Remat,
    chunk_tokens: int,
    deterministic: bool = False,
    rules: ShardingRules | None,
    layers: tuple[int, int] | None = None,
    x: Float[Array, "B T D"] | None = None,
) -> tuple[Float[Array, "B T D"], LossSums]:
    """The hidden states, and what `next_token_loss` divides; for the inside of a jit.

    Args:
      layers: the first and the end of those that `params` hold, a part of the model; None: all.
        Such a part adds its own terms, and only the last part has a likelihood.
      x: the hidden states before them; None embeds the tokens.
    """

    narrow = params if precision is None else precision.to_compute(params)
    trunk = bind(narrow, config, rules, layers=layers)
    tokens = jnp.asarray(tokens)
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    phase = trunk.full(tokens, segment_ids=segment_ids, deterministic=deterministic)
    out = trunk.run(tokens if x is None else x, phase, trace="load", remat=remat)
    x, loads = out.x, out.load
    of_layers = (jnp.zeros(()), None, None)
    if loads is not None:
        num_dropped = None if loads.num_dropped is None else loads.num_dropped.sum()
        of_layers = loads.balance.sum(), loads.load, num_dropped
    if not trunk.is_last:
        return x, LossSums(jnp.zeros(()), jnp.zeros(()), *of_layers)
    # The head narrows the weights as they were given, so that its gradients are summed over the
    # chunks in their dtype and not in that of the activations.
    model = bind(params, config, rules, layers=layers)
    logits_dtype = "float32" if precision is None else precision.logits
    place = model.placement
    devices = 1 if place is None else place.num_shards("batch") * place.num_shards("sequence")
    nll, squared_lse = _summed_over_chunks(
        lambda x: model.head(x).astype(logits_dtype).astype(jnp.float32),
        x,
        jnp.roll(tokens, -1, axis=1),
        is_counted,
        chunk_tokens * devices,
    )
    return x, LossSums(nll, squared_lse, *of_layers)


def _summed_over_chunks(head, x, labels, is_counted, chunk_tokens) -> tuple[Array, Array]:
    """Sums of -log p(label) and of lse ** 2; only a chunk's logits exist at one time."""
    batch, num_positions, _ = x.shape
    num_chunks = -(-num_positions // max(1, chunk_tokens // batch))

    def split(a):
        # Chunk i takes the positions i, i + num_chunks, ...: where T is spread over devices, each
        # of them has a part of every chunk.
        a = jnp.pad(a, ((0, 0), (0, -num_positions % num_chunks), *((0, 0),) * (a.ndim - 2)))
        return jnp.moveaxis(a.reshape(batch, -1, num_chunks, *a.shape[2:]), 2, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(sums, chunk):
        x, labels, is_counted = chunk
        logits = head(x)
        lse = jax.nn.logsumexp(logits, axis=-1)
        # A comparison instead of a gather, which would collect logits that are split over V.
        is_label = jnp.arange(logits.shape[-1])[None, None] == labels[..., None]
        nll = lse - jnp.where(is_label, logits, 0).sum(axis=-1)
        terms = (jnp.where(is_counted, term, 0).sum() for term in (nll, jnp.square(lse)))
        return tuple(a + b for a, b in zip(sums, terms, strict=True)), None

    chunks = (split(x), split(labels), split(is_counted))
    return jax.lax.scan(add, (jnp.zeros(()), jnp.zeros(())), chunks)[0]
