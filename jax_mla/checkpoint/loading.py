"""A published folder to a parameter dict on devices, one layer in host memory at a time."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jax_mla.checkpoint.folder import open_folder
from jax_mla.checkpoint.matching import match
from jax_mla.checkpoint.reading import Bounds, read_leaf
from jax_mla.checks.arrays import check_dtype
from jax_mla.config.leaves import Leaf
from jax_mla.config.model import DeepSeekConfig
from jax_mla.sharding.mesh import check_mesh

if TYPE_CHECKING:
    from jax_mla.sharding.rules import ShardingRules

# A leaf up to this size is read whole, which needs no compilation; a larger one layer by layer.
WHOLE_BYTES = 64 * 2**20


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], DeepSeekConfig]:
    """Reads a DeepSeek-family checkpoint in Hugging Face layout: config.json and safetensors.

    FP8 blocks are multiplied out in float32 and rounded once. Rotary weights keep their published
    layout. Of a multimodal model (kimi_k25, kimi_vl, deepseek_vl_v2) the text model is read. What
    is skipped is noted in the log of "jax_mla": layers of multi-token prediction, and all tensors
    beside a text model.

    Args:
      folder: a local folder with `config.json` and either `model.safetensors` or
        `model.safetensors.index.json` and its shards, of float32, float16, bfloat16 or FP8 e4m3.
      dtype: float32, bfloat16 or float16, for every leaf but the router's correction bias, which
        stays float32; None takes the config's, which must then be one of the three.
      mesh: devices for the leaves; each device reads its own shards, and nothing else is read.
        None puts everything on the default device.
      rules: which axes are sharded over which mesh axes; None takes `ShardingRules()`.
      progress: called with (bytes loaded so far, total bytes) after each step of the work.

    Returns:
      params: nested dict of arrays, the tree of `jax_mla.init`.
      config: the folder's, with `dtype` as loaded, and with the eos_token_id of
        generation_config.json if that file has one: generation stops there.

    Raises:
      FileNotFoundError: the folder, its config.json, its weights or some of its shards are missing.
      ValueError: the config is not supported, a file is damaged, a router's correction bias is not
        finite, or tensors are missing, unexpected, misshaped or mistyped, all of which are listed,
        before anything is on a device; or, found while reading, a weight is beyond the range of
        the dtype.

    Cost: reads the weights once. Host memory beyond the result: the largest of one leaf of one
    layer, the embedding, and 64 MiB.
    """
    if mesh is not None:
        check_mesh(mesh, has_devices=True)
    checkpoint = open_folder(folder)
    config = checkpoint.model_config(None if dtype is None else check_dtype(dtype))
    matched = match(checkpoint, config)
    sharding_of = _sharding_by_leaf(config, mesh, rules)
    params: dict[str, Any] = {}
    total = sum(leaf.size * _dtype_of(leaf, config).itemsize for leaf in matched.leaves)
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total)

    for leaf in matched.leaves:
        leaf_dtype = _dtype_of(leaf, config)
        read = functools.partial(read_leaf, matched, leaf, dtype=leaf_dtype)
        node = params
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = _load_leaf(leaf, leaf_dtype, sharding_of(leaf), read, advance)
    return params, config


def _dtype_of(leaf: Leaf, config: DeepSeekConfig) -> np.dtype:
    return jnp.dtype(leaf.type.stored_dtype(config.dtype))


def _sharding_by_leaf(
    config: DeepSeekConfig, mesh: Mesh | None, rules: ShardingRules | None
) -> Callable[[Leaf], NamedSharding | None]:
    if mesh is None:
        if rules is not None:
            raise ValueError(f"rules say how to shard over a mesh, got mesh=None and {rules}")
        return lambda leaf: None
    from jax_mla.params import param_shardings

    tree: Any = param_shardings(config, mesh, rules)
    return lambda leaf: functools.reduce(lambda node, key: node[key], leaf.path, tree)


def _load_leaf(
    leaf: Leaf,
    dtype: np.dtype,
    sharding: NamedSharding | None,
    read: Callable[[Bounds], np.ndarray],
    advance: Callable[[int], None],
) -> jax.Array:
    """The leaf on its devices. Waits for each transfer, so that host buffers do not queue up."""
    num_bytes = leaf.size * dtype.itemsize
    if leaf.layers is None or num_bytes <= WHOLE_BYTES:
        whole = jax.block_until_ready(_place(leaf.shape, sharding, read))
        advance(num_bytes)
        return whole
    layer_sharding = sharding and NamedSharding(
        sharding.mesh, PartitionSpec(*tuple(sharding.spec)[1:])
    )
    stacked = jnp.zeros(leaf.shape, dtype, device=sharding)
    for layer in range(len(leaf.layers)):

        def read_layer(bounds: Bounds, layer: int = layer) -> np.ndarray:
            return read(((layer, layer + 1), *bounds))[0]

        value = _place(leaf.shape[1:], layer_sharding, read_layer)
        stacked = jax.block_until_ready(_write_layer(sharding)(stacked, value, layer))
        advance(num_bytes // len(leaf.layers))
    return stacked


def _place(
    shape: tuple[int, ...],
    sharding: NamedSharding | None,
    read: Callable[[Bounds], np.ndarray],
) -> jax.Array:
    """An array whose shard on each device is what `read` returns for it."""
    if sharding is None:  # not committed to a device, like the arrays of `init`
        return jax.device_put(read(tuple((0, size) for size in shape)))
    read_once = functools.cache(read)  # devices that hold copies share one reading

    def shard(index: Any) -> np.ndarray:
        ranges = (axis.indices(size) for axis, size in zip(index, shape, strict=True))
        return read_once(tuple((start, stop) for start, stop, _ in ranges))

    return jax.make_array_from_callback(shape, sharding, shard)


@functools.cache
def _write_layer(
    sharding: NamedSharding | None,
) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """Writes one layer into a stack, in place."""

    def write(stacked: jax.Array, value: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stacked, value, layer, axis=0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)
