"""The collectives of a compiled program, as a table."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import jax


@dataclasses.dataclass(frozen=True)
class Collective:
    """All calls of one kind, shape and group size: `bytes_per_device` leave a device over a ring.

    For a result of b bytes over n devices a ring sends 2 (n - 1) / n * b for an all-reduce,
    (n - 1) / n * b for an all-gather or all-to-all, (n - 1) * b for a reduce-scatter, b for a
    permute. For a ragged all-to-all the number is an upper bound.
    """

    kind: str
    shape: str
    group_size: int
    calls: int
    bytes_per_device: int


def explain_collectives(compiled: jax.stages.Compiled) -> tuple[list[Collective], str]:
    """The collectives of a compiled step, as rows and as a table; a loop counts once per iteration.

    Args:
      compiled: `jax.jit(step).lower(...).compile()`.
    """
    rows = collectives_of(compiled.as_text() or "")
    table = [("collective", "shape", "devices", "calls", "MB/device")]
    table += [
        (r.kind, r.shape, str(r.group_size), str(r.calls), f"{r.bytes_per_device / 1e6:.3f}")
        for r in rows
    ]
    total = sum(row.bytes_per_device for row in rows)
    return rows, aligned([*table, ("total", "", "", "", f"{total / 1e6:.3f}")])


def collectives_of(program: str) -> list[Collective]:
    """The collectives of a program in XLA's own text, those with the most bytes first."""
    calls: dict[tuple[str, str, int], tuple[int, int]] = {}
    for kind, shape, size, group, times in _collectives(program):
        count, sent = calls.get((kind, shape, group), (0, 0))
        calls[kind, shape, group] = count + times, sent + times * _sent(kind, size, group)
    rows = [
        Collective(kind, shape, group, count, sent)
        for (kind, shape, group), (count, sent) in calls.items()
    ]
    return sorted(rows, key=lambda row: -row.bytes_per_device)


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) (?:\(.*\) -> .* )?\{$")
_WHILE = re.compile(r" while\(.*body=%?([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CALL = re.compile(r" (?:call|fusion|conditional)\(.*?(?:to_apply|calls)=%?([\w.-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{|true_computation=|false_computation=)([^}\n]*)")
_KIND = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|"
    r"collective-permute)(?:-start)?\("
)
_OPERANDS = re.compile(r"-start\(([^)]*)\)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_MESH = re.compile(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}")


def _collectives(text: str) -> Iterator[tuple[str, str, int, int, int]]:
    """(kind, shape, bytes of the result, devices per group, executions) of every collective."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if (match := _COMPUTATION.match(line)) is not None:
            lines = bodies.setdefault(match[1], [])
            entry = match[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)

    def walk(name: str, times: int) -> Iterator[tuple[str, str, int, int, int]]:
        for line in bodies.get(name, ()):
            if (match := _WHILE.search(line)) is not None:
                trips = _TRIPS.search(line)
                yield from walk(match[1], times * (int(trips[1]) if trips else 1))
            elif (match := _KIND.search(line)) is not None:
                arrays = _results(match[1], line)
                size = sum(_bytes(*array) for array in arrays)
                shape = " ".join(f"{dtype}[{dims}]" for dtype, dims in arrays)
                yield match[2], shape, size, _group_size(line), times
            elif (match := _CALL.search(line)) is not None:
                yield from walk(match[1], times)
            for branches in _BRANCHES.findall(line):
                for branch in re.findall(r"[\w.-]+", branches):
                    yield from walk(branch, times)

    yield from walk(entry, 1)


def _results(shapes: str, line: str) -> list[tuple[str, str]]:
    """The arrays that a collective returns; a `-start` lists its operands before them."""
    arrays = _ARRAY.findall(shapes)
    given = _OPERANDS.search(line)
    num_given = given[1].count("%") if given else len(arrays)
    return arrays[num_given : 2 * num_given] if len(arrays) > num_given else arrays


def _bytes(dtype: str, dims: str) -> int:
    bits = re.search(r"\d+", dtype)
    itemsize = 1 if bits is None else max(int(bits[0]) // 8, 1)
    return itemsize * math.prod(int(d) for d in dims.split(",") if d)


def _group_size(line: str) -> int:
    """XLA writes groups as lists of devices, as [groups, size], or as axes of a mesh."""
    if (match := _MESH.search(line)) is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])  # 'a', or a part of it 'a':(1)2
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if (match := _IOTA.search(line)) is not None:
        return int(match[2])
    match = _GROUPS.search(line)
    return len(match[1].split(",")) if match else 2  # a permute has pairs


def _sent(kind: str, size: int, group: int) -> int:
    if kind == "collective-permute":
        return size
    factor = {"all-reduce": 2 / group, "reduce-scatter": 1.0}.get(kind, 1 / group)
    return round((group - 1) * factor * size)


def aligned(table: list[tuple[str, ...]]) -> str:
    """Rows of text as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )
