"""The flags that say on which mesh a command computes, and what lies where on it."""

import argparse
from typing import TYPE_CHECKING

from jax_mla.cli.completion import positive

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jax_mla.sharding.rules import ShardingRules

RULES = (
    "ddp", "zero1", "zero2", "zero3", "tensor_parallel", "context_parallel", "dp_attention_ep",
)  # fmt: skip
_AXES = ("data", "fsdp", "tensor", "expert", "sequence")
_ALL_AXES = (*_AXES, "stage")


def add_arguments(parser: argparse.ArgumentParser, *, has_stages: bool = False) -> None:
    axes, names = (mesh_axes_and_stages, _ALL_AXES) if has_stages else (mesh_axes, _AXES)
    parser.add_argument(
        "--mesh", type=axes, metavar="AXIS=N,...",
        help=f"devices by {', '.join(names[:-1])} and {names[-1]}, such as data=2,tensor=2; one "
        "device without it",
    )  # fmt: skip
    parser.add_argument(
        "--rules", choices=RULES, help="what lies where on the mesh; as ShardingRules() without it"
    )


def build(args: argparse.Namespace) -> "tuple[Mesh | None, ShardingRules | None]":
    """The mesh and the rules that the flags name; None for what they do not.

    Raises:
      ValueError: there are rules and no mesh, or fewer devices than the mesh needs; or one of
        several processes would have no part in it.
    """
    if args.rules and not args.mesh:
        raise ValueError(f"--rules {args.rules} splits over a mesh, and there is no --mesh")
    import jax

    import jax_mla
    from jax_mla.sharding import layouts as published

    mesh = jax_mla.make_mesh(**args.mesh) if args.mesh else None
    rules = getattr(published, args.rules)() if args.rules else None
    processes, devices = jax.process_count(), jax.device_count()
    if processes > 1 and (size := 0 if mesh is None else mesh.size) != devices:
        raise ValueError(
            f"{processes} processes have {devices} devices and need a --mesh over all of them, "
            + (f"got one over {size}" if mesh else "got none")
        )
    return mesh, rules


def mesh_axes(word: str) -> dict[str, int]:
    """An argparse type: `data=2,tensor=4`."""
    return _axes(word, _AXES)


def mesh_axes_and_stages(word: str) -> dict[str, int]:
    """An argparse type: `data=2,stage=4`."""
    return _axes(word, _ALL_AXES)


def _axes(word: str, known: tuple[str, ...]) -> dict[str, int]:
    axes = {}
    for part in word.split(","):
        name, _, size = part.partition("=")
        if name not in known or name in axes:
            raise argparse.ArgumentTypeError(
                f"axes are {', '.join(known[:-1])} and {known[-1]}, each once, got {part!r}"
            )
        if not size:
            raise argparse.ArgumentTypeError(f"an axis has a size, as in {name}=2, got {part!r}")
        axes[name] = positive(size)
    return axes
