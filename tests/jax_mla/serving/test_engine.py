"""The engine writes what `generate` writes for each request alone, whatever else runs."""

import jax
import numpy as np
import pytest

import jax_mla
from jax_mla.serving import Engine, RequestOptions
from jax_mla.serving.runner import Runner

PAGE, CHUNK = 16, 64
DRAWN = jax_mla.SamplingOptions(temperature=0.9, top_k=30, top_p=0.95, min_p=0.01)


@pytest.fixture(scope="module")
def params(config):
    return jax_mla.init(jax.random.key(0), config)


@pytest.fixture(scope="module")
def engine(params, config):
    """A pool that 8 long requests do not fit into. Shared, because programs compile slowly."""
    return Engine(
        params, config, num_pages=24, page_size=PAGE, max_batch=8, chunk_tokens=CHUNK,
        max_tokens=256, paranoid=True,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def all_pages_come_back(request):
    yield
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        while not engine.is_idle:
            engine.step()
        assert engine.stats.pages_in_use == 0
        assert engine.stats.recompiles == 0


@pytest.fixture(scope="module")
def alone(params, config):
    """Continuations by `generate`, one at a time, cut at their end."""

    def continuation(prompt, max_new_tokens, sampling=None, seed=0, eos=None):
        sampling = vars(sampling or jax_mla.SamplingOptions())
        tokens = np.zeros((1, 256), np.int32)
        tokens[0, : len(prompt)] = prompt
        out = jax_mla.generate(
            params, config, tokens, lengths=np.asarray([len(prompt)]), max_new_tokens=64,
            key=[seed], eos_token_ids=eos, **sampling,
        )  # fmt: skip
        return np.asarray(out.tokens[0, : min(int(out.lengths[0]), max_new_tokens)]).tolist()

    return continuation


def prompts(rng, count, longest=190):
    return [rng.integers(0, 256, rng.integers(1, longest)).tolist() for _ in range(count)]


def test_random_arrivals_under_preemption(engine, alone, rng):
    before = engine.stats
    waiting, running = prompts(rng, 24), []
    while waiting or not engine.is_idle:
        if waiting and rng.random() < 0.3:
            seed = len(waiting)
            sampling = DRAWN if seed % 2 else None
            options = RequestOptions(seed=seed)
            arguments = {"max_new_tokens": int(rng.integers(1, 60)), "options": options}
            running.append(engine.submit(waiting.pop(), sampling, **arguments))
        engine.step()
    assert engine.stats.preemptions > before.preemptions
    for r in running:
        want = alone(list(r.prompt), r.max_new_tokens, r.sampling, r.options.seed)
        assert r.tokens == want
        assert r.finish_reason == ("stop" if len(want) < r.max_new_tokens else "length")


def test_generate(engine, alone, rng):
    given = prompts(rng, 5)
    got = engine.generate(given, DRAWN, max_new_tokens=9, seeds=[3, 1, 4, 1, 5])
    assert [r.tokens for r in got] == [
        alone(p, 9, DRAWN, s) for p, s in zip(given, [3, 1, 4, 1, 5], strict=True)
    ]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 20, 63, 64, 65, 128, 129, 190])
def test_hit_equals_miss(length, engine, alone, rng):
    prompt = rng.integers(0, 256, length).tolist()
    (miss,) = engine.generate([prompt], max_new_tokens=4)
    before = engine.stats
    (hit,) = engine.generate([prompt], max_new_tokens=4)
    assert miss.tokens == hit.tokens == alone(prompt, 4)
    computed = engine.stats.computed_tokens - before.computed_tokens
    full = (length + 3) // PAGE * PAGE  # tokens in full pages; of the prompt the last is computed
    assert computed == length - min(length - 1, full) + 3


def test_a_partial_match_is_copied(engine, alone, rng):
    first = rng.integers(0, 256, 112).tolist()
    second = first[:100] + rng.integers(0, 256, 60).tolist()
    second[100] = (first[100] + 1) % 256
    engine.generate([first], max_new_tokens=1)
    before = engine.stats
    (got,) = engine.generate([second], max_new_tokens=5)
    assert engine.stats.computed_tokens - before.computed_tokens == 60 + 4
    assert got.tokens == alone(second, 5)


def test_forks(engine, alone, rng):
    prompt = rng.integers(0, 256, 100).tolist()
    before = engine.stats
    options = RequestOptions(seed=2**32 - 2)
    forks = engine.submit_many(prompt, DRAWN, n=4, max_new_tokens=8, options=options)
    list(engine.run())
    assert engine.stats.page_copies - before.page_copies == 3
    assert engine.stats.computed_tokens - before.computed_tokens <= 100 + 3 + 4 * 7
    for fork, seed in zip(forks, (2**32 - 2, 2**32 - 1, 0, 1), strict=True):
        assert fork.tokens == alone(prompt, 8, DRAWN, seed)


