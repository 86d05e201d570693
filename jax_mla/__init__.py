"""DeepSeek-family models in JAX: train, shard, generate and serve, with one set of logits.

Dimension key, used in every shape and einsum of this project:

    B batch            T query tokens         S key/value tokens     D model width
    N heads            P no-position part     R rotary part          H value head
    C key/value latent Q query latent         X = C + R, cached row  V vocabulary
    F feed-forward     E routed experts       A active experts       M rows sorted by expert
    L layers of a stack
"""

import functools
import importlib
import inspect
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported on first use, so that the command line starts without jax.
_HOME = {
    "DeepSeekConfig": "config",
    "RopeScaling": "config",
    "tiny": "config",
    "v2_lite": "config",
    "v2": "config",
    "v3": "config",
    "kimi_k2": "config",
    "init": "params",
    "bind": "params",
    "param_shardings": "params",
    "forward": "functional",
    "forward_trace": "functional",
    "ForwardTrace": "model",
    "prefill": "functional",
    "decode_step": "functional",
    "LatentCache": "cache.latent",
    "PagedLatentCache": "cache.latent",
    "explain_sharding": "analysis.placement",
    "explain_collectives": "analysis.collectives",
    "generate": "generation",
    "Generated": "generation",
    "sample": "generation",
    "SamplingOptions": "generation",
    "load": "checkpoint",
    "save": "checkpoint",
    "make_mesh": "sharding.mesh",
    "Placement": "sharding.placement",
    "ShardingRules": "sharding.rules",
    "MLA": "layers.mla",
    "RMSNorm": "layers.norm",
    "SwiGLU": "layers.mlp",
    "MoE": "layers.moe",
    "GroupedQueryAttention": "layers.gqa",
    "KeyValueCache": "layers.gqa",
    "Block": "layers.block",
    "DeepSeek": "model",
}
_SUBPACKAGES = {
    "analysis",
    "cache",
    "checkpoint",
    "layers",
    "serving",
    "sharding",
    "text",
    "training",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from jax_mla import analysis, cache, checkpoint, layers, serving, sharding, text, training
    from jax_mla.analysis.collectives import explain_collectives
    from jax_mla.analysis.placement import explain_sharding
    from jax_mla.cache.latent import LatentCache, PagedLatentCache
    from jax_mla.checkpoint import load, save
    from jax_mla.config import DeepSeekConfig, RopeScaling, kimi_k2, tiny, v2, v2_lite, v3
    from jax_mla.functional import decode_step, forward, forward_trace, prefill
    from jax_mla.generation import Generated, SamplingOptions, generate, sample
    from jax_mla.layers.block import Block
    from jax_mla.layers.gqa import GroupedQueryAttention, KeyValueCache
    from jax_mla.layers.mla import MLA
    from jax_mla.layers.mlp import SwiGLU
    from jax_mla.layers.moe import MoE
    from jax_mla.layers.norm import RMSNorm
    from jax_mla.model import DeepSeek, ForwardTrace
    from jax_mla.params import bind, init, param_shardings
    from jax_mla.sharding.mesh import make_mesh
    from jax_mla.sharding.placement import Placement
    from jax_mla.sharding.rules import ShardingRules


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"jax_mla.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'jax_mla' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"jax_mla.{_HOME[name]}"), name)
    if isinstance(value, type) and type(value).__call__ is not type.__call__:
        # A Flax module: its metaclass hides from help() and `?` what the constructor takes.
        value.__signature__ = inspect.signature(functools.partial(value.__init__, None))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBPACKAGES})
