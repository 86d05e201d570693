"""A checkpoint folder: config.json and one or more safetensors files. No jax."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from jax_mla.checkpoint.problems import refuse, shortened
from jax_mla.checkpoint.safetensors_file import StoredTensor, parse_json, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_SHARD_NAME = re.compile(r"\w[\w.-]*\.safetensors")


@dataclasses.dataclass(frozen=True)
class CheckpointFolder:
    """`config` is the dict of config.json; `tensors` says where each published name is stored."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]


def open_folder(path: str | os.PathLike[str]) -> CheckpointFolder:
    """Reads config.json, the index and the headers, no weights.

    A `model.safetensors` is preferred to an index, as transformers does. What a shard holds is what
    its header says; an index that disagrees is an error. Pickles are never opened.

    Raises:
      FileNotFoundError: the folder, config.json, the weights or shards are missing.
      ValueError: a file is malformed, or the index and the shards disagree.
    """
    path = Path(path)
    config = read_config(path)
    if (path / SINGLE).is_file():
        return CheckpointFolder(path, config, read_header(path / SINGLE))
    if (path / INDEX).is_file():
        return CheckpointFolder(path, config, _read_shards(path))
    if pickles := sorted(file.name for pattern in _PICKLES for file in path.glob(pattern)):
        raise ValueError(
            f"{path} holds pickled weights ({shortened(pickles)}), which can run code when opened; "
            f"convert them to safetensors first"
        )
    raise FileNotFoundError(f"{path} holds neither {SINGLE} nor {INDEX}")


def read_config(path: Path) -> dict[str, Any]:
    """The dict of a folder's config.json."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a local folder; nothing is ever downloaded")
    return read_json(path / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; FileNotFoundError or ValueError where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    return parse_json(path.read_bytes(), str(path))


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
    """Tensor name -> shard. Shards are plain file names, so none can lie outside the folder."""
    shard_of = read_json(path / INDEX).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{path / INDEX} has no weight_map object")
    names = sorted({str(name) for name in shard_of.values()})
    refuse(
        f"{path / INDEX} names files that are not plain .safetensors names in the folder",
        {"refused": [repr(name) for name in names if not _SHARD_NAME.fullmatch(name)]},
    )
    return {tensor: str(shard) for tensor, shard in shard_of.items()}