def test_events_tell_the_tokens(engine, rng):
    given = prompts(rng, 3)
    options = RequestOptions(stop_token_ids=())
    requests = [engine.submit(p, max_new_tokens=6, options=options) for p in given]
    seen = {r: [] for r in requests}
    for event in engine.run():
        seen[event.request].append(event)
    for r in requests:
        assert [e.token for e in seen[r]] == r.tokens
        assert [e.finish_reason for e in seen[r]] == [None] * 5 + ["length"]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 9])
def test_abort_frees_pages(steps, engine, rng):
    requests = [engine.submit(p, max_new_tokens=30) for p in prompts(rng, 6)]
    for _ in range(steps):
        engine.step()
    for r in requests:
        engine.abort(r)
    while not engine.is_idle:
        engine.step()
    assert engine.stats.pages_in_use == 0
    assert all(r.finish_reason in ("abort", "length") for r in requests)


def test_stop_ids_and_min_tokens(engine, alone, rng):
    prompt = rng.integers(0, 256, 20).tolist()
    want = alone(prompt, 8, eos=())
    stop = want[2]
    end = want.index(stop)
    options = RequestOptions(stop_token_ids=(stop,))
    (got,) = engine.generate([prompt], max_new_tokens=8, options=options)
    assert (got.tokens, got.finish_reason) == (want[: end + 1], "stop")
    options = RequestOptions(stop_token_ids=(stop,), min_tokens=8)
    (held,) = engine.generate([prompt], max_new_tokens=8, options=options)
    assert stop not in held.tokens and held.finish_reason == "length"


def naive(params, config, prompt, num_tokens, change):
    """Greedy tokens and log probabilities through `forward`, with `change` of the logits."""
    ids, logprobs = list(prompt), []
    for _ in range(num_tokens):
        tokens = np.zeros((1, 64), np.int32)
        tokens[0, : len(ids)] = ids
        logits = np.asarray(jax_mla.forward(params, config, tokens))[0, len(ids) - 1]
        token = int(np.argmax(change(logits.copy(), ids)))
        logprobs.append(np.asarray(jax.nn.log_softmax(logits))[[token, *np.argsort(-logits)[:3]]])
        ids.append(token)
    return ids[len(prompt) :], np.asarray(logprobs)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"logit_bias": {7: 3.0, 9: -np.inf}},
        {"repetition_penalty": 0.6, "presence_penalty": -0.3, "logit_bias": {3: 1.0}},
    ],
    ids=lambda options: "+".join(options),
)
def test_penalties_biases_and_logprobs(options, engine, params, config, rng):
    """Beside others that have none, and with tokens that are written before they are read."""
    prompt = rng.integers(0, 256, 20).tolist()
    o = RequestOptions(logprobs=3, stop_token_ids=(), **options)

    def change(logits, ids):
        written = np.bincount(ids[len(prompt) :], minlength=len(logits))
        seen = np.isin(np.arange(len(logits)), ids)
        r = o.repetition_penalty
        logits = np.where(seen, np.where(logits > 0, logits / r, logits * r), logits)
        logits -= o.presence_penalty * (written > 0) + o.frequency_penalty * written
        for token, bias in o.logit_bias.items():
            logits[token] += bias
        return logits

    others = [engine.submit(p, max_new_tokens=12) for p in prompts(rng, 3)]
    got = engine.submit(prompt, max_new_tokens=10, options=o)
    list(engine.run())
    tokens, logprobs = naive(params, config, prompt, 10, change)
    assert got.tokens == tokens
    found = [[x.logprob, *(p for _, p in x.top)] for x in got.logprobs]
    np.testing.assert_allclose(found, logprobs, atol=2e-5)
    assert all(r.finish_reason for r in others)


def test_a_timeout_ends_a_request(engine, rng):
    options = RequestOptions(timeout_s=1e-9)
    r = engine.submit(rng.integers(0, 256, 5).tolist(), max_new_tokens=9, options=options)
    events = list(engine.run())
    assert r.finish_reason == "timeout" and [e.finish_reason for e in events] == ["timeout"]


