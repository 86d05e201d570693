"""The Hopper kernels of flash attention: their work lists, simulated, compiled, and on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from kernel_tools import flash_attention_matrix as matrix
from kernel_tools.aot import compile_sm90a, lower_for_cuda
from kernel_tools.interpreter import run_simulated
from numerics import assert_close, normal, poison

from pallas_kernels import dispatch, flash_attention, hardware
from pallas_kernels.flash_attention.api import IMPLEMENTATIONS
from pallas_kernels.flash_attention.config_sm90 import (
    BACKWARD_KEYS,
    BACKWARD_QUERIES,
    FORWARD,
    FUSED,
    HEAD_SIZES,
    TILE,
    Config,
    Problem,
    group_parts,
    is_backward_fused,
)
from pallas_kernels.flash_attention.launch_sm90 import _masks, flash_attention_sm90
from pallas_kernels.flash_attention.reference import flash_attention_reference
from pallas_kernels.flash_attention.work_sm90 import Tile, key_rows, key_tiles, query_tiles

NUM_SMS = 132
KERNELS = ("flash_attention_forward", "flash_attention_dq", "flash_attention_dk_dv")
# JAX 0.10 does not tell the compiler the name of a kernel with a sum.
FUSED_KERNEL = "flash_attention_backward" if jax.__version_info__ >= (0, 11) else "new_body"
HEADS = [f"{K}/{H}" for K, H in HEAD_SIZES]
MODES = pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fused"])

# Of segments as they come: ids in no order, one that returns, and how many positions have it.
UNSORTED = ((7, 30), (-2, 40), (1000, 20), (7, 40))
# B, T, S, N, G, K, H, dtype, options, number of CTAs; what a name says is what the case adds
CASES = {
    "causal-odd": (1, 133, 133, 1, 1, 64, 64, "bfloat16", {}, NUM_SMS),
    "T<S-gqa-lengths-persistent": (
        3, 70, 261, 2, 1, 64, 64, "bfloat16", {"lengths": [70, 0, 261]}, 2,
    ),
    "segments-192/128": (1, 72, 264, 2, 2, 192, 128, "bfloat16", {"segment_ids": 3}, NUM_SMS),
    "full-T>S-float16": (1, 200, 130, 1, 1, 128, 128, "float16", {"causal": False}, NUM_SMS),
    "all-masks-256/256": (
        1, 64, 192, 1, 1, 256, 256, "bfloat16", {"segment_ids": 2, "lengths": [180]}, NUM_SMS,
    ),
    "fused-causal-odd-persistent": (1, 133, 133, 1, 1, 64, 64, "bfloat16", {}, 1),
    "fused-all-masks-T<S-gqa-192/128": (
        2, 70, 200, 2, 1, 192, 128, "bfloat16", {"segment_ids": 2, "lengths": [190, 0]}, 2,
    ),
    "fused-full-T>S-float16": (1, 200, 130, 1, 1, 128, 128, "float16", {"causal": False}, 2),
    "ids-in-any-order-groups-in-parts": (
        1, 130, 130, 4, 1, 64, 64, "bfloat16", {"segment_ids": UNSORTED}, 4,
    ),
    "fused-ids-in-any-order-lengths-groups-in-parts": (
        1, 130, 130, 4, 1, 64, 64, "bfloat16", {"segment_ids": UNSORTED, "lengths": [129]}, 4,
    ),
    "float16-large-scores": (1, 72, 136, 1, 1, 64, 64, "float16", {"scale": 7.0}, NUM_SMS),
    "fused-float16-large-scores": (1, 128, 136, 1, 1, 64, 64, "float16", {"scale": 7.0}, NUM_SMS),
}  # fmt: skip


def inputs(rng, B, T, S, N, G, K, H, dtype):
    shapes = (B, T, N, K), (B, S, G, K), (B, S, G, H), (B, T, N, H)
    return [normal(rng, shape, dtype) for shape in shapes]


def case(rng, name):
    """q, k, v and the cotangent of out; the op's options; how many CTAs share the work."""
    *sizes, dtype, options, num_ctas = CASES[name]
    B, _, S = sizes[:3]
    options = {"causal": True, "scale": 0.11, "segment_ids": None, "lengths": None} | options
    options["deterministic"] = not name.startswith("fused")
    if options["segment_ids"] == UNSORTED:
        options["segment_ids"] = np.tile(np.repeat(*np.array(UNSORTED, np.int32).T), (B, 1))
    elif options["segment_ids"]:
        ids = rng.integers(0, options["segment_ids"], (B, S))
        options["segment_ids"] = np.sort(ids, axis=1).astype(np.int32)
    if options["lengths"]:
        options["lengths"] = np.asarray(options["lengths"], np.int32)
    return inputs(rng, *sizes, dtype), options, num_ctas


