"""A model cut into stages: which layers, which devices, and back again to the bit."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

import jax_mla
from jax_mla.sharding.placement import partition_spec
from jax_mla.training import Recipe, abstract_state
from jax_mla.training.pipeline import (
    Pipeline,
    exchange,
    join_params,
    join_state,
    split_params,
    split_state,
)


def numbered(shapes):
    """A tree of arrays in which every element of every array is another number."""
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(
        tree, [np.arange(x.size).reshape(x.shape).astype(x.dtype) + i for i, x in enumerate(leaves)]
    )


def params_of(config):
    return numbered(jax.eval_shape(lambda: jax_mla.init(jax.random.key(0), config)))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "layers"),
    [
        (61, 8, ((0, 8), (8, 16), (16, 24), (24, 32), (32, 40), (40, 47), (47, 54), (54, 61))),
        (3, 3, ((0, 1), (1, 2), (2, 3))),
        (3, 1, ((0, 3),)),
    ],
)
def test_layers_are_cut_evenly(moe_config, num_layers, num_stages, layers):
    config = dataclasses.replace(moe_config, num_hidden_layers=num_layers)
    assert Pipeline(config, jax_mla.make_mesh(stage=num_stages)).layers == layers


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)], ids=str)
def test_a_stage_has_its_layers_on_its_devices(moe_config, sizes):
    params = params_of(moe_config)
    mesh = jax_mla.make_mesh(stage=2, data=2, tensor=2)
    pipeline = Pipeline(moe_config, mesh, jax_mla.sharding.layouts.tensor_parallel(), sizes)
    first, last = split_params(params, pipeline)
    assert first.keys() == {"embed_tokens", "dense_layers"} | (
        {"moe_layers"} if sizes[0] > 1 else set()
    )
    assert last.keys() == {"moe_layers", "norm", "lm_head"}
    gate = last["moe_layers"]["mlp"]["gate"]["weight"]
    np.testing.assert_array_equal(gate, params["moe_layers"]["mlp"]["gate"]["weight"][-sizes[1] :])
    stage_axis = mesh.axis_names.index("stage")
    for stage, part in enumerate((first, last)):
        devices = set(np.take(mesh.devices, stage, stage_axis).flat)
        assert all(x.sharding.device_set == devices for x in jax.tree.leaves(part))
    head = last["lm_head"]["weight"]
    assert head.sharding.shard_shape(head.shape) == (32, 160)  # over tensor
    assert_same(join_params((first, last), pipeline), params)


def test_a_tied_embedding_is_in_the_first_and_the_last_stage(dense_config):
    params = params_of(dense_config)
    pipeline = Pipeline(dense_config, jax_mla.make_mesh(stage=3))
    parts = split_params(params, pipeline)
    assert [set(part) for part in parts] == [
        {"embed_tokens", "dense_layers"},
        {"dense_layers"},
        {"embed_tokens", "dense_layers", "norm"},
    ]
    assert_same(join_params(parts, pipeline), params)


def test_of_two_copies_of_an_embedding_the_first_is_joined(dense_config):
    pipeline = Pipeline(dense_config, jax_mla.make_mesh(stage=2))
    params = params_of(dense_config)
    first, last = split_params(params, pipeline)
    last["embed_tokens"]["weight"] = last["embed_tokens"]["weight"] + 1
    assert_same(join_params((first, last), pipeline), params)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_state_comes_back_to_the_bit(moe_config, optimizer):
    recipe = Recipe(num_steps=10, optimizer=optimizer)
    state = numbered(abstract_state(moe_config, recipe=recipe))
    pipeline = Pipeline(moe_config, jax_mla.make_mesh(stage=3))
    states = split_state(state, pipeline, recipe=recipe)
    joined = join_state(states, pipeline, recipe=recipe)
    assert_same(joined, state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": {"stage": 4}}, "4 stages need as many layers, the config has 3"),
        ({"layers_per_stage": (1, 1, 1)}, "must have 2 stages and 3 layers, it has 3 and 3"),
        ({"layers_per_stage": [2, 1]}, r"layers_per_stage must be a tuple, got \[2, 1\]"),
        ({"layers_per_stage": (2, 2)}, "must have 2 stages and 3 layers, it has 2 and 4"),
        ({"layers_per_stage": (3, 0)}, r"layers_per_stage\[1\] must be .* at least 1, got 0"),
        (
            {"mesh": {"stage": 2, "fsdp": 2}, "rules": jax_mla.ShardingRules(layers="fsdp")},
            "splits layers over 'stage', rules.layers is 'fsdp'",
        ),
        (
            {"rules": jax_mla.ShardingRules(batch=("data", "stage"))},
            r"over 'stage' and nothing else, rules.batch is \('data', 'stage'\)",
        ),
    ],
    ids=["few-layers", "stages", "list", "layers", "empty-stage", "rules", "rows"],
)
def test_a_cut_that_cannot_be_is_refused(moe_config, options, message):
    mesh = jax_mla.make_mesh(**options.pop("mesh", {"stage": 2}))
    with pytest.raises(ValueError, match=message):
        Pipeline(moe_config, mesh, **options)


def test_a_mesh_without_stages_is_refused(moe_config):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    with pytest.raises(ValueError, match=r"axes \('data', .*'stage', .* got axes \('data',\)"):
        Pipeline(moe_config, mesh)


@pytest.mark.parametrize(("num_stages", "of_embed"), [(2, ("fsdp", "stage")), (3, "fsdp")])
def test_between_steps_stages_share_what_they_can(moe_config, num_stages, of_embed):
    """A hidden size of 32 is split over two stages, not over three."""
    pipeline = Pipeline(moe_config, jax_mla.make_mesh(stage=num_stages))
    assert pipeline.joined_rules.embed == of_embed


@pytest.mark.parametrize("axes", [{"stage": 3}, {"stage": 2, "data": 2, "tensor": 2}], ids=str)
def test_zeros_keep_their_sign(moe_config, axes):
    """-0.0 + 0.0 is 0.0, and what is joined is added up."""
    params = jax.tree.map(lambda x: -0.0 * np.ones_like(x), params_of(moe_config))
    pipeline = Pipeline(
        moe_config, jax_mla.make_mesh(**axes), jax_mla.sharding.layouts.tensor_parallel()
    )
    joined = join_params(split_params(params, pipeline), pipeline)
    assert_same(joined, params)
    assert all(np.signbit(x).all() for x in jax.tree.leaves(joined))


def test_the_last_stage_is_given_the_first_ones_embedding(dense_config, monkeypatch):
    """By copies, and by the programs that several processes need."""
    pipeline = Pipeline(dense_config, jax_mla.make_mesh(stage=3, data=2))
    parts = split_params(params_of(dense_config), pipeline)
    parts[-1]["embed_tokens"]["weight"] = parts[-1]["embed_tokens"]["weight"] + 1
    spec = partition_spec(pipeline.rules, ("vocab", "embed"))
    for move in (exchange.move, exchange.passed_on):
        monkeypatch.setattr(exchange, "move", move)
        *others, last = exchange.with_first_embedding(parts, pipeline, spec)
        np.testing.assert_array_equal(
            last["embed_tokens"]["weight"], parts[0]["embed_tokens"]["weight"]
        )
        assert (
            last["embed_tokens"]["weight"].sharding == parts[-1]["embed_tokens"]["weight"].sharding
        )
        assert others == list(parts[:-1]) and last.keys() == parts[-1].keys()


@pytest.mark.parametrize(("source", "target"), [(0, 1), (2, 0)])
def test_programs_of_two_stages_move_what_a_copy_moves(dense_config, source, target):
    """With devices of several processes only a program over both stages can."""
    rules = jax_mla.sharding.layouts.tensor_parallel()
    pipeline = Pipeline(dense_config, jax_mla.make_mesh(stage=3, data=2), rules)
    spec = partition_spec(rules, ("batch", "sequence", None))
    x = np.arange(4 * 6, dtype=np.float32).reshape(4, 6, 1)
    x = jax.device_put(x, NamedSharding(pipeline.meshes[source], spec))
    copied = exchange.move(x, x, pipeline, source, target, spec)
    passed = exchange.passed_on(x, x, pipeline, source, target, spec)
    assert passed.sharding == copied.sharding
    assert_same(passed, copied)
