"""Compute capability, shared memory and peak rates of a device. Asks JAX only when called."""

import dataclasses
from typing import Any

import jax

SM90 = (9, 0)  # compute capability of Hopper
H200_NUM_SMS = 132
WGMMA_ROWS = 64  # rows of Hopper's matmul instruction, the least that a warpgroup multiplies


@dataclasses.dataclass(frozen=True)
class Peak:
    """Vendor figures: dense bfloat16 matmul with float32 sums, and memory, per second."""

    bf16_flops: float
    bandwidth_bytes: float


# NVIDIA's data sheets, without sparsity. Keys are beginnings of JAX's `device_kind`; a longer key
# wins over its own beginning.
PEAKS = {
    "NVIDIA B200": Peak(2250e12, 8.0e12),
    "NVIDIA H200": Peak(989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": Peak(989e12, 3.35e12),
    "NVIDIA H100 PCIe": Peak(756e12, 2.0e12),
    "NVIDIA H800": Peak(989e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 2.039e12),
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 1.555e12),
    "NVIDIA A100 80GB PCIe": Peak(312e12, 1.935e12),
    "NVIDIA L40S": Peak(362e12, 0.864e12),
    "NVIDIA L4": Peak(121e12, 0.3e12),
    "NVIDIA GeForce RTX 4090": Peak(165e12, 1.008e12),
}

# Shared memory that one CTA may use on Hopper: CUDA programming guide, table of technical
# specifications.
SM90_SHARED_MEMORY_BYTES = 227 * 1024


def compute_capability(device: Any = None) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU, such as (9, 0); None for anything else."""
    text = getattr(_device(device), "compute_capability", None)
    parts = str(text).split(".")
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and "".join(parts).isdigit() else None


def num_sms(device: Any = None) -> int:
    """Multiprocessors of a GPU; an H200's elsewhere, so that plans can be made anywhere."""
    found = _device(device)
    return found.core_count if found.platform == "gpu" else H200_NUM_SMS


def peak(device: Any = None) -> Peak | None:
    """Vendor peak of the device, or None for one that is not listed."""
    kind = _device(device).device_kind
    names = [name for name in PEAKS if kind.startswith(name)]
    return PEAKS[max(names, key=len)] if names else None


def missing_gpu(wanted: tuple[int, int], device: Any = None) -> str | None:
    """Why a kernel for compute capability `wanted` cannot run, or None."""
    found = compute_capability(device)
    if found == wanted:
        return None
    have = f"{found[0]}.{found[1]}" if found else f"platform {_device(device).platform!r}"
    return f"needs an NVIDIA GPU of compute capability {wanted[0]}.{wanted[1]}, got {have}"


def _device(device: Any) -> Any:
    return jax.devices()[0] if device is None else device
