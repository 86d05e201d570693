"""Slices of a parameter leaf, straight from the files and in our layout. No jax."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jax_mla.checkpoint import fp8
from jax_mla.checkpoint.matching import Matched
from jax_mla.checkpoint.safetensors_file import FP8
from jax_mla.config.leaves import Leaf

Bounds = tuple[tuple[int, int], ...]  # (start, stop) for each axis


def read_leaf(matched: Matched, leaf: Leaf, bounds: Bounds, dtype: np.dtype) -> np.ndarray:
    """leaf[bounds] in `dtype`, reading those elements of the files and no others.

    The result is fresh memory in the published order, seen through a transpose: files are copied
    straight through, and the device does the transposing.
    """
    num_lead = len(leaf.lead_shape)
    lead, inner = bounds[:num_lead], bounds[num_lead:]
    part = list(leaf.cut)
    for axis, (start, stop) in zip(leaf.order, inner, strict=True):
        first = leaf.cut[axis][0]
        part[axis] = (first + start, first + stop)
    lead_sizes = tuple(stop - start for start, stop in lead)
    buffer = np.empty((*lead_sizes, *(stop - start for start, stop in part)), dtype)

    def fill(index: tuple[int, ...]) -> None:
        at = tuple(start + i for (start, _), i in zip(lead, index, strict=True))
        _read_tensor(matched, leaf, leaf.name_at(at), tuple(part), buffer[index])

    with ThreadPoolExecutor() as threads:
        list(threads.map(fill, np.ndindex(*lead_sizes)))
    return buffer.transpose(*range(num_lead), *(num_lead + axis for axis in leaf.order))


def _read_tensor(matched: Matched, leaf: Leaf, name: str, bounds: Bounds, out: np.ndarray) -> None:
    """Fills `out` with the part `bounds` of a published tensor seen as `leaf.split`."""
    stored = matched.tensors[name]
    values = stored.read(leaf.split, bounds)
    if stored.dtype != FP8:
        out[...] = values
        return
    grid = matched.scale_of(name)
    scale = grid.read(grid.shape, tuple((0, size) for size in grid.shape)).astype(np.float32)
    num_out_axes = 1
    while math.prod(leaf.split[:num_out_axes]) < leaf.published_shape[0]:
        num_out_axes += 1
    rows = _positions(leaf.split[:num_out_axes], bounds[:num_out_axes])
    cols = _positions(leaf.split[num_out_axes:], bounds[num_out_axes:])
    matrix = (len(rows), len(cols))
    fp8.dequantise(values.reshape(matrix), scale, rows, cols, matched.block, out.reshape(matrix))


def _positions(shape: tuple[int, ...], bounds: Bounds) -> np.ndarray:
    """Positions in the flattened axis of the elements in `bounds` of `shape`."""
    inside = tuple(slice(start, stop) for start, stop in bounds)
    return np.arange(math.prod(shape)).reshape(shape)[inside].ravel()
