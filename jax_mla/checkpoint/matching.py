"""Compares a folder's tensors with its config: all differences in one message. No jax."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections import defaultdict

import numpy as np

from jax_mla.checkpoint import fp8
from jax_mla.checkpoint.folder import CheckpointFolder
from jax_mla.checkpoint.published import published
from jax_mla.checkpoint.safetensors_file import FP8, NUMPY_DTYPES, StoredTensor
from jax_mla.checks.problems import refuse
from jax_mla.config.leaves import Leaf, leaves_of
from jax_mla.config.model import DeepSeekConfig

_LOG = logging.getLogger("jax_mla")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_MANY_TENSORS = 200_000  # more than any published model has; their names fit into memory
_SCALE_DTYPES = ("F32", "BF16", "F16")


@dataclasses.dataclass(frozen=True)
class Matched:
    """The leaves to fill, the stored tensors to fill them from, and the size of FP8 blocks."""

    leaves: tuple[Leaf, ...]
    tensors: dict[str, StoredTensor]
    block: tuple[int, int]

    def scale_of(self, name: str) -> StoredTensor:
        return self.tensors[f"{name}_scale_inv"]


def match(folder: CheckpointFolder, config: DeepSeekConfig) -> Matched:
    """Checks names, shapes and dtypes of everything, and that the router's biases are finite.

    No other weight is read.

    Ignored are rotary frequencies, which are computed; a tied head that equals the embedding;
    shared experts of width 0; and, with a note in the log, layers of multi-token prediction beyond
    `num_hidden_layers`, and what a multimodal model holds beside its text model.

    Raises:
      ValueError: lists every missing, unexpected, misshaped and mistyped tensor, or says that the
        config asks for far more tensors than there are.
    """
    block = fp8.block_of(folder.config.get("quantization_config"))
    fused = any(name.endswith(".mlp.experts.gate_up_proj") for name in folder.tensors)
    leaves = leaves_of(config, fused_experts=fused)
    _check_number(folder, leaves)
    problems: dict[str, list[str]] = defaultdict(list)
    known: set[str] = set()
    for name, fills in published(leaves).items():
        if (tensor := folder.tensors.get(name)) is None:
            problems["missing"].append(name)
            continue
        known.add(name)
        if tensor.dtype == FP8:
            known.add(f"{name}_scale_inv")
        if tensor.shape != (shape := fills[0][0].published_shape):
            problems["wrong shape"].append(f"{name} is {[*tensor.shape]}, expected {[*shape]}")
        elif tensor.dtype not in NUMPY_DTYPES:
            problems["wrong dtype"].append(
                f"{name} is {tensor.dtype}, not {' or '.join(NUMPY_DTYPES)}"
            )
        elif tensor.dtype == FP8:
            problems["without its FP8 scale"] += _scale_problems(folder, name, block)
        elif fills[0][0].type.dtype == "float32":
            problems["not finite"] += _not_finite(name, tensor)
    extra = _multi_token_prediction(folder.tensors, config)
    ignored = {name for name in folder.tensors if name.endswith(".rotary_emb.inv_freq")}
    ignored = ignored.union(*extra.values())
    if config.n_shared_experts == 0:  # transformers writes them nevertheless, with no elements
        ignored |= {
            name
            for name, tensor in folder.tensors.items()
            if ".mlp.shared_experts." in name and 0 in tensor.shape
        }
    if config.tie_word_embeddings and _HEAD in folder.tensors:
        ignored.add(_HEAD)
        problems["tied, but different"] += _tie_problems(folder.tensors)
    problems["unexpected"] = sorted(folder.tensors.keys() - known - ignored)
    refuse(f"{folder.path} does not hold what its config.json describes", problems)
    if extra:
        layers = ", ".join(map(str, sorted(extra)))
        _LOG.warning("%s: skipped the multi-token prediction of layer %s", folder.path, layers)
    if folder.left_out:
        _LOG.warning(
            "%s: left out the %d tensors that are not of the text model",
            folder.path,
            len(folder.left_out),
        )
    return Matched(leaves, folder.tensors, block)


def _check_number(folder: CheckpointFolder, leaves: tuple[Leaf, ...]) -> None:
    """Refuses a config that asks for far more tensors than there are: the list may be huge."""
    expected, found = sum(math.prod(leaf.lead_shape) for leaf in leaves), len(folder.tensors)
    if expected > _MANY_TENSORS + 2 * found:
        raise ValueError(
            f"{folder.path} holds {found} tensors, its config.json describes about {expected}"
        )


def _scale_problems(folder: CheckpointFolder, name: str, block: tuple[int, int]) -> list[str]:
    weight, scale = folder.tensors[name], folder.tensors.get(f"{name}_scale_inv")
    if len(weight.shape) != 2:
        return [f"{name} is FP8 of shape {[*weight.shape]}, only matrices can be"]
    if scale is None:
        return [f"{name} is FP8, but {name}_scale_inv is missing"]
    grid = fp8.grid_shape(weight.shape, block)
    if scale.shape != grid or scale.dtype not in _SCALE_DTYPES:
        return [
            f"{name}_scale_inv is {scale.dtype}{[*scale.shape]}, expected F32{[*grid]} for "
            f"{[*weight.shape]} in blocks of {[*block]}"
        ]
    return []


def _not_finite(name: str, tensor: StoredTensor) -> list[str]:
    """Says so if a router's correction bias is not finite: experts could not be ranked."""
    values = tensor.read(tensor.shape, tuple((0, size) for size in tensor.shape))
    bad = values[~np.isfinite(values)]
    return [f"{name} holds {bad[0]}"] if bad.size else []


def _multi_token_prediction(
    tensors: dict[str, StoredTensor], config: DeepSeekConfig
) -> dict[int, set[str]]:
    """Tensors of the layers past the last that hold an eh_proj, as no ordinary layer does."""
    depth, found = config.num_hidden_layers, defaultdict(set)
    for name in tensors:
        if (layer := _LAYER.match(name)) and int(layer[1]) >= depth:
            found[int(layer[1])].add(name)
    return {
        layer: names
        for layer, names in found.items()
        if f"model.layers.{layer}.eh_proj.weight" in names
    }


def _tie_problems(tensors: dict[str, StoredTensor]) -> list[str]:
    """A head beside a tied embedding is redundant when equal, and a wrong config when not."""
    head, embedding = tensors[_HEAD], tensors.get(_EMBEDDING)
    if embedding is None:
        return []  # already listed as missing
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if same and head.dtype in NUMPY_DTYPES:
        size = math.prod(head.shape)
        pieces = [((start, min(start + 2**22, size)),) for start in range(0, size, 2**22)]
        same = all(
            head.read((size,), piece).tobytes() == embedding.read((size,), piece).tobytes()
            for piece in pieces
        )
    if same:
        return []
    return [f"{_HEAD} differs from {_EMBEDDING}, yet tie_word_embeddings is true"]
