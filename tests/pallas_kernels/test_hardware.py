"""Facts about devices, asked of stand-ins for devices that are not here."""

import dataclasses
import subprocess
import sys

import jax
import pytest

from pallas_kernels import hardware


@dataclasses.dataclass
class Device:
    """What JAX says of a GPU."""

    device_kind: str
    compute_capability: str | None = None
    core_count: int | None = None
    platform: str = "gpu"


H200 = Device("NVIDIA H200", "9.0", 132)


def test_facts_of_an_h200():
    assert hardware.compute_capability(H200) == (9, 0)
    assert hardware.num_sms(H200) == 132
    assert hardware.peak(H200) == hardware.Peak(989e12, 4.8e12)
    assert hardware.missing_gpu((9, 0), H200) is None


@pytest.mark.parametrize(
    ("kind", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H100 PCIe", 2.0e12),
        ("NVIDIA A100-SXM4-40GB", 1.555e12),
        ("NVIDIA L40S", 0.864e12),
        ("NVIDIA L4", 0.3e12),
    ],
)
def test_peak_goes_by_the_longest_name_that_fits(kind, bandwidth):
    assert hardware.peak(Device(kind)).bandwidth_bytes == bandwidth


def test_unknown_gpu_has_no_figures():
    unknown = Device("NVIDIA Z999", "99.0", 7)
    assert hardware.peak(unknown) is None
    assert hardware.num_sms(unknown) == 7


@pytest.mark.parametrize(
    ("device", "found"),
    [
        (Device("cpu", platform="cpu"), "platform 'cpu'"),
        (Device("NVIDIA A100-SXM4-40GB", "8.0"), "8.0"),
        (Device("AMD", "gfx942", platform="gpu"), "platform 'gpu'"),
    ],
)
def test_missing_gpu_says_what_was_found(device, found):
    assert hardware.missing_gpu((9, 0), device) == (
        f"needs an NVIDIA GPU of compute capability 9.0, got {found}"
    )


def test_a_cpu_has_no_capability_and_plans_as_an_h200():
    cpu = jax.devices("cpu")[0]
    assert hardware.compute_capability(cpu) is None
    assert hardware.peak(cpu) is None
    assert hardware.num_sms(cpu) == 132


def test_import_starts_no_backend():
    code = """if True:
        import pallas_kernels, pallas_kernels.flash_mla, pallas_kernels.hardware
        from jax._src import xla_bridge
        assert not xla_bridge.backends_are_initialized()
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