def everything(attend, q, k, v, dout):
    """out, lse, dq, dk, dv; the gradients through out and through lse."""

    def both(q, k, v):
        return attend(q, k, v, return_lse=True)

    (out, lse), transpose = jax.vjp(both, q, k, v)
    dlse = jnp.sin(jnp.where(lse == -jnp.inf, jnp.nan, lse))  # NaN where a caller's log makes it
    return out, lse, *transpose((dout, dlse))


def assert_as_accurate_as_xla(got, xla, want, name=""):
    """Against float32 on the same inputs: 2 times the error of the XLA path, 3 for gradients."""
    names = ("out", "lse", "dq", "dk", "dv")
    results = (dict(zip(names, results, strict=True)) for results in (got, xla, want))
    matrix.assert_accurate(*results, name)


@pytest.mark.kernel_sim
@pytest.mark.parametrize("name", CASES)
def test_simulated_equals_reference(rng, name):
    arrays, options, num_ctas = case(rng, name)
    reference = functools.partial(flash_attention_reference, **options)
    want = everything(reference, *(x.astype(jnp.float32) for x in arrays))
    xla = everything(reference, *arrays)
    if options["lengths"] is not None:
        is_past = np.arange(arrays[1].shape[1]) >= options["lengths"][:, None]
        arrays[1:3] = [poison(x, is_past) for x in arrays[1:3]]
    kernels = functools.partial(flash_attention_sm90, **options, num_sms=num_ctas)
    got = run_simulated(functools.partial(everything, kernels), *arrays)
    assert_as_accurate_as_xla(got, xla, want)


@pytest.mark.kernel_sim
def test_simulated_under_vmap(rng):
    q, k, v, _ = inputs(rng, 2, 64, 128, 1, 1, 64, 64, "bfloat16")
    options = {"causal": True, "scale": 0.1, "segment_ids": None, "lengths": None}
    options |= {"return_lse": False, "deterministic": False}
    kernels = functools.partial(flash_attention_sm90, **options)
    got = run_simulated(jax.vmap(kernels), q[:, None], k[:, None], v[:, None])
    assert_close(got[:, 0], flash_attention_reference(q, k, v, **options))


@MODES
@pytest.mark.kernel_sim
def test_simulated_gradients_under_vmap(rng, deterministic):
    """Two requests of different lengths; the sum of dq starts from zeros in each."""
    arrays = inputs(rng, 2, 128, 128, 1, 1, 64, 64, "bfloat16")
    lengths = np.array([128, 70], np.int32)
    options = {"causal": True, "scale": 0.1, "segment_ids": None, "deterministic": deterministic}
    reference = functools.partial(flash_attention_reference, **options, lengths=lengths)
    want = everything(reference, *(x.astype(jnp.float32) for x in arrays))
    xla = everything(reference, *arrays)

    def run(lengths, *arrays):
        attend = functools.partial(flash_attention_sm90, **options, lengths=lengths, num_sms=1)
        return everything(attend, *arrays)

    got = run_simulated(jax.vmap(run), lengths[:, None], *(x[:, None] for x in arrays))
    assert_as_accurate_as_xla([x[:, 0] for x in got], xla, want)


def visible(problem, options):
    """bool "B T S", written from the definition of the op."""
    p = problem.offset + np.arange(problem.T)[None, :, None]
    s = np.arange(problem.S)[None, None, :]
    seen = np.broadcast_to(s <= p if problem.causal else s >= 0, (problem.B, *(s <= p).shape[1:]))
    if options["lengths"] is not None:
        seen = seen & (s < options["lengths"][:, None, None])
    if (ids := options["segment_ids"]) is not None:
        seen = seen & (ids[:, problem.S - problem.T :, None] == ids[:, None, :])
    return seen


