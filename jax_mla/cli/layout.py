"""The flags for the mesh of a command, and for how arrays are sharded over it."""

import argparse
from typing import TYPE_CHECKING

from jax_mla.cli.arguments import positive
from jax_mla.sharding import MESH_AXES
from jax_mla.sharding.layouts import LAYOUTS

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jax_mla.sharding import ShardingRules

_AXES = tuple(axis for axis in MESH_AXES if axis != "stage")


def add_arguments(parser: argparse.ArgumentParser, *, has_stages: bool = False) -> None:
    axes, names = (mesh_axes_and_stages, MESH_AXES) if has_stages else (mesh_axes, _AXES)
    parser.add_argument(
        "--mesh",
        type=axes,
        metavar="AXIS=N,...",
        help=f"devices by {', '.join(names[:-1])} and {names[-1]}, such as data=2,tensor=2; one "
        "device without it",
    )
    parser.add_argument(
        "--rules", choices=LAYOUTS, help="layout of the mesh; the default is ShardingRules()"
    )


def build(args: argparse.Namespace) -> "tuple[Mesh | None, ShardingRules | None]":
    """The mesh and the rules that the flags name; None for what they leave out.

    Raises:
      ValueError: there are rules and no mesh, there are fewer devices than the mesh needs, or the
        mesh leaves out devices of one of several processes.
    """
    if args.rules and not args.mesh:
        raise ValueError(f"--rules {args.rules} shards over a mesh and needs --mesh")
    import jax

    import jax_mla

    mesh = jax_mla.make_mesh(**args.mesh) if args.mesh else None
    rules = LAYOUTS[args.rules]() if args.rules else None
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
    return _axes(word, MESH_AXES)


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
