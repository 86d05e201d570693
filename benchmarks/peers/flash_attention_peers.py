"""Flash attention against cuDNN and tokamax, in the benchmark of our own kernels.

python benchmarks/peers/flash_attention_peers.py [--smoke]
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import bench
from pallas_kernels.flash_attention.api import IMPLEMENTATIONS

OP = "flash_attention"
ROW_TOKENS = 128  # rows are a multiple of this; JAX refuses gradients of an odd number


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    bench.add_options(parser)
    options = parser.parse_args(arguments)
    workloads = bench.workloads(parser, options, [OP])[OP]
    about, results = bench.environment(), []
    print(f"{bench.header(about)}\n\n{OP}\n{bench.COLUMNS}")
    for workload in workloads:
        ours = [one.name for one in IMPLEMENTATIONS]
        for result in bench.measure(OP, workload, ours, peers(workload)):
            results.append(result)
            bench.write_json(options.json, about, results)
    return 1 if any(result.is_wrong for result in results) else 0


def peers(workload) -> dict[str, Callable]:
    """By name, a function that makes a peer's function; packed documents have two layouts."""
    if workload.num_documents > 1:
        return {"cudnn": cudnn_packed, "cudnn-rows": cudnn_rows, "tokamax-rows": tokamax_rows}
    return {"cudnn": cudnn, "tokamax": tokamax}


@dataclasses.dataclass(frozen=True)
class Rows:
    """Attention that takes packed documents as rows of a batch, padded to whole tiles.

    Attributes:
      lengths: of the documents of every sequence.
      attend: of q, k, v and the int32 lengths of their rows.
    """

    lengths: np.ndarray
    attend: Callable[..., Any]

    def __call__(self, q, k, v):
        num_sequences = len(q) // len(self.lengths)
        return self.attend(q, k, v, jnp.asarray(np.tile(self.lengths, num_sequences), jnp.int32))

    def arrange(self, arrays):
        """Unpacks documents to rows, padded with zeros; not part of what is timed."""
        places, (num_rows, size) = self._places()

        def rows(x):
            padded = jnp.zeros((len(x), num_rows * size, *x.shape[2:]), x.dtype)
            return padded.at[:, places].set(x).reshape(-1, size, *x.shape[2:])

        return jax.tree.map(rows, arrays)

    def restore(self, arrays):
        """The inverse of `arrange`, so that results can be compared."""
        places, (num_rows, size) = self._places()
        return jax.tree.map(
            lambda x: x.reshape(-1, num_rows * size, *x.shape[2:])[:, places], arrays
        )

    def _places(self):
        """Indices of the tokens in the rows of a sequence; number and size of these rows."""
        size = -(-self.lengths.max() // ROW_TOKENS) * ROW_TOKENS
        is_token = np.arange(size) < self.lengths[:, None]
        return np.flatnonzero(is_token), is_token.shape


def cudnn(workload):
    """NVIDIA's library, by what jax.nn calls, because jax.nn refuses values narrower than keys."""
    _refuse(workload)
    return _cudnn(workload, "CAUSAL" if workload.causal else "NO_MASK")


def cudnn_packed(workload):
    """Documents as they are packed; cuDNN takes the place where each begins."""
    _refuse(workload)
    if workload.K != workload.H:
        raise NotImplementedError(
            f"JAX gives it one list of places for keys of {workload.K} and values of {workload.H}"
        )
    attend, sizes = _cudnn(workload, _padded(workload)), workload.document_lengths()
    begins = np.concatenate([[0], np.cumsum(sizes[:-1]), [-1]])  # -1: there is no further one

    def run(q, k, v):
        lengths, places = (
            jnp.asarray(np.tile(row, (len(q), 1)), jnp.int32) for row in (sizes, begins)
        )
        return attend(
            q, k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=places, kv_offsets=places
        )

    return run


def cudnn_rows(workload):
    """One document per row, and the lengths of the rows."""
    _refuse(workload)
    attend = _cudnn(workload, _padded(workload))

    def run(q, k, v, lengths):
        return attend(q, k, v, q_seqlen=lengths, kv_seqlen=lengths)

    return Rows(workload.document_lengths(), run)


def _cudnn(workload, mask: str) -> Callable[..., Any]:
    from jax._src.cudnn import fused_attention_stablehlo as fused

    scale = workload.K**-0.5
    return functools.partial(
        fused.dot_product_attention, scale=scale, mask_type=fused.MaskType[mask]
    )


def _padded(workload) -> str:
    return "PADDING_CAUSAL" if workload.causal else "PADDING"


def tokamax(workload):
    """tokamax's Mosaic GPU kernel, with the configuration that it chooses."""
    _refuse(workload)
    return functools.partial(_tokamax(), is_causal=workload.causal)


def tokamax_rows(workload):
    """One document per row; keys have lengths, and queries past them have no cotangent."""
    _refuse(workload)
    attend = functools.partial(_tokamax(), is_causal=workload.causal)
    return Rows(
        workload.document_lengths(),
        lambda q, k, v, lengths: attend(q, k, v, key_value_seq_lengths=lengths),
    )


def _tokamax() -> Callable[..., Any]:
    try:
        import tokamax as package
    except ImportError as error:
        raise NotImplementedError(f"tokamax cannot be imported: {error}") from error
    return functools.partial(package.dot_product_attention, implementation="mosaic_gpu")


def _refuse(workload) -> None:
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"needs an NVIDIA GPU, got {jax.default_backend()!r}")
    if workload.deterministic:
        raise NotImplementedError("stands beside our faster gradients")
    if workload.T and workload.causal:
        raise NotImplementedError("aligns the first query with the first key, not the last ones")
    if workload.dtype not in ("bfloat16", "float16"):
        raise NotImplementedError(f"takes no {workload.dtype}")


if __name__ == "__main__":
    sys.exit(main())
