"""The language-modelling loss, in chunks: no array of all logits ever exists."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jaxtyping import Array, Bool, Float, Int, Integer

from jax_mla.checks.tokens import check_batch
from jax_mla.config.model import DeepSeekConfig
from jax_mla.layers.block import Remat
from jax_mla.params import Params, bind
from jax_mla.sharding.placement import check_split, placement_of
from jax_mla.sharding.rules import ShardingRules
from jax_mla.training.batch import Batch
from jax_mla.training.pass_options import PassOptions
from jax_mla.training.precision import Precision


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NextTokenLoss:
    """The loss of a batch, and how many of its tokens went to each expert.

    Attributes:
      loss: mean negative log-likelihood, in nats per token.
      load: tokens of each expert of each MoE layer; None without MoE layers.
      num_tokens: tokens whose prediction is counted.
      z_loss: mean of log(sum(exp(logits))) ** 2, to be added with a small factor (1e-4).
      balance_loss: `sequence_balance` summed over layers, mean over rows that hold more than
        padding; 0 without MoE layers.
      num_dropped: (token, expert) pairs dropped by capacity in all layers; None without a capacity.
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
    """Unnormalised sums behind `NextTokenLoss`; additive over micro-batches.

    Also used as a tree of ShapeDtypeStructs.
    """

    nll: Float[Array, ""]
    squared_lse: Float[Array, ""]
    balance: Float[Array, ""]
    load: Int[Array, "L E"] | None
    num_dropped: Int[Array, ""] | None = None

    def means(self, num_tokens: Int[Array, ""], num_rows: int | Int[Array, ""]) -> NextTokenLoss:
        """The loss of the batch that was summed over."""
        count = jnp.maximum(num_tokens, 1).astype(jnp.float32)
        return NextTokenLoss(
            loss=self.nll / count,
            load=self.load,
            num_tokens=num_tokens,
            z_loss=self.squared_lse / count,
            balance_loss=self.balance / jnp.maximum(num_rows, 1).astype(jnp.float32),
            num_dropped=self.num_dropped,
        )


def next_token_loss(
    params: Params,
    config: DeepSeekConfig,
    tokens: Integer[Array | np.ndarray, "B T"] | Sequence[Sequence[int]],
    *,
    segment_ids: Integer[Array | np.ndarray, "B T"] | Sequence[Sequence[int]] | None = None,
    loss_mask: Bool[Array | np.ndarray, "B T"] | None = None,
    precision: Precision | None = None,
    remat: Remat = "none",
    chunk_tokens: int = 4096,
    deterministic: bool = False,
    rules: ShardingRules | None = None,
) -> NextTokenLoss:
    """Mean of -log p(tokens[:, t + 1] | tokens[:, : t + 1]) over all positions but the last.

    Args:
      segment_ids: of packed sequences; the step from one segment to the next is not counted. A
        negative id marks padding, which changes nothing but the shapes: neither the loss, its
        gradients, the load nor what is dropped.
      loss_mask: True for tokens whose prediction counts: the answers, and not the prompts, of
        supervised fine-tuning. All are read as context. A batch without any has loss 0.
      precision: None computes in the dtype of the parameters.
      remat: what the backward pass recomputes of each block: "none", "dots" (all but the outputs
        of projections) or "full".
      chunk_tokens: the most tokens per device whose logits exist at one time, here and in the
        backward pass, which recomputes them; but at least one position of every row. Devices
        reduce the head's gradient once per chunk.
      deterministic: gradients of attention with the same bits every time, see `Recipe`.
      rules: the layout that the parameters are sharded by; None takes the defaults.

    Raises:
      ValueError: rows hold fewer than 2 tokens, shapes disagree, segment ids are not integers, the
        mask is not of booleans, chunk_tokens is below 1, or the mesh does not divide the rows or
        their positions.

    Cost: as `forward`, with chunk_tokens * V float32 numbers per device instead of all logits,
    or one position's logits of every row where that is more.
    """
    tokens, segment_ids = check_batch(tokens, config, segment_ids, loss_mask)
    check_split(tokens, placement_of(params, rules))
    options = PassOptions(precision, remat, chunk_tokens, deterministic)
    batch = Batch(tokens, segment_ids, loss_mask)
    return _next_token_loss(params, config, batch, options, rules)


@functools.partial(jax.jit, static_argnames=("config", "options", "rules"))
def _next_token_loss(params, config, batch: Batch, options: PassOptions, rules) -> NextTokenLoss:
    _, sums = loss_sums(params, config, batch, options, rules=rules)
    return sums.means(batch.is_counted().sum(), batch.num_rows())


def loss_sums(
    params: Params,
    config: DeepSeekConfig,
    batch: Batch,
    options: PassOptions,
    *,
    rules: ShardingRules | None,
    layers: tuple[int, int] | None = None,
    x: Float[Array, "B T D"] | None = None,
) -> tuple[Float[Array, "B T D"], LossSums]:
    """Hidden states, and the sums that `next_token_loss` divides. Call inside jit.

    Args:
      layers: half-open range [first, end) that `params` covers, a pipeline stage; None for all. A
        stage adds the balance loss and load of its own layers; only the last one has a likelihood.
      x: hidden states before these layers; None embeds the tokens.
    """

    precision = options.precision
    narrow = params if precision is None else precision.to_compute(params)
    trunk = bind(narrow, config, rules, layers=layers)
    tokens = jnp.asarray(batch.tokens)
    segment_ids = None if batch.segment_ids is None else jnp.asarray(batch.segment_ids)
    phase = trunk.full(tokens, segment_ids=segment_ids, deterministic=options.deterministic)
    out = trunk.run(tokens if x is None else x, phase, trace="load", remat=options.remat)
    x, loads = out.x, out.load
    of_layers = (jnp.zeros(()), None, None)
    if loads is not None:
        num_dropped = None if loads.num_dropped is None else loads.num_dropped.sum()
        of_layers = loads.balance.sum(), loads.load, num_dropped
    if not trunk.is_last:
        return x, LossSums(jnp.zeros(()), jnp.zeros(()), *of_layers)
    # The head narrows the weights by itself, so that its gradients are summed over the chunks in
    # the weights' dtype and not in the activations'.
    model = bind(params, config, rules, layers=layers)
    logits_dtype = "float32" if precision is None else precision.logits
    place = model.placement
    devices = 1 if place is None else place.num_shards("batch") * place.num_shards("sequence")
    nll, squared_lse = _summed_over_chunks(
        lambda x: model.head(x).astype(logits_dtype).astype(jnp.float32),
        x,
        jnp.roll(tokens, -1, axis=1),
        batch.is_counted(),
        options.chunk_tokens * devices,
    )
    return x, LossSums(nll, squared_lse, *of_layers)


def _summed_over_chunks(
    head: Callable[[Array], Array],
    x: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    is_counted: Bool[Array, "B T"],
    chunk_tokens: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums of -log p(label) and of lse ** 2; only one chunk's logits exist at a time."""
    batch, num_positions, _ = x.shape
    rows = 1 if is_symbolic_dim(batch) else batch  # of a batch that an export leaves open
    num_chunks = -(-num_positions // max(1, chunk_tokens // rows))

    def split(a):
        # Chunk i takes the positions i, i + num_chunks, ...: where T is sharded, every device has
        # positions of every chunk.
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
