"""What the processes of one run must do together; trivial with a single process."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

from jax_mla.params import Params


def is_first_process() -> bool:
    """Whether this is the process that writes what only one process may write."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has called it; `name` must be the same in all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process, so that they stop together or not at all."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def of_first_process(number: int) -> int:
    """The first process's number, in every process."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.array(number)))


def gathered(params: Params) -> Params | None:
    """All parameters in the host memory of the first process; None in the others.

    Besides its own shards, every device holds one layer of one leaf at a time. With a single
    process, returns the parameters unchanged.
    """
    if jax.process_count() == 1:
        return params

    def gather(x: jax.Array) -> np.ndarray:
        if x.ndim < 3:  # leaves with fewer axes are small, or not stacked
            return multihost_utils.process_allgather(x, tiled=True)
        whole = np.empty(x.shape, x.dtype) if is_first_process() else np.empty(0)
        for layer in range(len(x)):
            part = multihost_utils.process_allgather(x[layer], tiled=True)
            if is_first_process():
                whole[layer] = part
        return whole

    host = jax.tree.map(gather, params)
    return host if is_first_process() else None
