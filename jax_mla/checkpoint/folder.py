"""A checkpoint folder: config.json and one or more safetensors files. No jax."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_mla.checkpoint.files import read_json
from jax_mla.checkpoint.safetensors_file import StoredTensor, read_header
from jax_mla.checks.problems import refuse, shortened
from jax_mla.config.hf import token_ids
from jax_mla.config.model import DeepSeekConfig
from jax_mla.config.wrappers import Wrapper, text_part, wrapper_of

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_SHARD_NAME = re.compile(r"\w[\w.-]*\.safetensors")


@dataclasses.dataclass(frozen=True)
class CheckpointFolder:
    """What a folder holds of a text model, before any weight is read.

    config: the dict of config.json; for a multimodal model, the part that describes its text model.
    generation: the dict of generation_config.json, empty where there is none.
    tensors: where each published name is stored, by the names of a checkpoint of text alone.
    left_out: the tensors of a multimodal model that are not of its text part.
    """

    path: Path
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    tensors: dict[str, StoredTensor]
    left_out: dict[str, StoredTensor]

    def model_config(self, dtype: str | None = None) -> DeepSeekConfig:
        """The config with the ids at which generation stops; `dtype` replaces what the file says.

        The eos_token_id of generation_config.json wins over the one of config.json, unless null.
        """
        return _model_config(self.config, self.generation, dtype)


def open_folder(path: str | os.PathLike[str]) -> CheckpointFolder:
    """Reads config.json, generation_config.json, the index and the headers, no weights.

    A `model.safetensors` is preferred to an index, as transformers does. What a shard holds is what
    its header says; an index that disagrees is an error. Pickles are never opened.

    Raises:
      FileNotFoundError: the folder, config.json, the weights or shards are missing.
      ValueError: a file is malformed, or the index and the shards disagree.
    """
    path = Path(path)
    config, generation = _read_configs(path)
    if (path / SINGLE).is_file():
        stored = read_header(path / SINGLE)
    elif (path / INDEX).is_file():
        stored = _read_shards(path)
    elif pickles := sorted(file.name for pattern in _PICKLES for file in path.glob(pattern)):
        raise ValueError(
            f"{path} holds pickled weights ({shortened(pickles)}), which can run code when opened; "
            f"convert them to safetensors first"
        )
    else:
        raise FileNotFoundError(f"{path} holds neither {SINGLE} nor {INDEX}")
    tensors, left_out = _text_tensors(path, stored, wrapper_of(config))
    return CheckpointFolder(path, text_part(config), generation, tensors, left_out)


def read_model_config(path: Path, dtype: str | None = None) -> DeepSeekConfig:
    """The config of a folder that `open_folder` would give, which need not hold weights."""
    return _model_config(*_read_configs(path), dtype)


def _read_configs(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a local folder; nothing is ever downloaded")
    file = path / "generation_config.json"
    return read_json(path / "config.json"), read_json(file) if file.is_file() else {}


def _model_config(
    config: Mapping[str, Any], generation: Mapping[str, Any], dtype: str | None
) -> DeepSeekConfig:
    model = DeepSeekConfig.from_hf(config, dtype=dtype)
    try:
        stops = token_ids(generation.get("eos_token_id"))
    except ValueError as error:
        raise ValueError(f"generation_config.json: {error}") from None
    return dataclasses.replace(model, eos_token_id=stops) if stops else model


def _text_tensors(
    path: Path, stored: dict[str, StoredTensor], wrapper: Wrapper | None
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The tensors of the text model by its own names, and the others by theirs."""
    if wrapper is None:
        return stored, {}
    tensors: dict[str, StoredTensor] = {}
    left_out: dict[str, StoredTensor] = {}
    twice: list[str] = []
    for name, tensor in stored.items():
        text_name = wrapper.text_name(name)
        if text_name in tensors:
            twice.append(name)
        (left_out if text_name is None else tensors)[text_name or name] = tensor
    refuse(f"{path} holds tensors of its text model under two names", {"again": twice})
    return tensors, left_out


def _read_shards(path: Path) -> dict[str, StoredTensor]:
    shard_of = _read_index(path)
    shards = sorted(set(shard_of.values()))
    if missing := [name for name in shards if not (path / name).is_file()]:
        raise FileNotFoundError(
            f"{path} lacks {len(missing)} of the {len(shards)} shards in its index: "
            f"{shortened(missing)}"
        )
    malformed: list[str] = []
    holders: dict[str, list[StoredTensor]] = defaultdict(list)
    for shard in shards:
        try:
            for name, tensor in read_header(path / shard).items():
                holders[name].append(tensor)
        except ValueError as error:
            malformed.append(str(error))
    refuse(f"{path} has damaged shards", {"malformed": malformed})
    twice = {
        name: [t.path.name for t in found] for name, found in holders.items() if len(found) > 1
    }
    misplaced = [
        f"{name} in {shard}"
        for name, shard in shard_of.items()
        if shard not in [tensor.path.name for tensor in holders[name]]
    ]
    refuse(
        f"the index of {path} and its shards disagree",
        {
            "stored twice": [f"{name} in {' and '.join(files)}" for name, files in twice.items()],
            "not where the index says": misplaced,
        },
    )
    return {name: found[0] for name, found in holders.items() if found}


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard. Shards are plain file names, so none can be outside of the folder."""
    shard_of = read_json(path / INDEX).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{path / INDEX} has no weight_map object")
    names = sorted({str(name) for name in shard_of.values()})
    refuse(
        f"{path / INDEX} names files that are not plain .safetensors names in the folder",
        {"refused": [repr(name) for name in names if not _SHARD_NAME.fullmatch(name)]},
    )
    return {tensor: str(shard) for tensor, shard in shard_of.items()}
