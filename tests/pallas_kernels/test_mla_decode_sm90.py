"""MLA decode on Hopper: simulated with poison and races, lowered, compiled for sm_90a."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from kernel_tools.aot import compile_sm90a, lower_for_cuda
from kernel_tools.cases import DecodeCase as Case
from kernel_tools.interpreter import run_simulated
from numerics import assert_close

from pallas_kernels import hardware, mla_decode, mla_decode_plan
from pallas_kernels.flash_mla import flash_mla_with_kvcache
from pallas_kernels.hardware import WGMMA_ROWS
from pallas_kernels.mla_decode.sm90 import config as sm90_config

# Two slots, which C = 512 has, and more. Borders of blocks and pages, a part that ends inside a
# request, rows in one and two tiles, heads that do not fill eight rows, queries without any keys.
CASES = [
    (Case((1, 63, 0, 64, 65), N=1), {"whole", "empty", "combine"}),
    (Case((600,), N=3, num_sms=3), {"split", "idle", "combine"}),
    (Case((129, 640, 0), T=2, N=9), {"split", "whole", "empty", "combine"}),
    (Case((1, 640), T=4, N=5), {"split", "whole", "combine"}),
    (Case((65, 190), T=2, N=4, causal=False, num_sms=1), {"whole"}),
    (Case((131, 64), T=4, N=32, page_size=128, num_sms=2), {"whole", "paired"}),
    (Case((500,), N=72, page_size=128, num_sms=4), {"split", "paired", "combine"}),
    (Case((200, 0, 260), N=80, C=256, R=32, num_sms=2), {"whole", "empty", "paired"}),
    (Case((200, 3), N=7, C=256, R=32, page_size=128, dtype="float16", num_sms=1), {"whole"}),
    (Case((100, 128), C=64, R=16, num_sms=1), {"whole"}),
    (Case((129, 640, 0), C=192, N=3), {"split", "whole", "empty", "combine"}),
    (Case((200, 65), N=4, C=512, num_sms=1), {"whole"}),
    (Case((330,), N=66, C=512, num_sms=2), {"whole", "paired"}),
    (Case((0, 0, 0, 65, 0, 0), N=2, num_sms=1), {"whole", "empty"}),
    (Case((64,), N=2, num_sms=3), {"whole", "idle", "combine"}),
]


@pytest.fixture
def on_hopper(monkeypatch):
    """Lets the dispatcher believe in a GPU: the simulator is one."""
    monkeypatch.setattr(hardware, "missing_gpu", lambda wanted, device=None: None)


def decode(case, arrays, **options):
    options = dict(latent_dim=case.C, scale=(case.C + case.R) ** -0.5, causal=case.causal) | options
    return mla_decode(**arrays, **options)


def in_float32(arrays):
    is_float = {name: jnp.issubdtype(x.dtype, jnp.floating) for name, x in arrays.items()}
    return {n: x.astype(jnp.float32) if is_float[n] else x for n, x in arrays.items()}


@pytest.mark.kernel_sim
@pytest.mark.parametrize(("case", "paths"), CASES, ids=[str(case) for case, _ in CASES])
def test_simulation_equals_the_definition(rng, on_hopper, case, paths):
    assert case.paths() == paths
    arrays = case.arrays(rng)
    run = functools.partial(decode, case, plan=case.plan(), implementation="mosaic_gpu")
    got = run_simulated(run, arrays)
    want = decode(case, in_float32(arrays), implementation="xla")
    assert_close(got.out, want.out)
    assert_close(got.lse, want.lse, "float32")


@pytest.mark.kernel_sim
@pytest.mark.parametrize(("rows", "num_warpgroups"), [(8, 1), (1, 4), (2, 3)])
def test_simulated_combine_merges_by_lse(rng, rows, num_warpgroups):
    """One, two and six splits; a row that saw nothing in one split, a row that saw nothing."""
    from pallas_kernels.mla_decode.sm90.combine import combine

    B, M, C, num_splits = 3, 8, 128, [0, 1, 3, 9]
    partial_out, partial_lse = rng.standard_normal((10, M, C)), rng.standard_normal((10, M))
    partial_lse[2, 1], partial_lse[3:9, 4] = -np.inf, -np.inf
    partial_out[partial_lse == -np.inf] = 0
    out, lse = rng.standard_normal((B, M, C)), rng.standard_normal((B, M))
    config = sm90_config.CombineConfig(rows, num_warpgroups)
    got_out, got_lse = run_simulated(
        lambda *arrays: combine(*arrays, config),
        jnp.asarray(out, jnp.bfloat16),
        *(jnp.asarray(x, jnp.float32) for x in (lse, partial_out, partial_lse)),
        jnp.asarray(num_splits, jnp.int32),
    )
    for b in (1, 2):
        splits = slice(num_splits[b], num_splits[b + 1])
        weights = np.exp(partial_lse[splits])
        total = weights.sum(0)
        lse[b] = np.where(total == 0, -np.inf, np.log(np.where(total == 0, 1, total)))
        out[b] = np.einsum("sm,smc->mc", weights, partial_out[splits])
        out[b] /= np.where(total == 0, 1, total)[:, None]
    assert_close(got_out, out)
    assert_close(got_lse, lse, "float32")


@pytest.mark.kernel_sim
def test_simulated_lengths_beyond_the_table_count_as_all_of_it(rng, on_hopper):
    """Parts of the plan that begin past the table's end read no entry of it."""
    case = Case((192,), N=2)
    arrays = case.arrays(rng)
    arrays["page_table"] = arrays["page_table"][:, :3]
    want = decode(case, in_float32(arrays), implementation="xla")
    plan = dataclasses.replace(case, lengths=(1500,), num_sms=3).plan()
    assert np.any(np.asarray(plan.begin_page) > 3)
    arrays["lengths"] = jnp.asarray([1500])
    run = jax.jit(functools.partial(decode, case, plan=plan, implementation="mosaic_gpu"))
    assert_close(run_simulated(run, arrays).out, want.out)


