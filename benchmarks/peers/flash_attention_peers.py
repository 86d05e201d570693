"""Flash attention against cuDNN and tokamax, in the benchmark of our own kernels.

python benchmarks/peers/flash_attention_peers.py [--smoke]
"""

import argparse
import functools
import sys

import jax

from pallas_kernels import bench
from pallas_kernels.flash_attention.api import IMPLEMENTATIONS

OP = "flash_attention"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    bench.add_options(parser)
    options = parser.parse_args(arguments)
    about, results = bench.environment(), []
    print(f"{bench.header(about)}\n\n{OP}\n{bench.COLUMNS}")
    for workload in bench.workloads(OP, options):
        ours = [one.name for one in IMPLEMENTATIONS]
        peers = {"cudnn": cudnn, "tokamax": tokamax}
        for result in bench.measure(OP, workload, ours, peers):
            results.append(result)
            bench.write_json(options.json, about, results)
    return 1 if any(result.is_wrong for result in results) else 0


def cudnn(workload):
    """NVIDIA's library, through what jax.nn calls: jax.nn refuses values narrower than keys."""
    _refuse(workload)
    if workload.T and workload.causal:
        raise NotImplementedError("aligns the first query with the first key, not the last ones")
    from jax._src.cudnn import fused_attention_stablehlo as fused

    mask = fused.MaskType.CAUSAL if workload.causal else fused.MaskType.NO_MASK
    scale = workload.K**-0.5
    return functools.partial(fused.dot_product_attention, scale=scale, mask_type=mask)


def tokamax(workload):
    """Its Mosaic GPU kernel, with the configuration that it chooses."""
    _refuse(workload)
    try:
        import tokamax as package
    except ImportError as error:
        raise NotImplementedError(f"tokamax cannot be imported: {error}") from error
    attend = functools.partial(package.dot_product_attention, implementation="mosaic_gpu")
    return functools.partial(attend, is_causal=workload.causal)


def _refuse(workload) -> None:
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"needs an NVIDIA GPU, found {jax.default_backend()!r}")
    if workload.deterministic:
        raise NotImplementedError("stands beside our faster gradients")
    if workload.num_documents > 1:
        raise NotImplementedError("takes no segments")
    if workload.dtype not in ("bfloat16", "float16"):
        raise NotImplementedError(f"takes no {workload.dtype}")


if __name__ == "__main__":
    sys.exit(main())
