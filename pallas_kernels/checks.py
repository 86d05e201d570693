"""Input checks that every op shares: sizes, and values where the host can read them."""

import jax
import numpy as np
from jax.core import Tracer

FLOATS = ("float32", "bfloat16", "float16")


def require(condition: bool | np.bool_, message: str) -> None:
    """Raises ValueError(message) unless `condition`."""
    if not condition:
        raise ValueError(message)


def require_float(op: str, **arrays) -> None:
    """All arrays have the same dtype, one of FLOATS."""
    names = list(arrays)
    for name in names:
        dtype = str(arrays[name].dtype)
        require(dtype in FLOATS, f"{op}: {name} must have a dtype of {list(FLOATS)}, got {dtype}")
        first = names[0]
        require(
            arrays[name].dtype == arrays[first].dtype,
            f"{op}: {name} must have {first}'s dtype {arrays[first].dtype}, got {dtype}",
        )


def require_integer(op: str, **arrays) -> None:
    """Every array holds integers."""
    for name, array in arrays.items():
        require(
            np.issubdtype(array.dtype, np.integer),
            f"{op}: {name} must have an integer dtype, got {array.dtype}",
        )


def require_rank(op: str, **ranks) -> None:
    """Every keyword is (array, rank), by the name of the argument; the array has that rank."""
    for name, (array, rank) in ranks.items():
        require(
            hasattr(array, "shape") and hasattr(array, "dtype"),
            f"{op}: {name} must be an array, got {type(array).__name__}",
        )
        require(
            len(array.shape) == rank,
            f"{op}: {name} must have rank {rank}, got shape {tuple(array.shape)}",
        )


def require_shape(op: str, name: str, array, shape: tuple[int, ...], reason: str = "") -> None:
    """`array` has that shape; the reason says which other argument asks for it."""
    because = f" for {reason}" if reason else ""
    require(
        tuple(array.shape) == tuple(shape),
        f"{op}: {name} must have shape {tuple(shape)}{because}, got {tuple(array.shape)}",
    )


def host_values(array) -> np.ndarray | None:
    """The values where this process can read them by itself, otherwise None.

    It cannot while they are traced, nor where parts of them are on other hosts only; an array
    replicated over several hosts can be read.
    """
    if isinstance(array, Tracer):
        return None
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        return None
    return np.asarray(array)
