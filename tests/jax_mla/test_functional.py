"""The functional API: caches, chunks and ragged prompts give the numbers of one forward pass."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import POISONS, assert_close
from weights import random_params

import jax_mla
from jax_mla import functional
from jax_mla.layers.mla.forms import choose_form

CONFIG = dataclasses.replace(jax_mla.tiny(), initializer_range=0.1, num_hidden_layers=3)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 40))


@pytest.fixture(scope="module")
def logits(params, tokens):
    return np.asarray(jax_mla.forward(params, CONFIG, tokens))


def paged(batch=3, pages_each=6, page_size=8, extra=4, seed=0):
    table = np.random.default_rng(seed).permutation(batch * pages_each + extra)
    table = table[: batch * pages_each].reshape(batch, pages_each)
    return jax_mla.PagedLatentCache.with_table(
        CONFIG, table, num_pages=batch * pages_each + extra, page_size=page_size
    )


CACHES = {
    "dense": lambda: jax_mla.LatentCache.empty(CONFIG, 3, 48),
    "dense_small_pages": lambda: jax_mla.LatentCache.empty(CONFIG, 3, 41, page_size=8),
    "paged": paged,
}


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("kind", CACHES)
def test_chunked_ragged_prefill_then_decode(kind, form, params, tokens, logits):
    """Prompts of unlike lengths, in two chunks with padding in both, then tokens one by one."""
    first, second = np.asarray([9, 16, 3]), np.asarray([16, 0, 5])
    cache = CACHES[kind]()
    got, cache = jax_mla.prefill(params, CONFIG, tokens[:, :16], cache, lengths=first, form=form)
    at = np.arange(3)
    assert_close(got, logits[at, first - 1], "float32")
    chunk = np.stack([np.roll(row, -n)[:16] for row, n in zip(tokens, first, strict=True)])
    got, cache = jax_mla.prefill(params, CONFIG, chunk, cache, lengths=second, form=form)
    total = first + second
    has_new = second > 0
    assert_close(np.asarray(got)[has_new], logits[at, total - 1][has_new], "float32")
    assert cache.lengths.tolist() == total.tolist()
    for _ in range(3):
        got, cache = jax_mla.decode_step(params, CONFIG, tokens[at, total], cache)
        assert_close(got, logits[at, total], "float32")
        total = total + 1


@pytest.mark.parametrize("form", [None, "expanded", "absorbed"])
def test_several_tokens_in_one_decode_step(form, params, tokens, logits):
    _, cache = jax_mla.prefill(params, CONFIG, tokens[:, :20], paged())
    got, cache = jax_mla.decode_step(params, CONFIG, tokens[:, 20:24], cache, form=form)
    assert got.shape == (3, 4, CONFIG.vocab_size)
    assert_close(got, logits[:, 20:24], "float32")
    assert cache.lengths.tolist() == [24, 24, 24]


@pytest.mark.parametrize(
    ("call", "num_cached", "num_new", "form"),
    [
        ("decode_step", 0, 1, "absorbed"),
        ("decode_step", 2, 35, "absorbed"),
        ("decode_step", 20, 35, "expanded"),
        ("prefill", 2, 35, "absorbed"),
        ("prefill", 20, 35, "expanded"),
        ("prefill", 20, 1, "absorbed"),
    ],
)
def test_the_form_is_chosen_by_what_is_cached(call, num_cached, num_new, form, monkeypatch):
    # Sizes of which both forms cost the same for about 35 new tokens.
    config = dataclasses.replace(CONFIG, kv_lora_rank=256, qk_nope_head_dim=16, v_head_dim=16)
    assert form == choose_form(config, num_new, num_cached)
    chosen = []
    monkeypatch.setattr(functional, f"unchecked_{call}", lambda *_, form, **__: chosen.append(form))
    cache = jax_mla.LatentCache.empty(config, 3, 64)
    cache = dataclasses.replace(cache, lengths=jnp.asarray([0, num_cached, 0]))
    getattr(jax_mla, call)({}, config, np.zeros((3, num_new), int), cache)
    assert chosen == [form]


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("poison", POISONS)
def test_what_holds_no_token_is_never_read(poison, form, params, tokens):
    """Poison in free pages and page tails, garbage behind the table's used entries: equal bits."""
    clean = paged()
    bad = dataclasses.replace(
        clean,
        pages=jnp.full_like(clean.pages, POISONS[poison]),
        page_table=clean.page_table.at[:, 4:].set(2147480000),
    )
    lengths = np.asarray([13, 8, 1])
    results = []
    for cache in (clean, bad):
        _, cache = jax_mla.prefill(
            params, CONFIG, tokens[:, :16], cache, lengths=lengths, form=form
        )
        more, cache = jax_mla.prefill(params, CONFIG, tokens[:, 16:24], cache, form=form)
        step, cache = jax_mla.decode_step(params, CONFIG, tokens[:, 24], cache)
        results.append((np.asarray(more), np.asarray(step)))
    chex.assert_trees_all_equal(*results)


