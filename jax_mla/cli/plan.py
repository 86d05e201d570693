"""`jax-mla plan`: bytes on each device of a mesh, from the config alone, without jax."""

import argparse
import dataclasses
import math
from typing import Any

from jax_mla.analysis.memory import serving_bytes, training_bytes
from jax_mla.cli import report
from jax_mla.cli.arguments import CONFIG_HELP, config_named, number_above_0, positive
from jax_mla.cli.layout import mesh_axes
from jax_mla.sharding.divide import num_devices
from jax_mla.sharding.layouts import LAYOUTS
from jax_mla.sharding.rules import PARAM_AXES, ShardingRules

EPILOG = """
Bytes per device. Activations, the compiler's workspace and layers of multi-token prediction are not
counted: a plan that barely fits does not fit.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    parser.add_argument(
        "--mesh",
        type=mesh_axes,
        default={},
        metavar="AXIS=N,...",
        help="such as data=8; one device without it",
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help="weights, gradients and optimizer state instead of weights and cache",
    )
    parser.add_argument(
        "--memory-gib", type=number_above_0, metavar="GIB", help="per device; adds what fits"
    )
    parser.add_argument(
        "--param-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="training: of weights and moments; gradients are float32",
    )
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="training")
    parser.add_argument(
        "--batch", type=positive, default=1, help="serving: sequences at a time, on all devices"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    config = config_named(args.config)
    memory = None if args.memory_gib is None else int(args.memory_gib * 2**30)
    layouts = {name: layout() for name, layout in LAYOUTS.items()}
    layouts = {
        name: rules
        for name, rules in layouts.items()
        if name == "ddp" or _shards(rules, args.mesh, args.train)
    }
    rows = (_training if args.train else _serving)(config, args, layouts, memory)
    if args.json:
        sizes = {
            "mesh": args.mesh,
            "devices": math.prod(args.mesh.values()),
            "memory_bytes": memory,
        }
        report.print_json({"config": args.config, **sizes, "recipes": rows})
        return 0
    mesh = ", ".join(f"{axis}={size}" for axis, size in args.mesh.items()) or "one device"
    header = [name.replace("_", " ") for name in next(iter(rows.values()))]
    report.print_table(
        f"{args.config} on {mesh}: bytes per device",
        ["layout", *header],
        [[name, *(_cell(key, value) for key, value in row.items())] for name, row in rows.items()],
    )
    return 0


def _training(
    config, args, layouts: dict[str, ShardingRules], memory: int | None
) -> dict[str, Any]:
    rows = {}
    for name, rules in layouts.items():
        options = {"param": args.param_dtype, "optimizer": args.optimizer}
        found = training_bytes(config, args.mesh, rules, **options)
        rows[name] = dataclasses.asdict(found) | {"total": found.total}
        if memory is not None:
            rows[name]["fits"] = found.total <= memory
    return rows


def _serving(config, args, layouts: dict[str, ShardingRules], memory: int | None) -> dict[str, Any]:
    rows = {}
    for name, rules in layouts.items():
        options = {"batch": args.batch, "memory_bytes": memory}
        found = serving_bytes(config, args.mesh, rules, **options)
        rows[name] = dataclasses.asdict(found)
        if memory is None:
            del rows[name]["context_tokens"]
    return rows


def _shards(rules: ShardingRules, mesh: dict[str, int], is_training: bool) -> bool:
    """Whether a layout shards what is counted, on this mesh."""
    counted = [getattr(rules.optimizer() if is_training else rules, axis) for axis in PARAM_AXES]
    axes = counted if is_training else [*counted, rules.context]
    return any(num_devices(axis, mesh) > 1 for axis in axes)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if name in ("sequences", "context_tokens") else report.size(value)
