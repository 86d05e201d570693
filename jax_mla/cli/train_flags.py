"""The flags of `jax-mla train`, and the recipe that they describe."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jax_mla.cli import layout, processes
from jax_mla.cli.arguments import CONFIG_HELP, positive

if TYPE_CHECKING:
    from jax_mla.training import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_and_data(parser)
    _add_run(parser)
    _add_optimizer(parser.add_argument_group("optimizer and losses"))
    _add_computation(parser.add_argument_group("computation"))
    layout.add_arguments(parser, has_stages=True)
    parser.add_argument(
        "--pipeline",
        choices=("1f1b", "gpipe"),
        help="in which order the stages of --mesh stage=N take the micro-batches (1f1b)",
    )
    processes.add_arguments(parser)


def _add_model_and_data(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", metavar="CONFIG", help=f"of a new model: {CONFIG_HELP}")
    model.add_argument("--model", type=Path, metavar="DIR", help="checkpoint folder to start from")
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="text files, or .npy files of uint16 or uint32 token ids; files shorter than a row "
        "share one, and tokens see their own file only",
    )
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of a tokenizer.json")
    parser.add_argument(
        "--separate-documents",
        action="store_true",
        help="tokens see their own document only, also inside of a file: an end token ends one",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="checkpoints, metrics, the model"
    )
    parser.add_argument("--resume", action="store_true", help="resume from the newest whole step")
    parser.add_argument(
        "--steps", type=positive, required=True, help="of the whole run, and of its schedule"
    )
    parser.add_argument("--batch", type=positive, required=True, help="rows per step")
    parser.add_argument("--seq", type=positive, required=True, help="tokens per row")
    parser.add_argument(
        "--micro-batches",
        type=positive,
        default=1,
        metavar="N",
        help="into which a batch is divided, computed one after the other (1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of rows (0)")
    parser.add_argument(
        "--save-every", type=positive, default=1000, metavar="STEPS", help="default 1000"
    )
    parser.add_argument("--keep", type=positive, default=3, help="saved steps to keep (3)")
    parser.add_argument(
        "--export-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the model that a finished run leaves; its router's bias stays float32",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_optimizer(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--lr", type=float, default=3e-4, help="highest learning rate (3e-4)")
    group.add_argument("--final-lr", type=float, default=0.0, help="of the last step (0)")
    group.add_argument(
        "--schedule",
        choices=("cosine", "wsd"),
        default="cosine",
        help="decay of the rate: along a cosine (default), or linear in the last steps only",
    )
    group.add_argument("--warmup", type=int, metavar="STEPS", help="1 %% of the steps without it")
    group.add_argument("--decay", type=int, metavar="STEPS", help="of wsd; 20 %% without it")
    group.add_argument(
        "--optimizer",
        choices=("adamw", "muon"),
        default="adamw",
        help="adamw (default), or muon for matrices and adamw for the rest",
    )
    group.add_argument("--weight-decay", type=float, default=0.1, help="of matrices (0.1)")
    group.add_argument("--z-loss", type=float, default=0.0, help="its factor (0)")
    group.add_argument("--balance-loss", type=float, default=0.0, help="its factor (0)")
    group.add_argument("--router-bias-rate", type=float, default=1e-3, help="per step (1e-3)")


def _add_computation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dtype",
        choices=("bfloat16", "float32", "float16"),
        default="bfloat16",
        help="of the computation; weights and their optimizer stay float32",
    )
    group.add_argument(
        "--remat",
        choices=("none", "dots", "full"),
        default="none",
        help="what the backward pass computes again: nothing (default), all but matmuls, blocks",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="attention's gradients are the same bits every time, also on Hopper GPUs",
    )


def recipe_of(args: argparse.Namespace) -> "Recipe":
    """The recipe that the flags describe."""
    from jax_mla.training import Precision, Recipe

    return Recipe(
        num_steps=args.steps,
        optimizer=args.optimizer,
        schedule=args.schedule,
        learning_rate=args.lr,
        final_learning_rate=args.final_lr,
        warmup_steps=args.warmup,
        decay_steps=args.decay,
        weight_decay=args.weight_decay,
        z_loss=args.z_loss,
        balance_loss=args.balance_loss,
        router_bias_rate=args.router_bias_rate,
        num_micro_batches=args.micro_batches,
        remat=args.remat,
        deterministic=args.deterministic,
        precision=Precision(compute=args.dtype),
    )
