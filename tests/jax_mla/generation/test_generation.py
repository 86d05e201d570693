"""Generation: equals a loop over `forward`, stops where it should, and compiles once a bucket."""

import dataclasses
import math

import chex
import jax
import numpy as np
import pytest
from weights import random_params

import jax_mla
from jax_mla.generation import buckets, loop

CONFIG = dataclasses.replace(
    jax_mla.tiny(), initializer_range=0.1, num_hidden_layers=2, first_k_dense_replace=0
)
STEPS = 6


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(0).integers(0, 256, (3, 9)), np.asarray([9, 4, 1])


@pytest.fixture(scope="module")
def greedy(params, prompts):
    """Row by row and token by token, through `forward`, which knows no cache. Right padding is
    beyond the causal border, so that all steps share one shape."""
    rows = []
    for prompt, length in zip(*prompts, strict=True):
        row = np.zeros(16, np.int32)
        row[:length] = prompt[:length]
        for at in range(length, length + STEPS):
            row[at] = np.asarray(jax_mla.forward(params, CONFIG, row[None]))[0, at - 1].argmax()
        rows.append(row[length : length + STEPS])
    return np.stack(rows)


def run(params, prompts, **options):
    tokens, lengths = prompts
    options = {"max_new_tokens": STEPS, "eos_token_ids": ()} | options
    return jax_mla.generate(params, CONFIG, tokens, lengths=lengths, **options)


def test_greedy_equals_forward(params, prompts, greedy):
    out = run(params, prompts)
    np.testing.assert_array_equal(out.tokens, greedy)
    assert out.lengths.tolist() == [STEPS] * 3


def test_a_row_does_not_depend_on_its_batch(params, prompts, greedy):
    tokens, lengths = prompts
    for row in range(3):
        alone = jax_mla.generate(
            params,
            CONFIG,
            tokens[row : row + 1, : lengths[row]],
            max_new_tokens=STEPS,
            eos_token_ids=(),
        )
        np.testing.assert_array_equal(alone.tokens[0], greedy[row])


def test_stops_at_any_end_token(params, prompts, greedy):
    eos = (int(greedy[0, 2]), int(greedy[1, 4]))
    out = run(params, prompts, eos_token_ids=eos)
    for row in range(3):
        is_end = np.isin(greedy[row], eos)
        length = int(is_end.argmax()) + 1 if is_end.any() else STEPS
        assert out.lengths[row] == length
        np.testing.assert_array_equal(out.tokens[row, :length], greedy[row, :length])
        assert (out.tokens[row, length:] == CONFIG.pad_token_id).all()
    assert out.lengths[0] <= 3


def test_stops_when_all_rows_have(params, prompts, greedy):
    seen = []
    eos = tuple(int(t) for t in greedy[:, 0])
    out = run(params, prompts, eos_token_ids=eos, stream=seen.append)
    assert len(seen) == 1 and out.lengths.tolist() == [1, 1, 1]


def test_config_names_the_end_tokens(params, prompts, greedy):
    config = dataclasses.replace(CONFIG, eos_token_id=(int(greedy[0, 1]),))
    tokens, lengths = prompts
    out = jax_mla.generate(params, config, tokens[:1], lengths=lengths[:1], max_new_tokens=STEPS)
    assert out.lengths.tolist() == [int((greedy[0] == greedy[0, 1]).argmax()) + 1]


SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "key": 3}


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_streamed_tokens_are_the_tokens(options, params, prompts):
    seen = []
    streamed = run(params, prompts, stream=lambda tokens: seen.append(tokens.copy()), **options)
    chex.assert_trees_all_equal(streamed, run(params, prompts, **options))
    np.testing.assert_array_equal(np.stack(seen, axis=1), streamed.tokens)


def test_seeds(params, prompts):
    sampled = [run(params, prompts, temperature=1.5, key=key).tokens for key in (1, 1, 2)]
    np.testing.assert_array_equal(sampled[0], sampled[1])
    assert (sampled[0] != sampled[2]).any()
    with_key = run(params, prompts, temperature=1.5, key=jax.random.key(1)).tokens
    np.testing.assert_array_equal(with_key, sampled[0])


