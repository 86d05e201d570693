"""Meshes of the user's own: some of our axes are enough, and all else is refused in a sentence."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from numerics import assert_close

import jax_mla
from jax_mla.sharding import Placement, ShardingRules, layouts
from jax_mla.training import (
    Batch,
    Precision,
    Recipe,
    abstract_state,
    init_state,
    pipeline,
    place_batch,
    state_shardings,
    train,
    train_step,
)

RECIPE = Recipe(num_steps=3, precision=Precision(compute="float32"))


def auto_mesh(**sizes):
    types = (AxisType.Auto,) * len(sizes)
    devices = jax.devices()[: int(np.prod(tuple(sizes.values())))]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


@pytest.fixture(scope="module")
def params(config):
    return jax_mla.init(jax.random.key(0), config)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 256, (4, 8))


@pytest.fixture(scope="module")
def one_step(config, tokens):
    """The state after a step from seed 0, and its metrics, on a mesh."""

    def step(mesh=None, rules=None):
        state = init_state(jax.random.key(0), config, recipe=RECIPE, mesh=mesh, rules=rules)
        batch = place_batch(Batch(tokens), mesh, rules, config=config)
        return train_step(state, config, batch, recipe=RECIPE, mesh=mesh, rules=rules)

    return step


@pytest.fixture(scope="module")
def on_no_mesh(config, params, tokens, one_step):
    return jax_mla.forward(params, config, tokens), one_step()


SUBSETS = {
    "data": ({"data": 4}, None),
    "tensor": ({"tensor": 2}, None),
    "zero1": ({"data": 4}, layouts.zero1()),
    "fsdp": ({"fsdp": 4}, None),
    "expert": ({"expert": 4}, layouts.dp_attention_ep()),
    "sequence": ({"sequence": 2}, layouts.context_parallel()),
    "in another order": ({"tensor": 2, "data": 2}, None),
    "split over what is absent": ({"tensor": 2}, layouts.zero2()),
}
SLOW = {"zero1", "fsdp", "expert", "sequence", "in another order", "split over what is absent"}


@pytest.mark.parametrize(
    ("sizes", "rules"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, case in SUBSETS.items()
    ],
)
def test_a_mesh_of_some_axes_computes_the_same(
    sizes, rules, config, params, tokens, one_step, on_no_mesh
):
    """`forward` and `train_step`, whose state stays where it was put."""
    mesh = auto_mesh(**sizes)
    logits, (_, metrics) = on_no_mesh
    placed = jax.device_put(params, jax_mla.param_shardings(config, mesh, rules))
    assert_close(jax_mla.forward(placed, config, tokens, rules=rules), logits, "float32")
    state, found = one_step(mesh, rules)
    assert_close(found.loss, metrics.loss, "float32")
    assert_close(found.grad_norm, metrics.grad_norm, "float32")
    np.testing.assert_array_equal(found.load, metrics.load)
    wanted = state_shardings(config, mesh, rules, recipe=RECIPE)
    is_kept = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, wanted)
    assert all(jax.tree.leaves(is_kept))


@pytest.mark.parametrize("layout", ["zero1", "tensor_parallel", "dp_attention_ep"])
def test_an_absent_axis_is_one_of_size_1(layout, config):
    """Of shardings, abstract meshes included."""
    rules = layouts.LAYOUTS[layout]()
    for sizes in ({"data": 2}, {"tensor": 2, "expert": 2}):
        abstract = AbstractMesh(
            tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
        )
        whole = abstract_state(config, recipe=RECIPE, mesh=jax_mla.make_mesh(**sizes), rules=rules)
        for mesh in (auto_mesh(**sizes), abstract):
            some = abstract_state(config, recipe=RECIPE, mesh=mesh, rules=rules)
            shards = [
                [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(s)] for s in (some, whole)
            ]
            assert shards[0] == shards[1]


def test_rules_on_a_mesh_name_its_axes_only():
    rules = ShardingRules(vocab=("tensor", "data"), optimizer_split=("data", "fsdp"))
    on = rules.on(("data",))
    assert on.vocab == ("data",) and on.optimizer_split == ("data",) and on.gradient_split is None
    # A split over nothing is not the layout of the parameters.
    assert rules.on(("tensor",)).optimizer_split == ()
    assert ShardingRules().on(jax_mla.sharding.MESH_AXES) == ShardingRules()


NO_MESH = "mesh must be a mesh of devices, as from jax_mla.make_mesh, got"
OTHER = (
    "mesh axes must be some of data, fsdp, tensor, expert, stage, sequence, as in "
    "jax_mla.make_mesh, got 'x' among ('data', 'x')"
)
EXPLICIT = (
    "mesh axes must be of type Auto, as in jax_mla.make_mesh, got Explicit for 'data': "
    "jax.make_mesh takes axis_types"
)
REFUSED = {
    "a device": (lambda: jax.devices()[0], NO_MESH + " CpuDevice(id=0)"),
    "devices": (jax.devices, NO_MESH + " [CpuDevice(id=0), "),
    "a name": (lambda: "data", NO_MESH + " 'data'"),
    "another axis": (lambda: auto_mesh(data=2, x=2), OTHER),
    "explicit axes": (lambda: jax.make_mesh((8,), ("data",)), EXPLICIT),
    "one explicit axis": (
        lambda: jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]), EXPLICIT,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_no_mesh_of_ours_is_refused_everywhere(make, message, config, params, tmp_path):
    mesh, batch = make(), Batch(np.zeros((8, 8), np.int32))
    takers = {
        "param_shardings": lambda: jax_mla.param_shardings(config, mesh),
        "Placement": lambda: Placement(mesh, ShardingRules()),
        "load": lambda: jax_mla.load(tmp_path, mesh=mesh),
        "place_batch": lambda: place_batch(batch, mesh),
        "init_state": lambda: init_state(jax.random.key(0), config, recipe=RECIPE, mesh=mesh),
        "abstract_state": lambda: abstract_state(config, recipe=RECIPE, mesh=mesh),
        "state_shardings": lambda: state_shardings(config, mesh, recipe=RECIPE),
        "train": lambda: train(config, RECIPE, None, mesh=mesh),
        "Pipeline": lambda: pipeline.Pipeline(config, mesh),
    }
    if not isinstance(mesh, list):  # which jit itself refuses as a static argument
        state = abstract_state(config, recipe=RECIPE)
        step = lambda: train_step.lower(state, config, batch, recipe=RECIPE, mesh=mesh)  # noqa: E731
        takers["train_step"] = step
    for name, take in takers.items():
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            take()
        assert "\n" not in str(error.value), name
    if isinstance(mesh, jax.sharding.Mesh):
        placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        for call in (
            lambda: jax_mla.forward(placed, config, batch.tokens),
            lambda: jax_mla.generate(placed, config, batch.tokens, max_new_tokens=1),
        ):
            with pytest.raises(ValueError, match=re.escape(message)):
                call()


def test_a_mesh_of_no_devices_is_refused_where_arrays_are_made(config, tmp_path):
    mesh = jax_mla.make_mesh(data=2).abstract_mesh
    for make in (
        lambda: jax_mla.load(tmp_path, mesh=mesh),
        lambda: place_batch(Batch(np.zeros((8, 8), np.int32)), mesh),
        lambda: init_state(jax.random.key(0), config, recipe=RECIPE, mesh=mesh),
        lambda: train(config, RECIPE, None, mesh=mesh),
        lambda: pipeline.Pipeline(config, mesh),
    ):
        with pytest.raises(ValueError, match=re.escape(NO_MESH + " AbstractMesh(")):
            make()


def test_a_pipeline_needs_all_axes(config):
    message = "'sequence') of jax_mla.make_mesh, got axes ('stage',)"
    with pytest.raises(ValueError, match=re.escape(message)):
        pipeline.Pipeline(config, auto_mesh(stage=2))


def test_a_single_layer_takes_a_mesh_of_some_axes(config):
    place = Placement(auto_mesh(data=2).abstract_mesh, ShardingRules())
    assert place.axes("batch") == ("data",) and place.num_shards("heads") == 1
    jax.eval_shape(lambda: jax_mla.MoE(config, rngs=nnx.Rngs(0), placement=place))


def test_an_axis_that_shards_nothing_is_named(config, caplog):
    """Once, however often shardings are asked for."""
    for _ in range(2):  # of a size that no other test has
        jax_mla.param_shardings(config, jax_mla.make_mesh(data=2, sequence=3), layouts.ddp())
    assert caplog.messages == [
        "mesh axis 'sequence' of size 3 shards nothing by these rules: the devices along it all "
        "compute the same"
    ]
    caplog.clear()
    dense = dataclasses.replace(config, first_k_dense_replace=2)
    jax_mla.param_shardings(dense, auto_mesh(expert=7))
    assert "mesh axis 'expert' of size 7 shards nothing" in caplog.text
    caplog.clear()
    # Stages are for pipelines; the optimizer's state is sharded even where no parameter is.
    jax_mla.param_shardings(config, jax_mla.make_mesh(stage=2, data=4), layouts.zero1())
    jax_mla.param_shardings(config, jax_mla.make_mesh(expert=4))
    assert not caplog.messages