@pytest.mark.parametrize("direction", ["queries", "keys"])
@pytest.mark.parametrize("ids", [None, "sorted", "shuffled"])
@pytest.mark.parametrize("masks", ["causal", "full", "lengths"])
def test_work_list_covers_all_that_is_visible(rng, direction, ids, masks):
    """Every tile once; every block that is seen; without a mask only what is seen as a whole."""
    B, T, S, N, G, num_ctas = 3, 456, 768, 4, 2, 7
    options = {"segment_ids": None, "lengths": None}
    if masks == "lengths":
        options["lengths"] = np.array([768, 0, 300])
    if ids is not None:
        options["segment_ids"] = np.sort(rng.integers(0, 4, (B, S)), axis=1)
    if ids == "shuffled":
        options["segment_ids"] = rng.permuted(options["segment_ids"], axis=1)
    problem = Problem(B, T, S, N, G, 64, 64, masks != "full", 0.1, offset=S - T)
    config = Config(block=64, num_stages=(2, 2), heads_at_once=2)
    make = query_tiles if direction == "queries" else key_tiles
    tiles = make(problem, _masks(B, T, S, **options), config, num_ctas)
    seen = visible(problem, options)
    seen = seen if direction == "queries" else seen.swapaxes(1, 2)
    num_heads, num_tiles = (N if direction == "queries" else G), -(-seen.shape[1] // TILE)

    tiles = [Tile(*(int(x) for x in row)) for row in np.asarray(tiles)]
    places = {(tile.b, tile.head, tile.place) for tile in tiles}
    assert len(places) == len(tiles) == B * num_heads * num_tiles
    for tile in tiles:
        rows = seen[tile.b, tile.place * TILE : (tile.place + 1) * TILE]
        blocks = [rows[:, s : s + config.block] for s in range(0, rows.shape[1], config.block)]
        visited = [int(tile.block(i)) for i in range(tile.num_blocks)]
        assert len(set(visited)) == len(visited)
        assert {j for j, block in enumerate(blocks) if block.any()} <= set(visited)
        assert all(blocks[j].all() for j in visited[tile.num_masked :])
        if ids != "shuffled":
            assert tile.num_unmasked == sum(block.all() for block in blocks)
        if ids is None or (ids == "sorted" and masks != "lengths"):  # nothing in vain
            assert all(blocks[j].any() for j in visited)


def test_longest_tiles_come_first():
    problem = Problem(1, 2048, 2048, 8, 8, 64, 64, True, 0.1, offset=0)
    masks = _masks(1, 2048, 2048, segment_ids=None, lengths=None)
    for make in (query_tiles, key_tiles):
        tiles = Tile(*make(problem, masks, FORWARD[64, 64], num_ctas=8).T)
        lengths = tiles.num_blocks
        assert (np.diff(lengths) <= 0).all() and lengths[0] > lengths[-1]


def shapes(K, H, *, B=1, T=4096, S=4096, N=16, G=16, dtype="bfloat16"):
    sizes = (B, T, N, K), (B, S, G, K), (B, S, G, H), (B, T, N, H)
    return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


def with_masks(deterministic=True, num_sms=NUM_SMS):
    """A function of q, k, v, dout, segment_ids and lengths, either of them None."""
    options = {"causal": True, "scale": 0.1, "deterministic": deterministic, "num_sms": num_sms}

    def run(q, k, v, dout, segment_ids=None, lengths=None):
        masks = {"segment_ids": segment_ids, "lengths": lengths}
        attend = functools.partial(flash_attention_sm90, **options, **masks)
        return everything(attend, q, k, v, dout)

    return run


def masks(B, S):
    return jax.ShapeDtypeStruct((B, S), jnp.int32), jax.ShapeDtypeStruct((B,), jnp.int32)


@MODES
@pytest.mark.parametrize("K, H", HEAD_SIZES, ids=HEADS)
def test_lowers_for_cuda(K, H, deterministic):
    """Layouts, TMA limits and shared memory, on every supported JAX."""
    arrays = *shapes(K, H, B=2, T=133, S=261, G=4), *masks(2, 261)
    text = lower_for_cuda(with_masks(deterministic), *arrays)
    is_fused = not deterministic and (K, H) in FUSED
    assert "flash_attention_forward" in text
    assert ("flash_attention_dq" in text) != is_fused
    assert (FUSED_KERNEL in text) == is_fused


@MODES
def test_lowers_under_vmap_and_shard_map(deterministic):
    grad = with_masks(deterministic)
    arrays = shapes(64, 64, B=8, T=256, S=256, N=2, G=2)
    batched = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in arrays]
    texts = [lower_for_cuda(jax.vmap(grad), *batched)]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P("data"),) * 4, "out_specs": (P("data"),) * 5}
    texts.append(lower_for_cuda(jax.shard_map(grad, mesh=mesh, **specs), *arrays))
    for kernel in KERNELS if deterministic else (KERNELS[0], FUSED_KERNEL):
        assert all(kernel in text for text in texts)