SEEDS = (11, 22, 33)
DRAWN = {"temperature": 1.5, "top_p": 0.9}


@pytest.fixture(scope="module")
def drawn(params, prompts):
    return np.asarray(run(params, prompts, key=SEEDS, **DRAWN).tokens)


def drawn_keys(kind):
    seeds = np.asarray(SEEDS)
    keys = jax.numpy.stack([jax.random.key(seed) for seed in SEEDS])
    return {"tuple": SEEDS, "numpy": seeds, "keys": keys, "old keys": jax.random.key_data(keys)}[
        kind
    ]


@pytest.mark.parametrize("kind", ["tuple", "numpy", "keys", "old keys"])
def test_keys_by_row(kind, params, prompts, drawn):
    np.testing.assert_array_equal(run(params, prompts, key=drawn_keys(kind), **DRAWN).tokens, drawn)


@pytest.mark.parametrize(
    ("rows", "bucket", "max_new_tokens", "stream"),
    [((0,), 64, 4, lambda tokens: None), ((2, 0), 128, 6, None), ((1, 1, 2, 0), 64, 70, None)],
    ids=["alone, streamed", "of two, long bucket", "of four, long continuation"],
)
def test_a_drawn_row_depends_on_its_key_only(
    rows, bucket, max_new_tokens, stream, params, prompts, drawn
):
    """Not on its place, its batch, either bucket, or who waits for its tokens."""
    tokens, lengths = (x[list(rows)] for x in prompts)
    tokens = np.pad(tokens, ((0, 0), (0, bucket - tokens.shape[1])))
    options = {"key": [SEEDS[row] for row in rows], "stream": stream, **DRAWN}
    got = run(params, (tokens, lengths), max_new_tokens=max_new_tokens, **options).tokens
    compared = min(max_new_tokens, STEPS)
    np.testing.assert_array_equal(got[:, :compared], drawn[list(rows), :compared])


def test_one_key_draws_rows_apart(params, prompts):
    """Row i from fold_in(key, i)."""
    tokens, lengths = (np.stack([x[0]] * 3) for x in prompts)
    got = run(params, (tokens, lengths), key=5, **DRAWN).tokens
    assert len({tuple(row) for row in got.tolist()}) == 3
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), np.arange(3))
    np.testing.assert_array_equal(run(params, (tokens, lengths), key=keys, **DRAWN).tokens, got)


def test_tiny_temperature_is_greedy(params, prompts, greedy):
    out = run(params, prompts, temperature=1e-4)
    np.testing.assert_array_equal(out.tokens, greedy)


@pytest.fixture
def compiled():
    """The programs that XLA was asked to compile since the test began."""
    seen, event = [], "/jax/core/compile/backend_compile_duration"

    def listen(name, _, **kwargs):
        if name == event:
            seen.append(kwargs.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("stream", [None, lambda tokens: None], ids=["loop", "stream"])
def test_one_trace_a_bucket(stream, params, monkeypatch, compiled):
    chex.clear_trace_counter()
    for name in ("_start", "_loop", "_step_on_host"):
        once = chex.assert_max_traces(getattr(loop, name).__wrapped__, n=1)
        static = ("program", "new_bucket") if name == "_start" else "program"
        monkeypatch.setattr(loop, name, jax.jit(once, static_argnames=static))

    def run(length, steps, seed):
        tokens = np.random.default_rng(seed).integers(0, 256, (2, length))
        options = {"temperature": 0.5 + seed / 10, "key": seed, "stream": stream}
        return jax_mla.generate(
            params, CONFIG, tokens, max_new_tokens=steps, eos_token_ids=(), **options
        )

    run(3, 5, 0)
    assert compiled
    compiled.clear()
    for seed, (length, steps) in enumerate([(17, 9), (64, 64), (40, 1)]):
        run(length, steps, seed)
    assert compiled == []  # nor any small program around them
    with pytest.raises(AssertionError, match="traced > 1 times"):
        run(65, 4, 0)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [(1, 64), (64, 64), (65, 128), (256, 256), (257, 320), (513, 640), (4097, 5120), (8192, 8192)],
)
def test_buckets(size, bucket):
    assert buckets.bucket(size) == bucket


