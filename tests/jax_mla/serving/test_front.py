"""The engine behind asyncio: events arrive, errors too, and whoever leaves frees their pages."""

import asyncio
import contextlib

import jax
import pytest

import jax_mla
from jax_mla.serving import AsyncEngine, Engine


@pytest.fixture(scope="module")
def engine(config):
    params = jax_mla.init(jax.random.key(0), config)
    return Engine(
        params, config, num_pages=16, page_size=16, max_batch=4, chunk_tokens=16, max_tokens=128
    )


async def collect(front, prompt, **arguments):
    seen = {}
    async for number, event in front.stream(prompt, **({"max_new_tokens": 6} | arguments)):
        seen.setdefault(number, []).append(event)
    return seen


def test_many_at_once_write_what_each_would_alone(engine):
    prompts = [[1, 2, 3], [4] * 20, [5, 6], [7] * 40, [8, 9]]
    alone = [r.tokens for r in engine.generate(prompts, max_new_tokens=6)]

    async def main(front):
        return await asyncio.gather(*(collect(front, prompt, n=2) for prompt in prompts))

    with AsyncEngine(engine) as front:
        found = asyncio.run(main(front))
    for want, seen in zip(alone, found, strict=True):
        assert sorted(seen) == [0, 1]
        for events in seen.values():
            assert [event.token for event in events] == want
            assert events[-1].finish_reason in ("length", "stop")
    assert engine.stats.pages_in_use == 0


@pytest.mark.parametrize("way", ["close", "cancel"])
def test_who_leaves_aborts(way, engine):
    async def leave(front):
        async with contextlib.aclosing(front.stream([3] * 30, max_new_tokens=90, n=3)) as events:
            async for _ in events:
                if way == "close":
                    return
                await asyncio.sleep(3600)

    async def main(front):
        task = asyncio.create_task(leave(front))
        while not task.done():
            stats = await front.stats()
            if way == "cancel" and stats.generated_tokens > before:
                task.cancel()
            await asyncio.sleep(0.001)
        while (await front.stats()).pages_in_use:
            await asyncio.sleep(0.001)
        return await front.stats()

    before, aborted = engine.stats.generated_tokens, engine.stats.finished.get("abort", 0)
    with AsyncEngine(engine) as front:
        stats = asyncio.run(main(front))
    assert stats.finished["abort"] - aborted == 3 and stats.running == stats.waiting == 0


def test_what_is_refused_is_raised_where_it_was_asked(engine):
    async def main(front):
        with pytest.raises(ValueError, match="from 0 to 319"):
            await collect(front, [999])
        return await collect(front, [1])

    with AsyncEngine(engine) as front:
        assert len(asyncio.run(main(front))) == 1


def test_an_engine_that_fails_says_so(engine, monkeypatch):
    async def main(front):
        def fail():
            raise FloatingPointError("broken")

        monkeypatch.setattr(engine, "step", fail)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="the engine has failed") as caught:
                await collect(front, [1])
            assert isinstance(caught.value.__cause__, FloatingPointError)

    with AsyncEngine(engine) as front:
        asyncio.run(main(front))
    monkeypatch.undo()
    for request in [*engine.scheduler.running, *engine.scheduler.waiting]:
        engine.abort(request)
