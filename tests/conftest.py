"""Weather that every test runs in: eight fake CPU devices, no silent broadcasting, fixed seeds."""

import zlib

import hypothesis
import jax
import numpy as np
import pytest

# Read when the CPU backend starts, which no import of ours may do.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline: the first example compiles. Derandomised: a red test is red for everyone.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("project")


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Random numbers seeded by the test's own name, so that tests do not depend on their order."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


def pytest_collection_modifyitems(items):
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu and jax.default_backend() != "gpu":
        found = jax.default_backend()
        for item in needs_gpu:
            item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU, found {found!r}"))
