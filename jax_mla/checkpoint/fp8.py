"""FP8 weights in blocks: e4m3 bytes and one float32 multiplier per block of (128, 128). No jax.

The multiplier is published as `weight_scale_inv`; it multiplies, despite the name. Blocks start at
row and column 0, and those at the far edges may be partial, so the block size cannot be computed by
dividing the weight's size by the grid's.

Source: DeepSeek-V3, arXiv 2412.19437, section 3.3; its README_WEIGHTS.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

DEFAULT_BLOCK = (128, 128)
# All 256 values; a table look-up is three times as fast as numpy's own conversion.
_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def block_of(quantization: Mapping[str, Any] | None) -> tuple[int, int]:
    """The block size in a config.json's `quantization_config`; other schemes are refused."""
    if not quantization:
        return DEFAULT_BLOCK
    if not isinstance(quantization, Mapping):
        raise ValueError(f"quantization_config must be an object, got {quantization!r:.60}")
    method, fmt = quantization.get("quant_method"), quantization.get("fmt", "e4m3")
    if (method, fmt) != ("fp8", "e4m3"):
        raise ValueError(
            f"quantization {method!r} with fmt={fmt!r} is not supported, only 'fp8' with fmt='e4m3'"
        )
    block = quantization.get("weight_block_size", DEFAULT_BLOCK)
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or any(type(size) is not int or size < 1 for size in block)
    ):
        raise ValueError(f"weight_block_size must be two sizes such as [128, 128], got {block!r}")
    return (block[0], block[1])


def grid_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """The shape of the grid of multipliers for a weight [out, in]."""
    return (math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))


def dequantise(
    weight: np.ndarray,
    scale: np.ndarray,
    rows: np.ndarray,
    cols: np.ndarray,
    block: tuple[int, int],
    out: np.ndarray,
) -> None:
    """out[i, j] = weight[i, j] * scale[rows[i] // block[0], cols[j] // block[1]], in float32.

    Args:
      weight: a slice of an FP8 weight, [len(rows), len(cols)].
      scale: the grid of the whole weight, float32.
      rows: index into the whole weight of each row of the slice, ascending; `cols` likewise.
      out: receives the result, in any floating dtype; rounded once.
    """
    row_block, col_block = rows // block[0], cols // block[1]
    starts = np.flatnonzero(np.diff(row_block, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        values = _VALUES[weight[start:stop].view(np.uint8)]
        values *= scale[row_block[start], col_block]
        out[start:stop] = values
