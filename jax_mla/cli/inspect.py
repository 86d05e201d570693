"""`jax-mla inspect`: the contents of a checkpoint folder, from its headers alone, without jax."""

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
from jax_mla.config.model import DTYPES, DeepSeekConfig

MTP = "multi_token_prediction"
OTHER = "other"
LEFT_OUT = "beside_the_text_model"
NOT_LOADED = {MTP: "multi-token prediction", LEFT_OUT: "the rest of a multimodal model"}
LAYER = re.compile(r"^model\.layers\.(\d+)\.")
EPILOG = (
    "Exit code 1 when the tensors differ from what config.json describes; lists the differences."
)
FP8_SCALE = "_scale_inv"  # belongs to a weight: bytes, but no parameters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("folder", type=Path, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--dtype", choices=DTYPES, help="of the cache; the config's without it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    folder = open_folder(args.folder)
    config = folder.model_config(args.dtype)
    results = {"config": config.to_hf(), **summary(config, folder.tensors, folder.left_out)}
    try:
        match(folder, config)
        results["mismatch"] = None
    except ValueError as error:
        results["mismatch"] = str(error)
    if args.json:
        report.print_json(results)
    else:
        _print(args.folder, results)
        print(results["mismatch"] or "the tensors match config.json")
    return 0 if results["mismatch"] is None else 1


def summary(
    config: DeepSeekConfig,
    tensors: Mapping[str, StoredTensor],
    left_out: Mapping[str, StoredTensor] | None = None,
) -> dict[str, Any]:
    """Parameters, bytes by part and dtype, active parameters and cache bytes per token.

    Tensors that are not loaded (layers of multi-token prediction, and all beside a text model) are
    parts of their own, which only the total bytes include. A token is computed with all parameters
    except the embedding table, from which it takes one row (unless the head is tied to it), and the
    routed experts that it was not sent to.
    """
    parameters: Counter[str] = Counter()
    part_bytes: dict[str, Counter[str]] = defaultdict(Counter)
    for name, tensor in tensors.items():
        part = part_of(name, config)
        part_bytes[part][tensor.dtype] += tensor.nbytes
        parameters[part] += 0 if name.endswith(FP8_SCALE) else math.prod(tensor.shape)
    for tensor in (left_out or {}).values():
        part_bytes[LEFT_OUT][tensor.dtype] += tensor.nbytes
        parameters[LEFT_OUT] += math.prod(tensor.shape)
    not_loaded = {part: parameters.pop(part, 0) for part in NOT_LOADED}
    total = sum(parameters.values())
    active = total
    if not config.tie_word_embeddings:
        active -= parameters["embedding"]
    if config.num_moe_layers:
        experts, chosen = config.n_routed_experts or 1, config.num_experts_per_tok or 1
        active -= parameters["routed_experts"] // experts * (experts - chosen)
    order = [*PARTS, OTHER, *NOT_LOADED]
    return {
        "parameters": {
            "total": total,
            "active_per_token": active,
            "by_part": {part: parameters[part] for part in order if parameters[part]},
            **not_loaded,
        },
        "bytes": {
            "total": sum(sum(by_dtype.values()) for by_dtype in part_bytes.values()),
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
    if name.endswith(".self_attn.rotary_emb.inv_freq"):
        return "attention"  # in some files, though it follows from the config and is not loaded
    return _parts(config).get(name.removesuffix(FP8_SCALE), OTHER)


@functools.lru_cache
def _parts(config: DeepSeekConfig) -> dict[str, str]:
    """Part by published name, with {layer} and {expert} in it; both ways to store experts."""
    config = dataclasses.replace(config, tie_word_embeddings=False)  # files may hold the head
    leaves = [leaf for fused in (False, True) for leaf in leaves_of(config, fused_experts=fused)]
    rotary = "model.layers.{layer}.self_attn.rotary_emb.inv_freq"  # some files hold it: not loaded
    return {leaf.name: leaf.type.part for leaf in leaves} | {rotary: "attention"}


def _print(folder: Path, results: dict[str, Any]) -> None:
    fields = [[name, value] for name, value in results["config"].items() if value is not None]
    report.print_table(f"{folder}", ["config", "value"], fields)
    parameters, sizes = results["parameters"], results["bytes"]
    not_loaded = {part: parameters[part] for part in NOT_LOADED if parameters[part]}
    counts = parameters["by_part"] | not_loaded
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
    if not_loaded:
        names = " and ".join(NOT_LOADED[part] for part in not_loaded)
        title += f" ({names} is not loaded, and not in the sum of parameters)"
    report.print_table(title, ["part", "parameters", "bytes", "dtypes"], rows)
    cache = results["cache_bytes_per_token"]
    print(f"active parameters per token: {report.count(parameters['active_per_token'])}")
    print(
        f"cache: {cache['latent']:,} bytes per token in {cache['dtype']}; multi-head attention "
        f"with the same heads needs {cache['mha']:,}, {cache['ratio']:.1f} times as much"
    )