def test_logits_that_are_not_finite_end_their_request(params, config):
    broken = dict(params, norm={"weight": params["norm"]["weight"] * np.nan})
    sizes = {"num_pages": 8, "page_size": PAGE, "max_batch": 2, "chunk_tokens": 16}
    e = Engine(broken, config, **sizes, max_tokens=64)
    requests = e.generate([[1, 2], [3]], max_new_tokens=3)
    assert [(r.tokens, r.finish_reason) for r in requests] == [([], "error")] * 2
    with pytest.raises(FloatingPointError, match="token 0 of request 0 are not finite"):
        Engine(broken, config, **sizes, max_tokens=64, paranoid=True).generate(
            [[1, 2]], max_new_tokens=3
        )


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        ([], {}, "at least 1 token"),
        ([1, 320], {}, "prompt: token ids must be from 0 to 319, the vocabulary, got 320"),
        ([True], {}, "prompt: token ids must be .* got True"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ([1] * 250, {"max_new_tokens": 7}, "250 tokens and 7 new ones must be at most 256"),
        ([1], {"options": RequestOptions(logit_bias={999: 1.0})}, "logit_bias: .* got 999"),
        ([1], {"options": RequestOptions(stop_token_ids=(-1,))}, "stop: .* got -1"),
    ],
)
def test_refused_at_submission(prompt, arguments, message, engine):
    with pytest.raises(ValueError, match=message):
        engine.submit(prompt, **({"max_new_tokens": 1} | arguments))
    with pytest.raises(ValueError, match=message):
        engine.generate([[1], prompt], **({"max_new_tokens": 1} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 10**6}, "max_tokens must be at most 4096, .* got 1000000"),
        ({"num_pages": 0}, "num_pages must be an integer of at least 1, got 0"),
        ({"on_recompile": "warn"}, "on_recompile must be one of"),
        ({"deterministic": True, "chunk_tokens": 100}, "multiple of page_size=64"),
    ],
)
def test_refused_at_start(arguments, message, params, config):
    with pytest.raises(ValueError, match=message):
        Engine(params, config, **arguments)


def test_capacity_in_words(engine):
    assert engine.capacity == "24 pages of 16 tokens = 384 tokens: 1 sequences of 256"


def test_warm_up_compiles_everything(params, config, rng):
    e = Engine(
        params, config, num_pages=20, page_size=PAGE, max_batch=2, chunk_tokens=32, max_tokens=128,
        on_recompile="error",
    )  # fmt: skip
    seen, event = [], "/jax/core/compile/backend_compile_duration"

    def listen(name, _, **kwargs):
        seen.extend([name] * (name == event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert e.warm_up() == 16 and seen
        seen.clear()
        options = [None, RequestOptions(logprobs=2, presence_penalty=1.0)]
        for step in range(60):
            if step % 4 == 0:
                prompt = rng.integers(0, 256, rng.integers(1, 90)).tolist()
                e.submit(
                    prompt,
                    DRAWN if step % 8 else None,
                    max_new_tokens=5,
                    options=options[step % 3 % 2],
                )
            e.step()
        list(e.run())
        assert seen == [] and e.stats.recompiles == 0 and e.stats.pages_in_use == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_program_that_warm_up_missed_is_an_error(params, config, monkeypatch):
    monkeypatch.setattr(Runner, "programs", lambda runner: [])
    e = Engine(params, config, num_pages=8, max_batch=1, chunk_tokens=16, on_recompile="error")
    assert e.warm_up() == 0
    with pytest.raises(RuntimeError, match="was not compiled by warm_up"):
        e.generate([[1]], max_new_tokens=1)


@pytest.mark.parametrize("axes", [{"tensor": 2}, {"expert": 2}], ids=lambda axes: "+".join(axes))
def test_on_a_mesh(axes, params, config, alone, rng):
    mesh, rules = jax_mla.make_mesh(**axes), jax_mla.ShardingRules()
    sharded = jax.device_put(params, jax_mla.param_shardings(config, mesh, rules))
    e = Engine(
        sharded, config, num_pages=14, page_size=PAGE, max_batch=2, chunk_tokens=32, max_tokens=128,
        rules=rules, paranoid=True,
    )  # fmt: skip
    given = prompts(rng, 4, longest=90)
    for prompt, got in zip(given, e.generate(given, DRAWN, max_new_tokens=20), strict=True):
        assert got.tokens == alone(list(got.prompt), 20, DRAWN, got.options.seed), len(prompt)
    assert e.stats.pages_in_use == 0


def test_a_mesh_that_shards_sequences_is_refused(params, config):
    mesh = jax_mla.make_mesh(data=2)
    sharded = jax.device_put(params, jax_mla.param_shardings(config, mesh))
    with pytest.raises(ValueError, match="must not shard 'batch', the rules shard it over"):
        Engine(sharded, config, num_pages=8)
