"""`jax-mla plan`: bytes on each device of a mesh, from the config alone, without jax."""

import argparse
import dataclasses
import math
from typing import Any

from jax_mla.analysis.memory import (
    RECIPES,
    serving_bytes,
    training_bytes,
)
from jax_mla.cli import report
from jax_mla.cli.arguments import CONFIG_HELP, config_named, number_above_0, positive
from jax_mla.cli.layout import mesh_axes

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
    recipes = [name for name in RECIPES if _splits(name, args.mesh, args.train)]
    rows = (_training if args.train else _serving)(config, args, recipes, memory)
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
        f"{args.config} on {mesh}: bytes a device",
        ["recipe", *header],
        [[name, *(_cell(key, value) for key, value in row.items())] for name, row in rows.items()],
    )
    return 0


def _training(config, args, recipes: list[str], memory: int | None) -> dict[str, Any]:
    rows = {}
    for name in recipes:
        options = {"param": args.param_dtype, "optimizer": args.optimizer}
        found = training_bytes(config, args.mesh, name, **options)
        rows[name] = dataclasses.asdict(found) | {"total": found.total}
        if memory is not None:
            rows[name]["fits"] = found.total <= memory
    return rows


def _serving(config, args, recipes: list[str], memory: int | None) -> dict[str, Any]:
    rows = {}
    for name in recipes:
        options = {"batch": args.batch, "memory_bytes": memory}
        found = serving_bytes(config, args.mesh, name, **options)
        rows[name] = dataclasses.asdict(found)
        if memory is None:
            del rows[name]["context_tokens"]
    return rows


def _splits(recipe: str, mesh: dict[str, int], is_training: bool) -> bool:
    """Whether a layout is worth a row: "ddp" always, others where they shard what is counted."""
    split = RECIPES[recipe]
    counted = split.optimizer if is_training else split.parameters
    axes = {axis for names in counted.values() for axis in names}
    axes |= set() if is_training else set(split.context)
    return recipe == "ddp" or any(mesh.get(axis, 1) > 1 for axis in axes)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if name in ("sequences", "context_tokens") else report.size(value)
