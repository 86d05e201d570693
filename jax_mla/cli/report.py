"""Printing of results: rich tables on a terminal, aligned plain text in a pipe, or JSON."""

import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_mla.text import Completion


def print_json(report: dict[str, Any]) -> None:
    """One indented JSON object on stdout. NaN and infinity, which JSON lacks, become null."""
    print(json.dumps(_finite(report), indent=2, allow_nan=False))


def completion(one: "Completion") -> dict[str, Any]:
    """A completion as `print_json` takes it: texts, and counts instead of ids."""
    return {
        "prompt": one.prompt,
        "text": one.text,
        "num_prompt_tokens": len(one.prompt_tokens),
        "num_tokens": len(one.tokens),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(of_key) for key, of_key in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints rows under a title; columns in which every cell starts with a digit align right."""
    cells = [[str(cell) for cell in row] for row in rows]
    right = [all(row[i][:1].isdigit() for row in cells) for i in range(len(header))]
    if sys.stdout.isatty():
        _print_rich(title, header, cells, right)
        return
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    print(title)
    for row in [list(header), *cells]:
        aligned = (
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        )
        print(("  " + "  ".join(aligned)).rstrip())
    print()


def count(number: int) -> str:
    """671_026_404_352 -> '671.03 billion'."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.2f} {word}"
    return f"{number:,}"


def size(num_bytes: int | float) -> str:
    """70_272 -> '70.3 kB', in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"


def _print_rich(
    title: str, header: Sequence[str], cells: list[list[str]], right: list[bool]
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold")
    for name, is_right in zip(header, right, strict=True):
        table.add_column(name, justify="right" if is_right else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