def problem_of(*, B=2, T=2112, S=2112, N=16, G=4, K=192, H=128):
    return Problem(B, T, S, N, G, K, H, False, 0.1, offset=S - T)


def test_gradients_are_fused_where_that_is_less_work():
    def is_fused(*, deterministic=False, **sizes):
        return is_backward_fused(problem_of(**sizes), deterministic, num_sms=132)

    assert is_fused() and is_fused(K=128) and is_fused(K=64, H=64)
    assert not is_fused(deterministic=True)
    assert not is_fused(K=256, H=256)
    assert is_fused(T=64) and not is_fused(T=64, K=64, H=64)  # whose blocks are 128 queries
    # One tile of keys for all of 16384 queries: tiles of queries keep more of the GPU busy.
    assert not is_fused(B=1, T=16384, S=128, N=4, G=4)
    assert is_fused(B=1, T=16384, S=16384, N=4, G=4)


def test_groups_are_cut_where_tiles_of_keys_do_not_suffice():
    def parts(num_tiles, group):
        return group_parts(problem_of(B=1, S=num_tiles * TILE, N=group, G=1), num_sms=132)

    assert parts(132, 8) == parts(133, 8) == 1
    assert parts(128, 8) == 1  # two halves would take as long as the whole
    assert parts(66, 8) == 2 and parts(32, 16) == 4 and parts(1, 16) == 16
    assert parts(40, 9) == 3 and parts(1, 7) == 7
    assert parts(100, 8) == 8  # 7 turns of an eighth


def test_the_tile_in_which_keys_end_has_zeros_behind_them(rng):
    x = normal(rng, (4, 200, 2, 8), "float32")
    masks = _masks(4, 200, 200, None, np.array([0, 100, 128, 200]))
    problem = dataclasses.replace(problem_of(B=4, T=200, S=200), has_lengths=True)
    ((whole, last_tile),) = key_rows(problem, masks, x)
    assert whole is x and last_tile.shape == (4, TILE, 2, 8)
    np.testing.assert_array_equal(last_tile[1, :100], x[1, :100])
    np.testing.assert_array_equal(last_tile[3, :72], x[3, 128:])
    assert not last_tile[::2].any() and not last_tile[1, 100:].any()
    assert not last_tile[3, 72:].any()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32"])
def test_lengths_keep_their_value_beside_many_keys(dtype):
    """40000 keys are more than 8 or 16 bits can count."""
    masks = _masks(2, 40000, 40000, None, jnp.array([0, 120], dtype))
    np.testing.assert_array_equal(masks.key_ends, [0, 120])


def test_named_implementation_is_used(monkeypatch):
    monkeypatch.setattr(hardware, "missing_gpu", lambda *_: None)

    def run(q, k, v, dout):
        attend = functools.partial(flash_attention, implementation="mosaic_gpu")
        return jax.vjp(attend, q, k, v)[1](dout)

    text = lower_for_cuda(run, *shapes(64, 64, T=128, S=128, N=1, G=1))
    assert all(kernel in text for kernel in (KERNELS[0], FUSED_KERNEL))


@pytest.mark.parametrize(
    "arrays, scale, reason",
    [
        (shapes(48, 32), 1.0, r"head sizes .* found \(48, 32\)"),
        (shapes(128, 64), 1.0, r"head sizes .* found \(128, 64\)"),
        (shapes(64, 64, dtype="float32"), 1.0, "bfloat16 or float16, found float32"),
        (shapes(64, 64), -1.0, "positive scale.* found -1.0"),
        (shapes(64, 64), 1e-39, "at least 1e-30, found 1e-39"),
        (shapes(64, 64), float("nan"), "at least 1e-30, found nan"),
        (shapes(64, 64), 1.0, "NVIDIA GPU of compute capability 9.0"),
    ],
    ids=["head-sizes", "narrow-v", "float32", "scale", "tiny-scale", "nan-scale", "no-gpu"],
)
def test_refuses_with_the_reason(arrays, scale, reason, monkeypatch):
    monkeypatch.setattr(hardware, "compute_capability", lambda device=None: None)
    with pytest.raises(NotImplementedError, match=reason):
        dispatch.select("op", IMPLEMENTATIONS, "mosaic_gpu", *arrays[:3], scale=scale)
    assert dispatch.select("op", IMPLEMENTATIONS, None, *arrays[:3], scale=scale).name == "xla"


