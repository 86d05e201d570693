"""Bytes on one device, from the config, the mesh and the recipe alone. No jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

from jax_mla.checks.sizes import check_positive
from jax_mla.config.leaves import Leaf, leaves_of
from jax_mla.config.model import DTYPE_BYTES, DeepSeekConfig
from jax_mla.sharding.axes import MESH_AXES

Split = Mapping[str, tuple[str, ...]]  # the mesh axes that split a logical axis


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a layout shards weights, gradients, optimizer state and sequences."""

    parameters: Split
    gradients: Split
    optimizer: Split
    batch: tuple[str, ...] = ("data", "fsdp")
    context: tuple[str, ...] = ()  # of each sequence's cache


_WHOLE: Split = {}
_ZERO: Split = {"embed": ("data", "fsdp"), "latent": ("data", "fsdp")}
_EXPERT: Split = {"expert": ("expert",)}
_TENSOR: Split = _EXPERT | {axis: ("tensor",) for axis in ("vocab", "heads", "mlp")}

# By the names of `jax_mla.sharding.layouts`, which say the same with jax.
RECIPES = {
    "ddp": Recipe(_WHOLE, _WHOLE, _WHOLE),
    "zero1": Recipe(_WHOLE, _WHOLE, _ZERO),
    "zero2": Recipe(_WHOLE, _ZERO, _ZERO),
    "zero3": Recipe(_ZERO, _ZERO, _ZERO),
    "tensor_parallel": Recipe(_TENSOR, _TENSOR, _TENSOR),
    "context_parallel": Recipe(_WHOLE, _WHOLE, _WHOLE, context=("sequence",)),
    "dp_attention_ep": Recipe(_EXPERT, _EXPERT, _EXPERT, batch=("data", "fsdp", "expert")),
}


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
      cache_per_token: where devices share a sequence's cache, the mean over its tokens.
      sequences: those whose cache is on the device.
      context_tokens: that fit beside the weights, of every sequence; None without a memory size.
    """

    parameters: int
    cache_per_token: int
    sequences: int
    context_tokens: int | None


def training_bytes(
    config: DeepSeekConfig,
    mesh: Mapping[str, int],
    recipe: str,
    *,
    param: str = "float32",
    reduce: str = "float32",
    optimizer: str = "adamw",
) -> TrainingBytes:
    """Bytes a device of the state of `train_step` and of its gradients; activations not counted.

    AdamW keeps two moments of every weight, Muon one of every matrix but the embedding and the
    head and two of all else; the router's bias is float32 and has none. Scalars are left out.

    Args:
      mesh: sizes of mesh axes; those not named are 1.
      recipe: a name of `RECIPES`.
      param, reduce: as in `training.Precision`; moments are in the dtype of the weights.

    Raises:
      ValueError: a mesh axis does not divide the axis that it is to split, or there is no such
        recipe, axis, size, dtype or optimizer, or the mesh has stages.
    """
    for name, dtype in (("param", param), ("reduce", reduce)):
        _check_known(name, dtype, DTYPE_BYTES)
    _check_known("optimizer", optimizer, ("adamw", "muon"))
    split, parameters, gradients, moments = _recipe(recipe, mesh), 0, 0, 0
    for leaf in leaves_of(config):
        size = DTYPE_BYTES[leaf.type.stored_dtype(param)]
        parameters += size * _share(leaf, split.parameters, mesh)
        gradients += DTYPE_BYTES[reduce] * _share(leaf, split.gradients, mesh)
        moments += size * _num_moments(leaf, optimizer) * _share(leaf, split.optimizer, mesh)
    return TrainingBytes(parameters, gradients, moments)


def serving_bytes(
    config: DeepSeekConfig,
    mesh: Mapping[str, int],
    recipe: str,
    *,
    batch: int = 1,
    memory_bytes: int | None = None,
) -> ServingBytes:
    """Bytes a device of weights and latent cache, both in the config's dtype.

    Args:
      mesh, recipe: as in `training_bytes`.
      batch: sequences served at a time, over all devices.
      memory_bytes: of a device; activations and the compiler's workspace are not counted.

    Raises:
      ValueError: a mesh axis does not divide the axis that it is to split, or there is no such
        recipe, axis or size, or the mesh has stages.
    """
    check_positive(batch=batch)
    split, dtype_bytes = _recipe(recipe, mesh), DTYPE_BYTES[config.dtype]
    parameters = sum(
        DTYPE_BYTES[leaf.type.stored_dtype(config.dtype)] * _share(leaf, split.parameters, mesh)
        for leaf in leaves_of(config)
    )
    sequences, shares = (
        math.prod(mesh.get(axis, 1) for axis in axes) for axes in (split.batch, split.context)
    )
    sequences = -(-batch // sequences)
    per_token = config.num_hidden_layers * config.cache_row_dim * dtype_bytes
    context = None
    if memory_bytes is not None:
        context = max(memory_bytes - parameters, 0) * shares // (per_token * sequences)
        context = min(context, config.max_position_embeddings)
    return ServingBytes(parameters, -(-per_token // shares), sequences, context)


def _recipe(name: str, mesh: Mapping[str, int]) -> Recipe:
    _check_known("recipe", name, RECIPES)
    for axis, size in mesh.items():
        if axis not in MESH_AXES:
            raise ValueError(f"{axis!r} is not a mesh axis, those are {', '.join(MESH_AXES)}")
        check_positive(**{axis: size})
    if (num_stages := mesh.get("stage", 1)) > 1:
        raise ValueError(f"the parts of a pipeline are not planned, got stage={num_stages}")
    return RECIPES[name]


def _check_known(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(known)}")


def _share(leaf: Leaf, split: Split, mesh: Mapping[str, int]) -> int:
    """Numbers of a leaf that one device holds."""
    share = leaf.size
    for size, axis in zip(leaf.shape, leaf.axes, strict=True):
        names = () if axis is None else split.get(axis, ())
        parts = math.prod(mesh.get(name, 1) for name in names)
        if size % parts:
            raise ValueError(
                f"{'.'.join(leaf.path)}: axis {axis!r} of size {size} cannot be split over {parts} "
                f"devices of mesh axis {'+'.join(names)!r}"
            )
        share //= parts
    return share


def _num_moments(leaf: Leaf, optimizer: str) -> int:
    if leaf.type.kind == "fixed":
        return 0
    return 1 if optimizer == "muon" and leaf.type.kind == "matrix" else 2