@pytest.mark.kernel_sim
def test_simulated_under_vmap(rng, on_hopper):
    case = Case((70, 3), N=2, num_sms=1)
    arrays = case.arrays(rng)
    one = {name: x if name == "kv_pages" else x[:, None] for name, x in arrays.items()}
    axes = ({name: None if name == "kv_pages" else 0 for name in one},)
    plans = jax.vmap(lambda n: mla_decode_plan(n, num_rows=2, num_sms=1))(one["lengths"])
    run = functools.partial(decode, case, implementation="mosaic_gpu")
    batched = jax.vmap(lambda arrays, plan: run(arrays, plan=plan), (*axes, 0))
    got = run_simulated(lambda arrays: batched(arrays, plans), one)
    want = decode(case, in_float32(arrays), implementation="xla")
    assert_close(got.out[:, 0], want.out)


@pytest.mark.kernel_sim
def test_simulation_of_the_drop_in_function(rng, on_hopper, monkeypatch):
    """FlashMLA's lse of a row that sees nothing is +inf."""
    monkeypatch.setattr(hardware, "num_sms", lambda device=None: 1)
    case = Case((0, 70), N=2, R=16, causal=False)
    arrays = case.arrays(rng)
    q, table, lengths = arrays["q"], arrays["page_table"], arrays["lengths"]
    kv_pages = arrays["kv_pages"][:, :, None]
    out, lse = run_simulated(flash_mla_with_kvcache, q, kv_pages, table, lengths, case.C)
    want = decode(case, in_float32(arrays), implementation="xla")
    assert_close(out, want.out)
    assert_close(lse[1], want.lse[1].T, "float32")
    assert np.all(np.isposinf(lse[0]))


