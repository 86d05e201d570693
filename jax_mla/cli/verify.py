"""`jax-mla verify`: a checkpoint's numbers against golden data, or against themselves."""

import argparse
import dataclasses
import zipfile
from pathlib import Path
from typing import Any

from jax_mla.cli import report
from jax_mla.cli.arguments import number_from_0
from jax_mla.cli.byte_progress import ByteProgress

EPILOG = """
With --golden, compares the folder's model in float32 with the arrays of a reference in an .npz
file: hidden states and experts of every layer, logits, and a greedy continuation with a cache.
Without it, compares the expanded form of attention with the absorbed one and with decoding token by
token, on random tokens. Exit code 1 when a tensor deviates; names the first one.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("folder", type=Path, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--golden", type=Path, metavar="FILE.npz", help="arrays of a reference")
    parser.add_argument(
        "--atol",
        type=number_from_0,
        default=5e-5,
        help="largest error allowed, times a tensor's root mean square where that exceeds 1 "
        "(default 5e-5)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    import jax_mla
    from jax_mla.analysis import compare_with_golden, compare_with_itself

    golden = None if args.golden is None else _read_golden(args.golden)
    with ByteProgress("Loading") as progress:
        params, config = jax_mla.load(args.folder, dtype="float32", progress=progress)
    if golden is None:
        rows = compare_with_itself(params, config, atol=args.atol, seed=args.seed)
    else:
        rows = compare_with_golden(params, config, golden, atol=args.atol)
    first = next((row.tensor for row in rows if not row.is_ok), None)
    if args.json:
        comparisons = [dataclasses.asdict(row) | {"is_ok": row.is_ok} for row in rows]
        results = {"is_ok": first is None, "first_deviation": first, "comparisons": comparisons}
        report.print_json(results)
    else:
        against = "itself: expanded, absorbed, cached" if golden is None else args.golden
        report.print_table(
            f"{args.folder} against {against}",
            ["tensor", "error", "bound", "", ""],
            [
                [
                    row.tensor,
                    f"{row.error:.3g}",
                    f"{row.bound:.3g}",
                    row.measure,
                    "ok" if row.is_ok else "DEVIATES",
                ]
                for row in rows
            ],
        )
        print("everything agrees" if first is None else f"the first to deviate: {first}")
    return 0 if first is None else 1


def _read_golden(file: Path) -> dict[str, Any]:
    """The arrays of an .npz file; objects in it, which would be pickles, are refused."""
    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, EOFError, TypeError, zipfile.BadZipFile):
        raise ValueError(f"{file} is not an .npz file of plain arrays") from None
