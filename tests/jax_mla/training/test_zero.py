"""The stages of ZeRO as compiled: what a step sends, and what a device must hold."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from kernel_tools import aot
from layouts import Layout, shard_bytes, slow_unless

import jax_mla
from jax_mla.analysis import memory
from jax_mla.sharding import layouts
from jax_mla.sharding.layouts import LAYOUTS
from jax_mla.sharding.placement import partition_spec
from jax_mla.training import Batch, Precision, Recipe, abstract_state, next_token_loss, train_step

RECIPE = Recipe(num_steps=100, precision=Precision(compute="float32"))
DEVICES, T = 8, 8
# On one axis, so that every collective is over all devices.
STAGES = {
    stage: Layout({"data": DEVICES}, LAYOUTS[stage]())
    for stage in ("ddp", "zero1", "zero2", "zero3")
}
SOME = slow_unless(["zero3"], STAGES)  # each of them is ten seconds of compilation


@pytest.fixture(scope="module")
def config(config):
    """Two MoE layers: a loop of one is no loop, and the two passes share what they gather."""
    return dataclasses.replace(config, num_hidden_layers=3, first_k_dense_replace=1)


def compile_step(config, stage, devices=None):
    mesh, rules = STAGES[stage].mesh(devices), STAGES[stage].rules
    like = abstract_state(config, recipe=RECIPE, mesh=mesh, rules=rules)
    rows = jax.sharding.NamedSharding(mesh, partition_spec(rules, ("batch", "sequence")))
    batch = Batch(jax.ShapeDtypeStruct((DEVICES, T), np.int32, sharding=rows))
    options = {"recipe": RECIPE, "mesh": mesh, "rules": rules}
    return train_step.lower(like, config, batch, **options).compile()


@pytest.fixture(scope="module")
def compiled(config):
    return functools.cache(functools.partial(compile_step, config))


@pytest.fixture(scope="module")
def sizes(config):
    """Bytes of the embedding, of expert weights, of other matrices, and of vectors."""
    shapes = jax.eval_shape(lambda: jax_mla.init(jax.random.key(0), config))
    found = dict.fromkeys(("embedding", "experts", "matrices", "vectors"), 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = ".".join(key.key for key in path)
        kind = "experts" if ".experts." in name else "matrices"
        kind = "vectors" if name.endswith(("norm.weight", "bias")) else kind
        found["embedding" if name == "embed_tokens.weight" else kind] += leaf.size * 4
    return found


def sent(compiled):
    """By kind of collective, in units of (n - 1) / n bytes, which is what a ring sends of each."""
    found = dict.fromkeys(("all-reduce", "reduce-scatter", "all-gather"), 0.0)
    for row in jax_mla.explain_collectives(compiled)[0]:
        if row.kind in found:
            found[row.kind] += row.bytes_per_device * DEVICES / (DEVICES - 1)
    return found


@pytest.mark.parametrize("stage", SOME)
def test_what_a_step_sends(stage, compiled, sizes):
    """Of the parameters' bytes: DDP 2, ZeRO-1 and 2 one more to spread what was updated, ZeRO-3 3.

    XLA's CPU backend never merges an all-reduce and the slice that is kept of it into a
    reduce-scatter, so what the partitioner reduces costs 2 here where a GPU pays 1; the gradients
    of experts are scattered by the layer itself. The embedding that is split is looked up where it
    lies, so that rows are exchanged instead of the table.
    """
    found, experts = sent(compiled(stage)), sizes["experts"]
    matrices = sizes["matrices"] + experts
    everything = matrices + sizes["embedding"] + sizes["vectors"]
    reduced = {
        "ddp": everything,
        "zero1": everything,
        "zero2": matrices + sizes["vectors"],
        "zero3": matrices - experts + sizes["vectors"],
    }
    gathered = {"zero1": matrices + sizes["embedding"], "zero3": 2 * matrices}
    gathered |= {"ddp": 0, "zero2": gathered["zero1"]}
    small = everything / 100  # counts of tokens by expert, loss, norm, token ids
    assert found["all-reduce"] == pytest.approx(2 * reduced[stage], abs=small)
    assert found["all-gather"] == pytest.approx(gathered[stage], abs=small)
    scattered = experts if stage == "zero3" else 0
    assert found["reduce-scatter"] == pytest.approx(scattered, abs=small)


@pytest.mark.parametrize("chunk_tokens", [T, T // 4])
def test_chunks_of_the_loss_are_of_one_device(config, chunk_tokens):
    """Every chunk costs a sum of the head's gradient: their number does not grow with devices."""
    layout = STAGES["zero3"]
    like = layout.abstract_params(config)
    tokens = jax.ShapeDtypeStruct((DEVICES, T), np.int32)
    options = {"chunk_tokens": chunk_tokens, "rules": layout.rules}
    traced = jax.jit(lambda p, t: next_token_loss(p, config, t, **options).loss).trace(like, tokens)
    assert f"f32[{DEVICES},{chunk_tokens},{config.vocab_size}]" in str(traced.jaxpr)