SIZES = dict(row_dim=576, dtype="bfloat16", page_size=64, latent_dim=512, scale=0.1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": "float16", "page_size": 128, "row_dim": 288, "latent_dim": 256}, None),
        ({"dtype": "float32"}, r"the dtype must be one of .*, got float32"),
        ({"page_size": 16}, r"pages must have one of \[64, 128\] tokens, got 16"),
        ({"latent_dim": 192, "row_dim": 256}, None),
        ({"latent_dim": 500}, "multiple of 64 up to 512, got 500"),
        ({"latent_dim": 1024, "row_dim": 1088}, "multiple of 64 up to 512, got 1024"),
        ({"row_dim": 512}, "positive multiple of 16, got 0"),
        ({"row_dim": 520}, "positive multiple of 16, got 8"),
        ({"row_dim": 640}, "rows of 512 .* need 2[0-9]* bytes of shared memory, .* at most 232448"),
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
    ],
    ids=lambda value: "-".join(value) or "none" if isinstance(value, dict) else "",
)
def test_sizes_are_refused_with_the_reason(changes, reason):
    found = sm90_config.refusal(**SIZES | changes)
    assert found is None if reason is None else re.search(reason, found)


# Every kind of Config: blocks one by one and in pairs, queries with and without their own borders,
# both page sizes, both dtypes, two to four slots, probabilities in place of keys and of their own.
SHAPES = {
    "N16": dict(),
    "B4-T4-N16": dict(B=4, T=4),
    "N128-T2": dict(N=128, T=2),
    "N64-T4-full-page128": dict(N=64, T=4, causal=False, page_size=128),
    "N9-float16": dict(N=9, dtype="float16"),
    "N72": dict(N=72),
    "512+16": dict(N=64, R=16),
    "256+32": dict(N=128, C=256, R=32),
    "384+64": dict(N=64, C=384),
    "128+64": dict(C=128),
}


def program(B=128, T=1, N=16, C=512, R=64, page_size=64, dtype="bfloat16", causal=True):
    """A function of a decode step, and the shapes of its arguments."""
    X, max_pages = C + R, 8192 // page_size
    sizes = dict(num_rows=T * N, page_size=page_size, num_sms=hardware.H200_NUM_SMS)
    lengths = jax.ShapeDtypeStruct((B,), "int32")
    shapes = [
        jax.ShapeDtypeStruct((B, T, N, X), dtype),
        jax.ShapeDtypeStruct((B * max_pages, page_size, X), dtype),
        jax.ShapeDtypeStruct((B, max_pages), "int32"),
        lengths,
        jax.eval_shape(functools.partial(mla_decode_plan, **sizes), lengths),
    ]

    def run(q, kv_pages, page_table, lengths, plan):
        arrays = dict(q=q, kv_pages=kv_pages, page_table=page_table, lengths=lengths)
        options = dict(latent_dim=C, scale=X**-0.5, causal=causal, plan=plan)
        return mla_decode(**arrays, **options, implementation="mosaic_gpu")

    return run, shapes


@pytest.mark.parametrize("name", SHAPES)
def test_lowers(on_hopper, name):
    run, shapes = program(**SHAPES[name])
    assert lower_for_cuda(run, *shapes).count("mosaic_gpu_v2") == 2


@pytest.mark.parametrize(("N", "rows"), [(3, 8), (16, 16), (64, 64), (72, 128)])
def test_partial_results_of_less_than_a_tile_are_not_padded_to_one(on_hopper, N, rows):
    run, shapes = program(B=2, N=N)
    text = lower_for_cuda(run, *shapes)
    num_splits = 2 + hardware.H200_NUM_SMS // -(-N // WGMMA_ROWS)
    assert f"tensor<{num_splits}x{rows}x512xf32>" in text
    assert f"tensor<{num_splits}x{-(-N // 8) * 8}xf32>" in text


@pytest.mark.parametrize("C", [64, 192, 320, 448])
def test_rows_that_do_not_fill_a_warpgroup_are_merged_by_xla(on_hopper, C):
    run, shapes = program(C=C)
    assert lower_for_cuda(run, *shapes).count("mosaic_gpu_v2") == 1


