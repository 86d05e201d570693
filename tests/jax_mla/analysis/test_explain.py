"""Bytes and collectives that `explain_sharding` reports, against what each layout must cost."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from layouts import MESH_LAYOUTS, Layout

import jax_mla
from jax_mla.analysis.collectives import collectives_of
from jax_mla.sharding import layouts
from jax_mla.sharding.placement import partition_spec

CONFIG = dataclasses.replace(jax_mla.tiny(), num_attention_heads=4, num_hidden_layers=3)
B, T, D, LAYERS, MOE_LAYERS = 8, 16, CONFIG.hidden_size, 3, 2


def collectives(layout):
    tokens = jnp.zeros((B, T), jnp.int32)
    forward = jax.jit(lambda p: jax_mla.forward(p, CONFIG, tokens, rules=layout.rules))
    compiled = forward.lower(layout.abstract_params(CONFIG)).compile()
    return jax_mla.explain_collectives(compiled)[0]


def total_bytes(params):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def test_every_device_holds_all_of_ddp_and_an_eighth_of_zero3():
    ddp, zero3 = (MESH_LAYOUTS[name].abstract_params(CONFIG) for name in ("ddp", "zero3"))
    everything, _ = jax_mla.explain_sharding(ddp, CONFIG)
    eighth, _ = jax_mla.explain_sharding(zero3, CONFIG)
    size = total_bytes(ddp)
    assert sum(row.bytes_per_device for row in everything) == size
    assert sum(row.replicated_bytes for row in everything) == pytest.approx(size * 7 / 8, rel=1e-3)
    # All but norms and the router's bias is split.
    assert sum(row.bytes_per_device for row in eighth) < size / 8 * 1.02
    whole = [row.name for row in eighth if row.mesh_axes.count(()) == len(row.mesh_axes)]
    assert all("norm" in name or name.endswith("bias") for name in whole)


def test_a_row_names_its_axes():
    layout = Layout({"tensor": 4, "expert": 2}, layouts.tensor_parallel())
    rows, table = jax_mla.explain_sharding(layout.abstract_params(CONFIG), CONFIG)
    row = next(row for row in rows if row.name == "moe_layers.mlp.experts.down_proj.weight")
    assert row.logical_axes == ("layers", "expert", "mlp", "embed")
    assert row.mesh_axes == ((), ("expert",), ("tensor",), ())
    assert row.bytes_per_device * 8 == 4 * 2 * 8 * 96 * D and row.replicated_bytes == 0
    assert "moe_layers.mlp.experts.down_proj.weight" in table


def test_data_parallel_forward_sends_nothing():
    assert collectives(MESH_LAYOUTS["ddp"]) == []


def test_tensor_parallel_sends_one_all_reduce_a_half_block():
    rows = collectives(MESH_LAYOUTS["tensor"])
    assert {row.kind for row in rows} == {"all-reduce"} and {row.group_size for row in rows} == {4}
    assert sum(row.calls for row in rows) == 1 + 2 * LAYERS  # the embedding, two a layer
    each = 2 * 3 / 4 * B * T * D * 4
    # A layer's routed and shared experts are two arrays of one call.
    assert sum(row.bytes_per_device for row in rows) == (1 + 2 * LAYERS + MOE_LAYERS) * each


def test_zero3_gathers_every_split_parameter_once():
    layout = Layout({"data": 8}, layouts.zero3())
    rows, params = collectives(layout), layout.abstract_params(CONFIG)
    split = [r for r in jax_mla.explain_sharding(params)[0] if r.mesh_axes != ((),) * len(r.shape)]
    # The embedding is looked up where it lies, and its rows are exchanged.
    gathered = sum(8 * r.bytes_per_device for r in split if r.name != "embed_tokens.weight")
    sent = sum(row.bytes_per_device for row in rows)
    assert sent == pytest.approx(7 / 8 * gathered, rel=0.05)


@pytest.mark.parametrize("capacity", [None, 0.75], ids=["dropless", "capacity"])
def test_expert_parallel_sends_tokens_and_no_weights(capacity):
    rows = collectives(MESH_LAYOUTS["dp_attention_ep_8"].dispatching("a2a", capacity))
    assert {row.kind for row in rows} == {"all-to-all"}
    there_and_back = 2 * MOE_LAYERS
    room = 8 * T * min(CONFIG.num_experts_per_tok, CONFIG.n_routed_experts // 8)
    if capacity is not None:  # of the mean, for each of 8 devices
        room = 8 * capacity * T * CONFIG.num_experts_per_tok / 8
    floats = there_and_back * 7 / 8 * room * D * 4
    indices = MOE_LAYERS * 7 / 8 * room * 4
    assert sum(row.bytes_per_device for row in rows) == floats + indices


def test_context_parallel_gathers_latents_and_puts_tokens_in_order():
    rows = collectives(Layout({"sequence": 4}, layouts.context_parallel()))
    sent = {(row.kind, row.calls): row.bytes_per_device for row in rows}
    T_own = T // 4
    assert sent == {
        ("all-gather", LAYERS): LAYERS * 3 / 4 * B * T * CONFIG.cache_row_dim * 4,
        ("collective-permute", 4): 4 * B * T_own / 2 * 4,  # tokens and positions, in two halves
        ("collective-permute", 2): B * T_own * D * 4,  # the last layer's output
    }


def test_decoding_from_a_split_cache_sends_outputs_only():
    layout = Layout({"sequence": 4}, layouts.context_parallel())
    cache = jax.eval_shape(
        lambda: jax_mla.LatentCache.empty(CONFIG, B, 64, page_size=8, num_shards=4)
    )
    spec = partition_spec(layout.rules, (None, ("context", "batch"), None, None))
    pages = NamedSharding(layout.mesh(), spec)
    pages = jax.ShapeDtypeStruct(cache.pages.shape, cache.pages.dtype, sharding=pages)
    cache = dataclasses.replace(cache, pages=pages)
    token = jnp.zeros(B, jnp.int32)
    step = jax.jit(lambda p, c: jax_mla.decode_step(p, CONFIG, token, c, rules=layout.rules))
    lowered = step.lower(layout.abstract_params(CONFIG), cache)
    rows, _ = jax_mla.explain_collectives(lowered.compile())
    assert {row.kind for row in rows} == {"all-reduce"}
    # Of each head the weighted latent and its weight, and before them the largest lse.
    numbers = CONFIG.num_attention_heads * (CONFIG.kv_lora_rank + 1 + 1)
    assert sum(row.bytes_per_device for row in rows) == LAYERS * 2 * 3 / 4 * B * numbers * 4


def test_arrays_on_no_mesh_are_refused():
    with pytest.raises(ValueError, match="embed_tokens must be on a mesh"):
        jax_mla.explain_sharding({"embed_tokens": jnp.zeros(3)})


def program(line):
    """The text of a program of one operation."""
    return f"ENTRY %main (a: f32[8]) -> f32[8] {{\n  {line}\n}}\n"


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a', 'b'}", 8),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", 2),
    ],
)
def test_groups_are_read_in_every_spelling(groups, size):
    (row,) = collectives_of(program(f"%x = f32[2] all-reduce(%y), {groups}, to_apply=%add"))
    assert row.group_size == size


@pytest.mark.parametrize(
    ("line", "arrays"),
    [
        ("%x = (f32[8], s32[2]) all-reduce(%a, %b), to_apply=%add", "f32[8] s32[2]"),
        ("%x = ((f32[2]), f32[8]) all-gather-start(%a), dimensions={0}", "f32[8]"),
        (
            "%x = ((f32[2]{0}, s32[1]{0}), (f32[8]{0}, s32[4]{0})) all-gather-start(%a, %b)",
            "f32[8] s32[4]",
        ),
        ("%x = f32[8] all-reduce-start(%a), to_apply=%add", "f32[8]"),
        ("%x = (f32[8], f32[8], u32[], u32[]) collective-permute-start(%a)", "f32[8]"),
    ],
    ids=["at once", "one", "two", "nothing given", "permute"],
)
def test_of_what_is_started_the_results_count(line, arrays):
    (row,) = collectives_of(program(line))
    assert row.shape == arrays
