"""`jax-mla inspect`: what a checkpoint folder holds, from its headers alone, without jax."""

import argparse
import dataclasses
import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_mla.analysis import cache_bytes_per_token
from jax_mla.checkpoint.folder import open_folder
from jax_mla.checkpoint.matching import match
from jax_mla.checkpoint.safetensors_file import StoredTensor
from jax_mla.cli import report
from jax_mla.config.leaf_types import PARTS
from jax_mla.config.leaves import leaves_of
from jax_mla.config.model import DeepSeekConfig

MTP = "multi_token_prediction"
OTHER = "other"
LAYER = re.compile(r"^model\.layers\.(\d+)\.")
EPILOG = "Exit code 1 when the tensors are not those that config.json describes; they are listed."
FP8_SCALE = "_scale_inv"  # belongs to a weight: bytes, but no parameters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("folder", type=Path, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    folder = open_folder(args.folder)
    config = DeepSeekConfig.from_hf(folder.config)
    results = {"config": config.to_hf(), **summary(config, folder.tensors)}
    try:
        match(folder, config)
        results["mismatch"] = None
    except ValueError as error:
        results["mismatch"] = str(error)
    if args.json:
        report.print_json(results)
    else:
        _print(args.folder, results)
        print(results["mismatch"] or "the tensors are those that config.json describes")
    return 0 if results["mismatch"] is None else 1


def summary(config: DeepSeekConfig, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Parameters, bytes by part and dtype, active parameters and cache bytes per token.

    Layers of multi-token prediction are a part of their own and in no total but that of the bytes.
    A token is computed with all parameters except the embedding table, of which it takes one row
    (unless the head is tied to it), and the routed experts that it was not sent to.
    """
    parameters: Counter[str] = Counter()
    part_bytes: dict[str, Counter[str]] = defaultdict(Counter)
    for name, tensor in tensors.items():
        part = part_of(name, config)
        part_bytes[part][tensor.dtype] += tensor.nbytes
        parameters[part] += 0 if name.endswith(FP8_SCALE) else math.prod(tensor.shape)
    mtp = parameters.pop(MTP, 0)
    total = sum(parameters.values())
    active = total
    if not config.tie_word_embeddings:
        active -= parameters["embedding"]
    if config.num_moe_layers:
        experts, chosen = config.n_routed_experts or 1, config.num_experts_per_tok or 1
        active -= parameters["routed_experts"] // experts * (experts - chosen)
    order = [*PARTS, OTHER, MTP]
    return {
        "parameters": {
            "total": total,
            "active_per_token": active,
            "by_part": {part: parameters[part] for part in order if parameters[part]},
            MTP: mtp,
        },
        "bytes": {
            "total": sum(tensor.nbytes for tensor in tensors.values()),
            "by_part": {part: dict(part_bytes[part]) for part in order if part in part_bytes},
        },
        "cache_bytes_per_token": cache_bytes_per_token(config) | {"dtype": config.dtype},
    }


def part_of(name: str, config: DeepSeekConfig) -> str:
    """The part of the model that a published tensor name belongs to; "other" is none of its own."""
    if (layer := LAYER.match(name)) and int(layer[1]) >= config.num_hidden_layers:
        return MTP
    name = re.sub(r"^model\.layers\.\d+\.", "model.layers.{layer}.", name)
    name = re.sub(r"\.experts\.\d+\.", ".experts.{expert}.", name)
    return _parts(config).get(name.removesuffix(FP8_SCALE), OTHER)


@functools.lru_cache
def _parts(config: DeepSeekConfig) -> dict[str, str]:
    """Of every published name, with {layer} and {expert} in it, both ways to store experts."""
    config = dataclasses.replace(config, tie_word_embeddings=False)  # files may hold the head
    leaves = [leaf for fused in (False, True) for leaf in leaves_of(config, fused_experts=fused)]
    return {leaf.name: leaf.type.part for leaf in leaves}


def _print(folder: Path, results: dict[str, Any]) -> None:
    fields = [[name, value] for name, value in results["config"].items() if value is not None]
    report.print_table(f"{folder}", ["config", "value"], fields)
    parameters, sizes = results["parameters"], results["bytes"]
    counts = parameters["by_part"] | {MTP: parameters[MTP]}
    rows = [
        [
            part.replace("_", " "),
            report.count(counts.get(part, 0)),
            report.size(sum(by_dtype.values())),
            ", ".join(f"{dtype} {report.size(n)}" for dtype, n in sorted(by_dtype.items())),
        ]
        for part, by_dtype in sizes["by_part"].items()
    ]
    rows.append(["all", report.count(parameters["total"]), report.size(sizes["total"]), ""])
    title = "parameters and bytes on disk"
    if parameters[MTP]:
        title += " (multi-token prediction is not loaded, and not in the sum of parameters)"
    report.print_table(title, ["part", "parameters", "bytes", "dtypes"], rows)
    cache = results["cache_bytes_per_token"]
    print(f"active parameters per token: {report.count(parameters['active_per_token'])}")
    print(
        f"cache: {cache['latent']:,} bytes per token in {cache['dtype']}; multi-head attention "
        f"with the same heads needs {cache['mha']:,}, {cache['ratio']:.1f} times as much"
    )