def test_lowers_under_vmap_and_shard_map(on_hopper):
    """Also where only some arguments vary: every shard of the heads reads the same cache."""
    run, shapes = program(B=8)
    shapes = shapes[:4]
    run = functools.partial(run, plan=None)
    batched = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in shapes]
    texts = [lower_for_cuda(jax.vmap(run), *batched)]
    texts.append(lower_for_cuda(jax.vmap(run, (0, None, None, None)), batched[0], *shapes[1:]))
    mesh = jax.make_mesh((8,), ("shards",), axis_types=(AxisType.Auto,))
    heads, batch = P(None, None, "shards"), P("shards")
    for specs, out in (((heads, P(), P(), P()), heads), ((batch,) * 4, batch)):
        sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out)
        texts.append(lower_for_cuda(sharded, *shapes))
    assert [text.count("mosaic_gpu_v2") for text in texts] == [2] * 4


@functools.cache
def compiled(name):
    run, shapes = program(**SHAPES[name])
    return compile_sm90a(run, *shapes).kernels


@pytest.mark.kernel_aot
@pytest.mark.parametrize("name", SHAPES)
def test_compiles_for_sm90a(on_hopper, name):
    main, combine = compiled(name)
    assert (main.name, combine.name) == ("mla_decode", "mla_decode_combine")
    for kernel in (main, combine):
        kernel.check()


@pytest.mark.kernel_aot
@pytest.mark.parametrize("C", [64, 192, 320, 448])
def test_rows_that_do_not_fill_a_warpgroup_compile_for_sm90a(on_hopper, C):
    run, shapes = program(C=C)
    kernels = compile_sm90a(run, *shapes).kernels
    assert [kernel.name for kernel in kernels] == ["mla_decode"]  # and none that merges
    assert kernels[0].instructions.of("HGMMA") > 0
    kernels[0].check()


@pytest.mark.kernel_aot
@pytest.mark.parametrize(
    ("name", "loops"),
    [
        ("N16", {"left": (36, 4), "left tail": (36, 4), "right": (0, 4), "right tail": (0, 4)}),
        (
            "N128-T2",
            {"left": (36, 8), "left tail": (36, 4), "right": (36, 8), "right tail": (0, 4)},
        ),
    ],
)
def test_tensor_cores_do_nothing_twice(on_hopper, name, loops):
    """A block of 64 tokens is 36 instructions of 64x64x16 and, for both halves, 8 of 64x256x16."""
    main, _ = compiled(name)
    counts = [(loop.of("HGMMA.64x64x16"), loop.of("HGMMA.64x256x16")) for loop in main.loops]
    innermost = [count for count in counts if any(count)][:4]  # the shortest are first
    assert sorted(innermost) == sorted(loops.values())


@pytest.mark.kernel_aot
@pytest.mark.parametrize(
    ("name", "scores", "values"),
    [("N16", {2, 3}, {0, 1}), ("N128-T2", {2, 3}, {1}), ("512+16", {1, 2}, {0, 1})],
)
def test_barriers_of_a_warpgroup_are_those_that_the_code_names(on_hopper, name, scores, values):
    """The simulator takes a warpgroup for one thread, so it would not notice a missing one.

    With scores: one before and one after probabilities that take the place of rotary keys. In a
    tail one more, after values that were zeroed. Memory: none.
    """
    main, _ = compiled(name)
    # The shortest are first: of loops over blocks the innermost, before those over requests.
    copies = main.loop("UTMALDG")
    loops = [loop for loop in main.loops if loop.of("HGMMA")][:4]
    found = {True: set(), False: set()}
    for loop in loops:
        found[loop.of("HGMMA.64x64") > 0].add(loop.of("BAR"))
    assert copies.of("BAR") == 0
    assert found == {True: scores, False: values}