@pytest.mark.slow  # a minute each
@pytest.mark.kernel_aot
@pytest.mark.parametrize(("stage", "times"), [("ddp", 2), ("zero2", 2), ("zero3", 3)])
def test_what_a_step_sends_between_gpus(stage, times, config, sizes):
    """Compiled for H200s, gradients are reduce-scattered: 2, 2 and 3 times the parameters' bytes.

    Less what a split embedding saves: its rows are exchanged, in ZeRO-3 in both passes. The
    compiler may keep the last weights that the forward pass gathered for the backward pass.
    """
    found = sent(compile_step(config, stage, aot.h200_devices(DEVICES)))
    everything = sum(sizes.values())
    saved = {"ddp": 0, "zero2": 1, "zero3": 3}[stage] * sizes["embedding"]
    total, wanted = sum(found.values()), times * everything - saved
    kept = sizes["embedding"] if stage == "zero3" else 0  # as large as the head
    assert wanted - kept - everything / 50 <= total <= wanted + everything / 50
    is_split = stage != "ddp"
    assert (found["reduce-scatter"] > 0.9 * (everything - sizes["embedding"])) == is_split
    assert (found["all-reduce"] > everything / 10) == (not is_split)


@pytest.mark.parametrize("stage", SOME)
def test_what_a_device_holds_is_what_was_planned(stage, compiled, config):
    """Arguments of the compiled step: weights, moments, a row of tokens, and scalars."""
    planned = memory.training_bytes(config, STAGES[stage].axes, STAGES[stage].rules)
    program = compiled(stage).memory_analysis()
    scalars = program.argument_size_in_bytes - planned.parameters - planned.optimizer - T * 4
    assert 0 <= scalars <= 64
    # The state that comes out takes the place of the one that went in; gradients lie in between,
    # whatever else there is.
    assert program.alias_size_in_bytes >= planned.parameters + planned.optimizer
    assert program.temp_size_in_bytes >= planned.gradients


@pytest.mark.slow
def test_split_gradients_take_less_room(compiled, config):
    """ZeRO-2 against ZeRO-1: the same arguments, smaller gradients, nothing else changed."""
    whole, split = (
        memory.training_bytes(config, STAGES[s].axes, STAGES[s].rules).gradients
        for s in ("zero1", "zero2")
    )
    one, two = (compiled(s).memory_analysis() for s in ("zero1", "zero2"))
    assert one.argument_size_in_bytes == two.argument_size_in_bytes
    saved = one.temp_size_in_bytes - two.temp_size_in_bytes
    assert saved > (whole - split) / 2


