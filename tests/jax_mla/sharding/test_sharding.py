"""Meshes and rules: where parameters go, and what is refused."""

import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from numerics import assert_close
from weights import random_params

import jax_mla
from jax_mla import ShardingRules
from jax_mla.sharding import layouts
from jax_mla.sharding.layouts import LAYOUTS
from jax_mla.sharding.placement import partition_spec


def test_mesh_has_all_axes_and_they_are_auto():
    mesh = jax_mla.make_mesh(data=2, tensor=4)
    assert dict(mesh.shape) == {
        "data": 2,
        "fsdp": 1,
        "tensor": 4,
        "expert": 1,
        "stage": 1,
        "sequence": 1,
    }
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(ValueError, match="data=4, tensor=4 needs 16 devices, found 8"):
        jax_mla.make_mesh(data=4, tensor=4)


@pytest.mark.parametrize("size", [0, -1, 2.0, "2"])
def test_mesh_sizes_are_positive(size):
    with pytest.raises(ValueError, match=f"data must be an integer of at least 1, got {size!r}"):
        jax_mla.make_mesh(data=size)


def test_rules_name_a_spec():
    assert partition_spec(ShardingRules(), ("layers", "expert", "embed", "mlp")) == P(
        None, "expert", "fsdp", "tensor"
    )
    replicated = ShardingRules(vocab=None, embed=None)
    assert partition_spec(replicated, ("vocab", "embed")) == P(None, None)


def test_rules_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="logical axis 'headz' has no rule"):
        partition_spec(ShardingRules(), ("headz",))
    with pytest.raises(ValueError, match="use mesh axis 'tensor' twice"):
        partition_spec(ShardingRules(embed="tensor"), ("embed", "mlp"))


def test_axis_that_does_not_divide_is_refused():
    mesh = jax_mla.make_mesh(tensor=4)
    with pytest.raises(ValueError, match="axis 'heads' of size 6 cannot be split over 4 devices"):
        jax_mla.param_shardings(jax_mla.tiny(), mesh)


def test_every_parameter_has_a_sharding():
    for preset in (jax_mla.tiny(), jax_mla.v2_lite(), jax_mla.v3()):
        mesh = jax_mla.make_mesh(tensor=2, expert=2)
        shardings = jax_mla.param_shardings(preset, mesh)
        shapes = jax.eval_shape(lambda config=preset: jax_mla.init(jax.random.key(0), config))
        assert jax.tree.structure(shardings) == jax.tree.structure(shapes)


def test_sharded_parameters_give_the_same_logits():
    config = jax_mla.tiny()
    params = random_params(config)
    shardings = jax_mla.param_shardings(config, jax_mla.make_mesh(fsdp=2, tensor=2, expert=2))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 16)))
    got = jax_mla.forward(jax.device_put(params, shardings), config, tokens)
    assert_close(got, jax_mla.forward(params, config, tokens), "float32")


def test_layouts_by_name_are_all_that_are_published():
    functions = {n: v for n, v in vars(layouts).items() if inspect.isfunction(v)}
    assert functions == LAYOUTS
    for layout in LAYOUTS.values():
        assert isinstance(layout(), ShardingRules) and layout.__doc__


def test_rules_and_layouts_need_no_jax():
    code = (
        "import sys, jax_mla.sharding.layouts, jax_mla.sharding.divide, jax_mla.analysis.memory; "
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
