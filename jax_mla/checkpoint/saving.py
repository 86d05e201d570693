"""A parameter dict to a published folder, written beside its place and then renamed into it."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jax_mla.checkpoint.files import flush, write_json
from jax_mla.checkpoint.folder import INDEX, SINGLE
from jax_mla.checkpoint.published import Fills, published
from jax_mla.checks.problems import differences, refuse
from jax_mla.config.families import EXPERTS
from jax_mla.config.leaf_types import flatten
from jax_mla.config.leaves import Leaf, leaves_of
from jax_mla.config.model import DTYPES, DeepSeekConfig


def save(
    folder: str | os.PathLike[str],
    params: Mapping[str, Any],
    config: DeepSeekConfig,
    *,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a checkpoint in Hugging Face layout, with the published names, that `load` reads back.

    Holds `config.json` (with the dtype of the parameters), `generation_config.json` with the
    stop ids, and `model.safetensors`, or shards and their index. The folder appears complete or not
    at all: everything is written to a hidden folder beside it, flushed to disk, and renamed. A
    `kimi_k2` config keeps that model_type, as its checkpoints are published; transformers knows it
    only by the code published with them, and as "deepseek_v3".

    Args:
      folder: must not exist, or be empty; its parents are created. A link is followed.
      params: the tree of `jax_mla.init`; one floating dtype, but for the router's correction bias.
        Arrays may be sharded over the devices of this process.
      config: what the parameters are for. Multi-token-prediction layers are not part of them.
      max_shard_bytes: of tensor data in one file; a larger tensor has a file of its own.
      progress: called with the bytes written so far and in all, after each file.

    Raises:
      FileExistsError: the folder exists and is not empty.
      ValueError: the parameters are not those of the config, all differences are listed; or
        `load` would refuse the config or read another one; or a router's correction bias is not
        finite.
      OSError: the disk has no space for the checkpoint; nothing is left of it.

    Cost: writes the parameters once; host memory of one shard and one leaf of one layer.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    target = Path(folder).resolve()  # what a link points to: a folder cannot replace the link
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty folder; nothing was written")
    leaves = leaves_of(config)
    arrays = _checked(params, leaves)
    config = dataclasses.replace(config, dtype=arrays[leaves[0].path].dtype.name)
    _check_readable(config)
    fills = published(leaves)
    sizes = {name: _nbytes(parts, arrays) for name, parts in fills.items()}
    needed = sum(sizes.values())
    if needed > _free_bytes(target) > 0:  # some network disks know of no free bytes at all
        raise _no_space(target, needed)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
    partial.mkdir()
    try:
        write_json(partial / "config.json", config.to_hf())
        write_json(partial / "generation_config.json", _generation_config(config))
        _write_weights(partial, fills, sizes, arrays, max_shard_bytes, progress)
        flush(partial)
        partial.rename(target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if says_disk_full(error):
            raise _no_space(target, needed) from error
        raise
    flush(target.parent)


def _free_bytes(target: Path) -> int:
    """Free bytes of the disk that a path is on, or will be."""
    return shutil.disk_usage(next(p for p in target.parents if p.exists())).free


def says_disk_full(error: BaseException) -> bool:
    """Safetensors has no error number, only the words of the system or of Rust."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in ("No space left on device", "StorageFull"))


def _no_space(target: Path, needed: int) -> OSError:
    return OSError(
        f"No space left for {target}: it needs {needed:,} bytes, the disk has "
        f"{_free_bytes(target):,} free; nothing was written"
    )


def _check_readable(config: DeepSeekConfig) -> None:
    """Its config.json means this config, and not another one of its family."""
    read = DeepSeekConfig.from_hf(config.to_hf())
    for field in dataclasses.fields(config):
        if field.name in EXPERTS and config.n_routed_experts is read.n_routed_experts is None:
            continue
        wanted, found = getattr(config, field.name), getattr(read, field.name)
        is_group = field.name in ("n_group", "topk_group")
        if found != wanted and not (is_group and wanted is None and found == 1):
            raise ValueError(
                f"{config.model_type} cannot be saved with {field.name}={wanted!r}, "
                f"its readers take {found!r}"
            )