@pytest.mark.parametrize("preset", ["tiny", "v2_lite", "v3", "kimi_k2"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_plans_are_what_the_rules_say(name, preset):
    """The closed form, without jax, against the shardings of the real state."""
    config = getattr(jax_mla, preset)()
    axes = {"fsdp": 2, "expert": 2} if name == "dp_attention_ep" else {"data": 2, "tensor": 2}
    axes |= {"expert": 2}
    layout = Layout(axes, LAYOUTS[name]())
    mesh, rules = layout.mesh(), layout.rules
    for optimizer, param in (("adamw", "float32"), ("muon", "bfloat16")):
        recipe = Recipe(num_steps=9, optimizer=optimizer, precision=Precision(param=param))
        like = abstract_state(config, recipe=recipe, mesh=mesh, rules=rules)
        found = memory.training_bytes(config, axes, rules, param=param, optimizer=optimizer)
        assert found.parameters == shard_bytes(like.params)
        assert 0 <= shard_bytes(like.opt_state) - found.optimizer < 200  # counts of steps
        placed = jax_mla.param_shardings(config, mesh, rules.gradients())
        gradients = jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=at),
            like.params,
            placed,
        )
        assert found.gradients == shard_bytes(gradients)


def test_an_axis_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="axis 'heads' of size 6 cannot be split over 4 devices"):
        memory.training_bytes(jax_mla.tiny(), {"tensor": 4}, layouts.tensor_parallel())


@pytest.mark.parametrize(
    ("mesh", "batch", "message"),
    [
        ({"dta": 8}, 1, "mesh axis must be one of data, fsdp, .*, got 'dta'"),
        ({"data": 0}, 1, "data must be an integer of at least 1, got 0"),
        ({"data": 2, "stage": 4}, 1, "a pipeline are not counted: stage must be 1, got 4"),
        ({}, 0, "batch must be an integer of at least 1, got 0"),
    ],
    ids=["axis", "size", "stages", "batch"],
)
def test_what_cannot_be_planned_is_refused(mesh, batch, message):
    with pytest.raises(ValueError, match=message):
        memory.serving_bytes(jax_mla.tiny(), mesh, layouts.zero3(), batch=batch, memory_bytes=10**9)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"param": "int8"}, "param must be one of float32, bfloat16, float16, got 'int8'"),
        ({"reduce": "f32"}, "reduce must be one of float32, .*, got 'f32'"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, muon, got 'sgd'"),
    ],
    ids=["param", "reduce", "optimizer"],
)
def test_training_that_cannot_be_planned_is_refused(option, message):
    with pytest.raises(ValueError, match=message):
        memory.training_bytes(jax_mla.tiny(), {}, layouts.ddp(), **option)


def test_devices_share_the_cache_of_a_sequence():
    config, memory_bytes = jax_mla.v3(), 2 * 10**12
    options = {"memory_bytes": memory_bytes, "batch": 100}
    rules = layouts.context_parallel()
    one = memory.serving_bytes(config, {}, rules, **options)
    eight = memory.serving_bytes(config, {"sequence": 8}, rules, **options)
    assert one.cache_per_token == 70_272 == 8 * eight.cache_per_token
    room = memory_bytes - one.parameters
    assert one.context_tokens == room // (100 * 70_272) and one.parameters == eight.parameters
    assert eight.context_tokens == min(8 * room // (100 * 70_272), 163_840)


def test_serving_counts_weights_and_cache():
    """DeepSeek-V3 in bfloat16: 671 B parameters and 70,272 bytes a token of cache."""
    config, mesh = jax_mla.v3(), {"expert": 64}
    found = memory.serving_bytes(
        config, mesh, layouts.dp_attention_ep(), batch=128, memory_bytes=141 * 10**9
    )
    routed = 58 * 256 * 3 * 7168 * 2048 * 2
    whole = memory.serving_bytes(config, {}, layouts.ddp()).parameters
    assert whole == pytest.approx(2 * 671.03e9, rel=1e-3)
    assert found.parameters == whole - routed + routed // 64
    assert found.cache_per_token == 70_272 and found.sequences == 2
    assert found.context_tokens == min((141 * 10**9 - found.parameters) // (2 * 70_272), 163_840)
    assert memory.serving_bytes(config, {}, layouts.ddp(), memory_bytes=10**9).context_tokens == 0