def test_prompts_in_stripes_equal_forward(params, prompts, greedy):
    """On three devices, which divide no bucket, nor prompts of 9 tokens into six stripes."""
    rules, mesh = jax_mla.sharding.layouts.context_parallel(), jax_mla.make_mesh(sequence=3)
    placed = jax.device_put(params, jax_mla.param_shardings(CONFIG, mesh, rules))
    np.testing.assert_array_equal(run(placed, prompts, rules=rules).tokens, greedy)


def test_rows_that_the_mesh_does_not_divide_are_refused_as_they_were_given(params, prompts):
    rules, mesh = jax_mla.sharding.layouts.ddp(), jax_mla.make_mesh(data=2)
    placed = jax.device_put(params, jax_mla.param_shardings(CONFIG, mesh, rules))
    with pytest.raises(ValueError, match=r"shape \(3, 9\) cannot be split over 2 devices"):
        run(placed, prompts, rules=rules)


def test_works_inside_jit(params, prompts, greedy):
    @jax.jit
    def both(params, tokens, lengths):
        return jax_mla.generate(
            params, CONFIG, tokens, lengths=lengths, max_new_tokens=STEPS, eos_token_ids=()
        ).tokens

    np.testing.assert_array_equal(both(params, *prompts), greedy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 2**31}, "need a cache of 2147483656, positions end at 2147483647"),
        ({"temperature": -1.0}, "temperature must be a number of at least 0, got -1.0"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"temperature": float("nan")}, "temperature must be a number of at least 0, got nan"),
        ({"max_new_tokens": 3.0}, "max_new_tokens must be an integer, got 3.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"min_p": 0.0}, "min_p must be above 0 and at most 1, got 0.0"),
        ({"top_k": math.inf}, "top_k must be an integer of at least 1, got inf"),
        ({"top_k": "x"}, "top_k must be a number, got 'x'"),
        ({"top_p": "x"}, "top_p must be a number, got 'x'"),
        ({"temperature": "1"}, "temperature must be a number, got '1'"),
        ({"key": "x"}, "key must be a jax.random key or a seed from 0 to .*, got 'x'"),
        ({"key": 2**40}, "a seed from 0 to 2.*32 - 1, got 1099511627776"),
        ({"key": 2**70}, "a seed from 0 to 2.*32 - 1, got 1180591620717411303424"),
        ({"key": -1}, "a seed from 0 to 2.*32 - 1, got -1"),
        ({"key": [1, 2]}, "key must be one seed, or 3 for 3 rows, got 2"),
        ({"key": [1, 2, -3]}, "a seed from 0 to 2.*32 - 1, got -3"),
        ({"key": jax.random.split(jax.random.key(0), 2)}, r"3 for 3 rows, got shape \(2,\)"),
        ({"eos_token_ids": (1.5,)}, "eos_token_ids must be integers, got dtype float64"),
        ({"eos_token_ids": {3, 4}}, "eos_token_ids must be integers, got dtype object"),
        ({"eos_token_ids": 2**40}, "eos_token_ids must fit into 32 bits, got 1099511627776"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused(options, message, params, prompts):
    with pytest.raises(ValueError, match=message):
        run(params, prompts, **options)


def test_other_parameters_are_refused_with_what_is_missing(prompts):
    with pytest.raises(ValueError, match=r"parameters are not those of the config:\n  missing"):
        run({}, prompts)


def test_a_traced_temperature_is_refused(params, prompts):
    with pytest.raises(ValueError, match="temperature decides what is compiled: it cannot be"):
        jax.jit(lambda t: run(params, prompts, temperature=t).tokens)(0.5)


def test_prompts_and_lengths_may_be_lists(params, prompts, greedy):
    out = run(params, tuple(x.tolist() for x in prompts))
    np.testing.assert_array_equal(out.tokens, greedy)


def test_top_k_beyond_the_vocabulary_keeps_all(params, prompts):
    options = {"temperature": 1.5, "key": 2**32 - 1}
    all_kept = run(params, prompts, top_k=10**12, **options).tokens
    vocabulary = run(params, prompts, top_k=CONFIG.vocab_size, **options).tokens
    np.testing.assert_array_equal(all_kept, vocabulary)


def test_longrope_generates_up_to_the_original_length(params, prompts):
    scaling = jax_mla.RopeScaling(
        "longrope", 2.0, 12, short_factor=(1.0,) * 8, long_factor=(2.0,) * 8
    )
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    tokens, lengths = prompts
    jax_mla.generate(params, config, tokens, lengths=lengths, max_new_tokens=4)
    with pytest.raises(ValueError, match="=12 tokens, got 13"):
        jax_mla.generate(params, config, tokens, lengths=lengths, max_new_tokens=5)


def test_empty_prompts_are_refused(params, prompts):
    with pytest.raises(ValueError, match="needs at least 1 token, got length 0"):
        jax_mla.generate(
            params, CONFIG, prompts[0], lengths=np.asarray([1, 0, 2]), max_new_tokens=2
        )


def test_too_many_positions_are_refused(params, prompts):
    limit = CONFIG.max_position_embeddings
    message = f"9 tokens and {limit - 8} new ones are more than the {limit} positions"
    with pytest.raises(ValueError, match=message):
        run(params, prompts, max_new_tokens=limit - 8)


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_promotes_no_dtype_silently(options, params, prompts):
    with jax.numpy_dtype_promotion("strict"):
        shape = jax.eval_shape(lambda params: run(params, prompts, **options), params)
    assert (shape.tokens.dtype, shape.lengths.dtype) == ("int32", "int32")


@pytest.fixture(scope="module")
def broken(params, greedy):
    """Parameters that fail once row 0 has written its third token, and only there."""
    token = greedy[0, 2]
    assert (greedy == token).sum() == 1
    table = params["embed_tokens"]["weight"].at[token].set(np.nan)
    return params | {"embed_tokens": {"weight": table}}


@pytest.mark.parametrize("kind", ["loop", "stream"])
def test_logits_that_are_not_finite_are_an_error(kind, broken, prompts, greedy):
    seen = []
    with pytest.raises(FloatingPointError, match="logits of row 0 are not finite at step 3"):
        run(broken, prompts, stream=seen.append if kind == "stream" else None)
    np.testing.assert_array_equal(np.stack(seen or greedy[:, :3].T, axis=1), greedy[:, :3])


def test_where_it_cannot_raise_the_row_ends(broken, prompts, greedy):
    out = jax.jit(lambda params: run(params, prompts))(broken)
    assert out.lengths.tolist() == [3, STEPS, STEPS]
    assert (out.tokens[0, 3:] == CONFIG.pad_token_id).all()
    np.testing.assert_array_equal(out.tokens[0, :3], greedy[0, :3])
    np.testing.assert_array_equal(out.tokens[1:], greedy[1:])


@pytest.mark.parametrize(
    ("row", "lengths", "message"),
    [
        ([258, 258, 5, 6], None, "at the begin of row 1"),
        ([258, 5, 6, 7], [4, 3], "at the begin of row 1"),
        ([5, 6, 258, 258], None, "at the end of row 1"),
    ],
    ids=["left", "left with lengths", "right"],
)
def test_padding_that_is_not_said_to_be_is_refused(row, lengths, message, params):
    tokens = [[1, 2, 3, 4], row]
    message = f"padded on the right and have lengths .* got pad_token_id 258 {message}"
    with pytest.raises(ValueError, match=message):
        jax_mla.generate(params, CONFIG, tokens, max_new_tokens=2, lengths=lengths)


def test_the_pad_token_may_be_a_token(params):
    """Where lengths count it, where it is the first token of all texts, and alone."""
    options = {"max_new_tokens": 2, "eos_token_ids": ()}
    tokens = np.asarray([[258, 1, 2, 258], [3, 4, 258, 258]])
    without = dataclasses.replace(CONFIG, pad_token_id=None)
    first = dataclasses.replace(CONFIG, bos_token_id=258)
    for config, prompts, lengths in (
        (CONFIG, tokens, [4, 2]),
        (CONFIG, tokens[:, :1], None),
        (first, tokens[:1, :3], None),
    ):
        out = jax_mla.generate(params, config, prompts, lengths=lengths, **options)
        want = jax_mla.generate(params, without, prompts, lengths=lengths, **options)
        np.testing.assert_array_equal(out.tokens, want.tokens)