def test_sequences_may_share_pages(params, tokens, logits):
    """Two sequences whose first two pages are the same hold one prefix once."""
    prompt = np.stack([tokens[0, :16]] * 2)
    table = np.asarray([[5, 2, 0, 7], [5, 2, 1, 6]])
    cache = jax_mla.PagedLatentCache.with_table(CONFIG, table, num_pages=8, page_size=8)
    _, cache = jax_mla.prefill(params, CONFIG, prompt, cache, lengths=[16, 0])
    cache = dataclasses.replace(cache, lengths=jnp.asarray([16, 16]))
    a, b = tokens[0, 16], (tokens[0, 16] + 1) % CONFIG.vocab_size
    got, _ = jax_mla.decode_step(params, CONFIG, np.asarray([a, b]), cache)
    assert_close(got[0], logits[0, 16], "float32")
    other = jax_mla.forward(params, CONFIG, np.append(tokens[0, :16], b)[None])
    assert_close(got[1], other[0, -1], "float32")


def test_packed_segments(params, tokens):
    ids = np.asarray([[0] * 12 + [1] * 20 + [2] * 8])
    packed = jax_mla.forward(params, CONFIG, tokens[:1], segment_ids=ids)
    for start, end in ((0, 12), (12, 32), (32, 40)):
        # What follows a segment is not seen by it, and makes all of one length.
        alone = jax_mla.forward(params, CONFIG, np.roll(tokens[:1], -start, axis=1))
        assert_close(packed[:, start:end], alone[:, : end - start], "float32")


def test_shifted_positions_change_nothing(params, tokens, logits):
    positions = np.broadcast_to(np.arange(40) + 100, tokens.shape)
    got = jax_mla.forward(params, CONFIG, tokens, positions=positions)
    # Angles are products of float32 numbers, here a hundred radians instead of forty.
    np.testing.assert_allclose(got, logits, atol=2e-4 * np.abs(logits).max())


def test_everything_jits_and_donates(params, tokens, logits):
    @chex.assert_max_traces(1)
    def step(params, token, cache):
        return jax_mla.decode_step(params, CONFIG, token, cache)

    prefill = jax.jit(lambda params, tokens, cache: jax_mla.prefill(params, CONFIG, tokens, cache))
    step = jax.jit(step, donate_argnums=2)
    _, cache = prefill(params, jnp.asarray(tokens[:, :30]), CACHES["dense"]())
    for t in range(30, 34):
        old = cache.pages
        got, cache = step(params, jnp.asarray(tokens[:, t]), cache)
        assert_close(got, logits[:, t], "float32")
        assert old.is_deleted()


def test_a_cache_that_is_not_donated_stays_as_it_was(params, tokens):
    before = CACHES["dense"]()
    jax_mla.prefill(params, CONFIG, tokens[:, :8], before)
    assert not before.pages.any() and not before.lengths.any()


