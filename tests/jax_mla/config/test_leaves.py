"""The table of leaves: equal to what the layers declare, and the end of every unknown name."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from golden_sets import NAMES, read_config
from weights import random_params

import jax_mla
from jax_mla.analysis.memory import training_bytes
from jax_mla.config.leaf_types import LEAF_TYPES, leaf_type
from jax_mla.config.leaves import leaves_of
from jax_mla.model import DeepSeek
from jax_mla.sharding import layouts
from jax_mla.training import Precision, Recipe, make_optimizer, update_router_bias
from jax_mla.training.optimizer import kinds
from jax_mla.training.pipeline import Pipeline

PRESETS = ("tiny", "v2_lite", "v2", "v3", "kimi_k2")


CONFIGS = {
    **{name: getattr(jax_mla, name)() for name in PRESETS},
    **{f"golden_{name}": read_config(name) for name in NAMES},
    "biases": dataclasses.replace(jax_mla.tiny(), attention_bias=True),
    "biases_without_q_latent": dataclasses.replace(
        jax_mla.tiny(), attention_bias=True, q_lora_rank=None
    ),
    "tied": dataclasses.replace(jax_mla.tiny(), tie_word_embeddings=True),
    "only_experts": dataclasses.replace(jax_mla.tiny(), first_k_dense_replace=0),
    "bfloat16": dataclasses.replace(jax_mla.tiny(), dtype="bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_table_is_what_the_layers_declare(config):
    state = nnx.eval_shape(lambda: nnx.state(DeepSeek(config, rngs=0)))
    declared = {
        path: (
            variable.get_value().shape,
            variable.get_value().dtype.name,
            variable.get_metadata("logical_axes"),
        )
        for path, variable in nnx.to_flat_state(state)
    }
    table = {
        leaf.path: (leaf.shape, leaf.type.stored_dtype(config.dtype), leaf.axes)
        for leaf in leaves_of(config)
    }
    assert table == declared


def test_every_entry_of_the_table_is_a_leaf_of_some_model():
    found = {leaf.type.kind for config in CONFIGS.values() for leaf in leaves_of(config)}
    assert found == {"matrix", "table", "vector", "fixed"}
    paths = {
        ".".join(leaf.path if leaf.stack is None else ("layer", *leaf.path[1:]))
        for config in CONFIGS.values()
        for leaf in leaves_of(config)
    }
    assert paths == LEAF_TYPES.keys()


@pytest.mark.parametrize("name", LEAF_TYPES)
def test_a_matrix_contracts_some_axes_and_keeps_the_others(name):
    leaf = LEAF_TYPES[name]
    contracted, kept = leaf.contracted_and_kept
    if leaf.kind == "matrix":
        assert contracted and kept
    assert len(contracted) == len(leaf.contracted)
    assert len(contracted) + len(kept) + ("expert" in leaf.axes) == len(leaf.axes)


def with_unknown(params, name):
    mlp = params["moe_layers"]["mlp"] | {name: jnp.ones((1, 2, 3))}
    return params | {"moe_layers": params["moe_layers"] | {"mlp": mlp}}


MUON = Recipe(num_steps=2, optimizer="muon")
READERS = {
    "leaf_type": lambda params, config: leaf_type(("moe_layers", "mlp", "indexer")),
    "kinds": lambda params, config: kinds(params),
    "adamw": lambda params, config: make_optimizer(Recipe(num_steps=2)).init(params),
    "muon": lambda params, config: make_optimizer(MUON).init(params),
    "to_compute": lambda params, config: Precision().to_compute(params),
    "to_param": lambda params, config: Precision().to_param(params),
    "router_bias": lambda params, config: update_router_bias(params, jnp.zeros((4, 8), int), 0.1),
    "pipeline": lambda params, config: Pipeline(config, jax_mla.make_mesh(stage=2)).part(params, 0),
    "bind": lambda params, config: jax_mla.bind(params, config),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_an_unknown_leaf_is_refused(reader):
    config = jax_mla.tiny()
    params = with_unknown(random_params(config), "indexer")
    # `bind` compares with the config, and lists every difference.
    with pytest.raises(ValueError, match=r"indexer.* is not|unexpected \(1\): .*mlp\.indexer"):
        reader(params, config)


def test_an_unknown_leaf_is_not_saved_and_not_explained(tmp_path):
    config = jax_mla.tiny()
    params = with_unknown(random_params(config), "indexer")
    with pytest.raises(ValueError, match=r"unexpected.*\n?.*moe_layers.mlp.indexer"):
        jax_mla.save(tmp_path / "folder", params, config)
    mesh = jax_mla.make_mesh(data=2)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), params
    )
    with pytest.raises(ValueError, match=r"moe_layers\.mlp\.indexer is not a parameter"):
        jax_mla.explain_sharding(placed, config)


def test_an_unknown_stack_is_refused():
    config = jax_mla.tiny()
    params = random_params(config)
    params["mtp_layers"] = params["moe_layers"]
    with pytest.raises(ValueError, match=r"mtp_layers\..* is not a parameter"):
        Pipeline(config, jax_mla.make_mesh(stage=2)).part(params, 0)


def test_bytes_are_counted_for_every_leaf():
    config = CONFIGS["biases"]
    size = sum(leaf.size for leaf in leaves_of(config))
    bias = sum(leaf.size for leaf in leaves_of(config) if leaf.type.kind == "fixed")
    found = training_bytes(config, {}, layouts.ddp(), param="bfloat16")
    assert found.parameters == 2 * size + 2 * bias
    assert found.optimizer == 2 * 2 * (size - bias)
