"""Bytes on one device, from the config, the mesh and the rules alone. No jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jax_mla.checks.sizes import check_one_of, check_positive
from jax_mla.config.leaves import Leaf, leaves_of
from jax_mla.config.model import DTYPE_BYTES, DeepSeekConfig
from jax_mla.sharding.axes import MESH_AXES
from jax_mla.sharding.divide import check_divides, num_devices
from jax_mla.sharding.rules import ShardingRules


@dataclasses.dataclass(frozen=True)
class TrainingBytes:
    """What one device holds from step to step, and the gradients that every step makes anew."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


@dataclasses.dataclass(frozen=True)
class ServingBytes:
    """What one device holds of the weights, and of the cache for each token of each sequence.

    Attributes:
      cache_per_token: the mean over a sequence's tokens, where devices shard its cache.
      sequences: how many have their cache on the device.
      context_tokens: tokens of every sequence that fit beside the weights; None without a memory
        size.
    """

    parameters: int
    cache_per_token: int
    sequences: int
    context_tokens: int | None


def training_bytes(
    config: DeepSeekConfig,
    mesh: Mapping[str, int],
    rules: ShardingRules,
    *,
    param: str = "float32",
    reduce: str = "float32",
    optimizer: str = "adamw",
) -> TrainingBytes:
    """Bytes per device of the state of `train_step` and of its gradients; activations not counted.

    AdamW keeps two moments of every weight, Muon one of every matrix but the embedding and the
    head and two of all else; the router's bias is float32 and has none. Scalars are left out.

    Args:
      mesh: sizes of mesh axes; those not named are 1.
      rules: of `sharding.layouts`, or of your own.
      param, reduce: as in `training.Precision`; moments are in the dtype of the weights.

    Raises:
      ValueError: a mesh axis does not divide the axis that it shards, or there is no such axis,
        size, dtype or optimizer, or the mesh has stages.
    """
    for name, dtype in (("param", param), ("reduce", reduce)):
        check_one_of(name, dtype, DTYPE_BYTES)
    check_one_of("optimizer", optimizer, ("adamw", "muon"))
    _check_mesh(mesh)
    parameters, gradients, moments = 0, 0, 0
    for leaf in leaves_of(config):
        size = DTYPE_BYTES[leaf.type.stored_dtype(param)]
        parameters += size * _shard_size(leaf, rules, mesh)
        gradients += DTYPE_BYTES[reduce] * _shard_size(leaf, rules.gradients(), mesh)
        shard = _shard_size(leaf, rules.optimizer(), mesh)
        moments += size * _num_moments(leaf, optimizer) * shard
    return TrainingBytes(parameters, gradients, moments)


def serving_bytes(
    config: DeepSeekConfig,
    mesh: Mapping[str, int],
    rules: ShardingRules,
    *,
    batch: int = 1,
    memory_bytes: int | None = None,
) -> ServingBytes:
    """Bytes per device of weights and latent cache, both in the config's dtype.

    Args:
      mesh, rules: as in `training_bytes`.
      batch: sequences served at a time, over all devices.
      memory_bytes: of a device; activations and the compiler's workspace are not counted.

    Raises:
      ValueError: a mesh axis does not divide the axis that it shards, or there is no such axis or
        size, or the mesh has stages.
    """
    check_positive(batch=batch)
    _check_mesh(mesh)
    dtype_bytes = DTYPE_BYTES[config.dtype]
    parameters = sum(
        DTYPE_BYTES[leaf.type.stored_dtype(config.dtype)] * _shard_size(leaf, rules, mesh)
        for leaf in leaves_of(config)
    )
    shards, sequences = (
        num_devices(rules.context, mesh),
        -(-batch // num_devices(rules.batch, mesh)),
    )
    per_token = config.num_hidden_layers * config.cache_row_dim * dtype_bytes
    context = None
    if memory_bytes is not None:
        context = max(memory_bytes - parameters, 0) * shards // (per_token * sequences)
        context = min(context, config.max_position_embeddings)
    return ServingBytes(parameters, -(-per_token // shards), sequences, context)


def _check_mesh(mesh: Mapping[str, int]) -> None:
    for axis, size in mesh.items():
        check_one_of("mesh axis", axis, MESH_AXES)
        check_positive(**{axis: size})
    if (num_stages := mesh.get("stage", 1)) > 1:
        raise ValueError(f"stages of a pipeline are not counted: stage must be 1, got {num_stages}")


def _shard_size(leaf: Leaf, rules: ShardingRules, mesh: Mapping[str, int]) -> int:
    """How many numbers of a leaf one device holds."""
    shard, name = leaf.size, ".".join(leaf.path)
    for size, axis in zip(leaf.shape, leaf.axes, strict=True):
        axes = None if axis is None else getattr(rules, axis)
        check_divides(f"{name}: axis {axis!r} of size {size}", size, axes, mesh)
        shard //= num_devices(axes, mesh)
    return shard


def _num_moments(leaf: Leaf, optimizer: str) -> int:
    if leaf.type.kind == "fixed":
        return 0
    return 1 if optimizer == "muon" and leaf.type.kind == "matrix" else 2
