"""Published layouts, each as one ShardingRules for a mesh of `make_mesh`. No jax.

Tokens are always sharded over `data` (and `fsdp`), whatever else a layout shards.

Source: ZeRO, arXiv 1910.02054; Megatron-LM, arXiv 1909.08053; DeepSeek-V3, arXiv 2412.19437, 3.4;
Llama 3, arXiv 2407.21783, 3.3.2.
"""

from __future__ import annotations

import dataclasses

from jax_mla.sharding.dispatch import ExpertDispatch
from jax_mla.sharding.rules import ShardingRules

# In the order of --help.
__all__ = (
    "context_parallel",
    "ddp",
    "dp_attention_ep",
    "tensor_parallel",
    "zero1",
    "zero2",
    "zero3",
)

_REPLICATED = ShardingRules(
    vocab=None, embed=None, heads=None, latent=None, mlp=None, expert=None, sequence=None
)
_DATA = ("data", "fsdp")


def ddp() -> ShardingRules:
    """Every device holds all parameters, gradients and optimizer state.

    The only traffic is one sum of the gradients per step. For models that fit on one device.
    """
    return _REPLICATED


def zero1() -> ShardingRules:
    """Optimizer state sharded over `data`; gradients and parameters on every device.

    AdamW's two moments are half of what training holds, and nothing reads them but the update:
    each device updates its shard of the weights, and one all-gather per step spreads these.
    """
    return dataclasses.replace(_REPLICATED, optimizer_split=_DATA)


def zero2() -> ShardingRules:
    """Optimizer state and gradients sharded over `data`; parameters on every device.

    A device needs the summed gradients of the weights that it updates and no others, so that a
    reduce-scatter replaces the all-reduce.
    """
    return dataclasses.replace(_REPLICATED, optimizer_split=_DATA, gradient_split=_DATA)


def zero3() -> ShardingRules:
    """Parameters, gradients and optimizer state sharded over `data`; layers gathered one by one.

    A layer's weights are needed only while that layer runs. Gathering them in the forward and again
    in the backward pass sends half as much more than DDP, and no device ever holds all weights.
    Every matrix has exactly one of the axes `embed` and `latent`, so sharding these two shards all.
    """
    return dataclasses.replace(_REPLICATED, embed=_DATA, latent=_DATA)


def tensor_parallel() -> ShardingRules:
    """Heads, feed-forward widths and vocabulary sharded over `tensor`, experts over `expert`.

    Column then row: q_b, k_b, v_b, gate and up by their outputs, o and down by their inputs, so
    that each half of a block ends in one all-reduce and needs no other traffic. Nothing hides these
    two sums per layer: for devices with fast links. The latent cache has no heads: it is sharded
    over `data`, and every device of `tensor` holds a copy.
    """
    return dataclasses.replace(
        _REPLICATED, vocab="tensor", heads="tensor", mlp="tensor", expert="expert"
    )


def context_parallel() -> ShardingRules:
    """Positions sharded over `sequence`, in prompts, in training and in caches; for long sequences.

    What grows with length is activations and cache, and both have positions. Devices gather the
    latents of a prompt, which are small, and attend their own stripes to them; in decoding each
    attends to the cached tokens that it holds, and the results are merged.
    """
    return dataclasses.replace(_REPLICATED, sequence="sequence", context="sequence")


def dp_attention_ep() -> ShardingRules:
    """Attention data-parallel over every device, experts sharded over `expert`: for serving.

    A latent cache has no heads to shard, so tensor parallelism would copy it to every device; here
    each device keeps the cache of sequences of its own. Experts are 97% of DeepSeek-V3's weights,
    so they are what is sharded; tokens travel to them, and weights never move.
    """
    return dataclasses.replace(
        _REPLICATED,
        batch=(*_DATA, "expert"),
        expert="expert",
        dispatch=ExpertDispatch("a2a"),
    )


# By name, for command lines and tables.
LAYOUTS = {
    layout.__name__: layout
    for layout in (ddp, zero1, zero2, zero3, tensor_parallel, context_parallel, dp_attention_ep)
}