def tensor_clocks(loop):
    """Clocks of the tensor cores in a loop: m64nNk16 takes N / 2 of them."""
    widths = (int(op.split(".64x")[1].split("x")[0]) * n for op, n in loop.items() if "HGMMA" in op)
    return sum(widths) // 2


@pytest.mark.kernel_aot
@pytest.mark.parametrize("is_masked", [False, True], ids=["causal", "causal-segments-lengths"])
@pytest.mark.parametrize("K, H", HEAD_SIZES, ids=HEADS)
def test_compiles_for_hopper(K, H, is_masked):
    """No spills, no serialised wgmma, and no product computed that need not be."""
    program = compile_sm90a(
        with_masks(), *shapes(K, H, G=4), *(masks(1, 4096) if is_masked else ())
    )
    clocks = {}
    for kernel in program.kernels:
        kernel.check()
        assert not kernel.injected
        clocks.setdefault(kernel.name, []).append(tensor_clocks(kernel.loop("HGMMA")))
    columns = {  # of one step of one warpgroup, times what a column costs
        "flash_attention_forward": [FORWARD[K, H].block * (K + H)],
        "flash_attention_dq": [BACKWARD_QUERIES[K, H].block * (2 * K + H)],
        "flash_attention_dk_dv": [BACKWARD_KEYS[K, H].block * (2 * K + 2 * H)],
    }
    if (K, H) == (256, 256):  # dk and dv do not fit in registers together
        columns["flash_attention_dk_dv"] = [64 * (K + H), 64 * (2 * K + H)]
    assert {name: sorted(found) for name, found in clocks.items()} == {
        name: [n // 32 for n in found] for name, found in columns.items()
    }


def fused_gradients(causal=True):
    """A function of q, k, v, dout, stats, segment_ids and lengths, without the forward pass."""
    from pallas_kernels.flash_attention.mosaic_gpu_sm90_fused import gradients

    def run(q, k, v, dout, stats, segment_ids=None, lengths=None):
        (B, T, N, K), (S, G, H) = q.shape, v.shape[1:]
        problem = Problem(B, T, S, N, G, K, H, causal, 0.1, S - T, lengths is not None)
        masks = _masks(B, T, S, segment_ids, lengths)
        return gradients(problem, masks, q, k, v, dout, stats, num_sms=NUM_SMS)

    return run


@pytest.mark.kernel_aot
@pytest.mark.parametrize("is_masked", [False, True], ids=["causal", "full-segments-lengths"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("K, H", FUSED, ids=[f"{K}/{H}" for K, H in FUSED])
def test_fused_gradients_compile_for_hopper(K, H, dtype, is_masked):
    """No spills, no serialised wgmma, and five matmuls."""
    G = 4 if is_masked and dtype == "bfloat16" else 16
    arrays = *shapes(K, H, G=G, dtype=dtype), jax.ShapeDtypeStruct((1, 16, 2, 4096), jnp.float32)
    arrays += masks(1, 4096) if is_masked else ()
    (kernel,) = compile_sm90a(fused_gradients(not is_masked), *arrays).kernels
    kernel.check()
    assert not kernel.injected
    loop = kernel.loop("HGMMA")
    assert tensor_clocks(loop) == FUSED[K, H].block * (3 * K + 2 * H) // 32
    assert loop.of("UTMAREDG") == 1


@MODES
@pytest.mark.kernel_aot
def test_groups_in_parts_compile_for_hopper(deterministic):
    """16 query heads share 16 tiles of keys: 8 parts of 2 heads make 128 tiles of them."""
    arrays = *shapes(192, 128, T=2048, S=2048, G=1), *masks(1, 2048)
    kernels = compile_sm90a(with_masks(deterministic, NUM_SMS), *arrays).kernels
    grids = {kernel.name: kernel.grid[0] for kernel in kernels}
    assert grids[KERNELS[2] if deterministic else FUSED_KERNEL] == 128
    for kernel in kernels:
        kernel.check()


@pytest.mark.kernel_aot
def test_lengths_cost_no_copy_of_the_keys():
    """Few queries over a long cache; the keys are 201 MB."""
    q, k, v, _ = shapes(192, 128, T=128, S=32768)

    def run(q, k, v, lengths):
        options = {"causal": True, "scale": 0.1, "segment_ids": None, "deterministic": False}
        options |= {"lengths": lengths, "return_lse": False, "num_sms": NUM_SMS}
        return flash_attention_sm90(q, k, v, **options)

    assert compile_sm90a(run, q, k, v, masks(1, 32768)[1]).temp_bytes < 4e6


@pytest.mark.kernel_aot
def test_float16_compiles_for_hopper():
    kernels = compile_sm90a(with_masks(), *shapes(192, 128, dtype="float16")).kernels
    assert {kernel.name for kernel in kernels} == set(KERNELS)
    for kernel in kernels:
        kernel.check()


@MODES
@pytest.mark.kernel_aot
def test_memory_grows_with_the_length(deterministic):
    """At 32k tokens the scores of one head would be 2 GB in bfloat16."""

    def run(q, k, v, dout):
        return with_masks(deterministic)(q, k, v, dout)[2:]

    half, whole = (
        compile_sm90a(run, *shapes(192, 128, T=T, S=T)).temp_bytes for T in (16384, 32768)
    )
    assert whole < 2.2 * half
    size = 3 * (2 * 128 + 8)  # out, its gradient, lse and what is made of it
    size += 0 if deterministic else 4 * 192  # the sum of dq
    assert whole < 16 * 32768 * size


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_small_cases_on_a_gpu(rng, name):
    arrays, options, num_ctas = case(rng, name)
    reference = functools.partial(flash_attention_reference, **options)
    want = everything(reference, *(x.astype(jnp.float32) for x in arrays))
    xla = everything(reference, *arrays)
    kernels = functools.partial(flash_attention_sm90, **options, num_sms=num_ctas)
    assert_as_accurate_as_xla(everything(kernels, *arrays), xla, want)


@pytest.mark.gpu
@MODES
@pytest.mark.parametrize("S", [1024, 4096, 16384])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("G", [8, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("K, H", HEAD_SIZES, ids=HEADS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_equal_xla_on_a_gpu(rng, dtype, K, H, G, causal, S, deterministic):
    if not deterministic and (K, H) not in FUSED:
        pytest.skip("is deterministic in any case")
    arrays = inputs(rng, 1, S, S, 8, G, K, H, dtype)

    def attend(implementation, q, k, v, **options):
        options |= {"causal": causal, "deterministic": deterministic}
        return flash_attention(q, k, v, implementation=implementation, **options)

    run = jax.jit(everything, static_argnums=0)
    got = run(functools.partial(attend, "mosaic_gpu"), *arrays)
    xla = run(functools.partial(attend, "xla"), *arrays)
    want = run(functools.partial(attend, "xla"), *(x.astype(jnp.float32) for x in arrays))
    assert_as_accurate_as_xla(got, xla, want)


@MODES
@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("K, H", [(128, 128), (192, 128)], ids=["128/128", "192/128"])
def test_gradients_equal_cudnn(rng, K, H, causal, deterministic):
    """Through what jax.nn calls, because jax.nn refuses values narrower than keys."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    q, k, v, dout = inputs(rng, 2, 4096, 4096, 8, 8, K, H, "bfloat16")
    mask = fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK
    cudnn = functools.partial(fused.dot_product_attention, scale=K**-0.5, mask_type=mask)
    options = {"causal": causal, "deterministic": deterministic}
    ours = functools.partial(flash_attention, **options, implementation="mosaic_gpu")
    for got, want in zip(
        jax.vjp(ours, q, k, v)[1](dout), jax.vjp(cudnn, q, k, v)[1](dout), strict=True
    ):
        assert matrix.errors(got, want)[0] <= 1e-2


@pytest.mark.gpu
def test_gradients_are_bitwise_reproducible(rng):
    arrays = inputs(rng, 2, 2048, 2048, 8, 2, 192, 128, "bfloat16")
    attend = functools.partial(flash_attention, implementation="mosaic_gpu", deterministic=True)
    run = jax.jit(lambda q, k, v, dout: jax.vjp(attend, q, k, v)[1](dout))
    first, *others = [run(*arrays) for _ in range(3)]
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, other, first)
