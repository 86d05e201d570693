"""`jax-mla doctor`: versions, devices, and for every op which implementation would run here."""

import argparse
import importlib.metadata
import platform
import shutil
from typing import Any

from jax_mla.cli import report

PACKAGES = (
    "jax-mla",
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "flax",
    "numpy",
    "ml_dtypes",
    "safetensors",
    "optax",
    "tokenizers",
)
INSTALL_GPU = "pip install 'jax-mla[cuda]'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    devices, problem = _devices()
    ops = {} if problem else _ops()
    results = {
        "versions": _versions(),
        "devices": devices,
        "ops": ops,
        "advice": problem or _advice(devices),
    }
    if args.json:
        report.print_json(results)
    else:
        _print(results)
    return 1 if problem else 0


def _print(results: dict[str, Any]) -> None:
    versions = [[name, version or "not installed"] for name, version in results["versions"].items()]
    report.print_table("versions", ["package", "version"], versions)
    report.print_table(
        "devices",
        ["device", "kind", "compute capability", "memory"],
        [
            [
                f"{one['platform']}:{one['id']}",
                one["kind"],
                one["compute_capability"] or "-",
                report.size(one["memory_bytes"]) if one["memory_bytes"] else "-",
            ]
            for one in results["devices"]
        ],
    )
    report.print_table(
        "implementations for DeepSeek-V3's shapes in bfloat16",
        ["op", "implementation", "here"],
        [
            [op, one["name"], one["why_not"] or ("runs" if one["is_chosen"] else "could run")]
            for op, table in results["ops"].items()
            for one in table
        ],
    )
    print(results["advice"])


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _devices() -> tuple[list[dict[str, Any]], str | None]:
    """The devices that jax finds, or the reason why it finds none."""
    import jax

    try:
        devices = jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # jax asserts where a platform has no plug-in
        reason = " ".join(str(error).split()) or "the platform that was asked for is not installed"
        return [], f"jax finds no device: {reason}"
    return [
        {
            "id": device.id,
            "platform": device.platform,
            "kind": device.device_kind,
            "compute_capability": getattr(device, "compute_capability", None),
            "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        }
        for device in devices
    ], None


def _ops() -> dict[str, list[dict[str, Any]]]:
    """For each op and implementation, why it would not run a call of DeepSeek-V3's shapes."""
    from jax import ShapeDtypeStruct as Shape

    from pallas_kernels import dispatch
    from pallas_kernels.flash_attention.api import IMPLEMENTATIONS as FLASH_ATTENTION
    from pallas_kernels.grouped_matmul.api import IMPLEMENTATIONS as GROUPED_MATMUL
    from pallas_kernels.mla_decode.api import IMPLEMENTATIONS as MLA_DECODE

    lengths, table = Shape((4,), "int32"), Shape((4, 32), "int32")
    q, pages = Shape((4, 1, 128, 576), "bfloat16"), Shape((128, 64, 576), "bfloat16")
    qk, value = Shape((1, 2048, 128, 192), "bfloat16"), Shape((1, 2048, 128, 128), "bfloat16")
    rows, experts = Shape((4096, 7168), "bfloat16"), Shape((256, 7168, 2048), "bfloat16")
    attention = {"causal": True, "scale": 192**-0.5}
    calls = {
        "mla_decode": dispatch.explain(
            "mla_decode",
            MLA_DECODE,
            q,
            pages,
            table,
            lengths,
            latent_dim=512,
            plan=None,
            **attention,
        ),
        "flash_attention": dispatch.explain(
            "flash_attention",
            FLASH_ATTENTION,
            qk,
            qk,
            value,
            segment_ids=None,
            lengths=None,
            return_lse=False,
            deterministic=False,
            **attention,
        ),
        "grouped_matmul": dispatch.explain(
            "grouped_matmul",
            GROUPED_MATMUL,
            rows,
            experts,
            Shape((256,), "int32"),
            first_group=0,
            preferred_element_type=rows.dtype,
        ),
    }
    return {op: _chosen_first_that_can(reasons) for op, reasons in calls.items()}


def _chosen_first_that_can(reasons: list[tuple[str, str | None]]) -> list[dict[str, Any]]:
    chosen = next(name for name, why_not in reasons if why_not is None)
    return [{"name": n, "why_not": why, "is_chosen": n == chosen} for n, why in reasons]


def _advice(devices: list[dict[str, Any]]) -> str:
    if any(one["platform"] == "gpu" for one in devices):
        return "jax sees a GPU: nothing to install."
    if shutil.which("nvidia-smi"):
        return f"This machine has an NVIDIA driver, but jax sees no GPU: {INSTALL_GPU}"
    return f"jax runs on the CPU. On a machine with an NVIDIA GPU: {INSTALL_GPU}"