def test_init_is_the_tree_of_the_shardings():
    mesh = jax_mla.make_mesh(tensor=2, expert=2, fsdp=2)
    shardings = jax_mla.param_shardings(CONFIG, mesh)
    params = jax.jit(lambda: jax_mla.init(jax.random.key(0), CONFIG), out_shardings=shardings)()
    gate = params["moe_layers"]["mlp"]["experts"]["gate_proj"]["weight"]
    L, E, D, F = gate.shape
    assert gate.sharding.shard_shape(gate.shape) == (L, E // 2, D // 2, F // 2)
    heads = params["dense_layers"]["self_attn"]["k_b_proj"]["weight"]
    assert heads.sharding.shard_shape(heads.shape)[1] == CONFIG.num_attention_heads // 2


def test_scan_compiles_once_whatever_the_depth(params):
    """The program of 61 layers is the program of 10 with another trip count."""

    def program(num_layers):
        config = dataclasses.replace(jax_mla.v3(), num_hidden_layers=num_layers, dtype="float32",
            vocab_size=64, hidden_size=16, intermediate_size=16, moe_intermediate_size=8,
            num_attention_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4,
            qk_rope_head_dim=4, v_head_dim=4, n_routed_experts=16)  # fmt: skip
        params = jax.eval_shape(lambda: jax_mla.init(jax.random.key(0), config))
        tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        cache = jax.eval_shape(lambda: jax_mla.LatentCache.empty(config, 1, 64))
        calls = (
            lambda p, t, c: jax_mla.forward(p, config, t),
            lambda p, t, c: jax_mla.prefill(p, config, t, c),
            lambda p, t, c: jax_mla.decode_step(p, config, t, c),
        )
        jaxprs = [jax.make_jaxpr(call)(params, tokens, cache) for call in calls]
        return [str(jaxpr).count(" = ") for jaxpr in jaxprs]

    assert program(61) == program(10)


LONGROPE = jax_mla.RopeScaling("longrope", 2.0, 32, short_factor=(1.0,) * 8, long_factor=(2.0,) * 8)
LONG = dataclasses.replace(CONFIG, rope_scaling=LONGROPE)


def test_longrope_computes_up_to_the_original_length(params, tokens):
    want = jax_mla.forward(params, LONG, tokens[:, :32])
    cache = jax_mla.LatentCache.empty(LONG, 3, 48)
    _, cache = jax_mla.prefill(params, LONG, tokens[:, :31], cache)
    got, cache = jax_mla.decode_step(params, LONG, tokens[:, 31], cache)
    assert_close(got, want[:, 31], "float32")
    with pytest.raises(ValueError, match="=32 tokens, got 33: longrope"):
        jax_mla.decode_step(params, LONG, tokens[:, 32], cache)
    same = dataclasses.replace(LONGROPE, long_factor=LONGROPE.short_factor)
    jax_mla.decode_step(params, dataclasses.replace(LONG, rope_scaling=same), tokens[:, 32], cache)


def test_longrope_needs_a_cache_that_cannot_exceed_it_under_jit(params, tokens):
    step = jax.jit(lambda p, t, c: jax_mla.decode_step(p, LONG, t, c))
    step(params, tokens[:, 0], jax_mla.LatentCache.empty(LONG, 3, 32, page_size=32))
    with pytest.raises(ValueError, match="=32 tokens, got 48"):
        step(params, tokens[:, 0], jax_mla.LatentCache.empty(LONG, 3, 48, page_size=48))


def test_lists_are_arrays(params, tokens, logits):
    cache = dataclasses.replace(paged(), lengths=jnp.zeros(3, jnp.int32))
    got, _ = jax_mla.prefill(params, CONFIG, tokens.tolist(), cache, lengths=[40, 3, 40])
    assert_close(got, logits[np.arange(3), [39, 2, 39]], "float32")
    positions, ids = np.tile(np.arange(40), (3, 1)).tolist(), np.zeros((3, 40), int).tolist()
    got = jax_mla.forward(params, CONFIG, tokens, positions=positions, segment_ids=ids)
    assert_close(got, logits, "float32")


def prefilled(**fields):
    """Prefills 16 tokens a sequence into a cache of which some fields were replaced."""

    def call(params, tokens, cache):
        jax_mla.prefill(params, CONFIG, tokens[:, :16], dataclasses.replace(cache, **fields))

    return call


def with_table(table, cached=0, new=16):
    """Prefills `new` tokens after `cached` ones into pages of 8 tokens."""

    def call(params, tokens, cache):
        cache = dataclasses.replace(
            cache, page_table=jnp.asarray(table), lengths=jnp.full(3, cached, jnp.int32)
        )
        jax_mla.prefill(params, CONFIG, tokens[:, :new], cache)

    return call


BAD = {
    "swapped": (
        lambda p, t, c: jax_mla.forward(CONFIG, p, t),
        "config must be a DeepSeekConfig, got dict",
    ),
    "a_page_twice_in_a_row": (
        with_table([[0, 0], [2, 3], [4, 5]]),
        r"page_table\[0, 0\] and page_table\[0, 1\] must differ, got page 0 twice: it would be w",
    ),
    "a_page_in_two_rows": (
        with_table([[0, 1], [0, 3], [4, 5]]),
        r"page_table\[0, 0\] and page_table\[1, 0\] must differ, got page 0",
    ),
    "a_page_that_is_half_full_in_two_rows": (
        with_table([[0, 1], [2, 3], [4, 1]], cached=12, new=2),
        r"page_table\[0, 1\] and page_table\[2, 1\] must differ, got page 1",
    ),
    "a_page_written_here_and_read_there": (
        with_table([[0, 1], [1, 3], [4, 5]], cached=8, new=8),
        r"page_table\[0, 1\] and page_table\[1, 0\] must differ, got page 1",
    ),
    "negative_lengths": (prefilled(lengths=jnp.asarray([0, -1, 0])), "at least 0, got -1"),
    "float_lengths": (prefilled(lengths=jnp.zeros(3)), "cache.lengths must be integers, got dtype"),
    "list_of_lengths": (prefilled(lengths=[0, 0, 0]), r"cache.lengths must be an array, got \[0"),
    "lengths_of_2_axes": (
        prefilled(lengths=jnp.zeros((3, 1), int)),
        r"cache.lengths must have 1 axes, none empty, got shape \(3, 1\)",
    ),
    "a_row_for_all": (
        prefilled(page_table=jnp.asarray([[0, 1, 2]])),
        "cache.page_table must have a row for each of 3 cache.lengths, got 1",
    ),
    "float_table": (prefilled(page_table=jnp.zeros((3, 2))), "page_table must be integers, got"),
    "pages_of_3_axes": (
        prefilled(pages=jnp.zeros((3, 8, 80))),
        r"cache.pages must have 4 axes, none empty, got shape \(3, 8, 80\)",
    ),
    "integer_pages": (
        prefilled(pages=jnp.zeros((3, 22, 8, 80), jnp.int32)),
        "cache.pages must be one of float32, bfloat16, float16, got 'int32'",
    ),
    "dense_pages": (
        lambda p, t, c: jax_mla.prefill(
            p, CONFIG, t, jax_mla.LatentCache(c.pages[:, :4], c.lengths)
        ),
        "a dense cache of 3 sequences must be a multiple of 3, got 4",
    ),
    "no_cache": (
        lambda p, t, c: jax_mla.prefill(p, CONFIG, t, None),
        "the cache must be a latent cache, got NoneType",
    ),
    "no_parameters": (
        lambda p, t, c: jax_mla.forward({}, CONFIG, t),
        r"the parameters are not those of the config:\n  missing \(\d+\): ",
    ),
    "tokens_none": (
        lambda p, t, c: jax_mla.forward(p, CONFIG, None),
        "tokens must be integers, got dtype object",
    ),
    "float_positions": (
        lambda p, t, c: jax_mla.forward(p, CONFIG, t, positions=t * 1.0),
        "positions must be integers, got dtype float64",
    ),
    "wide_segments": (
        lambda p, t, c: jax_mla.forward(p, CONFIG, t, segment_ids=np.full(t.shape, 2**32)),
        "segment_ids must fit into 32 bits, got 4294967296",
    ),
    "longrope": (
        lambda p, t, c: jax_mla.forward(p, LONG, t),
        "at most original_max_position_embeddings=32 tokens, got 40",
    ),
    "longrope_positions": (
        lambda p, t, c: jax_mla.forward(
            p, LONG, t[:, :8], positions=np.full((3, 8), 32), form="expanded"
        ),
        "=32 tokens, got 33",
    ),
    "longrope_prefill": (
        lambda p, t, c: jax_mla.prefill(
            p, LONG, t[:, :8], dataclasses.replace(c, lengths=jnp.asarray([0, 25, 3]))
        ),
        "=32 tokens, got 33",
    ),
    "form": (
        lambda p, t, c: jax_mla.forward(p, CONFIG, t, form="absorb"),
        "form must be one of expanded, absorbed, None, got 'absorb'",
    ),
    "other_depth": (
        lambda p, t, c: jax_mla.forward(p, dataclasses.replace(CONFIG, num_hidden_layers=2), t),
        r"wrong shape \(\d+\): .* is \[2, .*expected \[1, .* more",
    ),
    "cut_embedding": (
        lambda p, t, c: jax_mla.forward(
            p | {"embed_tokens": {"weight": p["embed_tokens"]["weight"][:100]}}, CONFIG, t
        ),
        r"wrong shape \(1\): embed_tokens\.weight is \[100, 192\], expected \[320, 192\]",
    ),
    "no_norm": (
        lambda p, t, c: jax_mla.forward({k: v for k, v in p.items() if k != "norm"}, CONFIG, t),
        r"missing \(\d+\): .*norm\.weight",
    ),
    "vocabulary": (
        lambda p, t, c: jax_mla.forward(p, CONFIG, t + 300),
        "token ids must be from 0 to 319, the vocabulary, got ",
    ),
    "negative": (
        lambda p, t, c: jax_mla.forward(p, CONFIG, t - 1000),
        "from 0 to 319, the vocabulary, got -",
    ),
    "floats": (lambda p, t, c: jax_mla.forward(p, CONFIG, t * 1.0), "must be integers, got dtype"),
    "axes": (
        lambda p, t, c: jax_mla.forward(p, CONFIG, t[0]),
        r"must be Int\[B T\], got shape \(40,\)",
    ),
    "no_tokens": (lambda p, t, c: jax_mla.forward(p, CONFIG, t[:, :0]), "at least one token"),
    "segments": (
        lambda p, t, c: jax_mla.forward(p, CONFIG, t, segment_ids=t[:, :3]),
        r"segment_ids must have the shape of tokens, \(3, 40\), got \(3, 3\)",
    ),
    "lengths": (
        lambda p, t, c: jax_mla.prefill(p, CONFIG, t, c, lengths=np.asarray([1, 41, 2])),
        "lengths must be from 0 to 40, the tokens of a row, got 41",
    ),
    "lengths_shape": (
        lambda p, t, c: jax_mla.prefill(p, CONFIG, t, c, lengths=np.asarray([1, 2])),
        r"lengths must have shape \(3,\), one per row of tokens, got \(2,\)",
    ),
    "capacity": (
        lambda p, t, c: jax_mla.prefill(p, CONFIG, np.tile(t, 2), c),
        "sequence 0 must fit into the cache, which has room for 48 tokens, got 80",
    ),
    "batch": (
        lambda p, t, c: jax_mla.decode_step(p, CONFIG, t[:2, 0], c),
        "the cache must hold 2 sequences, as many as the tokens, got 3",
    ),
    "page_table": (
        lambda p, t, c: jax_mla.prefill(
            p, CONFIG, t, dataclasses.replace(c, page_table=c.page_table.at[1, 2].set(99))
        ),
        r"page_table\[1, 2\] must be one of the cache's 22 pages, got 99",
    ),
    "other_model": (
        lambda p, t, c: jax_mla.prefill(
            p, CONFIG, t, dataclasses.replace(c, pages=c.pages[:, :, :, :-1])
        ),
        "3 layers and 80 numbers per token, as the config, got 3 and 79",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case, params, tokens):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(params, tokens, paged())


def test_a_row_without_valid_tokens_decodes_nothing():
    """Its pages keep every bit, whatever its table names, and the other rows do not see it."""
    params = jax_mla.init(jax.random.key(0), CONFIG)
    table = np.asarray([[2, 0], [-1, 0]])
    cache = jax_mla.PagedLatentCache.with_table(CONFIG, table, num_pages=4, page_size=4)
    cache = dataclasses.replace(cache, pages=cache.pages.at[:, 1].set(np.nan).at[:, 3].set(np.nan))

    @jax.jit
    def step(tokens, cache, valid):
        model = jax_mla.bind(params, CONFIG)
        out = model.run(tokens, model.decoding(tokens, cache, valid=valid), cache)
        return out.x, out.cache.pages

    tokens, valid = np.asarray([[3], [5]]), np.asarray([[True], [False]])
    x, pages = step(tokens, cache, valid)
    expected, _ = step(tokens, dataclasses.replace(cache, pages=cache.pages.at[:].set(0)), valid)
    np.testing.assert_array_equal(x[0], expected[0])
    assert np.isfinite(x).all()
    changed = np.asarray(pages != cache.pages) & ~np.isnan(pages)
    assert changed[:, 2, 0].any()
    changed[:, 2, 0] = False
    assert not changed.any()
