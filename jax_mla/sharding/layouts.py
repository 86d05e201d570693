"""Published recipes of parallelism, each as one ShardingRules for a mesh of `make_mesh`.

Tokens are always split over `data` (and `fsdp`), whatever else a recipe splits.

Source: ZeRO, arXiv 1910.02054; Megatron-LM, arXiv 1909.08053; DeepSeek-V3, arXiv 2412.19437, 3.4;
Llama 3, arXiv 2407.21783, 3.3.2.
"""

from __future__ import annotations

import dataclasses

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


def ddp() -> ShardingRules:
    """Every device holds all parameters, gradients and optimizer state."""
    return _REPLICATED


def zero1() -> ShardingRules:
    """Optimizer state split over `data`; gradients and parameters on every device."""
    return dataclasses.replace(_REPLICATED, optimizer_split=("data", "fsdp"))


def zero2() -> ShardingRules:
    """Optimizer state and gradients split over `data`; parameters on every device."""
    split = ("data", "fsdp")
    return dataclasses.replace(_REPLICATED, optimizer_split=split, gradient_split=split)


def zero3() -> ShardingRules:
    """Parameters, gradients and optimizer state split over `data`; layers gathered one by one."""
    split = ("data", "fsdp")
    return dataclasses.replace(_REPLICATED, embed=split, latent=split)


def tensor_parallel() -> ShardingRules:
    """Heads, feed-forward widths and vocabulary split over `tensor`, experts over `expert`.

    Column then row: q_b, k_b, v_b, gate and up by their outputs, o and down by their inputs, so
    that each half of a block ends in one all-reduce. The latent cache has no heads: it is split
    over `data`, and every device of `tensor` holds a copy.
    """
    return dataclasses.replace(
        _REPLICATED, vocab="tensor", heads="tensor", mlp="tensor", expert="expert"
    )


def context_parallel() -> ShardingRules:
    """Positions split over `sequence`, in prompts, in training and in caches; for long sequences.

    Devices gather the latents of a prompt, which are small, and attend their own stripes to them;
    in decoding each attends to the cached tokens that it holds, and the results are merged.
    """
    return dataclasses.replace(_REPLICATED, sequence="sequence", context="sequence")


def dp_attention_ep() -> ShardingRules:
    """Attention data-parallel over every device, experts split over `expert`: for serving.

    Devices of `expert` hold sequences of their own, with their caches, and exchange tokens in the
    mixture of experts only.
    """
    return dataclasses.replace(
        _REPLICATED,
        batch=("data", "fsdp", "expert"),
        expert="expert",
        expert_dispatch="a2a",
    )
