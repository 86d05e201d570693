"""Weather that every test runs in: eight fake CPU devices, no silent broadcasting, fixed seeds."""

import gc
import zlib

import hypothesis
import jax
import numpy as np
import pytest
from kernel_tools import aot, interpreter

# Read when the CPU backend starts, which no import of ours may do.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes millions of objects, most of which stay: to look for cycles among them again and
# again takes a tenth of the time.
gc.set_threshold(100_000, 20, 50)

# No deadline: the first example compiles. Derandomised: a red test is red for everyone.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("project")


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Random numbers seeded by the test's own name, so that tests do not depend on their order."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """XLA's CPU backend maps memory for every program, and a process may have 65,530 such maps."""
    yield
    jax.clear_caches()


def pytest_addoption(parser):
    text = "print a failure when it happens and not only at the end, for runs that may be cut off"
    parser.addoption("--failures-at-once", action="store_true", help=text)


def pytest_configure(config):
    # pytest-xdist's workers report to the process that started them, which prints.
    if config.getoption("--failures-at-once") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailuresAtOnce(config))


class FailuresAtOnce:
    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        if report.failed:
            terminal = self.config.pluginmanager.get_plugin("terminalreporter")
            terminal.ensure_newline()
            terminal.write_line(f"FAILED in {report.when}: {report.nodeid}")
            terminal.write_line(report.longreprtext)
            terminal.flush()


def pytest_collection_modifyitems(items):
    for marker, why_not in WHY_NOT.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = why_not() if marked else None
        for item in marked:
            item.user_properties.append(("kind", marker))
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter):
    """A line for every kind of kernel test: how many ran, or why none did."""
    for marker, why_not in WHY_NOT.items():
        found = []
        for outcome in ("passed", "failed", "error", "skipped"):
            reports = terminalreporter.stats.get(outcome, [])
            kinds = [kind for r in reports for _, kind in getattr(r, "user_properties", ())]
            found += [f"{kinds.count(marker)} {outcome}"] if marker in kinds else []
        if found:
            reason = f" ({why_not()})" if why_not() else ""
            terminalreporter.write_line(f"{marker}: {', '.join(found)}{reason}")


def _why_no_gpu() -> str | None:
    found = jax.default_backend()
    return None if found == "gpu" else f"needs an NVIDIA GPU, got {found!r}"


WHY_NOT = {"kernel_sim": interpreter.why_not, "kernel_aot": aot.why_not, "gpu": _why_no_gpu}