def _checked(params: Mapping[str, Any], leaves: tuple[Leaf, ...]) -> dict[tuple[str, ...], Any]:
    """The arrays of `params` by path, once they are known to be what the config describes."""
    arrays = flatten(params)
    expected = {leaf.path: leaf for leaf in leaves}
    named = {path: ".".join(path) for path in arrays.keys() | expected.keys()}
    strange = [path for path, array in arrays.items() if not hasattr(array, "dtype")]
    refuse(
        "the parameters are not arrays",
        {"not an array": [f"{named[path]} is {type(arrays[path]).__name__}" for path in strange]},
    )
    both = [path for path in expected if path in arrays]
    dtypes = {path: expected[path].type.stored_dtype(arrays[both[0]].dtype.name) for path in both}
    problems = differences(
        {named[path]: array.shape for path, array in arrays.items()},
        {named[path]: leaf.shape for path, leaf in expected.items()},
    )
    problems["wrong dtype"] = [
        f"{named[path]} is {arrays[path].dtype.name}, expected {dtypes[path]}"
        for path in both
        if arrays[path].dtype.name != dtypes[path] or dtypes[path] not in DTYPES
    ]
    problems["not all on this process"] = [
        named[path] for path in both if not getattr(arrays[path], "is_fully_addressable", True)
    ]
    refuse("the parameters are not those of the config", problems)
    biases = [path for path in both if expected[path].type.dtype == "float32"]
    refuse(
        "the parameters cannot be loaded back",
        {"not finite": [named[p] for p in biases if not np.isfinite(arrays[p]).all()]},
    )
    return arrays


def _generation_config(config: DeepSeekConfig) -> dict[str, Any]:
    eos = config.eos_token_id
    tokens = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(eos) if len(eos) > 1 else (eos[0] if eos else None),
        "pad_token_id": config.pad_token_id,
    }
    return {"_from_model_config": True} | {k: v for k, v in tokens.items() if v is not None}


def _write_weights(
    folder: Path,
    fills: dict[str, Fills],
    sizes: dict[str, int],
    arrays: dict[tuple[str, ...], Any],
    max_shard_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    total, done = sum(sizes.values()), 0
    shards = _file_contents(sizes, max_shard_bytes)
    host = _HostLayer(arrays)
    shard_of = {}
    for number, names in enumerate(shards, 1):
        one = len(shards) == 1
        file = SINGLE if one else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _join(fills[name], host) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # save_file's are private
        flush(folder / file)
        shard_of |= dict.fromkeys(names, file)
        done += sum(sizes[name] for name in names)
        if progress is not None:
            progress(done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": shard_of}
        write_json(folder / INDEX, index)


def _nbytes(parts: Fills, arrays: dict[tuple[str, ...], Any]) -> int:
    leaf, _ = parts[0]
    return int(np.prod(leaf.published_shape)) * arrays[leaf.path].dtype.itemsize


def _file_contents(sizes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names in order, a new shard where the next tensor would not fit."""
    shards, filled = [[]], 0
    for name, nbytes in sizes.items():
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards


class _HostLayer:
    """Leaves on the host, one layer of one leaf at a time."""

    def __init__(self, arrays: dict[tuple[str, ...], Any]) -> None:
        self._arrays = arrays
        self._key: tuple[Any, ...] = ()
        self._value = np.empty(0)

    def get(self, leaf: Leaf, lead: tuple[int, ...]) -> np.ndarray:
        if self._key != (leaf.path, *lead[:1]):
            array = self._arrays[leaf.path]
            self._value = np.asarray(jax.device_get(array[lead[0]] if lead else array))
            self._key = (leaf.path, *lead[:1])
        return self._value[lead[1:]]


def _join(parts: Fills, host: _HostLayer) -> np.ndarray:
    """The published tensor, from the leaves that it fills."""
    joined = None
    for leaf, lead in parts:
        value = host.get(leaf, lead)
        if joined is None:
            joined = np.empty(leaf.split, value.dtype)
        cut = tuple(slice(start, stop) for start, stop in leaf.cut)
        joined[cut] = value.transpose(np.argsort(leaf.order))
    assert joined is not None
    return joined.reshape(parts[0][0].published_shape)
